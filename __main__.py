"""The `nemodiff` command, which is `python -m nemodiff` too.

It imports nothing new before it can be interrupted. Ctrl-C, SIGTERM and SIGHUP end it alike: without a word, with a
shell's exit code for the signal, and with nothing half-written.
"""

import os
import sys
from types import FrameType

_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")


def main() -> None:
    """Run the command of `sys.argv` and exit."""
    came: list[int] = []
    code: object = None
    try:
        import signal

        def interrupt(number: int, frame: FrameType | None) -> None:
            if _imports(frame):
                if os.isatty(2):  # whose line has the ^C
                    os.write(2, b"\n")
                os._exit(128 + number)
            again = number in came
            came.append(number)
            if not again or number == signal.SIGINT:  # a terminal that closes sends SIGHUP twice
                raise KeyboardInterrupt(number)

        heard = [getattr(signal, name) for name in _SIGNALS if hasattr(signal, name)]  # Windows has no SIGHUP
        heard = [one for one in heard if signal.getsignal(one) in (signal.SIG_DFL, signal.default_int_handler)]  # nohup
        for one in heard:
            signal.signal(one, interrupt)
        from .cli import main as command

        try:
            command()
        finally:
            for one in heard:  # one more would interrupt Python's own end with a traceback
                signal.signal(one, signal.SIG_DFL)
    except SystemExit as end:
        if not came:
            raise
        code = end.code
    except BaseException:
        if not came:
            raise
    if came:
        import atexit
        import contextlib

        atexit._run_exitfuncs()
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        # Python's own end is left out: threads of native libraries may not survive it.
        os._exit(code if isinstance(code, int) else 128 + came[0])


def _imports(frame: FrameType | None) -> bool:
    """Whether an import is under way; an exception in the midst of a native library's may abort the process."""
    while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    return frame is not None


if __name__ == "__main__":
    main()

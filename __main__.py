"""The `nemodiff` command, which is `python -m nemodiff` too.

It imports nothing before it can be interrupted: Ctrl-C ends it without a word, with a shell's exit code for that.
"""

import sys

_INTERRUPTED = 128 + 2  # SIGINT


def main() -> None:
    """Run the command of `sys.argv` and exit."""
    came = []
    try:
        import signal

        def interrupt(number: int, _frame: object) -> None:
            came.append(number)
            raise KeyboardInterrupt

        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, interrupt)
        from .cli import main as command

        try:
            command(obj=came)  # what one_line_errors is told of interrupts
        finally:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # one more would interrupt Python's own end with a traceback
    except KeyboardInterrupt:
        sys.exit(_INTERRUPTED)
    except Exception:
        if came:  # a library that was interrupted while it was imported may say that it failed
            sys.exit(_INTERRUPTED)
        raise


if __name__ == "__main__":
    main()

"""The `nemodiff` command, which is `python -m nemodiff` too.

It imports nothing before it can be interrupted: Ctrl-C ends it without a word, with a shell's exit code for that.
"""

import sys


def main() -> None:
    """Run the command of `sys.argv` and exit."""
    try:
        import signal

        from .cli import main as command

        try:
            command()
        finally:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # one more would interrupt Python's own end with a traceback
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()

"""What a command does about a problem that its user can cause: one line, and an exit code as shells have it."""

from __future__ import annotations

import contextlib
import errno
import signal
import sys
import traceback
from collections.abc import Iterator

import click

from ..errors import NemodiffError
from .answers import one_line
from .streams import abandon_streams

_UNREAD = 128 + 13  # SIGPIPE
_OUTPUT = "standard output"


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turns every problem that a user can cause into click's line and exit code.

    A KeyboardInterrupt has the number of its signal, if it is of another than SIGINT (`__main__.py`).
    """
    try:
        yield
    except NemodiffError as error:
        raise click.ClickException(one_line(str(error))) from None
    except OSError as error:
        abandon_streams()
        unread = error.errno == errno.EINVAL and _nameless(error) == _OUTPUT  # as Windows says it
        if error.errno == errno.EPIPE or unread:
            raise click.exceptions.Exit(_UNREAD) from None
        text = f"{error.filename or _nameless(error)}: {error.strerror or error}; check the path and its disk"
        raise click.ClickException(one_line(text)) from None
    except MemoryError:
        raise click.ClickException("out of memory; see what would fit: nemodiff build --dry-run") from None
    except KeyboardInterrupt as interrupt:
        if sys.stderr.isatty():
            click.echo(err=True)  # leaves the line on which the interrupt was typed
        raise click.exceptions.Exit(128 + (*interrupt.args, signal.SIGINT)[0]) from None


def _nameless(error: OSError) -> str:
    """What an error is about that names no file."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    if frames[-1].f_code is click.echo.__code__:
        return _OUTPUT
    return "the current folder" if error.errno == errno.ENOENT else "input/output"

"""The `nemodiff` command.

Standard output carries answers only; progress, statistics and errors go to standard error. A user's mistake is one
line and exit code 1, or 2 for a wrong flag; Ctrl-C is 130, and a reader of the output that has enough is 141, as shells
have it. Flags may be spelled with underscores too (`--max_batch_size`).
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import traceback
from collections.abc import Iterator
from typing import Any

import click

from .commands.answers import one_line
from .commands.batch import batch
from .commands.bench import bench
from .commands.build import build, export
from .commands.chat import chat
from .commands.doctor import doctor
from .commands.edit import infill, revise
from .commands.eval import evaluate
from .commands.inspect import inspect
from .commands.run import run
from .commands.serve import serve
from .commands.streams import abandon_streams, settle_streams
from .commands.trace import trace
from .commands.triton import triton
from .commands.verify import verify
from .contract import MODES, QUANTIZATIONS
from .errors import NemodiffError
from .runtime.sampling.policies import POLICIES

_INTERRUPTED = 128 + 2  # SIGINT
_UNREAD = 128 + 13  # SIGPIPE


class _Group(click.Group):
    """Turns every problem that a user can cause into one line."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        settle_streams()  # before the first word is printed
        return super().main(*args, **kwargs)

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        """See click.Command. The flags of the group itself are followed here, and print."""
        with _one_line():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        """See click.Command."""
        with _one_line():
            return super().invoke(ctx)


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    try:
        yield
    except NemodiffError as error:
        raise click.ClickException(one_line(str(error))) from None
    except OSError as error:
        abandon_streams()
        if error.errno == errno.EPIPE:
            raise click.exceptions.Exit(_UNREAD) from None
        text = f"{error.filename or _nameless(error)}: {error.strerror or error}; check the path and its disk"
        raise click.ClickException(one_line(text)) from None
    except MemoryError:
        raise click.ClickException("out of memory; see what would fit: nemodiff build --dry-run") from None
    except KeyboardInterrupt:
        _end_line()
        raise click.exceptions.Exit(_INTERRUPTED) from None


def _nameless(error: OSError) -> str:
    """What an error is about that names no file."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    if frames[-1].f_code is click.echo.__code__:
        return "standard output"
    return "the current folder" if error.errno == errno.ENOENT else "input/output"


def _end_line() -> None:
    """Leave the line of a terminal on which the interrupt was typed."""
    if sys.stderr.isatty():
        click.echo(err=True)


def _normalize(token: str) -> str:
    """A flag with hyphens; values of a choice pass through here too and keep their underscores."""
    return token if token in (*MODES, *POLICIES, *QUANTIZATIONS) else token.replace("_", "-")


@click.group(
    cls=_Group,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": _normalize,
        "max_content_width": 100,
    },
)
@click.version_option(package_name="nemodiff")
@click.pass_context
def main(ctx: click.Context) -> None:
    """Build tri-mode language models into engines and decode with them in every mode."""
    if os.environ.get("NO_COLOR"):  # no-color.org; click itself does not look at it
        ctx.color = False


for command in (
    build,
    export,
    inspect,
    verify,
    bench,
    run,
    chat,
    batch,
    infill,
    revise,
    serve,
    trace,
    triton,
    doctor,
    evaluate,
):
    main.add_command(command)

"""The `nemodiff` command.

Standard output carries answers only; progress, statistics and errors go to standard error. A user's mistake is one
line and exit code 1, or 2 for a wrong flag; Ctrl-C is 130, and a reader of the output that has enough is 141, as shells
have it. Flags may be spelled with underscores too (`--max_batch_size`).
"""

from __future__ import annotations

import os
from typing import Any

import click

from .commands.batch import batch
from .commands.bench import bench
from .commands.build import build, export
from .commands.chat import chat
from .commands.doctor import doctor
from .commands.edit import infill, revise
from .commands.eval import evaluate
from .commands.failures import one_line_errors
from .commands.inspect import inspect
from .commands.run import run
from .commands.serve import serve
from .commands.streams import set_up_streams
from .commands.trace import trace
from .commands.triton import triton
from .commands.tune import tune
from .commands.verify import verify
from .contract import MODES, QUANTIZATIONS
from .runtime.sampling.policies import POLICIES
from .version import __version__


class _Group(click.Group):
    """Turns every problem that a user can cause into one line."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        set_up_streams()  # before the first word is printed
        return super().main(*args, **kwargs)

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        """See click.Command. The flags of the group itself are followed here, and print."""
        with one_line_errors():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        """See click.Command."""
        with one_line_errors():
            return super().invoke(ctx)


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
@click.version_option(__version__)
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
    tune,
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

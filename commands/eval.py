"""`nemodiff eval`: lm-eval's tasks over an engine, in every mode."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from ..contract import MODES
from ..errors import install
from . import options

# Of a request: what a task leaves to whoever evaluates. The rest is the task's to say.
_CHOICES = (
    "block_length", "groups", "threshold", "seed", "thinking", "thinking_budget", "policy", "per_step",
    "entropy_bound", "block_steps", "merge_commit",
)  # fmt: skip


@click.command(
    name="eval", cls=options.RequestCommand, kept=_CHOICES, short_help="Evaluate ENGINE with lm-eval, in every mode."
)
@options.engine
@click.option(
    "--tasks",
    required=True,
    metavar="NAME|FILE,...",
    help="Run these tasks of lm-eval: names, task files (YAML) or folders of them, with commas between.",
)
@click.option(
    "--mode",
    "modes",
    type=click.Choice(MODES),
    multiple=True,
    help="Generate in this mode; may be repeated. [default: all of them]",
)
@click.option("--limit", type=click.IntRange(1), help="Ask this many questions of each task. [default: all]")
@click.option(
    "--num-fewshot", type=click.IntRange(0), help="Put this many examples before each question. [default: the task's]"
)
@click.option("--apply-chat-template", is_flag=True, help="Put every question through the engine's chat template.")
@click.option("--batch-size", type=int, default=1, show_default=True, help="Run this many requests at the same time.")
@options.threads
@options.device
@options.json_output("Print one JSON object instead of the table.")
def evaluate(
    engine: Path,
    tasks: str,
    modes: tuple[str, ...],
    limit: int | None,
    num_fewshot: int | None,
    apply_chat_template: bool,
    batch_size: int,
    threads: int | None,
    device: str | None,
    as_json: bool,
    **choices: Any,
) -> None:
    """Evaluate ENGINE with tasks of lm-eval: their metrics, and the tokens per pass, in every mode.

    Log-likelihoods are causal and the same in every mode. Data come from where a task says: files, or a hub.
    """
    try:
        from ..evaluation.evaluate import OF_DIFFUSION
        from ..evaluation.evaluate import evaluate as run
    except ModuleNotFoundError as error:
        raise click.ClickException(f"{error.name} is missing; install it: {install('nemodiff[eval]')}") from None
    from ..evaluation.table import table
    from ..runtime.loading import load

    ctx = click.get_current_context()
    if choices["thinking"] and not apply_chat_template:
        raise click.UsageError("--thinking needs the chat template; give --apply-chat-template too")
    if modes:
        unused: tuple[str, ...] = options.UNUSED_IN_AR if {*modes} == {"ar"} else ()
        unused += OF_DIFFUSION if "diffusion" not in modes else ()
        where = f"mode {' and '.join(dict.fromkeys(modes))}"
        options.warn_unused(ctx, unused, where)
    evaluation = run(
        load(engine, threads=threads, device=device),
        [task for task in tasks.split(",") if task],
        modes or MODES,
        rows=batch_size,
        limit=limit,
        num_fewshot=num_fewshot,
        chat=apply_chat_template,
        options={name: value for name, value in choices.items() if options.given(ctx, name)},
    )
    click.echo(json.dumps(evaluation, indent=2) if as_json else "\n".join(table(evaluation)))

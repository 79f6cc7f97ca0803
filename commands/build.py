"""`nemodiff build` and `nemodiff export`: a checkpoint becomes an engine folder or a plain checkpoint."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import click

from ..contract import (
    BACKEND_DTYPES,
    COMPILED,
    DEFAULT_MAX_BATCH_SIZE,
    DEFAULT_MAX_SEQ_LEN,
    EXPORT_FORMATS,
    GROUP_SIZE,
    GROUP_SIZES,
    ITEMSIZE,
    KV_CACHE_DTYPES,
    MAX_BATCH,
    MAX_BLOCK,
    MLP_GROUP_SIZE,
    PREFILL_CHUNK,
    QUANTIZATIONS,
)
from ..engine_folder import TOKENIZER_CONFIG_FILE, quoted
from .answers import one_line
from .options import PATH, json_output


@click.command()
@click.argument("checkpoint")
@click.option("-o", "--output", type=PATH, required=True, help="Write the engine to this folder.")
@click.option(
    "--backend",
    type=click.Choice(list(BACKEND_DTYPES)),
    default="onnxruntime",
    show_default=True,
    help="Build the engine for this runtime.",
)
@click.option(
    "--dtype",
    type=click.Choice(list(ITEMSIZE)),
    help="Store the weights and the KV cache as this type. [default: f32 on onnxruntime, else bf16]",
)
@click.option(
    "--max-seq-len",
    type=click.IntRange(1),
    help="Allow this many tokens per request, prompt and answer together. "
    f"[default: {DEFAULT_MAX_SEQ_LEN} or the model's limit]",
)
@click.option(
    "--max-batch-size",
    type=int,
    default=DEFAULT_MAX_BATCH_SIZE,
    show_default=True,
    help=f"Allow this many requests to share one forward pass, 1 to {MAX_BATCH}.",
)
@click.option(
    "--block-length",
    type=click.IntRange(1),
    help=f"Set the engine's default block length, 1 to {MAX_BLOCK} tokens. [default: the checkpoint's]",
)
@click.option(
    "--adapter",
    type=PATH,
    help="Take the drafter adapter from this folder. [default: the checkpoint's linear_spec_lora]",
)
@click.option(
    "--max-input-len",
    type=int,
    help=f"Allow this many tokens in one prefill pass; for the TensorRT backends. "
    f"[default: {PREFILL_CHUNK}, or --max-seq-len if less]",
)
@click.option(
    "--quantization",
    type=click.Choice(list(QUANTIZATIONS)),
    help="Quantize the projections: int8 and int4 for onnxruntime, torch and tensorrt-rtx; fp8, or fp8_dynamic "
    "with inputs in 8 bits too, for torch.",
)
@click.option(
    "--group-size",
    type=click.Choice(list(map(str, GROUP_SIZES))),
    callback=lambda ctx, param, value: None if value is None else int(value),
    help="Let this many inputs of an int4 weight share a scale. [default: the checkpoint's if it is quantized so, else "
    f"{GROUP_SIZE}, and {MLP_GROUP_SIZE} in the MLPs]",
)
@click.option(
    "--kv-cache-dtype",
    type=click.Choice(list(KV_CACHE_DTYPES)),
    default="auto",
    show_default=True,
    help="Keep K and V in this type, auto for that of --dtype; int8 for onnxruntime and torch, fp8 for torch.",
)
@click.option(
    "--logits/--no-logits",
    default=True,
    help="Keep or leave out the logits that sampling needs; for the TensorRT backends. [default: keep them]",
)
@click.option(
    "--fix-mistral-regex",
    is_flag=True,
    help="Give the engine the right pattern where tokenizer.json has the wrong one; the plan says whether it does.",
)
@click.option(
    "--max-image-size",
    type=int,
    metavar="PIXELS",
    help="Scale larger images down to this many pixels a side; for a model that sees images. [default: 1400 or what it "
    "was trained on]",
)
@click.option(
    "--sm",
    help="Compile for these compute capabilities, with commas between; for tensorrt-rtx. [default: 80,86,89,120]",
)
@click.option(
    "--plugins",
    is_flag=True,
    help="Use nemodiff's own kernels in place of TensorRT's layers; for the TensorRT backends.",
)
@click.option("--timing-cache", type=PATH, help="Keep measured kernel timings in this file; for tensorrt.")
@click.option(
    "--workspace",
    type=int,
    metavar="MIB",
    help="Limit the scratch memory of a layer to this many MiB; for the TensorRT backends. [default: no limit]",
)
@click.option(
    "--opt-level",
    type=int,
    help="Spend this much effort on optimizing, 0 (fast build) to 5 (fast engine); for the TensorRT backends. "
    "[default: TensorRT's]",
)
@click.option(
    "--strip-weights",
    is_flag=True,
    help="Compile without the weights and put them in when the engine is loaded; for the TensorRT backends.",
)
@click.option(
    "--refit",
    is_flag=True,
    help="Make an engine whose weights can be replaced later; for the TensorRT backends.",
)
@click.option(
    "--version-compatible",
    is_flag=True,
    help="Make an engine that later TensorRT versions can run too; for tensorrt.",
)
@click.option("--dry-run", is_flag=True, help="Print what would be built and whether it fits, without writing it.")
@json_output("Print the plan of --dry-run as one JSON object.")
def build(checkpoint: str, output: Path, dry_run: bool, as_json: bool, sm: str | None, **options: Any) -> None:
    """Build an engine folder from CHECKPOINT.

    CHECKPOINT is a folder with config.json and safetensors files, or a Hugging Face id such as
    nvidia/Nemotron-Labs-Diffusion-8B, optionally with @REVISION.
    """
    from ..builder.build import Builder
    from ..builder.compilers.choices import Choices

    if as_json and not dry_run:
        raise click.UsageError("--json goes with --dry-run; the build itself prints nothing but its progress")
    compiled = {field.name: options.pop(field.name) for field in dataclasses.fields(Choices) if field.name != "sm"}
    choices = Choices(sm=_parse_sms(sm), **compiled)
    builder = Builder(checkpoint, output, headers_only=dry_run, choices=choices, **options)
    plan = builder.plan()
    warning = _template_warning(builder.source.folder)
    if warning is not None:
        click.echo(warning, err=True)
    if dry_run:
        click.echo(json.dumps(plan.as_dict(), indent=2) if as_json else "\n".join(plan.lines(checkpoint, output)))
        return
    for line in plan.lines(checkpoint, output):
        click.echo(line, err=True)
    with _progress(plan.weight_bytes) as bar:
        builder.run(bar.update)
    where = "where such a GPU is" if builder.backend in COMPILED else "try"
    raw = "" if warning is None else " --raw"
    click.echo(f'built        {output}; {where}: nemodiff run {quoted(output)} -p "Hello"{raw}', err=True)


def _template_warning(folder: Path) -> str | None:
    """A line if the engine will have no chat template that works; it can complete plain text all the same."""
    from ..runtime.text.chat_template import ChatTemplate

    config = folder / TOKENIZER_CONFIG_FILE
    template = ChatTemplate(folder, json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {})
    problem = template.try_out()
    return None if problem is None else f"warning      {one_line(problem)}; without it only --raw prompts work"


def _parse_sms(text: str | None) -> tuple[int, ...] | None:
    """`80,8.9` -> (80, 89)."""
    if text is None:
        return None
    parts = [part.strip().removeprefix("sm_").replace(".", "") for part in text.split(",")]
    if not all(part.isdecimal() and part.isascii() for part in parts):
        raise click.UsageError(f"--sm is {text!r}; give compute capabilities like 80,86,89")
    return tuple(map(int, parts))


@click.command()
@click.argument("checkpoint")
@click.option("-o", "--output", type=PATH, required=True, help="Write the checkpoint to this folder.")
@click.option(
    "--format",
    "layout",
    type=click.Choice(EXPORT_FORMATS),
    default=EXPORT_FORMATS[0],
    show_default=True,
    help="Write the folder in this layout.",
)
@click.option("--dry-run", is_flag=True, help="Print what would be written, without writing it.")
def export(checkpoint: str, output: Path, layout: str, dry_run: bool) -> None:
    """Write the autoregressive twin of CHECKPOINT for other engines.

    CHECKPOINT is a folder or a Hugging Face id, as for build. The twin is a plain Ministral-3 folder with the same
    weights, bit for bit; it decodes as mode ar does.
    """
    from ..builder.export import Exporter

    exporter = Exporter(checkpoint, output, layout=layout, headers_only=dry_run)
    plan = exporter.plan()
    for line in plan.lines(checkpoint, output):
        click.echo(line, err=not dry_run)
    if dry_run:
        return
    with _progress(plan.weight_bytes) as bar:
        exporter.run(bar.update)
    click.echo(f"exported     {output}; load it with transformers' AutoModelForCausalLM.from_pretrained", err=True)


def _progress(total: int) -> Any:
    """A bar of the bytes written, on standard error."""
    from tqdm import tqdm

    return tqdm(total=total, unit="B", unit_scale=True, desc="writing", disable=None, file=sys.stderr)

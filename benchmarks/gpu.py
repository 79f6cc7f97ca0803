"""The GPU path measured in one command: torch engine, kernels, graphs and loops, and transformers beside them.

    python benchmarks/gpu.py --plan              what would run, with bytes and minutes; needs no GPU
    python benchmarks/gpu.py --minutes 9         the most important figures first; again to go on where it stopped
    python benchmarks/gpu.py --device cpu        the same code at tiny sizes; its figures mean nothing

In: nothing but a card. Out: `gpu.json`, written every few seconds, so a run that is cut short loses nothing and the
next one on a card of the same name measures what is missing; at the end `gpu.md` and `gpu.png`. The surprising fact:
what a figure is compared with, the copy and the matrix ceiling, is measured anew in every run: cards of a name differ.
"""

from __future__ import annotations

import argparse
import collections
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

try:
    from common import (
        checkout,  # noqa: F401  (makes an uninstalled checkout importable)
        record,
    )
    from gpu import forward as gpu_forward
    from gpu import kernels as gpu_kernels
    from gpu import modes as gpu_modes
    from gpu import peers as gpu_peers
    from gpu import plan as gpu_plan
    from gpu import report as gpu_report
    from gpu import tensorrt as gpu_tensorrt
    from gpu.card import Card
    from gpu.plan import Asked, Cell, Lab

    from nemodiff.errors import NemodiffError
except ModuleNotFoundError as error:
    raise SystemExit(f"nothing measured: the package {error.name} is missing; pip install {error.name}") from None

PACKAGES = ("nemodiff", "numpy", "torch", "triton", "transformers")
SECTIONS = ("forward", "kernels", "decode", "variants", "modes", "peers", "tensorrt")
SAVE_SECONDS = 5.0  # between two writes of the report


def cells(asked: Asked) -> Iterator[Cell]:
    """Everything there is to measure, the most important first: a size at a time, many rows and other peers later."""
    few, many = asked.scale.rows[:1], asked.scale.rows[1:]
    for shape in asked.shapes[:1]:
        yield from gpu_forward.cells(asked, shape, few)
        yield from gpu_forward.variant_cells(asked, shape)
        yield from gpu_modes.decode_cells(asked, shape)
        yield from gpu_kernels.cells(asked, shape)
        yield from gpu_modes.answer_cells(asked)
        yield from gpu_peers.cells(asked, shape, compiled=False)
        yield from gpu_forward.cells(asked, shape, many)
        yield from gpu_peers.cells(asked, shape, compiled=True)
    for shape in asked.shapes[1:]:
        yield from gpu_forward.cells(asked, shape, few)
        yield from gpu_modes.decode_cells(asked, shape)
        yield from gpu_kernels.cells(asked, shape)
        yield from gpu_forward.variant_cells(asked, shape)
    for shape in asked.shapes[1:]:
        yield from gpu_forward.cells(asked, shape, many)
        yield from gpu_peers.cells(asked, shape, compiled=False)
        yield from gpu_peers.cells(asked, shape, compiled=True)
    yield from gpu_tensorrt.cells(asked)


def print_plan(todo: list[Cell], memory: int, minutes: float) -> None:
    """What would run, by section and shape."""
    groups: dict[tuple[str, str], list[Cell]] = collections.defaultdict(list)
    for cell in todo:
        groups[cell.section, cell.shape].append(cell)
    print(f"{'section':<10} {'shape':<10} {'figures':>7} {'too large':>9} {'GiB at most':>11} {'minutes':>8}")
    total = 0.0
    for (section, shape), found in groups.items():
        fit = [cell for cell in found if cell.nbytes <= memory]
        spent, peak = sum(c.seconds for c in fit) / 60, max((c.nbytes for c in fit), default=0) / 2**30
        total += spent
        print(f"{section:<10} {shape:<10} {len(found):>7} {len(found) - len(fit):>9} {peak:>11.1f} {spent:>8.1f}")
    print(f"about {total:.0f} minutes on an H100 with {memory / 2**30:.0f} GiB, {-(-total // minutes):.0f} calls of "
          f"--minutes {minutes:g}; estimates, not measured")  # fmt: skip


def measured(cell: Cell, lab: Lab, left: float) -> dict[str, Any]:
    """A cell's row, or why there is none."""
    if cell.nbytes > lab.card.total:
        needed, there = cell.nbytes / 2**30, lab.card.total / 2**30
        return {"skipped": f"needs about {needed:.0f} GiB, the card has {there:.0f}"}
    if cell.seconds > left:
        return {"skipped": "no time was left"}
    try:
        return cell.measure(lab)
    except ModuleNotFoundError as error:
        return {"skipped": f"the package {error.name} is missing"}
    except NemodiffError as error:
        lab.let_go()
        return {"skipped": str(error)}
    except Exception as error:
        traceback.print_exc()
        lab.let_go()
        short = "out of memory" if type(error).__name__ == "OutOfMemoryError" else "failed"
        return {"skipped": f"{short}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}


def run(asked: Asked, todo: list[Cell], lab: Lab, report: gpu_report.Report, minutes: float) -> int:
    """Measure what is missing and keep the report up to date; returns how many cells failed."""
    started = saved = time.monotonic()
    failed = 0
    try:
        for cell in todo:
            if report.has(cell):
                continue
            before = time.monotonic()
            row = measured(cell, lab, 60 * minutes - (before - started))
            report.put(cell, row)
            failed += row.get("skipped", "").startswith("failed")
            told = row.get("skipped") or gpu_report.headline(row)
            print(f"{time.monotonic() - started:7.1f} s  {cell.name}: {told}", flush=True)
            if time.monotonic() - saved > SAVE_SECONDS:
                report.save()
                saved = time.monotonic()
    finally:
        report.run["minutes"] = round((time.monotonic() - started) / 60, 2)
        report.save()
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", action="store_true", help="print what would run and end")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--only", help=f"sections, with commas between: {', '.join(SECTIONS)}; measured even if known")
    parser.add_argument("--shapes", help="sizes, with commas between, the most important first; default 8b,3b,14b")
    parser.add_argument("--dtype", choices=["bf16", "f16", "f32"], help="default bf16, on the CPU f32")
    parser.add_argument("--checkpoint", type=Path, default=record.TINY_CHAT, help="trained one, default tiny-chat")
    parser.add_argument("--minutes", type=float, default=9.0, help="of time, default 9; what is left is left out")
    parser.add_argument(
        "--memory", type=float, default=80.0, help="GiB of the card that --plan counts with, default 80"
    )
    parser.add_argument("--again", action="store_true", help="measure what the report has already")
    parser.add_argument("--out", type=Path, help="folder of the report, default benchmarks/results; on the CPU none")
    arguments = parser.parse_args()
    on_gpu = arguments.device == "cuda"
    only = set((arguments.only or ",".join(SECTIONS)).split(","))
    if not only <= set(SECTIONS):
        parser.error(f"--only holds {min(only - set(SECTIONS))!r}, allowed: {', '.join(SECTIONS)}; choose some of them")
    shapes = tuple((arguments.shapes or ("8b,3b,14b" if on_gpu else "tiny")).split(","))
    dtype = arguments.dtype or ("bf16" if on_gpu else "f32")
    asked = Asked(shapes, dtype, arguments.checkpoint.resolve(), gpu_plan.GPU if on_gpu else gpu_plan.CPU)
    todo = [cell for cell in cells(asked) if cell.section in only]
    if arguments.plan:
        print_plan(todo, int(arguments.memory * 2**30), arguments.minutes)
        return
    if not on_gpu:
        os.environ["TRITON_INTERPRET"] = "1"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # what has been measured is written on the way out
    origin = record.origin(PACKAGES, None if on_gpu else 1)
    try:
        card = Card(arguments.device)
    except NemodiffError as error:
        raise SystemExit(f"nothing measured: {error}") from None
    out = arguments.out or (record.RESULTS if on_gpu else None)
    lab = Lab(card, card.ceilings(dtype))
    report = gpu_report.Report(out, origin, card.about, lab.ceilings, asked)
    if arguments.again or arguments.only:
        report.forget(todo)
    failed = run(asked, todo, lab, report, arguments.minutes)
    report.finish()
    if failed:
        sys.exit(f"{failed} figures failed; see above")


if __name__ == "__main__":
    main()

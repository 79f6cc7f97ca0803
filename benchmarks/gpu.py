"""Measure the GPU path in one command: the torch engine, its kernels, graphs, loops and scheduler, and a peer.

    python benchmarks/gpu.py --plan              print what would run, with bytes and minutes; needs no GPU
    python benchmarks/gpu.py --minutes 6         measure the most important figures first; repeat to continue
    python benchmarks/gpu.py --device cpu        run the same code at tiny sizes; its figures mean nothing

Writes `gpu.json` and `gpu.md` every few seconds, so a run that is cut short loses nothing and the next one on a card of
the same name measures what is missing. At the end it draws `gpu.png`. `scripts/measure-gpu` runs it on a card that
is lent for minutes.
"""

from __future__ import annotations

# The package benchmarks/gpu/ beside this file shares its name on purpose, so that the command stays
# `python benchmarks/gpu.py`; an import of `gpu` finds the package.
import argparse
import collections
import contextlib
import itertools
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
    from gpu import first as gpu_first
    from gpu import forward as gpu_forward
    from gpu import kernels as gpu_kernels
    from gpu import modes as gpu_modes
    from gpu import peers as gpu_peers
    from gpu import plan as gpu_plan
    from gpu import products as gpu_products
    from gpu import profile as gpu_profile
    from gpu import report as gpu_report
    from gpu import serve as gpu_serve
    from gpu import tensorrt as gpu_tensorrt
    from gpu import tiles as gpu_tiles
    from gpu.card import Card
    from gpu.guard import PATIENCE, Guard
    from gpu.plan import Cell, Lab, RunConfig

    from nemodiff.errors import NemodiffError
except ModuleNotFoundError as error:
    raise SystemExit(f"nothing measured: the package {error.name} is missing; pip install {error.name}") from None

PACKAGES = ("nemodiff", "numpy", "torch", "triton")
SECTIONS = ("first", "forward", "kernels", "narrow", "decode", "serve", "variants", "modes", "peers", "tensorrt")
SECTIONS += ("profile", "tiles")
NO_TIME = "no time was left"
SAVE_SECONDS = 5.0  # between two writes of the report


def cells(config: RunConfig) -> Iterator[Cell]:
    """Everything there is to measure, the most important first: a size at a time, many rows and other peers later."""
    few, many = config.scale.rows[:1], config.scale.rows[1:]
    *crowds, most = config.scale.requests
    for shape in config.shapes[:1]:
        yield from gpu_first.cells(config, shape)  # what follows up to the requests runs over its graphs
        yield from gpu_forward.cells(config, shape, few)
        yield from gpu_modes.decode_cells(config, shape)
        yield from gpu_serve.cells(config, shape, tuple(crowds))
        yield from gpu_kernels.main_cells(config, shape)
        yield from gpu_products.narrow_cells(config, shape)
        yield from gpu_profile.cells(config, shape)
        yield from gpu_forward.variant_cells(config, shape, gpu_forward.EARLY)
        yield from itertools.islice(gpu_forward.loaded_cells(config, shape), 1)
        yield from gpu_modes.fp8_cells(config, shape)
        yield from itertools.islice(gpu_peers.cells(config, shape), 1)
        yield from gpu_modes.answer_cells(config)
        yield from gpu_serve.cells(config, shape, (most,))
        yield from itertools.islice(gpu_forward.loaded_cells(config, shape), 1, None)
        yield from gpu_tiles.cells(config, shape)
        yield from gpu_forward.variant_cells(config, shape, gpu_forward.OTHERS)
        yield from gpu_kernels.other_cells(config, shape)
        yield from gpu_forward.cells(config, shape, many)
        yield from itertools.islice(gpu_peers.cells(config, shape), 1, None)
    for shape in config.shapes[1:]:
        yield from gpu_first.cells(config, shape)
        yield from gpu_forward.cells(config, shape, few)
        yield from gpu_modes.decode_cells(config, shape)
        yield from gpu_kernels.main_cells(config, shape)
        yield from gpu_forward.variant_cells(config, shape, (*gpu_forward.EARLY, *gpu_forward.OTHERS))
        yield from gpu_forward.loaded_cells(config, shape)
    for shape in config.shapes[1:]:
        yield from gpu_forward.cells(config, shape, many)
        yield from gpu_serve.cells(config, shape, config.scale.requests)
        yield from gpu_kernels.other_cells(config, shape)
        yield from gpu_peers.cells(config, shape)
    yield from gpu_tensorrt.cells(config)


def print_plan(todo: list[Cell], memory: int, minutes: float) -> None:
    """Print what would run, by section and shape."""
    groups: dict[tuple[str, str], list[Cell]] = collections.defaultdict(list)
    for cell in todo:
        groups[cell.section, cell.shape].append(cell)
    print(f"{'section':<10} {'shape':<10} {'figures':>7} {'too large':>9} {'GiB at most':>11} {'minutes':>8}")
    total = 0.0
    for (section, shape), group in groups.items():
        fit = [cell for cell in group if cell.nbytes <= memory]
        spent, peak = sum(c.seconds for c in fit) / 60, max((c.nbytes for c in fit), default=0) / 2**30
        total += spent
        print(f"{section:<10} {shape:<10} {len(group):>7} {len(group) - len(fit):>9} {peak:>11.1f} {spent:>8.1f}")
    print(f"about {total:.0f} minutes on an H100 with {memory / 2**30:.0f} GiB, {-(-total // minutes):.0f} calls of "
          f"--minutes {minutes:g}; estimates, not measured")  # fmt: skip


def release(lab: Lab) -> None:
    """Free what is held, if the card still does anything; the guard asks it."""
    with contextlib.suppress(RuntimeError):
        lab.let_go()


def measured(cell: Cell, lab: Lab, left: float) -> dict[str, Any]:
    """A cell's figures, or why there are none."""
    if cell.nbytes > lab.card.total:
        needed, there = cell.nbytes / 2**30, lab.card.total / 2**30
        return {"skipped": f"needs about {needed:.0f} GiB, the card has {there:.0f}"}
    if cell.seconds > left:
        return {"skipped": NO_TIME}
    try:
        return cell.measure(lab)
    except ModuleNotFoundError as error:
        return {"skipped": f"the package {error.name} is missing"}
    except NemodiffError as error:
        release(lab)
        return {"skipped": str(error)}
    except Exception as error:
        traceback.print_exc()
        release(lab)
        short = "out of memory" if type(error).__name__ == "OutOfMemoryError" else "failed"
        return {"skipped": f"{short}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}


def run(todo: list[Cell], lab: Lab, report: gpu_report.Report, guard: Guard, minutes: float) -> int:
    """Measure what is missing and keep the report up to date; returns how many cells failed."""
    started = saved = time.monotonic()
    failed = late = 0
    try:
        for cell in todo:
            if report.has(cell):
                continue
            left = 60 * minutes - (time.monotonic() - started)
            with guard.watch(cell, left):
                figures = measured(cell, lab, left)
                report.put(cell, figures)
                failed += figures.get("skipped", "").startswith("failed")
                if "skipped" in figures:
                    guard.check(cell, lab.card.answers(), figures["skipped"])
            if figures.get("skipped") == NO_TIME:
                late += 1
                continue
            outcome = figures.get("skipped") or gpu_report.headline(figures)
            print(f"{time.monotonic() - started:7.1f} s  {cell.name}: {outcome}", flush=True)
            if time.monotonic() - saved > SAVE_SECONDS:
                report.save()
                saved = time.monotonic()
    finally:
        report.run["minutes"] = round((time.monotonic() - started) / 60, 2)
        report.save()
    if late:
        print(f"{late} figures not measured: {NO_TIME}", flush=True)
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", action="store_true", help="print what would run and end")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="device to measure, default cuda")
    parser.add_argument("--only", help=f"measure these sections anew, separated by commas: {', '.join(SECTIONS)}")
    parser.add_argument("--shapes", help="model sizes, separated by commas, most important first; default 8b,3b,14b")
    parser.add_argument("--dtype", choices=["bf16", "f16", "f32"], help="type of weights, default bf16, on the CPU f32")
    parser.add_argument(
        "--checkpoint", type=Path, default=record.MODEL, help=f"trained one, default {record.MODEL.name}"
    )
    parser.add_argument("--minutes", type=float, default=6.0, help="stop measuring after so many minutes, default 6")
    parser.add_argument("--memory", type=float, default=80.0, help="GiB of the card that --plan assumes, default 80")
    parser.add_argument("--again", action="store_true", help="measure also what the report has already")
    parser.add_argument(
        "--go-on", action="store_true", help="follow a process that a figure has ended: without that one"
    )
    parser.add_argument("--out", type=Path, help="folder of the report, default benchmarks/results; on the CPU none")
    arguments = parser.parse_args()
    on_gpu = arguments.device == "cuda"
    only = set((arguments.only or ",".join(SECTIONS)).split(","))
    if not only <= set(SECTIONS):
        parser.error(f"--only holds {min(only - set(SECTIONS))!r}, allowed: {', '.join(SECTIONS)}; choose some of them")
    shapes = tuple((arguments.shapes or ("8b,3b,14b" if on_gpu else "tiny")).split(","))
    dtype = arguments.dtype or ("bf16" if on_gpu else "f32")
    config = RunConfig(shapes, dtype, arguments.checkpoint.resolve(), gpu_plan.GPU if on_gpu else gpu_plan.CPU)
    todo = [cell for cell in cells(config) if cell.section in only]
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
    report = gpu_report.Report(out, origin, card.about, lab.ceilings, config)

    def put(name: str, figures: dict[str, Any]) -> None:
        report.put_by_name(name, figures)
        report.save()

    guard = Guard(out, put, PATIENCE if on_gpu else None)
    if arguments.go_on:
        report.keeps_failures = True
        guard.last()
    elif arguments.again or arguments.only:
        report.forget(todo)
    failed = run(todo, lab, report, guard, arguments.minutes)
    report.finish()
    if failed:
        sys.exit(f"{failed} figures failed; see above")


if __name__ == "__main__":
    main()

"""Measure attention with other sizes of its tiles than it has, each beside them: what to choose for a card.

What a variant names is set on `plugins/ops/paged_attention.py` while it is measured, or on its stage, so a winner is
adopted by writing its numbers there.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import multiprocessing
import os
from collections.abc import Iterator
from unittest import mock

from gpu import models as gpu_models
from gpu.kernels import measured as launch
from gpu.kernels import sizes
from gpu.plan import Cell, Figures, Lab, RunConfig
from nemodiff.errors import first_line
from nemodiff.plugins.ops import paged_attention

OPTIONS = ("num_warps", "num_stages")  # of the stage; "programs" is of each multiprocessor, the others are the module's
LARGE = {"LARGE_M": 128, "num_warps": 8}
VARIANTS: dict[str, dict[str, int]] = {
    "as it is": {},
    "3 programs": {"programs": 3},
    "4 programs": {"programs": 4},
    "4 stages": {"num_stages": 4},
    "shares of 2 pages": {"LEAST": 2},
    "shares of 4 pages": {"LEAST": 4},
    "small tiles up to 64 pages": {"SHORT": 64},
    "large shares of twice the pages": {"LARGE_PAGES": 2},
    "large tiles of 64 slots": {"LARGE_N": 64},
    "large tiles of 64 slots, 2 stages": {"LARGE_N": 64, "num_stages": 2},
    "large tiles of 64 slots, shares of twice the pages": {"LARGE_N": 64, "LARGE_PAGES": 2},
    "large tiles of 128 rows, 8 warps": LARGE,
    "large tiles of 128 rows, 64 slots, 8 warps": {**LARGE, "LARGE_N": 64},
}


def _one(lab: Lab, config: RunConfig, shape: str, variant: str, context: int, tokens: int) -> float:
    """Microseconds of a launch."""
    changes = dict(VARIANTS[variant])
    programs = changes.pop("programs", 2) * lab.card.programs // 2
    options = {name: changes.pop(name) for name in OPTIONS if name in changes}
    model = gpu_models.work(shape, config.dtype).model
    with contextlib.ExitStack() as changed:
        for name, value in changes.items():
            changed.enter_context(mock.patch.object(paged_attention, name, value))
        op = paged_attention.op(None, programs)
        varied = dataclasses.replace(op, stages=(dataclasses.replace(op.stages[0], **options),))
        figures = launch(lab, varied, model, config.dtype, sizes(varied, model, tokens, context), programs)
    return float(figures["us"])


def _compiled(config: RunConfig, shape: str, variant: str) -> None:
    """Compile what a variant needs, in a process of its own; Triton's cache keeps it."""
    from gpu.card import Card

    _one(Lab(Card("cuda"), {"copy_bytes_per_second": 1.0}), config, shape, variant, 512, 1)


@functools.cache
def compile_all(config: RunConfig, shape: str) -> None:
    """Compile all variants side by side; one that cannot be compiled says so when it is measured."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(max(1, (os.cpu_count() or 2) - 2), context) as pool:
        concurrent.futures.wait([pool.submit(_compiled, config, shape, variant) for variant in VARIANTS])


def measured(lab: Lab, config: RunConfig, shape: str, context: int, tokens: int) -> Figures:
    """Every variant at one size."""
    if lab.card.is_gpu:
        compile_all(config, shape)
    us: dict[str, float] = {}
    refused: dict[str, str] = {}
    for variant in VARIANTS:
        try:
            us[variant] = _one(lab, config, shape, variant, context, tokens)
        except Exception as error:
            if not lab.card.answers():
                raise
            refused[variant] = f"{type(error).__name__}: {first_line(error)[:100]}"
    winner = min(us, key=lambda name: us[name])
    return {"context": context, "tokens": tokens, "variants": us, "refused": refused, "winner": winner}


def cells(config: RunConfig, shape: str) -> Iterator[Cell]:
    """Decode passes and blocks in some contexts."""
    sizes_of = [size for size in config.scale.kernel_sizes if size <= 32]
    for context, tokens in itertools.product(config.scale.kernel_contexts, sizes_of):

        def measure(lab: Lab, context: int = context, tokens: int = tokens) -> Figures:
            return measured(lab, config, shape, context, tokens)

        yield Cell("tiles", shape, f"context {context} tokens {tokens}", 2**31, 0.4 * len(VARIANTS), measure)

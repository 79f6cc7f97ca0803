"""Measure kernels with other sizes of their tiles than they have, each beside them: what to choose for a card.

What a variant names is set on the modules of the ops while it is measured, or on the kernel's stage, so a winner is
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
from types import ModuleType
from unittest import mock

from gpu import models as gpu_models
from gpu import products as gpu_products
from gpu.kernels import EVERY, sizes
from gpu.kernels import measured as launch
from gpu.plan import Cell, Figures, Lab, RunConfig
from nemodiff.config import ModelConfig
from nemodiff.contract import Quantization
from nemodiff.errors import first_line
from nemodiff.plugins.op import Op
from nemodiff.plugins.ops import confidence_commit, linear, paged_attention

Changes = dict[str, int]  # num_warps, num_stages and inputs of a step are the stage's, programs of each multiprocessor

ATTENTION: dict[str, Changes] = {
    "as it is": {},
    "3 programs": {"programs": 3},
    "4 programs": {"programs": 4},
    "4 stages": {"num_stages": 4},
    "shares of 2 pages": {"LEAST": 2},
    "shares of 4 pages": {"LEAST": 4},
    "up to 16 shares of a tile": {"SPLITS": 16},
    "up to 64 shares of a tile": {"SPLITS": 64},
    "small tiles up to 64 pages": {"SHORT": 64},
    "large shares of twice the pages": {"LARGE_PAGES": 2},
    "large tiles of 32 slots": {"LARGE_N": 32, "GROUP_N": 32},
    "large tiles of 64 slots": {"LARGE_N": 64, "GROUP_N": 64},
    "large tiles of 64 slots, 2 stages": {"LARGE_N": 64, "GROUP_N": 64, "num_stages": 2},
    "large tiles of 64 slots, shares of twice the pages": {"LARGE_N": 64, "GROUP_N": 64, "LARGE_PAGES": 2},
    "large tiles of 128 rows, 32 slots, 8 warps": {"LARGE_M": 128, "LARGE_N": 32, "GROUP_N": 32, "num_warps": 8},
    "large tiles of 128 rows, 64 slots, 8 warps": {"LARGE_M": 128, "LARGE_N": 64, "GROUP_N": 64, "num_warps": 8},
}
SCAN: dict[str, Changes] = {
    "as it is": {},
    "512 entries, 1 warp": {"SHARE": 512, "num_warps": 1},
    "1024 entries, 1 warp": {"SHARE": 1024, "num_warps": 1},
    "1024 entries, 2 warps": {"SHARE": 1024, "num_warps": 2},
    "2048 entries, 2 warps": {"SHARE": 2048, "num_warps": 2},
    "2048 entries, 4 warps": {"SHARE": 2048, "num_warps": 4},
}
SHARES: dict[str, Changes] = {
    "as it is": {},
    "2 shares": {"MOST_SHARES": 2},
    "8 shares": {"MOST_SHARES": 8},
    "64 outputs": {"BLOCK_F": 64},
    "64 outputs, 128 inputs": {"BLOCK_F": 64, "inputs": 128},
    "128 outputs, 128 inputs, 3 stages": {"inputs": 128, "num_stages": 3},
}
FEW_BITS: dict[str, Changes] = {
    "as it is": {},
    "4 warps": {"num_warps": 4},
    "3 stages": {"num_stages": 3},
    "8 stages": {"num_stages": 8},
    "2 shares": {"MOST_SHARES": 2},
    "8 shares": {"MOST_SHARES": 8},
    "64 outputs, 4 warps": {"BLOCK_F": 64, "num_warps": 4},
}
EIGHT_BITS = FEW_BITS | {"64 inputs": {"inputs": 64}, "128 inputs, 4 stages": {"inputs": 128, "num_stages": 4}}
KINDS: dict[str, Quantization] = {f"{kind.capitalize()}SplitLinear": kind for kind in linear.KINDS if kind}
SCANS = ("ConfidenceCommitScan", "SampledCommitScan", "FlatSampledScan")
_OWNERS: dict[str, tuple[ModuleType, ...]] = {
    **dict.fromkeys(("LEAST", "SPLITS", "SHORT", "LARGE_PAGES", "LARGE_N", "GROUP_N", "LARGE_M"), (paged_attention,)),
    "SHARE": (confidence_commit,),
    **dict.fromkeys(("BLOCK_F", "MOST_SHARES"), (linear,)),
}


def variants(kernel: str) -> dict[str, Changes]:
    """Those of a kernel."""
    if kernel in KINDS:
        return FEW_BITS if KINDS[kernel] == "int4" else EIGHT_BITS
    return ATTENTION if kernel == "PagedAttention" else SCAN if kernel in SCANS else SHARES


def _one(lab: Lab, config: RunConfig, shape: str, kernel: str, variant: str, context: int, tokens: int) -> float:
    """Microseconds of a launch."""
    changes = dict(variants(kernel)[variant])
    programs = changes.pop("programs", 2) * lab.card.programs // 2
    options = {name: changes.pop(name) for name in ("num_warps", "num_stages") if name in changes}
    step = {"STEP": changes.pop("inputs")} if "inputs" in changes else {}

    def varied(op: Op) -> Op:
        first, *others = op.stages
        constants = first.constants
        if step:
            first = dataclasses.replace(first, constants=lambda model: {**constants(model), **step})
        return dataclasses.replace(op, stages=(dataclasses.replace(first, **options), *others))

    model = gpu_models.work(shape, config.dtype).model
    with contextlib.ExitStack() as changed:
        for name, value in changes.items():
            for owner in _OWNERS[name]:
                changed.enter_context(mock.patch.object(owner, name, value))
        if kernel in gpu_products.NARROW:
            product = gpu_products.in_shares(lab, varied)
            matrix = gpu_products.projections(model)[kernel]
            return gpu_products.microseconds(lab, product, matrix, config.dtype, tokens)
        op = varied(_op(model, kernel, tokens, programs))
        return float(launch(lab, op, model, config.dtype, sizes(op, model, tokens, context), programs)["us"])


def _op(model: ModelConfig, kernel: str, tokens: int, programs: int) -> Op:
    """A kernel as an engine has it, a product of few bits that of down."""
    if kernel in KINDS:
        tile = next(tile for tile in linear.TILES if tokens <= tile)
        return linear.split(KINDS[kernel], tile, linear.shares(*gpu_products.projections(model)["down"]))
    return paged_attention.op(None, programs) if kernel == "PagedAttention" else EVERY[kernel]


def _compiled(config: RunConfig, shape: str, kernel: str, variant: str, tokens: int) -> None:
    """Compile what a variant needs, in a process of its own; Triton's cache keeps it."""
    from gpu.card import Card

    lab = Lab(Card("cuda"), {"copy_bytes_per_second": 1.0})
    _one(lab, config, shape, kernel, variant, config.scale.kernel_contexts[0], tokens)


@functools.cache
def compile_all(config: RunConfig, shape: str) -> None:
    """Compile all variants side by side; one that cannot be compiled says so when it is measured."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(max(1, (os.cpu_count() or 2) - 2), context) as pool:
        jobs = {(kernel, tokens) for kernel, _, tokens in _points(config) if kernel != "PagedAttention" or tokens == 1}
        concurrent.futures.wait(
            [
                pool.submit(_compiled, config, shape, kernel, variant, tokens)
                for kernel, tokens in sorted(jobs)
                for variant in variants(kernel)
            ]
        )


def measured(lab: Lab, config: RunConfig, shape: str, kernel: str, context: int, tokens: int) -> Figures:
    """Every variant at one size."""
    if lab.card.is_gpu:
        compile_all(config, shape)
    us: dict[str, float] = {}
    refused: dict[str, str] = {}
    for variant in variants(kernel):
        try:
            us[variant] = _one(lab, config, shape, kernel, variant, context, tokens)
        except Exception as error:
            if not lab.card.answers():
                raise
            refused[variant] = f"{type(error).__name__}: {first_line(error)[:100]}"
    about = {"kernel": kernel, "context": context, "tokens": tokens}
    return {**about, "variants": us, "refused": refused, "winner": min(us, key=lambda name: us[name], default="")}


def _points(config: RunConfig) -> Iterator[tuple[str, int, int]]:
    """Kernels, contexts and tokens."""
    contexts, tokens = config.scale.kernel_contexts, [size for size in config.scale.kernel_sizes if size <= 32]
    for context, size in itertools.product(contexts, tokens):
        yield "PagedAttention", context, size
    for kernel in SCANS:
        yield kernel, contexts[0], tokens[-1]
    for kernel, size in itertools.product((*gpu_products.NARROW, *KINDS), {tokens[0], tokens[-1]}):
        yield kernel, contexts[0], size


def cells(config: RunConfig, shape: str) -> Iterator[Cell]:
    """Attention in some contexts, scans of a block, and products in shares, also of few bits."""
    for kernel, context, tokens in _points(config):

        def measure(lab: Lab, kernel: str = kernel, context: int = context, tokens: int = tokens) -> Figures:
            return measured(lab, config, shape, kernel, context, tokens)

        where = f" context {context}" if kernel == "PagedAttention" else ""
        yield Cell("tiles", shape, f"{kernel}{where} tokens {tokens}", 2**31, 0.2 * len(variants(kernel)), measure)

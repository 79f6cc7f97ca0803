"""What a build will make and what it will need, from config and tensor headers alone.

In: a checkpoint's description and the build's choices. Out: `Plan`, numbers in bytes, and `lines()` for people. The
surprising facts: caches grow with use, so `max_seq_len` costs nothing until a text is that long, while a TensorRT
engine's rows have their whole length from the start; and f16 weights take f32's memory once loaded by
ONNX Runtime, which converts them where the processor has no f16 arithmetic that it uses (benchmarks/build_memory.py).
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any

from ..contract import COMPILED, ITEMSIZE, Backend
from ..engine_folder import BuildConfig, cache_slots, dtype_line
from .checkpoint.checkpoint import Checkpoint
from .compilers.tensorrt import memory_needed
from .graph.graph import Graph

CARDS = (8, 12, 16, 24, 32, 48, 80)  # GiB that GPUs are sold with
CARD_RESERVE = 2**30  # bytes left for the driver, activations and kernels
LENGTHS = (1024, 4096, 16384, 65536, 262144)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sizes are bytes; `rows_that_fit` maps a sequence length to how many rows' K/V fit beside the weights.

    For the backends of GPUs memory is the GPU's and `rows_that_fit` maps a card's GiB to rows of `max_seq_len`.
    `build_memory` is what compiling takes here, 0 where nothing is compiled.
    """

    backend: Backend
    tensors: int
    checkpoint_bytes: int
    parameters: int
    adapter_rank: int
    weight_bytes: int
    disk_free: int
    kv_bytes_per_token: int
    memory_loaded: int
    memory_here: int
    disk_needed: int
    build_memory: int
    build: BuildConfig
    rows_that_fit: dict[int, int]
    unknown_fields: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def lines(self, checkpoint: str, output: Path) -> list[str]:
        """The plan for people."""
        b = self.build
        fits = ", ".join(f"{rows} x {length}" for length, rows in self.rows_that_fit.items() if rows)
        adapter = f"drafter LoRA of rank {self.adapter_rank}" if self.adapter_rank else "no drafter adapter"
        row = size(self.kv_bytes_per_token * b.max_seq_len)
        kind = dtype_line(b.dtype, b.quantization)
        limits = f"up to {b.max_batch_size} rows of {b.max_seq_len} tokens"
        if self.backend == "onnxruntime":
            memory = [
                f"memory       {size(self.memory_loaded)} of loaded weights; this machine has {size(self.memory_here)}",
                f"fits here    {fits or 'nothing'}" + (" (rows x tokens)" if fits else ""),
            ]
        else:
            fits = _first_cards(self.rows_that_fit, b.max_batch_size)
            slots = cache_slots(b) if self.build_memory else b.max_seq_len
            full = size(self.memory_loaded + b.max_batch_size * self.kv_bytes_per_token * slots)
            compiling = f"; to compile about {size(self.build_memory)} here" if self.build_memory else ""
            memory = [
                f"memory       {full} of GPU memory for weights and all rows{compiling}, this machine has "
                f"{size(self.memory_here)}",
                f"fits         {fits or 'no row in ' + str(CARDS[-1]) + ' GiB'}"
                + (f" (rows of {b.max_seq_len})" if fits else ""),
            ]
        return [
            f"checkpoint   {checkpoint}: {self.tensors} tensors, {size(self.checkpoint_bytes)}",
            f"parameters   {self.parameters:,}, {adapter}",
            f"engine       {self.backend}, {kind}, block length {b.block_length}, {limits}",
            f"disk         {size(self.disk_needed)} to write under {output}, {size(self.disk_free)} free",
            f"KV cache     {self.kv_bytes_per_token:,} bytes per token, {row} for one row of {b.max_seq_len}",
            *memory,
            *([f"ignored      unknown config fields: {', '.join(self.unknown_fields)}"] if self.unknown_fields else []),
        ]


def _first_cards(rows_that_fit: dict[int, int], wanted: int) -> str:
    """`3 in 24 GiB, 8 in 32 GiB`: up to the first card that holds all rows."""
    enough = next((card for card, rows in rows_that_fit.items() if rows >= wanted), CARDS[-1])
    return ", ".join(f"{rows} in {card} GiB" for card, rows in rows_that_fit.items() if rows and card <= enough)


def make_plan(checkpoint: Checkpoint, graph: Graph, build: BuildConfig, output: Path, backend: Backend) -> Plan:
    """Compute the plan; nothing is written and no weight is read."""
    model = checkpoint.model
    everything = [*checkpoint.tensors.values(), *(checkpoint.adapter.tensors.values() if checkpoint.adapter else ())]
    per_token = model.kv_bytes_per_token(ITEMSIZE[build.dtype])
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    compiled = backend in COMPILED
    if backend != "onnxruntime":
        loaded, row = graph.weight_bytes, per_token * (cache_slots(build) if compiled else build.max_seq_len)
        room = {card: max(0, card * 2**30 - loaded - CARD_RESERVE) // row for card in CARDS}
    else:
        loaded = (model.parameters - model.vocab_size * model.hidden_size) * ITEMSIZE["f32"]  # embedding stays mapped
        lengths = [n for n in LENGTHS if n < build.max_seq_len] + [build.max_seq_len]
        room = {n: max(0, memory - loaded) // (per_token * n) for n in lengths}
    return Plan(
        backend=backend,
        tensors=len(everything),
        checkpoint_bytes=sum(t.nbytes for t in everything),
        parameters=model.parameters,
        adapter_rank=checkpoint.adapter.rank if checkpoint.adapter else 0,
        weight_bytes=graph.weight_bytes,
        disk_free=disk_free(output),
        kv_bytes_per_token=per_token,
        memory_loaded=loaded,
        memory_here=memory,
        disk_needed=graph.weight_bytes * (2 if compiled else 1),
        build_memory=memory_needed(graph.weight_bytes) if compiled else 0,
        build=build,
        rows_that_fit={key: min(build.max_batch_size, rows) for key, rows in room.items()},
        unknown_fields=model.unknown_fields,
    )


def disk_free(path: Path) -> int:
    """Free bytes on the disk that will hold `path`."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def size(nbytes: int) -> str:
    """1536 -> '1.5 KiB'."""
    value, unit = float(nbytes), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"

"""What a build will make and what it will need, from config and tensor headers alone.

In: a checkpoint's description and the build's choices. Out: `Plan`, numbers in bytes, and `lines()` for people. The
surprising facts: on the CPU engine the cache grows with use, so `max_seq_len` costs nothing until a text is that long;
and f16 weights take f32's memory once loaded, because ONNX Runtime converts them where the processor has no f16
arithmetic that it uses (measured by benchmarks/build_memory.py).
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any

from ..contract import ITEMSIZE, BuildConfig
from .checkpoint import Checkpoint
from .graph import Graph

LENGTHS = (1024, 4096, 16384, 65536, 262144)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sizes are bytes; `rows_that_fit` maps a sequence length to how many rows' K/V fit beside the weights."""

    tensors: int
    checkpoint_bytes: int
    parameters: int
    adapter_rank: int
    weight_bytes: int
    disk_free: int
    kv_bytes_per_token: int
    memory_loaded: int
    memory_here: int
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
        limits = f"up to {b.max_batch_size} rows of {b.max_seq_len} tokens"
        return [
            f"checkpoint   {checkpoint}: {self.tensors} tensors, {size(self.checkpoint_bytes)}",
            f"parameters   {self.parameters:,}, {adapter}",
            f"engine       {b.dtype}, block length {b.block_length}, {limits}",
            f"disk         {size(self.weight_bytes)} to write under {output}, {size(self.disk_free)} free",
            f"KV cache     {self.kv_bytes_per_token:,} bytes per token, {row} for one row of {b.max_seq_len}",
            f"memory       {size(self.memory_loaded)} of loaded weights; this machine has {size(self.memory_here)}",
            f"fits here    {fits or 'nothing'}" + (" (rows x tokens)" if fits else ""),
            *([f"ignored      unknown config fields: {', '.join(self.unknown_fields)}"] if self.unknown_fields else []),
        ]


def make_plan(checkpoint: Checkpoint, graph: Graph, build: BuildConfig, output: Path) -> Plan:
    """Compute the plan; nothing is written and no weight is read."""
    model = checkpoint.model
    everything = [*checkpoint.tensors.values(), *(checkpoint.adapter.tensors.values() if checkpoint.adapter else ())]
    per_token = model.kv_bytes_per_token(ITEMSIZE[build.dtype])
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    loaded = (model.parameters - model.vocab_size * model.hidden_size) * ITEMSIZE["f32"]  # the embedding stays mapped
    spare = max(0, memory - loaded)
    lengths = [n for n in LENGTHS if n < build.max_seq_len] + [build.max_seq_len]
    return Plan(
        tensors=len(everything),
        checkpoint_bytes=sum(t.nbytes for t in everything),
        parameters=model.parameters,
        adapter_rank=checkpoint.adapter.rank if checkpoint.adapter else 0,
        weight_bytes=graph.weight_bytes,
        disk_free=disk_free(output),
        kv_bytes_per_token=per_token,
        memory_loaded=loaded,
        memory_here=memory,
        build=build,
        rows_that_fit={n: min(build.max_batch_size, spare // (per_token * n)) for n in lengths},
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

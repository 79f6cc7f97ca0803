"""Report what the kernels compile to: registers, shared memory, spills and blocks per multiprocessor, without a GPU.

    python benchmarks/kernels.py
    python benchmarks/kernels.py --only f32,SwiGLU     compile these types, ops and kernels anew, keep what is recorded

The sizes are those of the released 8B model, in bf16 and, of the torch engine, in f32. Blocks per multiprocessor are an
upper bound from registers, shared memory and warps; `gpu.py` measures how fast a kernel runs. Writes
`results/kernels.json`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common import record

from nemodiff.builder.checkpoint.checkpoint import open_checkpoint
from nemodiff.builder.compilers.kernels import PTX_VERSION, SMS, compile_kernels
from nemodiff.contract import Dtype
from nemodiff.plugins import FUSED, OPS, SAMPLED
from nemodiff.plugins.op import Op, stage_op
from nemodiff.tensorrt_info import Kernel

# Shared memory (KiB), warps and blocks of a multiprocessor by compute capability; all have 65536 registers.
# Source: CUDA C++ Programming Guide, technical specifications per compute capability.
LIMITS = {
    80: (164, 64, 32),
    86: (100, 48, 16),
    89: (100, 48, 24),
    90: (228, 64, 32),
    100: (228, 64, 32),
    120: (100, 48, 24),
}
HEAD = {"num_heads": 32, "num_kv_heads": 8, "head_dim": 128, "vocab_size": 131072}  # of the 3B, 8B and 14B models
WIDTH = {"hidden_size": 4096, "intermediate_size": 14336}  # of the 8B model


def blocks(kernel: Kernel) -> int:
    """Blocks of a kernel that one multiprocessor can hold."""
    shared, warps, most = LIMITS[kernel.sm]
    registers = -(-kernel.registers // 8) * 8 * 32 * kernel.num_warps  # allocated in eights
    by_shared = shared * 1024 // (kernel.shared_bytes + 1024)  # a KiB of each block is the system's
    return min(65536 // registers, by_shared, warps // kernel.num_warps, most)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="types, ops and kernels, separated by commas, that are compiled anew")
    only = parser.parse_args().only
    origin = record.origin(("nemodiff", "triton"), None)
    model = dataclasses.replace(open_checkpoint(record.MODEL).model, **HEAD, **WIDTH)
    typed = [op for op in FUSED if any(arg.dtype == "compute" for arg in op.args.values())]
    of_dtype: dict[Dtype, Sequence[Op]] = {"bf16": (*OPS, SAMPLED, *FUSED), "f32": typed}
    kernels: list[dict[str, Any]] = []
    for dtype, ops in of_dtype.items():
        named = set(only.split(",")) if only is not None else {dtype}
        some = [stage_op(op, stage) for op in ops for stage in op.stages if {dtype, op.name, stage.name} & named]
        with tempfile.TemporaryDirectory() as folder:
            for made in compile_kernels(model, dtype, SMS, Path(folder), some):
                held = blocks(made)
                share = round(held * made.num_warps / LIMITS[made.sm][1], 2)
                taken = {"blocks_per_multiprocessor": held, "occupancy": share}
                kernels.append({"dtype": dtype, **dataclasses.asdict(made), **taken})
    print(f"{'kernel':<22} type  SM {'warps':>5} {'registers':>9} {'spilled':>7} {'shared':>7} {'blocks':>6}")
    for k in kernels:
        print(
            f"{k['stage']:<22} {k['dtype']:>4} {k['sm']:>3} {k['num_warps']:>5} {k['registers']:>9} "
            f"{k['spill_bytes']:>7} {k['shared_bytes']:>7} {k['blocks_per_multiprocessor']:>6}"
        )
    if only is not None:
        recorded = json.loads((record.RESULTS / "kernels.json").read_text(encoding="utf-8"))["kernels"]
        kernels = list(({_key(k): k for k in recorded} | {_key(k): k for k in kernels}).values())
    worst = max(k["spill_bytes"] for k in kernels)
    goals = [record.goal("bytes spilled by any kernel", worst, "at most", 0, "bytes per thread")]
    record.write("kernels", origin, goals, {"model": {**HEAD, **WIDTH}, "ptx_version": PTX_VERSION, "kernels": kernels})


def _key(kernel: Mapping[str, Any]) -> tuple[str, str, int]:
    return kernel["dtype"], kernel["stage"], kernel["sm"]


if __name__ == "__main__":
    main()

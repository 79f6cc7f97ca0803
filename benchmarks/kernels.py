"""Report what the kernels compile to: registers, shared memory, spills and blocks per multiprocessor, without a GPU.

    python benchmarks/kernels.py

The sizes are those of the released 8B model, in bf16 and, of the torch engine, in f32. Blocks per multiprocessor are an
upper bound from registers, shared memory and warps; `gpu.py` measures how fast a kernel runs. Writes
`results/kernels.json`.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path

from common import record

from nemodiff.builder.checkpoint.checkpoint import open_checkpoint
from nemodiff.builder.compilers.kernels import PTX_VERSION, SMS, compile_kernels
from nemodiff.contract import Dtype
from nemodiff.plugins import FUSED, OPS, SAMPLED
from nemodiff.plugins.op import Op
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
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    origin = record.origin(("nemodiff", "triton"), None)
    model = dataclasses.replace(open_checkpoint(record.MODEL).model, **HEAD, **WIDTH)
    typed = [op for op in FUSED if any(arg.dtype == "compute" for arg in op.args.values())]
    of_dtype: dict[Dtype, Sequence[Op]] = {"bf16": (*OPS, SAMPLED, *FUSED), "f32": typed}
    with tempfile.TemporaryDirectory() as folder:
        kernels = [
            (dtype, k) for dtype, ops in of_dtype.items() for k in compile_kernels(model, dtype, SMS, Path(folder), ops)
        ]
    print(f"{'kernel':<22} type  SM {'warps':>5} {'registers':>9} {'spilled':>7} {'shared':>7} {'blocks':>6}")
    for dtype, k in kernels:
        print(
            f"{k.stage:<22} {dtype:>4} {k.sm:>3} {k.num_warps:>5} {k.registers:>9} {k.spill_bytes:>7} "
            f"{k.shared_bytes:>7} {blocks(k):>6}"
        )
    worst = max(k.spill_bytes for _, k in kernels)
    goals = [record.goal("bytes spilled by any kernel", worst, "at most", 0, "bytes per thread")]
    figures = {
        "model": {**HEAD, **WIDTH},
        "ptx_version": PTX_VERSION,
        "kernels": [
            {
                "dtype": dtype,
                **dataclasses.asdict(k),
                "blocks_per_multiprocessor": blocks(k),
                "occupancy": round(blocks(k) * k.num_warps / LIMITS[k.sm][1], 2),
            }
            for dtype, k in kernels
        ],
    }
    record.write("kernels", origin, goals, figures)


if __name__ == "__main__":
    main()

"""Report what the kernels compile to: registers, shared memory, spills and blocks per multiprocessor, without a GPU.

    python benchmarks/kernels.py

The sizes are those of the released 8B model. Blocks per multiprocessor are an upper bound from registers, shared memory
and warps; `gpu.py` measures how fast a kernel runs. Writes `results/kernels.json`.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from pathlib import Path

from common import record

from nemodiff.builder.checkpoint.checkpoint import open_checkpoint
from nemodiff.builder.compilers.kernels import PTX_VERSION, SMS, compile_kernels
from nemodiff.plugins import FUSED, OPS, SAMPLED
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
    with tempfile.TemporaryDirectory() as folder:
        kernels = compile_kernels(model, "bf16", SMS, Path(folder), (*OPS, SAMPLED, *FUSED))
    print(f"{'kernel':<22} {'SM':>4} {'warps':>5} {'registers':>9} {'spilled':>7} {'shared':>7} {'blocks':>6}")
    for k in kernels:
        print(
            f"{k.stage:<22} {k.sm:>4} {k.num_warps:>5} {k.registers:>9} {k.spill_bytes:>7} {k.shared_bytes:>7} "
            f"{blocks(k):>6}"
        )
    worst = max(k.spill_bytes for k in kernels)
    goals = [record.goal("bytes spilled by any kernel", worst, "at most", 0, "bytes per thread")]
    figures = {
        "model": {**HEAD, **WIDTH},
        "dtype": "bf16",
        "ptx_version": PTX_VERSION,
        "kernels": [
            {
                **dataclasses.asdict(k),
                "blocks_per_multiprocessor": blocks(k),
                "occupancy": round(blocks(k) * k.num_warps / LIMITS[k.sm][1], 2),
            }
            for k in kernels
        ],
    }
    record.write("kernels", origin, goals, figures)


if __name__ == "__main__":
    main()

"""Compiles the ops' kernels to PTX and cubin files, for GPUs that need not be here.

It compiles in a child process, because a process that has imported Triton in interpreter mode cannot compile any more.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import re
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from ...config import ModelConfig
from ...contract import Dtype
from ...errors import BuildError, install
from ...plugins import FUSED, OPS, SAMPLED
from ...plugins.failure import failure
from ...plugins.op import Op, Stage
from ...tensorrt_info import KERNELS_FOLDER, Kernel
from .child import child, end_with_parent, printed, read_job, read_result, write_result

OLDEST_SM = 80  # that Triton compiles for
OLDEST_PDL_SM = 90  # that has programmatic dependent launch; a kernel made for it can be launched without, too
SMS = (OLDEST_SM, 86, 89, 90, 100, 120)
# 8.8, of CUDA 12.9: the first that knows SM 121. Left alone, Triton writes the newest version it knows for the newest
# cards, and an older driver would refuse it.
PTX_VERSION = 88
YOUNGER = {110: 90}  # Jetson Thor, which has this number since CUDA 13
_MOST_PROCESSES = 8
_POINTER = {"f32": "*fp32", "f16": "*fp16", "bf16": "*bf16", "i32": "*i32", "i8": "*i8", "u8": "*u8"}
_USAGE = re.compile(r"(\d+) bytes spill stores.*Used (\d+) registers", re.DOTALL)


def compile_kernels(
    model: ModelConfig, dtype: Dtype, sms: tuple[int, ...], folder: Path, ops: Sequence[Op]
) -> tuple[Kernel, ...]:
    """Compile every stage of some ops into `folder`/kernels.

    Args:
        model: gives the constants compiled in: heads, head size, vocabulary, mask id.
        dtype: of queries and cache; logits are f32.
        sms: compute capabilities, 80 for 8.0.
        folder: the engine folder.
        ops: some of `plugins.OPS`, `SAMPLED` and `FUSED`; without one nothing is compiled.

    Returns:
        A record per stage and compute capability.

    Raises:
        BuildError: Triton is missing or cannot compile for a capability.
    """
    with compiling_kernels(model, dtype, sms, folder, ops) as records:
        return records()


@contextlib.contextmanager
def compiling_kernels(
    model: ModelConfig, dtype: Dtype, sms: tuple[int, ...], folder: Path, ops: Sequence[Op]
) -> Iterator[Callable[[], tuple[Kernel, ...]]]:
    """Compile while the block does something else; what it gets waits for the records. Leaving it ends the compiling.

    Arguments and errors are those of `compile_kernels`.
    """
    if not ops or not sms:
        yield tuple
        return
    (folder / KERNELS_FOLDER).mkdir(exist_ok=True)
    wanted = [(stage.name, sm) for _, stage in stages(ops) for sm in sorted(set(sms))]
    job = (model, dtype, folder.absolute(), wanted)
    with tempfile.TemporaryDirectory(prefix="nemodiff-kernels-") as name:
        work = Path(name)
        variables = {"TRITON_CACHE_DIR": str(work / "cache"), "TRITON_INTERPRET": "0"}
        with child("nemodiff.builder.compilers.kernels", work, job, **variables) as process:
            yield functools.cache(lambda: _records(process, work))


def _records(process: subprocess.Popen[bytes], work: Path) -> tuple[Kernel, ...]:
    if process.wait():
        raise BuildError(
            f"the kernels cannot be compiled ({failure(printed(work)):.300}); install Triton with: "
            f"{install('nemodiff[trt]')}, or build without --plugins and with --no-logits"
        )
    records: tuple[Kernel, ...] = read_result(work)
    return records


def ptx_version(sm: int) -> int:
    """The PTX version for a compute capability, 88 for 8.8: what it asks for, or the newest that the assembler knows.

    Triton brings an assembler of its own, and from 3.6 on another for newer cards: 3.5 knows PTX up to 8.7, 3.6 up to
    8.7 and from SM 100 on 8.8, 3.9 up to 8.8 and from SM 90 on 9.4.
    """
    from triton.backends.nvidia import compiler

    newest: int = compiler.get_ptx_version_from_options(types.SimpleNamespace(ptx_version=None), sm)
    return min(YOUNGER.get(sm, PTX_VERSION), newest)


def stages(ops: Sequence[Op]) -> list[tuple[Op, Stage]]:
    """Every stage of some ops once, with an op that has it."""
    by_name = {stage.name: (op, stage) for op in ops for stage in op.stages}
    return list(by_name.values())


def _arguments(op: Op, stage: Stage, dtype: Dtype) -> dict[str, str]:
    """Types of a stage's parameters by name, in order, as Triton spells them."""
    types = {"compute": dtype, "logits": "f32"}

    def pointer(name: str) -> str:
        return _POINTER[types.get(op.args[name].dtype, op.args[name].dtype)]

    return {
        **{name: pointer(name) for name in stage.inputs},
        **dict.fromkeys(stage.scalars, "i32"),
        **{arg.name: pointer(arg.name) for arg in stage.outputs},
    }


def _compile(op: Op, stage: Stage, model: ModelConfig, dtype: Dtype, sm: int, folder: Path) -> Kernel:
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget

    arguments = _arguments(op, stage, dtype)
    constants = {**stage.constants_for(model, dtype), **({"PDL": sm >= OLDEST_PDL_SM} if stage.follows else {})}
    source = triton.compiler.ASTSource(
        fn=stage.load(),
        signature={**arguments, **dict.fromkeys(constants, "constexpr")},
        constexprs=dict(constants),
        # Every tensor that TensorRT or an allocator hands out starts at a multiple of 16 bytes.
        attrs={(i,): [["tt.divisibility", 16]] for i, kind in enumerate(arguments.values()) if kind[0] == "*"},
    )
    options = {**stage.options_for(dtype), "ptx_version": ptx_version(sm)}
    with contextlib.redirect_stdout(io.StringIO()) as log, knobs.nvidia.scope():
        knobs.nvidia.dump_ptxas_log = True
        compiled = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
    usage = _USAGE.search(log.getvalue())
    if usage is None:
        raise ValueError(f"the assembler gives no usage of {stage.name}: {log.getvalue()!r}")
    metadata = compiled.metadata
    kernel = Kernel(
        stage=stage.name,
        sm=sm,
        entry=metadata.name,
        num_warps=metadata.num_warps,
        shared_bytes=metadata.shared,
        registers=int(usage[2]),
        spill_bytes=int(usage[1]),
        arguments=tuple(f"{kind} {name}" for name, kind in arguments.items()),
        constants=constants,
    )
    (folder / kernel.file("ptx")).write_text(compiled.asm["ptx"], encoding="ascii")
    (folder / kernel.file("cubin")).write_bytes(compiled.asm["cubin"])
    return kernel


def _record(model: ModelConfig, dtype: Dtype, folder: Path, name: str, sm: int) -> Kernel:
    """Compile the stage of this name for a compute capability."""
    op, stage = next(pair for pair in stages((*OPS, SAMPLED, *FUSED)) if pair[1].name == name)
    return _compile(op, stage, model, dtype, sm, folder)


def _main(work: Path) -> None:
    """The child: from a job to the records; a process for each core compiles."""
    model, dtype, folder, wanted = read_job(work)
    record = functools.partial(_record, model, dtype, folder)
    with ProcessPoolExecutor(min(len(wanted), os.cpu_count() or 1, _MOST_PROCESSES)) as pool:
        records = pool.map(record, *zip(*wanted, strict=True))
        end_with_parent()  # a thread, so not before the pool has forked
        write_result(work, tuple(records))


if __name__ == "__main__":
    _main(Path(sys.argv[1]))

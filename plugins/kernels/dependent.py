# mypy: ignore-errors
"""Programmatic dependent launch: a kernel begins while the one before it in the stream ends, on cards from SM 90 on."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def follow(PDL: tl.constexpr):
    """Wait until the kernel before has ended and its writes are seen; let the kernel behind begin, which waits too.

    The first thing in a kernel, before it reads or writes anything but what no kernel writes.
    """
    lead(PDL)
    wait(PDL)


@triton.jit
def lead(PDL: tl.constexpr):
    """Let the kernel behind begin once all programs have come here; for kernels that wait before or after it."""
    if PDL:
        gdc_launch_dependents()


@triton.jit
def wait(PDL: tl.constexpr):
    """Wait until the kernel before has ended and its writes are seen."""
    if PDL:
        gdc_wait()


def ask(pointer, size, _semantic=None):
    """Have `size` bytes from each pointer on brought into the second-level cache; pointers are multiples of 16 bytes.

    A function of the Triton compiler, for kernels from SM 90 on.
    """
    asm = "{ .reg .pred p; setp.gt.s32 p, $2, 0; @p cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }"
    arguments = [pointer.to(tl.int64, _semantic=_semantic), size]
    tl.inline_asm_elementwise(asm, "=r,l,r", arguments, tl.int32, False, 1, _semantic=_semantic)


ask.__triton_builtin__ = True

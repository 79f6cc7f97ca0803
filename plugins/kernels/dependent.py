# mypy: ignore-errors
"""Programmatic dependent launch: a kernel begins while the one before it in the stream ends, on cards from SM 90 on."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def follow(PDL: tl.constexpr):
    """Wait until the kernel before has ended and its writes are seen; let the kernel behind begin, which waits too.

    The first thing in a kernel, before it reads or writes anything.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()

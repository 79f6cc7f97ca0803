"""Projections with weights of fewer bits, as nodes that give a token the same bits whatever else is in its pass.

That is what self-speculation rests on: it verifies in one pass what mode ar decides one token at a time. So a token's
scale is made from that token alone, sums are of integers or, per output, of fixed groups, and one kernel serves passes
of every size. Measured with ONNX Runtime 1.32 (docs/log.md): MatMulNBits keeps it in groups of 32 with 8-bit sums. In
wider ones it takes two tokens at a time and the last of an odd number by another kernel, so there is none such:
`GraphWriter.even` adds one of zeros.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Protocol

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from ...contract import GROUP_SIZE, BuildConfig, Quantization, on_x86
from .writer import GraphWriter, Source

# Bytes of f32. Fewer lie in a processor's nearest caches, where a convolution gains nothing; with more, loading would
# hold too much, since ONNX Runtime has its weights twice meanwhile.
CONVOLVED_BYTES = (2**24, 2**33)
CONTRIB = "com.microsoft"  # the domain of MatMulNBits


class Shaped(Protocol):
    """What has a shape."""

    @property
    def shape(self) -> tuple[int, ...]: ...


def convolves(build: BuildConfig, tensors: Iterable[Shaped]) -> bool:
    """Whether products on ONNX Runtime are convolutions: its kernel for these reads weights in a better order.

    It sums a token's numbers in one order in a pass of any size too, but there is such a kernel on x86 alone.
    """
    if build.dtype != "f32" or build.quantization is not None or not on_x86():
        return False
    least, most = CONVOLVED_BYTES
    return least <= 4 * sum(math.prod(tensor.shape) for tensor in tensors) <= most


def add_zero(w: GraphWriter, like: str, name: str) -> str:
    """The byte that stands for 0 in a token's quantized inputs, (B, tokens, 1) u8 of the shape of `like`."""
    shape = w.node("Shape", [like], f"{name}.shape")
    middle = helper.make_attribute("value", numpy_helper.from_array(np.array([128], np.uint8)))
    w.node("ConstantOfShape", [shape], name)
    w.nodes[-1].attribute.append(middle)
    return name


def int8(w: GraphWriter, x: str, zero: str, name: str, source: Source, size_in: int, size_out: int) -> str:
    """Multiply by an int8 projection: inputs in 8 bits with a scale per token, weights with one per output."""
    scale = f"{x}.scale"
    if x not in w.quantized:
        w.quantized.add(x)
        most = w.node("ReduceMax", [w.node("Abs", [x], f"{x}.magnitude"), "axis.last"], f"{x}.most", keepdims=1)
        w.node("Mul", [most, "int8.step"], scale)  # (B, S, 1)
        w.node("QuantizeLinear", [x, scale, zero], f"{x}.int8", axis=2, block_size=size_in)
    weight, step = w.int8_weight(f"{name}.weight", source, size_in, size_out)
    sums = w.node("MatMulInteger", [f"{x}.int8", weight, "int8.zero"], f"{name}.sums")
    sums = w.node("Cast", [sums], f"{name}.sums.f32", to=TensorProto.FLOAT)
    return w.node("Mul", [w.node("Mul", [sums, scale], f"{name}.scaled"), step], name)


def dequantized(
    w: GraphWriter,
    kind: Quantization,
    x: str,
    name: str,
    source: Source,
    size_in: int,
    size_out: int,
    group: int = GROUP_SIZE,
) -> str:
    """Multiply by what a projection of few bits stands for, in the engine's dtype, which TensorRT does as it reads it.

    The numbers and scales are those of the other functions here, the scales rounded.
    """
    step = f"{name}.weight.step"
    values = f"{name}.weight.values"
    if kind == "int8":
        weight, scale = w.int8_weight(f"{name}.weight", source, size_in, size_out)
        w.node("DequantizeLinear", [weight, w.compute(scale, step)], values, axis=1)
    else:
        weight, scale = w.int4_weight(f"{name}.weight", source, size_in, size_out, group)
        scale = w.compute(scale, step)
        rows = w.node("DequantizeLinear", [weight, scale], f"{values}.rows", axis=1, block_size=group)
        w.node("Transpose", [rows], values, perm=[1, 0])
    return w.node("MatMul", [x, values], name)


def int4(w: GraphWriter, x: str, name: str, source: Source, size_in: int, size_out: int, group: int) -> str:
    """Multiply by an int4 projection, with a scale per output and group of inputs."""
    weights = w.int4_weight(f"{name}.weight", source, size_in, size_out, group)
    sizes = {"K": size_in, "N": size_out, "bits": 4, "block_size": group, "accuracy_level": 4}
    return w.node("MatMulNBits", [x, *weights], name, domain=CONTRIB, **sizes)

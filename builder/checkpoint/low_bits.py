"""Weights in 8 and 4 bits, as engines store them."""

from __future__ import annotations

import numpy as np

from ...contract import GROUP_SIZE

_TINY = np.finfo(np.float32).tiny  # the scale of zeros
_FITS = 2  # how often numbers of 4 bits are rounded anew for a fitted scale
_TILE = 2**16  # weights of a step in 4 bits, which the processor's cache holds


def int8_scale(weight: np.ndarray) -> np.ndarray:
    """The scales (out) f32 of a projection (out, in) f32: the row's largest magnitude is 127."""
    scale: np.ndarray = np.maximum(np.abs(weight).max(-1) / np.float32(127), _TINY)
    return scale


def quantise_int8(weight: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """The nearest int8 of a projection in f32, for scales that go with it."""
    numbers: np.ndarray = np.clip(np.rint(weight / scale), -127, 127).astype(np.int8)
    return numbers


def quantise_rows(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A projection (out, in) f32 as int8, and its scales (out) f32."""
    scale = int8_scale(weight)
    return quantise_int8(weight, scale[:, None]), scale


def quantise_int4(weight: np.ndarray, group_size: int = GROUP_SIZE) -> tuple[np.ndarray, np.ndarray]:
    """A projection (out, in) f32 as MatMulNBits reads it.

    A group's scale begins where the input of the largest magnitude is -8, then has the least squared error for the
    numbers, and these for it, `_FITS` times: no step lets the error grow.

    Returns:
        (out, groups, group_size / 2) u8, each with two inputs, the earlier one in the lower bits, as their number plus
        8; and scales (out, groups) f32.
    """
    groups = weight.reshape(-1, group_size)
    numbers = np.empty(groups.shape, np.int8)
    scale = np.empty(len(groups), np.float32)
    step = _TILE // group_size
    for start in range(0, len(groups), step):
        some = slice(start, start + step)
        numbers[some], scale[some] = _fitted(groups[some])
    rows = len(weight)
    return packed_int4(numbers.reshape(rows, -1, group_size)), scale.reshape(rows, -1)


def _fitted(groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The numbers -8..7 of groups (n, inputs) f32, and their scales (n)."""
    values = np.ascontiguousarray(groups.T)  # a group is a column, so that every step is one over long rows
    least, most = values.min(0), values.max(0)
    begin = np.where(-least < most, most, least) / np.float32(-8)
    begin = np.where(np.abs(begin) < _TINY, _TINY, begin)
    values /= begin
    numbers, products = np.empty_like(values), np.empty_like(values)
    factor = np.ones_like(begin)  # of the scale, so that no sum overflows
    for _ in range(1 + _FITS):
        np.clip(np.rint(np.divide(values, factor, out=numbers), out=numbers), -8, 7, out=numbers)
        product = np.multiply(values, numbers, out=products).sum(0)
        square = np.multiply(numbers, numbers, out=products).sum(0)
        np.divide(product, square, out=factor, where=square > 0)
    return numbers.T.astype(np.int8), begin * factor


def packed_int4(numbers: np.ndarray) -> np.ndarray:
    """Numbers -8..7 plus 8, two in a byte, the earlier one in the lower bits; an odd axis ends with half a byte."""
    fields = (numbers + 8).astype(np.uint8)
    if fields.shape[-1] % 2:
        fields = np.concatenate([fields, np.zeros_like(fields[..., :1])], axis=-1)
    packed: np.ndarray = fields[..., 0::2] | fields[..., 1::2] << 4
    return packed

"""Weights in 8 and 4 bits, as engines store them."""

from __future__ import annotations

import numpy as np

from ...contract import GROUP_SIZE

_TINY = np.finfo(np.float32).tiny  # the scale of zeros


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

    Returns:
        (out, groups, group_size / 2) u8, each with two inputs, the earlier one in the lower bits, as their number plus
        8; and scales (out, groups) f32. The input of the largest magnitude is -8, so no step is lost to an unused -8.
    """
    groups = weight.reshape(len(weight), -1, group_size)
    at = np.abs(groups).argmax(-1, keepdims=True)
    scale = np.take_along_axis(groups, at, -1) / np.float32(-8)
    scale = np.where(np.abs(scale) < _TINY, _TINY, scale)
    numbers = np.clip(np.rint(groups / scale), -8, 7).astype(np.int8)
    return packed_int4(numbers), scale[..., 0]


def packed_int4(numbers: np.ndarray) -> np.ndarray:
    """Numbers -8..7 plus 8, two in a byte, the earlier one in the lower bits; an odd axis ends with half a byte."""
    fields = (numbers + 8).astype(np.uint8)
    if fields.shape[-1] % 2:
        fields = np.concatenate([fields, np.zeros_like(fields[..., :1])], axis=-1)
    packed: np.ndarray = fields[..., 0::2] | fields[..., 1::2] << 4
    return packed

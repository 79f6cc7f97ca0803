"""Projections of a quantized checkpoint in f32, by the formats of GPTQ, AWQ, compressed-tensors and ModelOpt.

A projection is then several tensors, which are told apart by their names and shapes; see the builder's reader for the
formats' sources. This one shares no code with it.
"""

from __future__ import annotations

from collections.abc import Mapping

import ml_dtypes
import numpy as np

Parts = Mapping[str, np.ndarray]
SCALES = ("scales", "weight_scale")  # which of these there is tells a quantized projection
PARTS = (*SCALES, "qweight", "qzeros", "weight", "weight_packed", "weight_scale_2", "weight_zero_point")
_AWQ = [0, 4, 1, 5, 2, 6, 3, 7]  # the nibble of a word where each of eight outputs lies
_FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)


def kind(parts: Parts, bits: int) -> str | None:
    """The quantization of an engine that keeps these numbers; None where none does. `bits` are those of an integer."""
    if "qweight" in parts or "weight_packed" in parts:
        return "int4" if bits == 4 else None
    if parts["weight_scale"].size not in (1, len(parts["weight"])):
        return None
    return {np.dtype(np.int8): "int8", np.dtype(ml_dtypes.float8_e4m3fn): "fp8"}.get(parts["weight"].dtype)


def dequantized(parts: Parts, bits: int) -> np.ndarray:
    """A projection (out, in) f32; `bits` are those of an integer."""
    zeros: np.ndarray | None = None
    if "qweight" in parts:
        scales = parts["scales"].T
        if parts["qweight"].shape[1] == len(scales):  # GPTQ packs along the inputs, and each zero point less one
            numbers = _fields(parts["qweight"].T, bits)
            zeros = ((_fields(parts["qzeros"], bits) + 1) % 2**bits).T
        else:  # AWQ packs along the outputs
            numbers, zeros = (
                _fields(parts[name], 4).reshape(len(parts[name]), -1, 8)[..., _AWQ].reshape(len(parts[name]), -1).T
                for name in ("qweight", "qzeros")
            )
    elif "weight_packed" in parts:
        scales = parts["weight_scale"]
        numbers = _fields(parts["weight_packed"], bits)
        zeros = np.full((1, 1), 2 ** (bits - 1))
        if "weight_zero_point" in parts:
            zeros = _fields(parts["weight_zero_point"].T, bits).T
    elif "weight_scale_2" in parts:  # NVFP4
        scales = parts["weight_scale"].astype(np.float32) * parts["weight_scale_2"].reshape(())
        fields = np.stack([parts["weight"] & 15, parts["weight"] >> 4], axis=-1).reshape(len(parts["weight"]), -1)
        numbers = np.where(fields & 8, -1, 1).astype(np.float32) * _FP4[fields & 7]
    else:
        numbers, scales = parts["weight"], parts["weight_scale"].reshape(-1, 1)
        if parts["weight_scale"].size > len(numbers):
            scales = parts["weight_scale"]
    grouped = numbers.astype(np.float32).reshape(len(numbers), scales.shape[1], -1)
    if zeros is not None:
        grouped = grouped - zeros.astype(np.float32)[..., None]
    weight: np.ndarray = (grouped * scales.astype(np.float32)[..., None]).reshape(len(numbers), -1)
    return weight


def _fields(words: np.ndarray, bits: int) -> np.ndarray:
    """(n, words) as (n, words * 32 / bits), the lowest bits first."""
    unsigned = np.ascontiguousarray(words).view(np.uint32)
    fields = [unsigned >> np.uint32(at) & np.uint32(2**bits - 1) for at in range(0, 32, bits)]
    return np.stack(fields, axis=-1).reshape(len(words), -1).astype(np.int64)

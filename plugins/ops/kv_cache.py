"""How a cache keeps K and V in 8 bits: every token's head as a row of bytes with one scale.

A row x of D numbers becomes values and a scale, x = values * scale or nearly. `int8`: whole numbers from -127 to 127,
the scale is the largest magnitude over 127; `fp8`: e4m3 as its bits, and 448. A row depends on nothing but its own
numbers, so what a token leaves in the cache is the same whatever else is in its pass.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from ...contract import KvBits
from ..op import Dtype

LARGEST: dict[KvBits, float] = {"int8": 127.0, "fp8": 448.0}
STORED: dict[KvBits, Dtype] = {"int8": "i8", "fp8": "u8"}
CODE: dict[KvBits, int] = {"int8": 1, "fp8": 2}  # for the kernels; 0 is the engine's dtype


def quantise(x: np.ndarray, kind: KvBits) -> tuple[np.ndarray, np.ndarray]:
    """The nearest numbers to rows (..., D), as i8 or as the bits of e4m3 in u8, and the rows' scales (...) f32.

    A tie goes to the even number; a row of zeros has the smallest scale.
    """
    x = x.astype(np.float32)
    scale = np.maximum(np.abs(x).max(-1) / np.float32(LARGEST[kind]), np.finfo(np.float32).tiny)
    over = np.clip(x / scale[..., None], -LARGEST[kind], LARGEST[kind])
    if kind == "int8":
        return np.rint(over).astype(np.int8), scale
    return over.astype(ml_dtypes.float8_e4m3fn).view(np.uint8), scale


def dequantise(values: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """The rows that values and scales stand for, f32."""
    numbers = values if values.dtype == np.int8 else values.view(ml_dtypes.float8_e4m3fn)
    rows: np.ndarray = numbers.astype(np.float32) * scale[..., None]
    return rows

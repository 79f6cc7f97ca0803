"""An image as the vision graph takes it: resized, normalized, cut into patches."""

from __future__ import annotations

import dataclasses
import functools
import hashlib

import numpy as np

from ...vision import CHANNELS, VisionConfig

# CLIP's, by which the released processor normalizes.
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
_SHARPNESS = -0.75  # of the cubic kernel: OpenCV's INTER_CUBIC, with which the released processor resizes


@dataclasses.dataclass(frozen=True, eq=False)
class Image:
    """A picture as the tower takes it; `columns` and `rows` are of its tokens.

    The patches of a token are neighbours, row by row, and so are the tokens of the image.
    """

    patches: np.ndarray  # (N, 3 * patch_size^2) f32, ordered channel, row, column
    positions: np.ndarray  # (N, 2) i32: row and column
    columns: int
    rows: int

    @functools.cached_property
    def digest(self) -> bytes:
        """What its content is known by, 32 bytes: equal only for equal pixels of equal shape."""
        digest = hashlib.sha256(f"{self.columns} x {self.rows}".encode())
        digest.update(self.patches.data)
        return digest.digest()

    @property
    def tokens(self) -> int:
        """Its tokens in a prompt: pads, breaks, start and end."""
        return self.rows * (self.columns + 1) + 1

    def layout(self, start: int, pad: int, row_break: int, end: int) -> list[int]:
        """Its token ids in a prompt: a start, rows of pads with a break between two, an end."""
        ids = [start]
        for _ in range(self.rows):
            ids += [*[pad] * self.columns, row_break]
        ids[-1] = end
        return ids


def make_image(pixels: np.ndarray, vision: VisionConfig, limit: int) -> Image:
    """Resize, normalize and cut a picture.

    Args:
        pixels: (height, width, 3) u8.
        vision: gives the sizes of patches and tokens.
        limit: pixels that the longer side of a larger picture is scaled down to.
    """
    height, width = pixels.shape[:2]
    columns, rows = vision.grid(width, height, limit)
    sizes = (rows * vision.cell, columns * vision.cell)
    # The axis that shrinks most comes first, so that a strip of millions of pixels is never widened.
    for axis in sorted((1, 0), key=lambda axis: sizes[axis] / pixels.shape[axis]):
        pixels = _resized(pixels, sizes[axis], axis)
    normal = (pixels / np.float32(255) - MEAN) / STD
    side, merge = vision.patch_size, vision.merge
    # (token row, patch row in it, pixel row in that, and the same for columns, channel)
    cut = normal.reshape(rows, merge, side, columns, merge, side, CHANNELS)
    patches = np.ascontiguousarray(cut.transpose(0, 3, 1, 4, 6, 2, 5)).reshape(-1, CHANNELS * side * side)
    grid = np.stack(np.meshgrid(np.arange(rows * merge), np.arange(columns * merge), indexing="ij"), axis=-1)
    positions = grid.reshape(rows, merge, columns, merge, 2).transpose(0, 2, 1, 3, 4).reshape(-1, 2)
    return Image(patches, np.ascontiguousarray(positions, np.int32), columns, rows)


def _resized(pixels: np.ndarray, size: int, axis: int) -> np.ndarray:
    """Cubic interpolation along one axis, without smoothing where it shrinks, the edge repeated beyond itself."""
    old = pixels.shape[axis]
    if old == size:
        return pixels
    at = ((np.arange(size) + 0.5) * (old / size) - 0.5).astype(np.float32)  # OpenCV rounds here
    first = np.floor(at).astype(np.int64)
    t = at - first.astype(np.float32)
    a = np.float32(_SHARPNESS)
    near = [((a + 2) * d - (a + 3)) * d * d + 1 for d in (t, 1 - t)]
    before = ((a * (t + 1) - 5 * a) * (t + 1) + 8 * a) * (t + 1) - 4 * a
    weights = [before, near[0], near[1], 1 - before - near[0] - near[1]]
    shape = [1] * pixels.ndim
    shape[axis] = size
    result = np.float32(0)
    for tap, weight in enumerate(weights):
        taken = np.take(pixels, (first + tap - 1).clip(0, old - 1), axis=axis)
        result = result + taken * weight.reshape(shape)
    return np.asarray(result)

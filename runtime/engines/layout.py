"""Where the small bindings of one shape of a pass lie in one buffer, and how a pass is written there.

In: an engine's description, the shape (rows, S, R) and passes. Out: offsets for a device and numpy views for the host.
A GPU engine copies one such buffer up and one down per step, whatever the number of bindings. The surprising fact:
padding is written, not left out: a padding token has a slot of its own past the pass and sees that alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from ...contract import Binding, inputs, outputs
from ...engine_folder import EngineInfo
from .engine import Pass

ALIGNMENT = 256  # bytes, of every address that TensorRT gets; Triton assumes 16
_NUMPY: dict[str, type] = {"i32": np.int32, "f32": np.float32}


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the small bindings of one shape lie in one buffer: name -> (offset, dtype, shape)."""

    places: dict[str, tuple[int, type, tuple[int, ...]]]
    nbytes: int

    def views(self, buffer: np.ndarray) -> dict[str, np.ndarray]:
        """Each binding as an array over the buffer, (nbytes,) u8."""
        return {
            name: buffer[at : at + 4 * math.prod(shape)].view(dtype).reshape(shape)
            for name, (at, dtype, shape) in self.places.items()
        }


# What `SampledCommit` takes beside the logits and the threshold, given only where a row is sampled; see
# `plugins/ops/confidence_commit.py`.
SAMPLING = (
    Binding("picked", "i32", ("B", "R")),  # its `ids`
    Binding("temperature", "f32", ("B",)),
    Binding("seed", "i32", ("B", 2)),
    Binding("position", "i32", ("B", "R")),
)


def layouts(info: EngineInfo, rows: int, size: int, predicted: int, sampled: bool = False) -> tuple[Layout, Layout]:
    """The layouts of what a pass is given and of what is taken from it."""
    lengths = {"B": rows, "S": size, "R": predicted}

    def layout(bindings: list[Binding]) -> Layout:
        places, end = {}, 0
        for b in bindings:
            if b.kind != "compute" and b.name != "logits":
                shape = tuple(lengths[d] if isinstance(d, str) else d for d in b.shape)
                places[b.name] = (end, _NUMPY[b.kind], shape)
                end += -(-4 * math.prod(shape) // ALIGNMENT) * ALIGNMENT
        return Layout(places, end)

    given = [*inputs(info.model, info.has_adapter), *(SAMPLING if sampled else ())]
    return layout(given), layout(outputs(info.model))


def fill(given: Mapping[str, np.ndarray], row: int, p: Pass, mask_id: int) -> None:
    """Write one row's inputs; padding tokens write past the pass and see their own slot only."""
    size, predicted, whole = p.ids.size, p.predicted.size, given["ids"].shape[1]
    given["ids"][row, :size], given["pos"][row, :size] = p.ids, p.pos
    given["visible"][row, :size], given["write_at"][row] = p.visible, p.write_at
    given["rows"][row, :predicted], given["rows"][row, predicted:] = p.predicted, whole - 1
    given["threshold"][row] = p.threshold
    if "adapter" in given:
        given["adapter"][row, :size], given["adapter"][row, size:] = p.adapter, 0
    if size < whole:
        own = np.arange(p.write_at + size, p.write_at + whole, dtype=np.int32)
        given["ids"][row, size:], given["pos"][row, size:] = int(mask_id == 0), own  # any id but the mask
        given["visible"][row, size:] = np.stack([np.zeros_like(own), own, own + 1], axis=1)
    if "seed" in given:
        ids, pos = (given[name][row][given["rows"][row]] for name in ("ids", "pos"))  # (R,) i32
        given["temperature"][row] = p.temperature
        given["seed"][row] = np.array([p.seed], np.uint64).view(np.int32)
        given["picked"][row] = ids
        given["position"][row] = pos + (ids != mask_id)  # a mask stands where its token goes, another token before it


def rounded(number: int, limit: int) -> int:
    """The next power of two, at most `limit`."""
    return min(1 << (number - 1).bit_length(), limit)

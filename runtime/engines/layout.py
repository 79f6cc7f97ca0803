"""The shape of a forward, where its small bindings lie in one buffer, and how a pass is written there.

A GPU engine copies one buffer of inputs up and one of outputs down per step, whatever the number of bindings.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ...contract import Binding, inputs, outputs
from ...engine_info import EngineInfo
from .passes import Pass

ALIGNMENT = 256  # bytes, of every address that TensorRT gets; Triton assumes 16
_NUMPY: dict[str, type] = {"i32": np.int32, "f32": np.float32}


class PassShape(NamedTuple):
    """What decides the buffers of a forward; each engine keeps buffers, contexts and graphs by it."""

    first: int  # the first row of the cache
    rows: int  # B
    tokens: int  # S
    predicted: int  # R
    logits: bool = False  # whether a row wants its logits on the host
    sampled: bool = False  # whether a row is sampled on the device
    embedded: bool = False  # whether a row has embeddings of an image


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


# The inputs of `SampledCommit` (`plugins/ops/confidence_commit.py`) beside logits and threshold.
SAMPLING = (
    Binding("predicted_ids", "i32", ("B", "R")),  # the op's `ids`
    Binding("temperature", "f32", ("B", "R")),
    Binding("seed", "i32", ("B", 2)),
    Binding("position", "i32", ("B", "R")),
)


def layouts(info: EngineInfo, shape: PassShape) -> tuple[Layout, Layout]:
    """The layouts of the inputs and of the outputs of a forward."""
    bindings = inputs(info.model, info.has_adapter)
    if shape.sampled:
        bindings += SAMPLING
    lengths = {"B": shape.rows, "S": shape.tokens, "R": shape.predicted}
    lengths["F"] = shape.rows * shape.tokens if shape.embedded else 1
    return layout(bindings, lengths), layout(outputs(info.model), lengths)


def layout(bindings: Sequence[Binding], lengths: Mapping[str, int]) -> Layout:
    """The small bindings one after the other; caches and logits have memory of their own."""
    places = {}
    end = 0
    for binding in bindings:
        if binding.kind == "compute" or binding.name == "logits":
            continue
        sizes = tuple(lengths[size] if isinstance(size, str) else size for size in binding.shape)
        places[binding.name] = (end, _NUMPY[binding.kind], sizes)
        end += -(-4 * math.prod(sizes) // ALIGNMENT) * ALIGNMENT
    return Layout(places, end)


def fill(arrays: Mapping[str, np.ndarray], row: int, p: Pass, mask_id: int) -> None:
    """Write one row's inputs; padding tokens write past the pass and see their own slot only."""
    ids = arrays["ids"][row]  # (S,) i32
    pos = arrays["pos"][row]
    visible = arrays["visible"][row]
    predicted = arrays["rows"][row]  # (R,) i32
    size = p.ids.size
    ids[:size] = p.ids
    pos[:size] = p.pos
    visible[:size] = p.visible
    predicted[: p.predicted.size] = p.predicted
    predicted[p.predicted.size :] = ids.size - 1
    arrays["write_at"][row] = p.write_at
    arrays["threshold"][row] = p.threshold
    if "adapter" in arrays:
        arrays["adapter"][row, :size] = p.adapter
        arrays["adapter"][row, size:] = 0
    if size < ids.size:
        own = np.arange(p.write_at + size, p.write_at + ids.size, dtype=np.int32)
        ids[size:] = int(mask_id == 0)  # any id but the mask
        pos[size:] = own
        visible[size:] = np.stack([np.zeros_like(own), own, own + 1], axis=1)
    if "embedding" in arrays:
        arrays["embedding"][row] = -1
        if p.embedded is not None:
            places = row * ids.size + p.embedded
            arrays["embedding"][row, p.embedded] = places
            arrays["embeddings"][places] = p.embeddings
    if "seed" in arrays:
        predicted_ids = ids[predicted]
        masked = predicted_ids == mask_id
        arrays["temperature"][row] = np.where(masked, p.mask_temperature, p.temperature)
        arrays["seed"][row] = np.array([p.seed], np.uint64).view(np.int32)
        arrays["predicted_ids"][row] = predicted_ids
        # A mask stands at its token's position, any other token one before it.
        arrays["position"][row] = pos[predicted] + ~masked


def rounded(number: int, limit: int) -> int:
    """The next power of two, at most `limit`."""
    return min(1 << (number - 1).bit_length(), limit)

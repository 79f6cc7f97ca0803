"""The safetensors format: headers are read and written here and nowhere else in the builder.

A file is the header's length (8 bytes, little endian), the header (JSON: dtype, shape and place of each tensor), and
the tensors' bytes with nothing between them.
"""

from __future__ import annotations

import dataclasses
import json
import re
import struct
from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from ...errors import CheckpointError
from ..files import forget

DTYPES: dict[str, np.dtype[Any]] = {  # that a checkpoint may have
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
}
# That the parts of quantized projections have as well.
PACKED_DTYPES: dict[str, np.dtype[Any]] = {
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
}
CODES = {dtype: code for code, dtype in (DTYPES | PACKED_DTYPES).items()}
PIECE = 16 * 2**20  # bytes copied at once
# Buffers that older checkpoints carry and every loader computes anew from the config: they are passed over.
_RECOMPUTED = re.compile(r"(.*\.)?(rotary_emb\.(inv_freq|original_inv_freq|cos_cached|sin_cached)|position_ids)")
_ALIGNMENT = 8  # bytes; the format wants the data aligned


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where one tensor lies."""

    file: Path
    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int  # in the file

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def array(self) -> np.ndarray:
        """The tensor as a read-only map of the file."""
        return np.memmap(self.file, self.dtype, "r", self.offset, self.shape)

    def forget(self) -> None:
        """Let the system take back the memory that holds it; every map of it must be gone."""
        with self.file.open("rb") as file:
            forget(file, self.offset, self.nbytes)


@dataclasses.dataclass(frozen=True)
class Entry:
    """What a header says about one tensor; `begin` and `end` count bytes from the end of the header."""

    dtype: str  # the format's code
    shape: Sequence[int]
    begin: int
    end: int


def recomputed(name: str) -> bool:
    """Whether a tensor is no weight but a buffer that the config gives."""
    return _RECOMPUTED.fullmatch(name) is not None


def read_tensors(path: Path, without: Set[str] = frozenset(), packed: bool = False) -> dict[str, Tensor]:
    """Find all weights of one file, `without` those of these names, with `packed` also those of quantized projections.

    Raises CheckpointError.
    """
    dtypes = DTYPES | PACKED_DTYPES if packed else DTYPES
    header, begin = read_header(path)
    tensors = {}
    for name, entry in header.items():
        if recomputed(name) or name in without:
            continue
        if entry["dtype"] not in dtypes:
            raise CheckpointError(
                f"{path}: tensor {name} has dtype {entry['dtype']}, allowed: {', '.join(dtypes)}; "
                "use a checkpoint in one of them"
            )
        offset = begin + entry["data_offsets"][0]
        tensors[name] = Tensor(path, name, dtypes[entry["dtype"]], tuple(entry["shape"]), offset)
    return tensors


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """What a file says of each tensor, and the offset at which its data begins. Raises CheckpointError."""
    again = "download the file again"
    if not path.is_file():
        raise CheckpointError(f"{path}: missing; {again}")
    try:
        # The library itself proves the header and the file's length when it opens the file.
        with safe_open(path, framework="np"), path.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
    except (SafetensorError, OSError, ValueError, struct.error) as error:
        raise CheckpointError(f"{path}: not a whole safetensors file ({error}); {again}") from None
    header.pop("__metadata__", None)
    return header, 8 + length


def header_bytes(
    entries: Mapping[str, Entry], metadata: Mapping[str, str] | None = None, alignment: int = _ALIGNMENT
) -> bytes:
    """Everything before the data, which begins at a multiple of `alignment`."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    for name, entry in entries.items():
        header[name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [entry.begin, entry.end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % alignment)
    return struct.pack("<Q", len(text)) + text


def write_hollow(path: Path, entries: Mapping[str, Entry]) -> None:
    """Write a file that has its header and, as a hole, the length of its data."""
    with path.open("wb") as out:
        out.write(header_bytes(entries))
        out.truncate(out.tell() + max((entry.end for entry in entries.values()), default=0))


def copy_tensors(
    tensors: Sequence[Tensor], rename: Callable[[str], str], path: Path, advance: Callable[[int], object]
) -> None:
    """Copy tensors of one file, in order of their offsets, into a new file under other names.

    `advance` gets each number of bytes copied. Raises CheckpointError.
    """
    file = tensors[0].file
    entries = {}
    left = 0  # bytes to copy
    for tensor in tensors:
        entries[rename(tensor.name)] = Entry(CODES[tensor.dtype], tensor.shape, left, left + tensor.nbytes)
        left += tensor.nbytes
    with file.open("rb") as source, path.open("wb") as out:
        out.write(header_bytes(entries, {"format": "pt"}))
        for tensor in tensors:
            source.seek(tensor.offset)
            end = tensor.offset + tensor.nbytes
            while source.tell() < end:
                piece = source.read(min(PIECE, end - source.tell()))
                if not piece:
                    raise CheckpointError(
                        f"{file}: ended {left} bytes early while it was copied; download the file again"
                    )
                out.write(piece)
                left -= len(piece)
                advance(len(piece))

"""A Hugging Face checkpoint folder, opened strictly and read from its config and headers alone."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ...config import ModelConfig, parse_config
from ...engine_folder import CONFIG_FILE, GENERATION_FILE, TOKENIZER_CONFIG_FILE, TOKENIZER_FILE, made_as
from ...errors import CheckpointError
from .adapter import Adapter, open_adapter
from .folder import carried, read_json
from .image_tokens import check_image_tokens, image_token_notes
from .notes import end_notes, weight_notes
from .quantized import QuantizedTensor, assemble
from .safetensors_file import Tensor
from .scheme import parse_scheme
from .shards import open_weights

Stamp = tuple[int, int] | None  # size in bytes and time of change in ns; None of a file that is not there


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint folder says, and where each of its tensors lies.

    `generation` is its generation_config.json, `notes` says where its files contradict each other, and `stamps` tell
    whether a file is still what was opened.
    """

    folder: Path
    config: dict[str, Any]
    model: ModelConfig
    tensors: dict[str, Tensor | QuantizedTensor]
    adapter: Adapter | None
    generation: dict[str, Any]
    notes: tuple[str, ...]
    stamps: Mapping[Path, Stamp] = dataclasses.field(default_factory=dict)

    @property
    def files(self) -> dict[str, Path]:
        """The files the engine is made from, by the names they have in a whole checkpoint, in a fixed order."""
        named: dict[str, Path] = {}
        for tensor in self.tensors.values():
            parts = tensor.parts.values() if isinstance(tensor, QuantizedTensor) else [tensor]
            named |= {part.file.name: part.file for part in parts}
        named |= {name: self.folder / name for name in (CONFIG_FILE, *carried(self.folder))}
        if self.adapter:
            named |= self.adapter.files
        return dict(sorted(named.items()))

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Read the files inside. Raises CheckpointError if one has changed since the checkpoint was opened.

        What else fails inside may have failed for that reason, so it is looked for first.
        """
        try:
            yield
        except Exception:
            self._check_stamps()
            raise
        self._check_stamps()

    def _check_stamps(self) -> None:
        for path, stamp in self.stamps.items():
            now = _stamp(path)
            if now != stamp:
                state = "is gone" if now is None else "has changed"
                raise CheckpointError(
                    f"{path}: the file {state} while it was read; run the command again when the checkpoint is whole"
                )


def open_checkpoint(folder: Path, adapter: Path | None = None) -> Checkpoint:
    """Read a checkpoint folder and its drafter adapter, or the adapter in the folder `adapter`.

    Raises CheckpointError.
    """
    _check_kind(folder)
    config = read_json(folder / CONFIG_FILE)
    generation = _read_if_there(folder / GENERATION_FILE)
    model = parse_config(config, generation)
    tokenizer = _open_tokenizer(folder, model.vocab_size)
    ends = end_notes(model, config, generation, tokenizer, _read_if_there(folder / TOKENIZER_CONFIG_FILE))
    if model.vision:
        check_image_tokens(folder, tokenizer)
        ends = [*ends, *image_token_notes(config, tokenizer)]
    scheme = parse_scheme(config, folder / CONFIG_FILE)
    opened = open_weights(folder, packed=scheme is not None)
    notes = (*ends, *weight_notes(folder, opened))
    tensors: dict[str, Tensor | QuantizedTensor] = {**opened}
    if scheme is not None:
        tensors = assemble(opened, scheme)
        notes = (*notes, scheme.note())
    checkpoint = Checkpoint(folder, config, model, tensors, open_adapter(folder, adapter), generation, notes)
    return dataclasses.replace(checkpoint, stamps={path: _stamp(path) for path in checkpoint.files.values()})


def _stamp(path: Path) -> Stamp:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_size, stat.st_mtime_ns


def _read_if_there(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _check_kind(folder: Path) -> None:
    """Refuse what nemodiff itself has made of a checkpoint."""
    made = made_as(folder)
    if made is not None:
        kind, name = made
        source = "" if name is None else f": {name}"
        raise CheckpointError(f"{folder}: {kind}, not a checkpoint; give the checkpoint that it was made from{source}")


def _open_tokenizer(folder: Path, vocab_size: int) -> Tokenizer:
    """Read it, and refuse here what the engine could only refuse once it is built."""
    path = folder / TOKENIZER_FILE
    if not path.is_file():
        raise CheckpointError(f"{path}: missing; an engine carries its tokenizer, so download the checkpoint again")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise CheckpointError(f"{path}: not a tokenizer ({error}); download the file again") from None
    highest = max(tokenizer.get_vocab().values(), default=0)
    if highest >= vocab_size:
        raise CheckpointError(
            f"{path}: holds token id {highest}, allowed: ids below vocab_size {vocab_size} of {CONFIG_FILE}; "
            "download the checkpoint again"
        )
    return tokenizer

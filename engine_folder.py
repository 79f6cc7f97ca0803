"""An engine folder: the names of its files, what marks it as one, and the records that are kept beside them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from .errors import EngineError, NemodiffError
from .whole_file import whole

ENGINE_FILE = "rank0.engine"  # of the TensorRT backends
COMPILED_FOLDER = "compiled"  # what a torch engine's first load on a GPU has compiled, so not in the manifest
MODEL_FILE = "model.onnx"
WEIGHTS_FILE = "model.onnx.data"
TENSORS_FILE = "model.safetensors"  # the weights of the torch backend, by the names they have in the graph
# The second graph of a model that sees images.
VISION_MODEL_FILE = "vision.onnx"
VISION_WEIGHTS_FILE = "vision.onnx.data"
VISION_TENSORS_FILE = "vision.safetensors"
VISION_ENGINE_FILE = "vision.engine"  # of the TensorRT backends
CONFIG_FILE = "config.json"
MANIFEST_FILE = "manifest.json"
TWIN_FILE = "nemodiff_export.json"  # marks an exported twin; no loader reads it
TRITON_FILE = "nemodiff_triton.json"  # marks an exported Triton model
TRITON_ENGINE = "1/engine"  # the engine in an exported Triton model
VERIFY_FILE = "verify.json"  # what `nemodiff verify` found last; written after the build, so not in the manifest
TUNED_FILE = "tuned.json"  # what `nemodiff tune` has chosen on cards; likewise a record
COST_FILE = "cost_curves.json"  # what `nemodiff bench` has measured last; likewise a record
GENERATION_FILE = "generation_config.json"
PROPOSED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")  # what of that file is sampling
TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
TEMPLATES_FOLDER = "additional_chat_templates"  # of named ones, NAME.jinja
DEFAULT_TEMPLATE_FILE = f"{TEMPLATES_FOLDER}/default.jinja"


class ImageTokens(NamedTuple):
    """The special tokens of an image in a prompt: a start, rows of pads with a break between two, and an end."""

    start: str = "<|image_start|>"
    pad: str = "<|image_pad|>"
    row_break: str = "<|image_break|>"
    end: str = "<|image_end|>"


IMAGE_TOKENS = ImageTokens()


def engine_path(path: object) -> Path:
    """What a user gives as an engine's folder. Raises EngineError where that is no path, or one not of UTF-8."""
    if not isinstance(path, (str, os.PathLike)):
        raise EngineError(
            f"path is {path!r:.60}, allowed: the path of a folder made by: nemodiff build CHECKPOINT -o PATH"
        )
    check_utf8(Path(path), EngineError)
    return Path(path)


def check_utf8(path: Path, error: type[NemodiffError]) -> None:
    """Refuse a path that is no text: a system allows it, what reads tokenizers and graphs does not. Raises `error`."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise error(f"{path}: the path is not UTF-8; rename it, or choose a locale of UTF-8 if it is") from None


def engine_digest(folder: Path) -> str:
    """sha256 of the description, by which a record knows the engine that it was made of."""
    return hashlib.sha256((folder / CONFIG_FILE).read_bytes() + (folder / MANIFEST_FILE).read_bytes()).hexdigest()


def write_record(folder: Path, name: str, values: Mapping[str, Any]) -> None:
    """Put a record beside an engine's files, whole or not at all, with the engine's digest. Raises OSError."""
    record = {**values, "engine": engine_digest(folder)}
    with whole(folder / name) as stage:
        stage.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def read_record(folder: Path, name: str) -> dict[str, Any] | None:
    """A record that was made of this very engine; None where there is none, or one that cannot be read."""
    try:
        record = json.loads((folder / name).read_text(encoding="utf-8"))
        return record if record["engine"] == engine_digest(folder) else None
    except (OSError, ValueError, RecursionError, LookupError, TypeError):
        return None


def is_engine(folder: Path) -> bool:
    """Whether a folder claims to be an engine (it may still be a broken one)."""
    return (folder / MANIFEST_FILE).is_file()


def made_as(folder: Path) -> tuple[str, str | None] | None:
    """What nemodiff wrote a folder as and its checkpoint's name if it is known; None if nemodiff did not write it."""
    for marker, kind, described in (
        (MANIFEST_FILE, "an engine", MANIFEST_FILE),
        (TWIN_FILE, "an exported twin", TWIN_FILE),
        (TRITON_FILE, "an exported Triton model", f"{TRITON_ENGINE}/{MANIFEST_FILE}"),
    ):
        name = None
        with contextlib.suppress(OSError, ValueError, RecursionError, LookupError, TypeError):
            name = json.loads((folder / described).read_text(encoding="utf-8"))["checkpoint"]["name"]
        # Others have a manifest.json too.
        if (folder / marker).is_file() and (name is not None or marker != MANIFEST_FILE):
            return kind, name if isinstance(name, str) else None
    return None


def quoted(path: Path) -> str:
    """A path as a word of a command that somebody may copy."""
    return f'"{path}"' if sys.platform == "win32" else shlex.quote(str(path))


def build_again(folder: Path) -> str:
    """What to do about an engine that cannot be used."""
    return f"build it again: nemodiff build CHECKPOINT -o {quoted(folder)}"

"""The engine folder: what its description says, how it is read, checked and written."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from .config import ModelConfig, parse_config
from .contract import (
    BACKEND_DTYPES,
    COMPILED,
    GROUP_SIZES,
    ITEMSIZE,
    KV_CACHE_DTYPES,
    MAX_BATCH,
    MAX_BLOCK,
    QUANTIZATIONS,
    BuildConfig,
)
from .errors import CheckpointError, EngineError
from .tensorrt_info import TensorRTInfo, parse_tensorrt
from .whole_file import whole

# A reader refuses a newer schema. It reads 6, whose graph has no memory_pattern, 5, which has no group_size, 4, which
# has no kv_cache_dtype, 3, which has no images, 2, which has no quantization, and 1, which has no max_input_len either.
SCHEMA = 7
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


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Where an engine comes from and what its folder holds.

    File entries: `{name: {bytes, sha256}}`, names relative to the folder. `tensorrt` is there for its backends only.
    """

    schema: int
    backend: str
    versions: dict[str, str]
    checkpoint: dict[str, Any]
    adapter: dict[str, Any] | None
    files: dict[str, dict[str, Any]]
    tensorrt: TensorRTInfo | None = None


@dataclasses.dataclass(frozen=True)
class EngineInfo:
    """An engine folder's description. `pretrained` is the checkpoint's config.json as it was."""

    model: ModelConfig
    build: BuildConfig
    manifest: Manifest
    pretrained: Mapping[str, Any]

    @property
    def has_adapter(self) -> bool:
        return self.manifest.adapter is not None

    def write(self, folder: Path) -> None:
        """Write config.json and manifest.json."""
        config = {"pretrained_config": self.pretrained, "build_config": dataclasses.asdict(self.build)}
        for name, values in ((CONFIG_FILE, config), (MANIFEST_FILE, dataclasses.asdict(self.manifest))):
            (folder / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


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
    return shlex.quote(str(path))


def build_again(folder: Path) -> str:
    """What to do about an engine that cannot be used."""
    return f"build it again: nemodiff build CHECKPOINT -o {quoted(folder)}"


def read_engine(folder: Path) -> EngineInfo:
    """Read and check an engine folder's description. Raises EngineError with the command that fixes it."""
    again = build_again(folder)
    _check_is_engine(folder, again)
    manifest = _read_object(folder / MANIFEST_FILE, again)
    _check_schema(folder, manifest.get("schema"), again)
    _check_manifest(manifest, folder / MANIFEST_FILE, again)
    config = _read_object(folder / CONFIG_FILE, again)
    generation = _read_object(folder / GENERATION_FILE, again) if (folder / GENERATION_FILE).is_file() else None
    try:
        build = BuildConfig(**config["build_config"])
        model = parse_config(config["pretrained_config"], generation)
        checked = Manifest(**{**manifest, "tensorrt": parse_tensorrt(manifest.get("tensorrt"))})
        info = EngineInfo(model, build, checked, config["pretrained_config"])
        sizes = {name: int(entry["bytes"]) for name, entry in info.manifest.files.items()}
    except CheckpointError as error:
        raise EngineError(f"{folder}: {error}; {again}") from None
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise EngineError(f"{folder}: {CONFIG_FILE} and {MANIFEST_FILE} are incomplete ({error}); {again}") from None
    _check_build(build, folder / CONFIG_FILE, again)
    _check_backend(info, folder, again)
    _check_images(info, folder / CONFIG_FILE, again)
    _check_sizes(folder, sizes, again)
    if (folder / TOKENIZER_CONFIG_FILE).is_file():
        _read_object(folder / TOKENIZER_CONFIG_FILE, again)
    return info


def _check_is_engine(folder: Path, again: str) -> None:
    if folder.is_file():
        ours = folder.parent if is_engine(folder.parent) else "the one that nemodiff build has made"
        raise EngineError(f"{folder}: a file, expected an engine folder; give {ours}")
    if not folder.is_dir():
        raise EngineError(
            f"{folder}: no such folder; expected an engine made by: nemodiff build CHECKPOINT -o {quoted(folder)}"
        )
    if not is_engine(folder):
        hint = again
        made = made_as(folder)
        if made is not None and (folder / TRITON_FILE).is_file():
            hint = f"it is {made[0]}, whose engine is in {folder / TRITON_ENGINE}"
        elif made is not None:
            hint = f"it is {made[0]} for other programs; build an engine from the checkpoint it was made from"
        elif any(folder.glob("*.safetensors")):
            hint = f"it looks like a checkpoint, so build it first: nemodiff build {quoted(folder)} -o ENGINE"
        raise EngineError(f"{folder}: not an engine, {MANIFEST_FILE} is missing; {hint}")


def _check_schema(folder: Path, schema: Any, again: str) -> None:
    if isinstance(schema, bool) or not isinstance(schema, int) or schema < 1:
        raise EngineError(f"{folder / MANIFEST_FILE}: schema is {schema!r}, allowed: 1 to {SCHEMA}; {again}")
    if schema > SCHEMA:
        raise EngineError(
            f"{folder}: written with engine schema {schema}, this nemodiff reads up to {SCHEMA}; "
            f"update nemodiff or {again}"
        )


def _check_manifest(manifest: Mapping[str, Any], path: Path, again: str) -> None:
    """Refuse fields of another kind than those that a build has written; missing ones are seen elsewhere."""
    kinds = {"backend": (str, "text"), "versions": (dict, "an object"), "checkpoint": (dict, "an object")}
    _check_kinds(manifest, {**kinds, "adapter": (dict | None, "an object or null")}, path, again)
    if manifest.get("adapter") is not None:
        _check_kinds({"rank": None, **manifest["adapter"]}, {"rank": (int, "an integer")}, path, again)


def _check_kinds(values: Mapping[str, Any], kinds: Mapping[str, tuple[Any, str]], path: Path, again: str) -> None:
    for name, (kind, allowed) in kinds.items():
        if name in values and not isinstance(values[name], kind):
            raise EngineError(f"{path}: {name} is {values[name]!r:.100}, allowed: {allowed}; {again}")


def _check_sizes(folder: Path, sizes: dict[str, int], again: str) -> None:
    for name, size in sizes.items():
        path = folder / name
        nbytes = path.stat().st_size if path.is_file() else None
        if nbytes != size:
            state = "missing" if nbytes is None else f"{nbytes} bytes"
            raise EngineError(f"{path}: {state}, the manifest says {size} bytes; copy it whole or {again}")


def _check_build(build: BuildConfig, path: Path, again: str) -> None:
    kinds = {"dtype": (str, "text"), "quantization": (str | None, "text or null"), "kv_cache_dtype": (str, "text")}
    logits = {"gather_generation_logits": (bool, "true or false")}
    _check_kinds(dataclasses.asdict(build), {**kinds, **logits}, path, again)
    if build.dtype not in tuple(ITEMSIZE):
        raise EngineError(f"{path}: dtype is {build.dtype!r}, allowed: {', '.join(ITEMSIZE)}; {again}")
    limits = {
        "max_seq_len": 2**31 - 1,
        "max_batch_size": MAX_BATCH,
        "block_length": MAX_BLOCK,
        "max_input_len": 2**31 - 1,
    }
    for name, high in limits.items():
        value = getattr(build, name)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= high:
            raise EngineError(f"{path}: {name} is {value!r}, allowed: 1 to {high}; {again}")


def _check_backend(info: EngineInfo, folder: Path, again: str) -> None:
    backend = info.manifest.backend
    dtype = info.build.dtype
    dtypes = {str(name): allowed for name, allowed in BACKEND_DTYPES.items()}.get(backend)
    if dtypes is None:
        raise EngineError(f"{folder}: built for backend {backend!r}, allowed: {', '.join(BACKEND_DTYPES)}; {again}")
    if dtype not in dtypes:
        raise EngineError(f"{folder}: dtype is {dtype} on {backend}, allowed: {', '.join(dtypes)}; {again}")
    quantization = info.build.quantization
    if quantization is not None and backend not in QUANTIZATIONS.get(quantization, ()):
        raise EngineError(
            f"{folder}: quantization is {quantization!r} on {backend}, allowed: "
            f"{', '.join(name for name, backends in QUANTIZATIONS.items() if backend in backends) or 'none'}; {again}"
        )
    groups = {str(name): sizes for name, sizes in GROUP_SIZES.items()}.get(backend, ())
    group = info.build.group_size
    if quantization == "int4" and (isinstance(group, bool) or group not in groups):
        raise EngineError(
            f"{folder}: group_size is {group!r} on {backend}, allowed: {', '.join(map(str, groups))}; {again}"
        )
    cache = info.build.kv_cache_dtype
    if backend not in KV_CACHE_DTYPES.get(cache, ()):
        allowed = ", ".join(name for name, backends in KV_CACHE_DTYPES.items() if backend in backends)
        raise EngineError(f"{folder}: kv_cache_dtype is {cache!r} on {backend}, allowed: {allowed}; {again}")
    if (info.manifest.tensorrt is None) == (backend in COMPILED):
        raise EngineError(f"{folder / MANIFEST_FILE}: field tensorrt does not belong to backend {backend}; {again}")


def _check_images(info: EngineInfo, path: Path, again: str) -> None:
    size, vision = info.build.max_image_size, info.model.vision
    allowed = "0, as the model sees no images" if vision is None else f"a multiple of {vision.cell}"
    right = type(size) is int and (size == 0 if vision is None else size > 0 and size % vision.cell == 0)
    if not right:
        raise EngineError(f"{path}: max_image_size is {size!r}, allowed: {allowed}; {again}")
    about = info.manifest.tensorrt
    if about is not None and (about.vision is None) != (vision is None):
        has = "no engine for the images that the model sees" if vision else "an engine for images that it cannot see"
        raise EngineError(f"{path.parent / MANIFEST_FILE}: tensorrt has {has}; {again}")


def _read_object(path: Path, again: str) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise EngineError(f"{path}: missing; {again}") from None
    except OSError as error:
        raise EngineError(f"{path}: cannot be read ({error.strerror}); mend that, or {again}") from None
    except (ValueError, RecursionError) as error:
        raise EngineError(f"{path}: not readable as JSON ({error}); {again}") from None
    if not isinstance(values, dict):
        raise EngineError(f"{path}: holds a {type(values).__name__}, expected a JSON object; {again}")
    return values

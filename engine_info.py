"""What an engine folder says of its engine: written by a build, read and checked by everything else."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
from .engine_folder import (
    CONFIG_FILE,
    GENERATION_FILE,
    MANIFEST_FILE,
    TOKENIZER_CONFIG_FILE,
    TRITON_ENGINE,
    TRITON_FILE,
    build_again,
    is_engine,
    made_as,
    quoted,
)
from .errors import CheckpointError, EngineError
from .tensorrt_info import TensorRTInfo, parse_tensorrt

# A reader refuses a newer schema. It reads 8, whose kernels have no constants, 7, which has no mlp_group_size, 6, whose
# graph has no memory_pattern, 5, which has no group_size, 4, which has no kv_cache_dtype, 3, which has no images, 2,
# which has no quantization, and 1, which has no max_input_len either.
SCHEMA = 9


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
            (folder / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8", newline="\n")


def read_engine(folder: Path) -> EngineInfo:
    """Read and check an engine folder's description. Raises EngineError with the command that fixes it."""
    again = build_again(folder)
    _check_is_engine(folder, again)
    manifest = read_object(folder / MANIFEST_FILE, again)
    _check_schema(folder, manifest.get("schema"), again)
    _check_manifest(manifest, folder / MANIFEST_FILE, again)
    config = read_object(folder / CONFIG_FILE, again)
    generation = read_object(folder / GENERATION_FILE, again) if (folder / GENERATION_FILE).is_file() else None
    try:
        choices = config["build_config"]
        if "group_size" in choices:
            choices = {"mlp_group_size": choices["group_size"], **choices}
        build = BuildConfig(**choices)
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
    for name in info.manifest.tensorrt.files if info.manifest.tensorrt else ():
        if not sizes.get(name):
            raise EngineError(f"{folder / MANIFEST_FILE}: lists no {name}, which the engine needs; {again}")
    _check_sizes(folder, sizes, again)
    if (folder / TOKENIZER_CONFIG_FILE).is_file():
        read_object(folder / TOKENIZER_CONFIG_FILE, again)
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
    for name in ("group_size", "mlp_group_size"):
        group = getattr(info.build, name)
        if quantization == "int4" and (isinstance(group, bool) or group not in GROUP_SIZES):
            raise EngineError(f"{folder}: {name} is {group!r}, allowed: {', '.join(map(str, GROUP_SIZES))}; {again}")
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


def read_object(path: Path, again: str) -> dict[str, Any]:
    """A JSON object of an engine folder; `again` is what to do about one that cannot be read. Raises EngineError."""
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

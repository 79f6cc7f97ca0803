"""`nemodiff inspect`: what an engine is, from its description and its graph, without loading a weight.

It works on any machine, also one that could not run the engine; only a TensorRT engine's own view of its layers needs a
GPU, and is None without one.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import mmap
from pathlib import Path
from typing import Any

from ..contract import DOMAIN, counted, dtype_line, kv_bytes_per_token, size_text
from ..engine_folder import (
    ENGINE_FILE,
    GENERATION_FILE,
    MODEL_FILE,
    VERIFY_FILE,
    VISION_ENGINE_FILE,
    build_again,
    read_record,
)
from ..engine_info import EngineInfo, read_engine
from ..errors import EngineError
from ..tuned import named, read_tuned
from .checkpoint.carried_notes import regex_notes, sampling_notes
from .files import sha256


def check_files(folder: Path) -> None:
    """Compare every file with its sha256 of the build. Raises EngineError.

    Loading compares sizes alone: it reads no weight before it is needed, and a digest would read them all.
    """
    entries = read_engine(folder).manifest.files
    changed = [name for name, entry in entries.items() if sha256(folder / name) != entry.get("sha256")]
    if changed:
        raise EngineError(
            f"{folder}: {', '.join(changed)} not as built, by sha256; copy it whole again or {build_again(folder)}"
        )


def describe(folder: Path) -> dict[str, Any]:
    """Everything about an engine; sizes in bytes. Raises EngineError."""
    info = read_engine(folder)
    model = info.model
    build = info.build
    manifest = info.manifest
    generation = folder / GENERATION_FILE
    return {
        "engine": {
            "backend": manifest.backend,
            "schema": manifest.schema,
            "dtype": build.dtype,
            "quantization": build.quantization,
            **build.groups,
            "kv_cache_dtype": build.kv_cache_dtype,
            "max_seq_len": build.max_seq_len,
            "max_batch_size": build.max_batch_size,
            "block_length": build.block_length,
            "max_input_len": build.max_input_len,
            "logits": build.gather_generation_logits,
            "versions": manifest.versions,
        },
        "checkpoint": {key: manifest.checkpoint.get(key) for key in ("name", "revision")},
        "adapter": manifest.adapter,
        "model": {
            "parameters": model.parameters,
            "layers": model.num_layers,
            "hidden_size": model.hidden_size,
            "heads": [model.num_heads, model.num_kv_heads, model.head_dim],
            "vocab_size": model.vocab_size,
            "mask_id": model.mask_id,
            "eos_ids": list(model.eos_ids),
            "rope": [model.rope.rope_type, model.rope.theta, model.rope.factor],
            "max_position": model.max_position,
        },
        "images": _images(info),
        "kv_bytes_per_token": kv_bytes_per_token(model, build),
        "notes": [
            *sampling_notes(json.loads(generation.read_text(encoding="utf-8")) if generation.is_file() else {}),
            *regex_notes(
                folder, "build with --fix-mistral-regex for the right one, unless it was trained with this one"
            ),
        ],
        "tensorrt": dataclasses.asdict(manifest.tensorrt) if manifest.tensorrt else None,
        "engine_layers": engine_layers(folder, info),
        "files": {name: entry["bytes"] for name, entry in manifest.files.items()},
        "graph": None if manifest.backend == "torch" else _graph(folder / MODEL_FILE),
        "verified": read_record(folder, VERIFY_FILE),
        "tuned": [{"here": dict(one.here), "date": one.date, "choice": str(one.choice)} for one in read_tuned(folder)],
    }


def _images(info: EngineInfo) -> dict[str, Any] | None:
    """What a model that sees takes of an image; None for one that sees none."""
    vision, size = info.model.vision, info.build.max_image_size
    if vision is None:
        return None
    return {
        "parameters": vision.parameters(info.model.hidden_size),
        "layers": vision.num_layers,
        "hidden_size": vision.hidden_size,
        "patch_size": vision.patch_size,
        "max_image_size": size,
        "max_tokens": vision.most_tokens(size),
    }


def _graph(path: Path) -> dict[str, Any]:
    """What the graph consists of. Raises EngineError."""
    import onnx

    try:
        graph = onnx.load(path, load_external_data=False).graph
    except Exception as error:  # protobuf's errors have no common base that onnx exports
        raise EngineError(f"{path}: not an ONNX file ({error}); build the engine again") from None
    ops = collections.Counter(node.op_type for node in graph.node if node.domain != DOMAIN)
    plugins = collections.Counter(node.op_type for node in graph.node if node.domain == DOMAIN)
    return {
        "nodes": len(graph.node),
        "plugins": dict(plugins),
        "ops": dict(ops.most_common()),
        "inputs": [value.name for value in graph.input],
        "outputs": [value.name for value in graph.output],
    }


def engine_layers(folder: Path, info: EngineInfo) -> list[Any] | None:
    """What the engine says about its layers, profile by profile; None where it cannot be loaded."""
    # What follows has not been executed on a GPU (docs/log.md).
    about = info.manifest.tensorrt
    if about is None or about.implementation == "plugin":
        return None
    from ..plugins.tensorrt.api import device_sm, load

    if device_sm() not in about.sms:
        return None
    try:
        api = load("tensorrt-rtx" if about.module == "tensorrt_rtx" else "tensorrt", EngineError)
    except EngineError:
        return None
    with (folder / ENGINE_FILE).open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        engine = api.runtime().deserialize_cuda_engine(data)
    if engine is None:  # of another version, say
        return None
    text = engine.create_engine_inspector().get_engine_information(api.module.LayerInformationFormat.JSON)
    layers: list[Any] = json.loads(text).get("Layers", [])
    return layers


def _image_lines(images: dict[str, Any] | None) -> list[str]:
    if images is None:
        return []
    return [
        f"images       {counted(images['layers'], 'layer')}, hidden {images['hidden_size']}, "
        f"{images['parameters']:,} parameters "
        f"with the projector; up to {images['max_image_size']} pixels a side, {images['max_tokens']} tokens"
    ]


def _tensorrt_lines(described: dict[str, Any]) -> list[str]:
    about = described["tensorrt"]
    layers = described["engine_layers"]
    if about is None:
        return []
    profiles = "; ".join(
        f"{p['name']} up to {counted(p['max_batch_size'], 'row')} of {counted(p['max_tokens'], 'token')}, "
        f"{p['max_rows']} predicted"
        for p in about["profiles"]
    )
    kinds = "; ".join(_of_kind(kind, counts) for kind, counts in about["layers"].items() if counts)
    by_sm: dict[int, list[str]] = {}
    for kernel in about["kernels"]:
        by_sm.setdefault(kernel["sm"], []).append(
            f"{kernel['stage']} ({kernel['registers']} registers, {kernel['shared_bytes']} bytes shared, "
            f"{kernel['spill_bytes']} spilled)"
        )
    flags = f", {' '.join(about['flags'])}" if about["flags"] else ""
    rtx = about["module"] == "tensorrt_rtx"
    return [
        f"compiled     {about['module']} {about['version']} for SM {', '.join(map(str, about['sms']))}, "
        f"{size_text(about['engine_bytes'])}{flags}",
        *(["             TensorRT-RTX 1.7 runs on no SM 90 card, such as H100 and H200 (2026-11-27)"] * rtx),
        f"profiles     {profiles}",
        f"layers       {kinds}",
        *(f"kernels      SM {sm}: {', '.join(names)}" for sm, names in by_sm.items()),
        *_vision_engine_lines(about["vision"]),
        *([f"in engine    {counted(len(layers), 'layer')}"] if layers is not None else []),
    ]


def _vision_engine_lines(vision: dict[str, Any] | None) -> list[str]:
    if vision is None:
        return []
    kinds = "; ".join(_of_kind(kind, counts) for kind, counts in vision["layers"].items() if counts)
    return [
        f"tower        {VISION_ENGINE_FILE}, {size_text(vision['engine_bytes'])}, profiles up to "
        f"{' and '.join(map(str, vision['patches']))} patches; {kinds}"
    ]


def _of_kind(kind: str, counts: dict[str, int]) -> str:
    """`native 6 BlockAttention, 1 ConfidenceCommit`."""
    return f"{kind} {', '.join(f'{count} {name}' for name, count in counts.items())}"


def _graph_lines(graph: dict[str, Any] | None) -> list[str]:
    if graph is None:
        return []
    plugins = ", ".join(f"{count} {name}" for name, count in graph["plugins"].items())
    common = ", ".join(f"{count} {name}" for name, count in list(graph["ops"].items())[:6])
    return [f"graph        {graph['nodes']} nodes: {plugins}; {common}, ..."]


def _verified_lines(record: dict[str, Any] | None) -> list[str]:
    if record is None:
        return []
    try:
        tallies = [*record["modes"].values(), *record["passes"].values()]
        counts = [sum(tally[kind] for tally in tallies) for kind in ("equal", "near_ties", "wrong", "strays")]
        result = f"{counted(counts[0], 'token')} equal, {counted(counts[1], 'near tie')}, {counts[2] + counts[3]} wrong"
        return [
            f"verified     {'ok' if record['ok'] else 'WRONG'} on {record['date']} against {record['against']} in "
            f"{record['precision']}: {result}"
        ]
    except (LookupError, TypeError, AttributeError):
        return []


def _tuned_lines(tuned: list[dict[str, Any]]) -> list[str]:
    return [
        f"tuned        {one['choice']}: on {one['date']} for {named(one['here'])}; "
        "not used with another card or version, or with --tp-size"
        for one in tuned
    ]


def lines(described: dict[str, Any]) -> list[str]:
    """The description for people."""
    engine = described["engine"]
    model = described["model"]
    heads, kv_heads, head_dim = model["heads"]
    dtype = dtype_line(
        *(engine[key] for key in ("dtype", "quantization", "kv_cache_dtype", "group_size", "mlp_group_size"))
    )
    kind, theta, factor = model["rope"]
    source = described["checkpoint"]
    adapter = described["adapter"]
    revision = f" at {source['revision']}" if source["revision"] else ""
    rank = f"drafter LoRA of rank {adapter['rank']}" if adapter else "no drafter adapter"
    limits = f"up to {counted(engine['max_batch_size'], 'row')} of {counted(engine['max_seq_len'], 'token')}"
    files = ", ".join(f"{name} {size_text(nbytes)}" for name, nbytes in described["files"].items())
    return [
        f"engine       {engine['backend']}, {dtype}, block length {engine['block_length']}, {limits}",
        f"checkpoint   {source['name']}{revision}",
        f"parameters   {model['parameters']:,}, {rank}",
        f"model        {counted(model['layers'], 'layer')}, hidden {model['hidden_size']}, {counted(heads, 'head')} on "
        f"{counted(kv_heads, 'key/value head')} of {head_dim}, vocabulary {model['vocab_size']}",
        f"positions    {kind}, theta {theta:g}, factor {factor:g}, up to {model['max_position']}",
        *_image_lines(described["images"]),
        f"ids          mask {model['mask_id']}, end of sequence {', '.join(map(str, model['eos_ids']))}",
        f"KV cache     {described['kv_bytes_per_token']:,} bytes per token",
        *_tensorrt_lines(described),
        *_graph_lines(described["graph"]),
        *(f"note         {note}" for note in described["notes"]),
        f"files        {files}",
        f"built with   {', '.join(f'{name} {version}' for name, version in engine['versions'].items())}",
        *_verified_lines(described["verified"]),
        *_tuned_lines(described["tuned"]),
    ]

"""`nemodiff export`: the autoregressive twin of a checkpoint, as a plain Ministral-3 folder for other engines.

In: a checkpoint folder or hub id. Out: a folder with the same weights under Ministral-3's names, put in place in one
step. Only the headers of the weight files are written anew; behind them the bytes are copied as they are, so shards,
dtypes and values stay the checkpoint's. The surprising fact: `Ministral3Config` has defaults of its own (ids, RoPE), so
a field that the checkpoint leaves out must be written, or the class would fill in another model's value.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import shutil
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..config import ModelConfig
from ..contract import EXPORT_FORMATS
from ..engine_folder import CONFIG_FILE, GENERATION_FILE
from ..errors import BuildError, CheckpointError
from .checkpoint.checkpoint import (
    ADAPTER_FOLDER,
    CARRIED,
    DTYPES,
    INDEX,
    WEIGHTS,
    Checkpoint,
    Tensor,
    open_checkpoint,
    read_json,
)
from .checkpoint.hub import Source, resolve
from .checkpoint.weights import match
from .graph.graph import build_graph
from .plan import disk_free, size
from .staging import Kind, check_target, staged

EXPORT_FILE = "nemodiff_export.json"  # tells an export; no loader reads it
EXPORT = Kind("export", EXPORT_FILE, frozenset({EXPORT_FILE, CONFIG_FILE, WEIGHTS, INDEX, *CARRIED}))
PIECE = 16 * 2**20  # bytes copied at once
_SLACK = 64 * 2**20  # bytes kept free beside the weights: headers, tokenizer, file system
_CODES = {dtype: code for code, dtype in DTYPES.items()}
# Fields that mean the same in both configs, with what is written where the checkpoint is silent.
_FIELDS: dict[str, Any] = {
    "vocab_size": None,
    "hidden_size": None,
    "intermediate_size": None,
    "num_hidden_layers": None,
    "num_attention_heads": None,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": None,
    "rms_norm_eps": None,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "pad_token_id": None,
}


@dataclasses.dataclass(frozen=True)
class ExportPlan:
    """What an export will write; sizes in bytes."""

    tensors: int
    parameters: int
    dtype: str
    weight_bytes: int
    files: tuple[str, ...]
    disk_free: int
    adapter_rank: int
    unknown_fields: tuple[str, ...]

    def lines(self, checkpoint: str, output: Path) -> list[str]:
        """The plan for people."""
        count = f"{len(self.files)} files" if len(self.files) > 1 else "1 file"
        unknown = ", ".join(self.unknown_fields)
        adapter = f"the drafter adapter of rank {self.adapter_rank}: the twin only decodes autoregressively"
        return [
            f"checkpoint   {checkpoint}: {self.tensors} tensors, {size(self.weight_bytes)}",
            f"twin         Ministral3ForCausalLM, {self.parameters:,} parameters, {self.dtype}",
            f"disk         {size(self.weight_bytes)} to write under {output} in {count}, {size(self.disk_free)} free",
            *([f"left out     {adapter}"] if self.adapter_rank else []),
            *([f"ignored      unknown config fields: {unknown}"] if unknown else []),
        ]


class Exporter:
    """One export: opens and checks everything on construction; `plan()` and `run()` are the two things to do then.

    Args:
        checkpoint: folder or hub id `OWNER/NAME[@REVISION]`.
        output: the folder to write; an export already there is replaced.
        layout: `ministral3`, the only format so far.
        headers_only: of a hub id fetch no weights, which is enough for `plan()`.

    Raises:
        CheckpointError, BuildError: one line that says what to do.
    """

    def __init__(
        self, checkpoint: str | Path, output: str | Path, *, layout: str = "ministral3", headers_only: bool = False
    ) -> None:
        if layout not in EXPORT_FORMATS:
            raise BuildError(f"--format is {layout!r}, allowed: {', '.join(EXPORT_FORMATS)}; choose one of them")
        self.output, self.layout = Path(output), layout
        check_target(self.output, EXPORT)
        self.source: Source = resolve(str(checkpoint), headers_only=headers_only)
        self.checkpoint: Checkpoint = open_checkpoint(self.source.folder)
        # The twin's tensors are the engine's, so the graph of an engine is the list of what must be there.
        graph = build_graph(self.checkpoint.model, "f32")
        match(graph, self.checkpoint.tensors, self.source.folder / CONFIG_FILE)
        self.shards: dict[str, list[Tensor]] = {}
        for tensor in sorted(self.checkpoint.tensors.values(), key=lambda t: (t.file.name, t.offset)):
            self.shards.setdefault(tensor.file.name, []).append(tensor)

    def plan(self) -> ExportPlan:
        """What the export will write; nothing is written."""
        model, adapter = self.checkpoint.model, self.checkpoint.adapter
        return ExportPlan(
            tensors=len(self.checkpoint.tensors),
            parameters=model.parameters,
            dtype=_dtype(self.checkpoint),
            weight_bytes=sum(t.nbytes for t in self.checkpoint.tensors.values()),
            files=tuple(self.shards),
            disk_free=disk_free(self.output),
            adapter_rank=adapter.rank if adapter else 0,
            unknown_fields=model.unknown_fields,
        )

    def run(self, advance: Callable[[int], object] = lambda nbytes: None) -> Path:
        """Write the folder and return its path; `advance` gets each number of weight bytes written."""
        if self.source.headers_only:
            raise BuildError(f"{self.source.name}: only headers were fetched; leave out headers_only to export")
        plan = self.plan()
        need = plan.weight_bytes + _SLACK
        if plan.disk_free < need:
            raise BuildError(
                f"{self.output}: the export needs {size(need)} of disk, {size(plan.disk_free)} are free; free some "
                "space or choose another --output"
            )
        folder = self.source.folder
        with staged(self.output, EXPORT) as stage:
            for name, tensors in self.shards.items():
                write_shard(tensors, stage / name, advance)
            if list(self.shards) != [WEIGHTS]:
                placed = {twin_name(t.name): name for name, tensors in self.shards.items() for t in tensors}
                total = {"total_size": plan.weight_bytes, "total_parameters": plan.parameters}
                _write(stage / INDEX, {"metadata": total, "weight_map": dict(sorted(placed.items()))})
            for name in CARRIED:
                if (folder / name).is_file():
                    shutil.copyfile(folder / name, stage / name)
            generation = read_json(folder / GENERATION_FILE) if (folder / GENERATION_FILE).is_file() else {}
            _write(stage / GENERATION_FILE, twin_generation(self.checkpoint.model, generation))
            _write(stage / CONFIG_FILE, twin_config(self.checkpoint))
            origin = {
                "format": self.layout,
                "checkpoint": {"name": self.source.name, "revision": self.source.revision},
                "left_out": [ADAPTER_FOLDER] if self.checkpoint.adapter else [],
                "versions": {"nemodiff": importlib.metadata.version("nemodiff")},
                "files": {path.name: {"bytes": path.stat().st_size} for path in sorted(stage.iterdir())},
            }
            _write(stage / EXPORT_FILE, origin)
        return self.output


def twin_name(name: str) -> str:
    """A tensor's name in Ministral-3."""
    return "lm_head.weight" if name == "diffusion_head.weight" else name.replace("encoder.", "model.", 1)


def twin_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The twin's config.json. `rope_parameters` keeps every field of the checkpoint as it was."""
    values, model = checkpoint.config, checkpoint.model
    rope = {
        "rope_type": model.rope.rope_type,
        "rope_theta": model.rope.theta,
        # transformers computes the query scale also where there is none: 1 + 0 * ln(...)
        "original_max_position_embeddings": model.rope.original_max_position or model.max_position,
        "llama_4_scaling_beta": model.rope.llama_4_scaling_beta,
    }
    given = values.get("rope_parameters") or values["rope_scaling"]
    rope |= {key: value for key, value in given.items() if value is not None}
    config = {name: values.get(name, default) for name, default in _FIELDS.items()}
    config |= {
        "architectures": ["Ministral3ForCausalLM"],
        "model_type": "ministral3",
        "dtype": _dtype(checkpoint),
        "eos_token_id": _eos(model),
        "rope_parameters": rope,
        "use_cache": True,  # the checkpoint's is false, for its diffusion loop
    }
    if model.rope.llama_4_scaling_beta:  # where vLLM's Mistral looks for the query scale
        config["llama_4_scaling"] = {
            "original_max_position_embeddings": model.rope.original_max_position,
            "beta": model.rope.llama_4_scaling_beta,
        }
    return dict(sorted(config.items()))


def twin_generation(model: ModelConfig, values: dict[str, Any]) -> dict[str, Any]:
    """The twin's generation_config.json: the checkpoint's, and the mask id is never chosen, as in mode ar."""
    suppressed = values.get("suppress_tokens")
    suppressed = suppressed if isinstance(suppressed, list) else []
    if model.mask_id not in suppressed:
        suppressed = [*suppressed, model.mask_id]
    return values | {"eos_token_id": _eos(model), "suppress_tokens": suppressed}


def write_shard(tensors: Sequence[Tensor], path: Path, advance: Callable[[int], object]) -> None:
    """Write one safetensors file: all tensors of one of the checkpoint's files, by offset, under the twin's names."""
    file, begin = tensors[0].file, tensors[0].offset
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for t in tensors:
        offsets = [t.offset - begin, t.offset - begin + t.nbytes]
        header[twin_name(t.name)] = {"dtype": _CODES[t.dtype], "shape": list(t.shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format wants the data aligned
    left = sum(t.nbytes for t in tensors)
    with file.open("rb") as source, path.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        source.seek(begin)
        while left:
            piece = source.read(min(PIECE, left))
            if not piece:
                raise CheckpointError(f"{file}: ended {left} bytes early while it was copied; download the file again")
            out.write(piece)
            left -= len(piece)
            advance(len(piece))


def _dtype(checkpoint: Checkpoint) -> str:
    """The dtype to load the twin in: the one of all tensors, or f32, which holds any mixture."""
    names = {t.dtype.name for t in checkpoint.tensors.values()}
    return names.pop() if len(names) == 1 else "float32"


def _eos(model: ModelConfig) -> int | list[int]:
    return model.eos_ids[0] if len(model.eos_ids) == 1 else list(model.eos_ids)


def _write(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")

"""`nemodiff build`: from a checkpoint to an engine folder.

In: a checkpoint folder or hub id and the build's choices. Out: an engine folder, put in place in one step, or with
`plan` nothing but numbers. Everything that can be refused is refused from config and headers, before a byte is written.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx

from ..contract import (
    DEFAULT_MAX_BATCH_SIZE,
    DEFAULT_MAX_SEQ_LEN,
    ITEMSIZE,
    MAX_BATCH,
    MAX_BLOCK,
    MODEL_FILE,
    SCHEMA,
    WEIGHTS_FILE,
    BuildConfig,
    Dtype,
    EngineInfo,
    Manifest,
)
from ..errors import BuildError
from .checkpoint import CARRIED, Adapter, Checkpoint, Tensor, open_checkpoint
from .graph import Graph, build_graph
from .hub import Source, resolve
from .plan import Plan, disk_free, make_plan, size
from .staging import check_target, staged
from .weights import match, write_weights

_VERSIONS = ("nemodiff", "onnx", "numpy", "ml_dtypes", "safetensors")
_SLACK = 64 * 2**20  # bytes kept free beside the weights: model file, tokenizer, file system


class Builder:
    """One build: opens and checks everything on construction; `plan()` and `run()` are the two things to do then.

    Args:
        checkpoint: folder or hub id `OWNER/NAME[@REVISION]`.
        output: the engine folder to write; an engine already there is replaced.
        dtype: `f32`, or `f16` for half the disk and half the K/V cache.
        max_seq_len: limit on prompt plus generated tokens; default 32768 or the model's own limit if smaller.
        max_batch_size: limit on rows of a forward.
        block_length: default block length of the engine, 1..64; default the checkpoint's.
        adapter: folder of a drafter adapter, to use in the place of the checkpoint's own if it has one.
        headers_only: of a hub id fetch no weights, which is enough for `plan()`.

    Raises:
        CheckpointError, BuildError: one line that says what to do.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        output: str | Path,
        *,
        dtype: Dtype = "f32",
        max_seq_len: int | None = None,
        max_batch_size: int = DEFAULT_MAX_BATCH_SIZE,
        block_length: int | None = None,
        adapter: str | Path | None = None,
        headers_only: bool = False,
    ) -> None:
        self.output = Path(output)
        check_target(self.output)
        self.source: Source = resolve(str(checkpoint), headers_only=headers_only)
        self.checkpoint: Checkpoint = open_checkpoint(self.source.folder, None if adapter is None else Path(adapter))
        model = self.checkpoint.model
        self.config = BuildConfig(
            dtype=dtype,
            max_seq_len=min(DEFAULT_MAX_SEQ_LEN, model.max_position) if max_seq_len is None else max_seq_len,
            max_batch_size=max_batch_size,
            block_length=min(model.block_length, MAX_BLOCK) if block_length is None else block_length,
        )
        self._check_config()
        lora = self.checkpoint.adapter
        self.graph: Graph = build_graph(model, dtype, lora.rank if lora else 0, lora.scale if lora else 1.0)
        self.tensors: dict[str, Tensor] = {**self.checkpoint.tensors, **(lora.tensors if lora else {})}
        match(self.graph, self.tensors, self.source.folder / "config.json")

    def _check_config(self) -> None:
        config, model = self.config, self.checkpoint.model
        if config.dtype not in ITEMSIZE:
            raise BuildError(f"--dtype is {config.dtype!r}, allowed: {', '.join(ITEMSIZE)}; choose one of them")
        for flag, value, high, why in (
            ("--max-seq-len", config.max_seq_len, model.max_position, "the model's max_position_embeddings"),
            ("--max-batch-size", config.max_batch_size, MAX_BATCH, "rows of one forward"),
            ("--block-length", config.block_length, MAX_BLOCK, "the longest block of an engine"),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= high:
                raise BuildError(f"{flag} is {value!r}, allowed: 1 to {high} ({why}); choose a value in that range")

    def plan(self) -> Plan:
        """What the build will make and need; nothing is written."""
        return make_plan(self.checkpoint, self.graph, self.config, self.output)

    def run(self, advance: Callable[[int], object] = lambda nbytes: None) -> Path:
        """Write the engine folder and return its path; `advance` gets each number of weight bytes written."""
        if self.source.headers_only:
            raise BuildError(f"{self.source.name}: only headers were fetched; leave out headers_only to build")
        need, free = self.graph.weight_bytes + _SLACK, disk_free(self.output)
        if free < need:
            raise BuildError(
                f"{self.output}: the engine needs {size(need)} of disk, {size(free)} are free; free some space, choose "
                "another --output" + (" or build with --dtype f16" if self.config.dtype == "f32" else "")
            )
        with staged(self.output) as stage:
            hashes = {WEIGHTS_FILE: write_weights(self.graph, self.tensors, stage / WEIGHTS_FILE, advance)}
            onnx.save(self.graph.proto, stage / MODEL_FILE)
            for name in CARRIED:
                if (self.source.folder / name).is_file():
                    shutil.copyfile(self.source.folder / name, stage / name)
            files = {p.name: _file_entry(p, hashes.get(p.name)) for p in sorted(stage.iterdir())}
            EngineInfo(self.checkpoint.model, self.config, self._manifest(files), self.checkpoint.config).write(stage)
        return self.output

    def _manifest(self, files: dict[str, dict[str, object]]) -> Manifest:
        adapter = self.checkpoint.adapter
        identity = {name: _file_entry(path) for name, path in self.checkpoint.files.items()}
        return Manifest(
            schema=SCHEMA,
            backend="onnxruntime",
            versions={name: importlib.metadata.version(name) for name in _VERSIONS},
            checkpoint={"name": self.source.name, "revision": self.source.revision, "files": identity},
            adapter=_adapter_entry(adapter) if adapter else None,
            files=files,
        )


def _adapter_entry(adapter: Adapter) -> dict[str, object]:
    return {"name": "linear_spec_lora", "rank": adapter.rank, "scale": adapter.scale, "acts_in": ["draft"]}


def _file_entry(path: Path, sha256: str | None = None) -> dict[str, object]:
    if sha256 is None:
        with path.open("rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": sha256}

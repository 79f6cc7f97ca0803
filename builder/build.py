"""`nemodiff build`: from a checkpoint to an engine folder.

In: a checkpoint folder or hub id and the build's choices. Out: an engine folder, put in place in one step, or with
`plan` nothing but numbers. Everything that can be refused is refused from config and headers, before a byte is written.
For the TensorRT backends the same graph and weights are written, compiled into `rank0.engine`, and the weights removed;
for torch the weights alone are written, and torch itself is not needed.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import shutil
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path

import onnx

from ..contract import (
    BACKEND_DTYPES,
    COMPILED,
    DEFAULT_MAX_BATCH_SIZE,
    DEFAULT_MAX_SEQ_LEN,
    MAX_BATCH,
    MAX_BLOCK,
    PREFILL_CHUNK,
    QUANTIZATIONS,
    Backend,
    Dtype,
    Quantization,
)
from ..engine_folder import (
    ENGINE_FILE,
    MODEL_FILE,
    SCHEMA,
    TENSORS_FILE,
    WEIGHTS_FILE,
    BuildConfig,
    EngineInfo,
    Manifest,
    Profile,
    TensorRTInfo,
    cache_slots,
)
from ..errors import BuildError
from ..plugins import OPS, SAMPLED
from ..plugins.ops import fp8_linear
from .checkpoint.checkpoint import CARRIED, Adapter, Checkpoint, Tensor, open_checkpoint
from .checkpoint.hub import Source, resolve
from .checkpoint.weights import as_safetensors, match, write_weights
from .compilers import tensorrt
from .compilers.kernels import OLDEST_SM, compile_kernels
from .files import sha256
from .graph.graph import Graph, build_graph
from .plan import Plan, disk_free, make_plan, size
from .staging import check_target, staged

_VERSIONS = ("nemodiff", "onnx", "numpy", "ml_dtypes", "safetensors")
_Entry = dict[str, object]  # bytes and sha256 of a file
_SLACK = 64 * 2**20  # bytes kept free beside the weights: model file, tokenizer, file system


class Builder:
    """One build: opens and checks everything on construction; `plan()` and `run()` are the two things to do then.

    Args:
        checkpoint: folder or hub id `OWNER/NAME[@REVISION]`.
        output: the engine folder to write; an engine already there is replaced.
        backend: `onnxruntime`, `tensorrt-rtx`, `tensorrt` or `torch`.
        dtype: default `f32` on onnxruntime, where `f16` halves disk and K/V cache, else `bf16`.
        max_seq_len: limit on prompt plus generated tokens; default 32768 or the model's own limit if smaller.
        max_batch_size: limit on rows of a forward.
        block_length: default block length of the engine, 1..64; default the checkpoint's.
        max_input_len: tokens of a prefill pass, TensorRT only; default 512 or `max_seq_len` if smaller.
        logits: False leaves out the output that sampling needs, TensorRT only.
        quantization: `fp8` stores the layers' projections in 8 bits, torch only; default none.
        choices: flags that only a TensorRT backend has.
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
        backend: Backend = "onnxruntime",
        dtype: Dtype | None = None,
        max_seq_len: int | None = None,
        max_batch_size: int = DEFAULT_MAX_BATCH_SIZE,
        block_length: int | None = None,
        max_input_len: int | None = None,
        logits: bool = True,
        quantization: Quantization | None = None,
        choices: tensorrt.Choices = tensorrt.Choices(),  # noqa: B008  (frozen)
        adapter: str | Path | None = None,
        headers_only: bool = False,
    ) -> None:
        self.output, self.backend, self.choices = Path(output), backend, choices
        self._check_backend(dtype, max_input_len, logits, quantization)
        if backend in COMPILED and not headers_only:
            tensorrt.require(backend)
        check_target(self.output)
        self.source: Source = resolve(str(checkpoint), headers_only=headers_only)
        self.checkpoint: Checkpoint = open_checkpoint(self.source.folder, None if adapter is None else Path(adapter))
        model = self.checkpoint.model
        length = min(DEFAULT_MAX_SEQ_LEN, model.max_position) if max_seq_len is None else max_seq_len
        self.config = BuildConfig(
            dtype=BACKEND_DTYPES[backend][0] if dtype is None else dtype,
            max_seq_len=length,
            max_batch_size=max_batch_size,
            block_length=min(model.block_length, MAX_BLOCK) if block_length is None else block_length,
            max_input_len=min(PREFILL_CHUNK, length) if max_input_len is None else max_input_len,
            gather_generation_logits=logits,
            quantization=quantization,
        )
        self._check_config()
        compiled = backend in COMPILED
        self.profiles: tuple[Profile, ...] = tensorrt.profiles(model, self.config) if compiled else ()
        lora = self.checkpoint.adapter
        self.graph: Graph = build_graph(
            model,
            self.config.dtype,
            lora.rank if lora else 0,
            lora.scale if lora else 1.0,
            capacity=cache_slots(self.config) if compiled else None,
            logits=logits,
        )
        self._header = b""  # of the weights file
        if backend == "torch":
            self.graph, self._header = as_safetensors(self.graph, quantization)
        self.tensors: dict[str, Tensor] = {**self.checkpoint.tensors, **(lora.tensors if lora else {})}
        match(self.graph, self.tensors, self.source.folder / "config.json")

    def _check_backend(
        self, dtype: Dtype | None, max_input_len: int | None, logits: bool, quantization: Quantization | None
    ) -> None:
        if self.backend not in BACKEND_DTYPES:
            raise BuildError(f"--backend is {self.backend!r}, allowed: {', '.join(BACKEND_DTYPES)}; choose one of them")
        tensorrt.check(self.backend, self.choices)
        allowed = BACKEND_DTYPES[self.backend]
        if dtype is not None and dtype not in allowed:
            raise BuildError(
                f"--dtype is {dtype!r}, allowed on {self.backend}: {', '.join(allowed)}; use --dtype {allowed[0]}"
            )
        if self.backend not in COMPILED and (max_input_len is not None or not logits):
            flag = "--no-logits" if max_input_len is None else "--max-input-len"
            raise BuildError(
                f"{flag}: not a choice of --backend {self.backend}, allowed: tensorrt-rtx or tensorrt; leave it out or "
                "add --backend tensorrt-rtx"
            )
        if quantization is not None and quantization not in QUANTIZATIONS:
            raise BuildError(
                f"--quantization is {quantization!r}, allowed: {', '.join(QUANTIZATIONS)}; choose one of them or none"
            )
        if quantization is not None and self.backend not in QUANTIZATIONS[quantization]:
            backends = QUANTIZATIONS[quantization]
            raise BuildError(
                f"--quantization {quantization}: not a choice of --backend {self.backend}, allowed: "
                f"{', '.join(backends)}; leave it out or add --backend {backends[0]}"
            )

    def _check_config(self) -> None:
        config, model = self.config, self.checkpoint.model
        for flag, value, high, why in (
            ("--max-seq-len", config.max_seq_len, model.max_position, "the model's max_position_embeddings"),
            ("--max-batch-size", config.max_batch_size, MAX_BATCH, "rows of one forward"),
            ("--block-length", config.block_length, MAX_BLOCK, "the longest block of an engine"),
            ("--max-input-len", config.max_input_len, config.max_seq_len, "--max-seq-len"),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= high:
                raise BuildError(f"{flag} is {value!r}, allowed: 1 to {high} ({why}); choose a value in that range")
        widths = (model.hidden_size, model.num_heads * model.head_dim, model.intermediate_size)
        if config.quantization and (odd := [width for width in widths if width % fp8_linear.MULTIPLE]):
            raise BuildError(
                f"--quantization {config.quantization}: a projection has {odd[0]} inputs, allowed: multiples of "
                f"{fp8_linear.MULTIPLE}; leave it out"
            )

    def plan(self) -> Plan:
        """What the build will make and need; nothing is written."""
        return make_plan(self.checkpoint, self.graph, self.config, self.output, self.backend)

    def run(self, advance: Callable[[int], object] = lambda nbytes: None) -> Path:
        """Write the engine folder and return its path; `advance` gets each number of weight bytes written."""
        if self.source.headers_only:
            raise BuildError(f"{self.source.name}: only headers were fetched; leave out headers_only to build")
        compiled = self.backend in COMPILED
        sms = tensorrt.targets(self.backend, self.choices) if compiled else ()
        self._check_room()
        keep = not compiled or self.choices.keeps_weights
        # The checkpoint is hashed while its tensors are copied: later it would be read from the disk once more. For
        # TensorRT it is: copying keeps two processors busy, compiling hardly more than one, and needs the memory.
        with ThreadPoolExecutor(1) as pool, staged(self.output) as stage:
            hashing = {} if compiled else self._start_hashing(pool)
            weights, info = stage / (TENSORS_FILE if self.backend == "torch" else WEIGHTS_FILE), None
            digest = write_weights(
                self.graph, self.tensors, weights, advance, hashed=keep, header=self._header, once=compiled
            )
            hashes = {weights.name: digest}
            if self.backend != "torch":
                onnx.save(self.graph.proto, stage / MODEL_FILE)
            if compiled:
                model = self.checkpoint.model
                plugins, logits = self.choices.plugins, self.config.gather_generation_logits
                ops = [*(OPS if plugins else ()), *((SAMPLED,) if logits else ())]
                cards = sms if plugins else tuple(sm for sm in sms if sm >= OLDEST_SM)
                kernels = pool.submit(compile_kernels, model, self.config.dtype, cards, stage, ops)
                hashing = self._start_hashing(pool)
                made = tensorrt.compile_engine(
                    self.backend,
                    self.choices,
                    sms,
                    self.profiles,
                    model.num_layers,
                    kernels.result() if plugins else (),
                    stage / MODEL_FILE,
                    stage / ENGINE_FILE,
                )
                info = dataclasses.replace(made.info, kernels=kernels.result())
                hashes[ENGINE_FILE] = made.sha256
            if not keep:
                weights.unlink()
            for name in CARRIED:
                if (self.source.folder / name).is_file():
                    shutil.copyfile(self.source.folder / name, stage / name)
            written = {str(p.relative_to(stage)): p for p in sorted(stage.rglob("*")) if p.is_file()}
            files = {name: _file_entry(p, hashes.get(name)) for name, p in written.items()}
            manifest = self._manifest({name: entry.result() for name, entry in hashing.items()}, files, info)
            EngineInfo(self.checkpoint.model, self.config, manifest, self.checkpoint.config).write(stage)
        return self.output

    def _start_hashing(self, pool: Executor) -> dict[str, Future[_Entry]]:
        once = self.backend in COMPILED
        return {name: pool.submit(_file_entry, path, once=once) for name, path in self.checkpoint.files.items()}

    def _check_room(self) -> None:
        """Refuse a build that the disk or, for TensorRT, the memory cannot hold."""
        weights, compiled = self.graph.weight_bytes, self.backend in COMPILED
        need, free = weights * (2 if compiled else 1) + _SLACK, disk_free(self.output)
        if free < need:
            raise BuildError(
                f"{self.output}: the engine needs {size(need)} of disk, {size(free)} are free; free some space, choose "
                "another --output" + (" or build with --dtype f16" if self.config.dtype == "f32" else "")
            )
        memory, here = tensorrt.memory_needed(weights), tensorrt.memory_free()
        if compiled and here is not None and here < memory:
            raise BuildError(
                f"--backend {self.backend}: compiling needs about {size(memory)} of memory, {size(here)} are free; "
                "close other programs or build on a larger machine"
            )

    def _manifest(self, identity: dict[str, _Entry], files: dict[str, _Entry], info: TensorRTInfo | None) -> Manifest:
        adapter = self.checkpoint.adapter
        return Manifest(
            schema=SCHEMA,
            backend=self.backend,
            versions={name: importlib.metadata.version(name) for name in _VERSIONS}
            | ({info.module: info.version} if info else {}),
            checkpoint={"name": self.source.name, "revision": self.source.revision, "files": identity},
            adapter=_adapter_entry(adapter) if adapter else None,
            files=files,
            tensorrt=info,
        )


def _adapter_entry(adapter: Adapter) -> dict[str, object]:
    return {"name": "linear_spec_lora", "rank": adapter.rank, "scale": adapter.scale, "acts_in": ["draft"]}


def _file_entry(path: Path, digest: str | None = None, once: bool = False) -> _Entry:
    return {"bytes": path.stat().st_size, "sha256": sha256(path, once) if digest is None else digest}

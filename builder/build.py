"""`nemodiff build`: from a checkpoint to an engine folder, which is put in place in one step.

Everything that can be refused is refused from config and headers, before a byte is written. For the TensorRT backends
the graph and weights of ONNX are written, compiled into `rank0.engine`, and the weights removed; for torch the weights
alone are written, and torch itself is not needed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path

import onnx

from ..contract import (
    BACKEND_DTYPES,
    COMPILED,
    DEFAULT_MAX_BATCH_SIZE,
    DEFAULT_MAX_SEQ_LEN,
    MAX_BLOCK,
    PREFILL_CHUNK,
    QUANTIZATIONS,
    Backend,
    BuildConfig,
    Dtype,
    KvCacheDtype,
    Quantization,
    cache_slots,
    stored_as,
)
from ..engine_folder import (
    CONFIG_FILE,
    MODEL_FILE,
    TENSORS_FILE,
    TOKENIZER_FILE,
    VISION_MODEL_FILE,
    VISION_TENSORS_FILE,
    VISION_WEIGHTS_FILE,
    WEIGHTS_FILE,
)
from ..engine_info import EngineInfo
from ..errors import BuildError
from ..plugins import OPS, SAMPLED
from ..tensorrt_info import Kernel, Profile
from .checkpoint.checkpoint import Checkpoint, open_checkpoint
from .checkpoint.folder import copy_carried
from .checkpoint.hub import Source, resolve
from .checkpoint.layout import as_safetensors, match
from .checkpoint.mistral_regex import correct, has_wrong_regex
from .checkpoint.quantized import QuantizedTensor
from .checkpoint.safetensors_file import Tensor
from .checkpoint.weights import write_weights
from .checks import check_backend, check_config, choose_groups
from .compilers.choices import Choices, require, targets
from .compilers.graphs import compile_graphs
from .compilers.kernels import OLDEST_SM, compiling_kernels
from .compilers.profiles import image_profiles, profiles
from .graph.graph import Graph, build_graph
from .graph.projection import convolves
from .graph.vision import build_vision_graph
from .manifest import FileEntry, file_entry, folder_entries, make_manifest
from .plan import Plan, make_plan
from .resources import check_build_disk, check_compile_memory
from .staging import check_target, staged


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
        quantization: `int8` or `int4` projections, not on tensorrt, `fp8` or `fp8_dynamic` on torch; default none.
        group_size: inputs of an int4 weight that share a scale, 32, 64 or 128; default the checkpoint's own where it
            is quantized so, else 32, and 128 in the MLPs where that divides their inputs.
        kv_cache_dtype: how K and V are kept: `auto` is `dtype`; `int8` on onnxruntime and torch, `fp8` on torch.
        choices: flags that only a TensorRT backend has.
        adapter: folder of a drafter adapter, to use in the place of the checkpoint's own if it has one.
        max_image_size: pixels to which the longer side of a larger image is scaled down; a model that sees images
            only; default 1400 or what its tower was trained on if smaller.
        headers_only: of a hub id fetch no weights, which is enough for `plan()`.
        fix_mistral_regex: mend a tokenizer with the pattern that `checkpoint/mistral_regex.py` knows to be wrong.

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
        group_size: int | None = None,
        kv_cache_dtype: KvCacheDtype = "auto",
        choices: Choices = Choices(),  # noqa: B008  (frozen)
        adapter: str | Path | None = None,
        headers_only: bool = False,
        fix_mistral_regex: bool = False,
        max_image_size: int | None = None,
    ) -> None:
        self.output = Path(output)
        self.backend = backend
        self.choices = choices
        check_backend(backend, choices, dtype, max_input_len, logits, quantization, kv_cache_dtype, group_size)
        self._compiled = backend in COMPILED
        if self._compiled and not headers_only:
            require(backend)
        check_target(self.output)
        self.source: Source = resolve(str(checkpoint), headers_only=headers_only)
        self.checkpoint: Checkpoint = open_checkpoint(self.source.folder, None if adapter is None else Path(adapter))
        self.fix_mistral_regex = fix_mistral_regex
        tokenizer = self.source.folder / TOKENIZER_FILE
        if fix_mistral_regex and not has_wrong_regex(tokenizer):
            raise BuildError(f"--fix-mistral-regex: {tokenizer} does not have the wrong pattern; leave the flag out")
        model = self.checkpoint.model
        length = min(DEFAULT_MAX_SEQ_LEN, model.max_position) if max_seq_len is None else max_seq_len
        largest = model.vision.default_max_image_size if model.vision else 0
        packed = [t for t in self.checkpoint.tensors.values() if isinstance(t, QuantizedTensor)]
        # TensorRT has no zero points.
        exact = [t for t in packed if t.kind and t.exact and (t.scheme.symmetric or not self._compiled)]
        kinds = {t.kind for t in exact if t.kind and backend in QUANTIZATIONS[t.kind]}
        if quantization is None and dtype in (None, BACKEND_DTYPES[backend][0]) and len(kinds) == 1:
            (quantization,) = kinds
        held = [t for t in exact if t.kind == stored_as(quantization)]
        groups = choose_groups(group_size, quantization, {t.group for t in held}, model)
        kept = {t.name: t.scheme.symmetric for t in held}
        self.config = BuildConfig(
            dtype=BACKEND_DTYPES[backend][0] if dtype is None else dtype,
            max_seq_len=length,
            max_batch_size=max_batch_size,
            block_length=min(model.block_length, MAX_BLOCK) if block_length is None else block_length,
            max_input_len=min(PREFILL_CHUNK, length) if max_input_len is None else max_input_len,
            gather_generation_logits=logits,
            quantization=quantization,
            max_image_size=largest if max_image_size is None else max_image_size,
            kv_cache_dtype=kv_cache_dtype,
            group_size=groups[0],
            mlp_group_size=groups[1],
        )
        check_config(self.config, model, backend)
        self.profiles: tuple[Profile, ...] = profiles(model, self.config) if self._compiled else ()
        sees = model.vision if self._compiled else None
        self.patches: tuple[int, ...] = image_profiles(sees, self.config) if sees else ()
        lora = self.checkpoint.adapter
        self.graph: Graph = build_graph(
            model,
            self.config.dtype,
            lora.rank if lora else 0,
            lora.scale if lora else 1.0,
            capacity=cache_slots(self.config) if self._compiled else None,
            logits=logits,
            quantization=None if backend == "torch" else quantization,
            group_size=self.config.group_size,
            mlp_group_size=self.config.mlp_group_size,
            kept=kept or None,  # what is in other bits is quantized anew
            packed=backend == "onnxruntime",
            convolved=backend == "onnxruntime" and convolves(self.config, self.checkpoint.tensors.values()),
            kv_bits=self.config.kv_bits if backend == "onnxruntime" else None,
        )
        self._header = b""  # of the weights file
        if backend == "torch":
            self.graph, self._header = as_safetensors(
                self.graph, stored_as(quantization), groups=groups, kept=kept if packed else None
            )
        self.vision: Graph | None = None
        if model.vision:
            self.vision = build_vision_graph(model, self.config.dtype, fused=self._compiled)
        self.tensors: dict[str, Tensor | QuantizedTensor] = {
            **self.checkpoint.tensors,
            **(lora.tensors if lora else {}),
        }
        match([self.graph, *([self.vision] if self.vision else [])], self.tensors, self.source.folder / CONFIG_FILE)

    def plan(self) -> Plan:
        """What the build will make and need; nothing is written."""
        return make_plan(
            self.checkpoint,
            self.weight_bytes,
            self.config,
            self.output,
            self.backend,
            profiles=self.profiles,
            patches=self.patches,
            fix_regex=self.fix_mistral_regex,
        )

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights files."""
        return self.graph.weight_bytes + (self.vision.weight_bytes if self.vision else 0)

    def run(self, advance: Callable[[int], object] = lambda nbytes: None) -> Path:
        """Write the engine folder and return its path; `advance` gets each number of weight bytes written."""
        if self.source.headers_only:
            raise BuildError(f"{self.source.name}: only headers were fetched; leave out headers_only to build")
        sms = targets(self.backend, self.choices) if self._compiled else ()
        check_build_disk(self.output, self.weight_bytes, self.config.dtype, self._compiled)
        if self._compiled:
            check_compile_memory(self.backend, self.weight_bytes)
        with staged(self.output) as stage, _reader() as pool, self.checkpoint.reading():
            # The checkpoint is hashed while its tensors are copied: later it would be read from the disk once more.
            # A compiled build hashes later: copying keeps two processors busy, compiling hardly more than one, and
            # compiling needs the memory.
            hashing = {} if self._compiled else self._start_hashing(pool)
            digests = self._write_model(stage, advance)
            info = None
            if self._compiled:
                hashing = self._start_hashing(pool)
                with self._compiling_kernels(stage, sms) as kernels:
                    info, compiled = compile_graphs(
                        stage,
                        self.backend,
                        self.choices,
                        self.checkpoint.model,
                        sms=sms,
                        profiles=self.profiles,
                        patches=self.patches,
                        kernels=kernels,
                    )
                if not self.choices.keeps_weights:
                    for name in digests:
                        (stage / name).unlink()
                digests |= compiled
            copy_carried(self.source.folder, stage)
            if self.fix_mistral_regex:
                correct(stage / TOKENIZER_FILE)
            files = folder_entries(stage, digests)
            checkpoint_files = {name: entry.result() for name, entry in hashing.items()}
            adapter = self.checkpoint.adapter
            manifest = make_manifest(self.backend, self.source, checkpoint_files, adapter, files, info)
            EngineInfo(self.checkpoint.model, self.config, manifest, self.checkpoint.config).write(stage)
        return self.output

    def _start_hashing(self, pool: Executor) -> dict[str, Future[FileEntry]]:
        files = self.checkpoint.files
        return {name: pool.submit(file_entry, path, once=self._compiled) for name, path in files.items()}

    def _write_model(self, stage: Path, advance: Callable[[int], object]) -> dict[str, str]:
        """Write the weights, and the graphs that read them; each weights file's sha256 by its name."""
        torch = self.backend == "torch"
        parts = [(self.graph, self._header, MODEL_FILE, TENSORS_FILE if torch else WEIGHTS_FILE)]
        if self.vision:
            graph, header = as_safetensors(self.vision) if torch else (self.vision, b"")
            parts.append((graph, header, VISION_MODEL_FILE, VISION_TENSORS_FILE if torch else VISION_WEIGHTS_FILE))
        digests = {}
        for graph, header, model, weights in parts:
            digests[weights] = write_weights(
                graph,
                self.tensors,
                stage / weights,
                advance,
                hashed=not self._compiled or self.choices.keeps_weights,
                header=header,
                once=self._compiled,
            )
            if not torch:
                onnx.save(graph.proto, stage / model)
        return digests

    def _compiling_kernels(
        self, stage: Path, sms: tuple[int, ...]
    ) -> contextlib.AbstractContextManager[Callable[[], tuple[Kernel, ...]]]:
        """Compile the kernels of the plugins and of what samples after the engine, beside it."""
        ops = list(OPS) if self.choices.plugins else []
        if self.config.gather_generation_logits:
            ops.append(SAMPLED)
        if not self.choices.plugins:
            sms = tuple(sm for sm in sms if sm >= OLDEST_SM)
        return compiling_kernels(self.checkpoint.model, self.config.dtype, sms, stage, ops)


@contextlib.contextmanager
def _reader() -> Iterator[Executor]:
    """A thread beside the build that only reads, so a build that fails does not wait for it."""
    pool = ThreadPoolExecutor(1)
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)

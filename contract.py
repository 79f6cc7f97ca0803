"""What builder and runtime agree on: the choices an engine is built with, and the bindings of its graph.

`inputs` and `outputs` list every binding of an engine, for all backends and modes, to which ONNX Runtime's graph adds
`MEMORY_PATTERN`; the builder declares them and the runtime allocates them from the same list.

Letters in shapes: B rows, S tokens this pass, R of them that are predicted, T cache capacity, V vocabulary; G key/value
heads and D head size are numbers of the model. Of images: N patches, M and F embeddings.
"""

from __future__ import annotations

import dataclasses
import platform
from typing import Literal, get_args

from .config import ModelConfig
from .vision import CHANNELS, VisionConfig

DOMAIN = "nemodiff"  # of the custom ops
MAX_BLOCK = 64  # tokens; the block profile of the compiled backends is 1..64
MAX_BATCH = 4096  # rows of one forward
DEFAULT_MAX_SEQ_LEN = 32768
DEFAULT_MAX_BATCH_SIZE = 8
PAGE = 64  # slots of a page of K/V, of the torch engine and its kernels
DEFAULT_MAX_LOGPROBS = 20  # likeliest tokens that servers tell of for each token, as in vLLM
DEFAULT_GPU_MEMORY_UTILIZATION = 0.9  # share of a GPU that weights, passes and K/V may take, as in vLLM
PREFILL_CHUNK = 512  # tokens of a prefill pass unless another --max-input-len is built
EXPORT_FORMATS = ("ministral3",)
Mode = Literal["ar", "diffusion", "linear_spec", "quadratic_spec"]
MODES: tuple[str, ...] = get_args(Mode)

Backend = Literal["onnxruntime", "tensorrt-rtx", "tensorrt", "torch"]
COMPILED: tuple[Backend, ...] = ("tensorrt-rtx", "tensorrt")  # compiled while they are built, each for some GPUs
Dtype = Literal["f32", "f16", "bf16"]
# Of the projections. fp8: e4m3 with an f32 scale per output. int8: likewise, with the head. int4: an f32 scale per
# output and group of inputs, and the head in int8. On onnxruntime the inputs of int8 and int4 are in 8 bits too; in
# tensorrt-rtx they are not, and the scales are rounded to the engine's dtype.
# fp8_dynamic: weights as in fp8, and inputs in e4m3 with a scale per token.
Quantization = Literal["fp8", "fp8_dynamic", "int8", "int4"]
# Which backends have each, and what a projection's inputs are then a multiple of.
QUANTIZATIONS: dict[str, tuple[Backend, ...]] = {
    "int8": ("onnxruntime", "torch", "tensorrt-rtx"),
    "int4": ("onnxruntime", "torch", "tensorrt-rtx"),
    "fp8": ("torch",),
    "fp8_dynamic": ("torch",),
}
QUANTIZED_INPUTS: dict[str, int] = {"int8": 16, "int4": 32, "fp8": 16, "fp8_dynamic": 16}
GROUP_SIZE = 32  # inputs of an int4 weight that share a scale, unless another is chosen
MLP_GROUP_SIZE = 128  # likewise in the MLPs, where it divides their inputs
GROUP_SIZES = (32, 64, 128)
# Of K and V: auto is the engine's dtype. The others have a scale for every token and head; fp8 is e4m3.
KvCacheDtype = Literal["auto", "int8", "fp8"]
KvBits = Literal["int8", "fp8"]
KV_CACHE_DTYPES: dict[str, tuple[Backend, ...]] = {
    "auto": ("onnxruntime", "tensorrt-rtx", "tensorrt", "torch"),
    "int8": ("onnxruntime", "torch"),
    "fp8": ("torch",),
}
CONVOLVED = "convolved"  # the metadata of a graph for ONNX Runtime whose products need `on_x86`
ITEMSIZE: dict[str, int] = {"f32": 4, "f16": 2, "bf16": 2}
# What each backend computes in, its default first. TensorRT-RTX 1.7 has no f32 attention, ONNX Runtime no bf16 (CPU).
BACKEND_DTYPES: dict[Backend, tuple[Dtype, ...]] = {
    "onnxruntime": ("f32", "f16"),
    "tensorrt-rtx": ("bf16", "f16"),
    "tensorrt": ("bf16", "f16"),
    "torch": ("bf16", "f16", "f32"),
}
Kind = Literal["i8", "i32", "f32", "compute"]  # compute: the engine's dtype


@dataclasses.dataclass(frozen=True)
class BuildConfig:
    """The choices an engine is built with, in TensorRT-LLM's spelling where it has one.

    Without `gather_generation_logits` there is no output `logits`, so the engine cannot sample. `quantization` is that
    of the layers' projections, on a CPU of the head as well; embedding, norms and adapter stay in `dtype`.
    """

    dtype: Dtype
    max_seq_len: int
    max_batch_size: int
    block_length: int
    # Tokens of one pass (a prefill chunk), not of a prompt: a limit of a compiled engine, else a default.
    max_input_len: int = PREFILL_CHUNK
    gather_generation_logits: bool = True
    quantization: Quantization | None = None
    max_image_size: int = 0  # pixels; larger images are scaled down to it. 0 for a model that sees none
    kv_cache_dtype: KvCacheDtype = "auto"
    group_size: int = GROUP_SIZE  # inputs of an int4 weight that share a scale
    mlp_group_size: int = GROUP_SIZE  # likewise in the MLPs

    @property
    def groups(self) -> dict[str, int | None]:
        """The groups of int4 by their names here, None in other bits."""
        sizes = {"group_size": self.group_size, "mlp_group_size": self.mlp_group_size}
        return {name: size if self.quantization == "int4" else None for name, size in sizes.items()}

    @property
    def dtype_text(self) -> str:
        """What weights and cache are, for people."""
        return dtype_line(self.dtype, self.quantization, self.kv_cache_dtype, **self.groups)

    @property
    def kv_bits(self) -> KvBits | None:
        """How K and V are kept in 8 bits, if they are."""
        return None if self.kv_cache_dtype == "auto" else self.kv_cache_dtype


def on_x86() -> bool:
    """Whether this machine is of x86 in 64 bits, where ONNX Runtime has kernels that no other has."""
    return platform.machine().lower() in ("x86_64", "amd64")


def stored_as(quantization: Quantization | None) -> Quantization | None:
    """The kind that a projection's weights are of, whatever its inputs are."""
    return "fp8" if quantization == "fp8_dynamic" else quantization


def dtype_line(
    dtype: str, quantization: str | None, kv_cache_dtype: str, group_size: int | None, mlp_group_size: int | None
) -> str:
    """What weights and cache are, for people; the groups are int4's."""
    parts = [f"{quantization} projections"] if quantization else []
    if quantization == "int4":
        wide = "" if mlp_group_size == group_size else f" ({mlp_group_size} in the MLPs)"
        parts = [f"int4 projections in groups of {group_size}{wide}"]
    parts += [f"{kv_cache_dtype} K/V"] if kv_cache_dtype != "auto" else []
    return f"{dtype} with {' and '.join(parts)}" if parts else dtype


def kv_bytes_per_token(model: ModelConfig, build: BuildConfig) -> int:
    """Bytes that one token occupies in the cache, K and V over all layers."""
    if build.kv_bits is None:
        return model.kv_bytes_per_token(ITEMSIZE[build.dtype])
    return model.kv_bytes_per_token(1) // model.head_dim * (model.head_dim + ITEMSIZE["f32"])


def cache_slots(build: BuildConfig) -> int:
    """Slots of the longest row: `max_seq_len`, and room for the scratch of a pass that begins at the last slot.

    A block, groups of masks, fillings of a hole or a batch's padding reach past the request's end. A pass has up to
    PREFILL_CHUNK tokens however few `max_seq_len` allows or the engine takes at once, since it then runs in pieces.
    This is T of a TensorRT engine.
    """
    # In whole pages, so that every row of TensorRT's begins at an address that it takes.
    return -(-(build.max_seq_len + max(PREFILL_CHUNK, build.max_input_len)) // PAGE) * PAGE


@dataclasses.dataclass(frozen=True)
class Binding:
    """One input or output of the graph; letters in `shape` are dynamic."""

    name: str
    kind: Kind
    shape: tuple[str | int, ...]


def cache_names(layers: int) -> list[str]:
    """The cache inputs in order; the output over the same memory is `NAME_out`."""
    # An ONNX graph cannot give an output the name of an input, so each cache is bound twice.
    return [f"{kind}_cache_{layer}" for layer in range(layers) for kind in "kv"]


def caches(model: ModelConfig, kv_bits: KvBits | None = None) -> list[Binding]:
    """The cache inputs: K and V of every layer, in 8 bits beside scales `k_scale_0` and so on."""
    slots = ("B", model.num_kv_heads, "T")
    if kv_bits is None:
        return [Binding(name, "compute", (*slots, model.head_dim)) for name in cache_names(model.num_layers)]
    return [
        binding
        for name in cache_names(model.num_layers)
        for binding in (
            Binding(name, "i8", (*slots, model.head_dim)),
            Binding(name.replace("cache", "scale"), "f32", (*slots, 1)),
        )
    ]


def inputs(model: ModelConfig, adapter: bool, kv_bits: KvBits | None = None) -> list[Binding]:
    """Inputs of an engine.

    `visible` holds `(prefix_end, span_begin, span_end)` per query: it sees cache slots `[0, prefix_end)` and
    `[span_begin, span_end)`, after this pass has written its own K/V at `[write_at, write_at + S)`. `rows` picks the
    tokens that get the head. `adapter` is 1 where the drafter LoRA acts, present only if the engine has one. A model
    that sees images has `embeddings`, F of them and at least one, and `embedding`: which of them stands in the place of
    a token's own, -1 for none.
    """
    gate = [Binding("adapter", "f32", ("B", "S"))] if adapter else []
    return [
        Binding("ids", "i32", ("B", "S")),
        Binding("pos", "i32", ("B", "S")),
        Binding("write_at", "i32", ("B",)),
        Binding("visible", "i32", ("B", "S", 3)),
        Binding("rows", "i32", ("B", "R")),
        *gate,
        *(_embeddings(model) if model.vision else []),
        Binding("threshold", "f32", ("B",)),
        *caches(model, kv_bits),
    ]


def _embeddings(model: ModelConfig) -> list[Binding]:
    return [Binding("embedding", "i32", ("B", "S")), Binding("embeddings", "f32", ("F", model.hidden_size))]


# ONNX Runtime keeps where the arrays of a pass lie by the exclusive or of all sizes of its inputs, in which S and R
# cancel, so most passes would share what suits the first of them. This input has no elements, and its P makes the
# exclusive or a number of the runtime's choice.
MEMORY_PATTERN = Binding("memory_pattern", "i32", ("P", 0))


def vision_inputs(vision: VisionConfig) -> list[Binding]:
    """Inputs of the vision graph, for N patches of one or more images.

    The patches of a token are neighbours, row by row, as are the tokens of an image. `positions` holds row and column
    in patches. `visible` is as in `inputs`, over patches: each sees those of its own image.
    """
    return [
        Binding("patches", "f32", ("N", CHANNELS * vision.patch_size**2)),
        Binding("positions", "i32", ("N", 2)),
        Binding("visible", "i32", (1, "N", 3)),
    ]


def vision_outputs(model: ModelConfig) -> list[Binding]:
    """Output of the vision graph: the embedding of each of M tokens, M = N / merge^2."""
    return [Binding("features", "f32", ("M", model.hidden_size))]


def outputs(model: ModelConfig, logits: bool = True, kv_bits: KvBits | None = None) -> list[Binding]:
    """Outputs of an engine; `logits` is missing from one built for greedy decoding only.

    `token` and `confidence`: best vocabulary entry (never the mask id) and its probability among all others.
    `next_ids`: the picked ids after the commit rule. `masks_left`: masks remaining among them. `logits` is bound only
    by a caller that needs it (sampling, logprobs, debugging) and otherwise never leaves the device.
    """
    return [
        Binding("token", "i32", ("B", "R")),
        Binding("confidence", "f32", ("B", "R")),
        Binding("next_ids", "i32", ("B", "R")),
        Binding("masks_left", "i32", ("B",)),
        *([Binding("logits", "f32", ("B", "R", "V"))] if logits else []),
        *(Binding(f"{b.name}_out", b.kind, b.shape) for b in caches(model, kv_bits)),
    ]


def size_text(nbytes: int) -> str:
    """A number of bytes for people: 1536 is `1.5 KiB`."""
    value, unit = float(nbytes), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"


def counted(count: int, noun: str) -> str:
    """A count with its noun: `1 row`, `2 rows`, `2 passes`; the noun's last word gets the ending."""
    ending = "" if count == 1 else "es" if noun.endswith(("s", "x", "ch")) else "s"
    return f"{count} {noun}{ending}"

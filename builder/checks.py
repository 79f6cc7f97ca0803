"""Refuses what a build may not choose: by the backend before anything is opened, then by the checkpoint's sizes."""

from __future__ import annotations

import math
from collections.abc import Collection

from ..config import ModelConfig
from ..contract import (
    BACKEND_DTYPES,
    COMPILED,
    GROUP_SIZE,
    GROUP_SIZES,
    KV_CACHE_DTYPES,
    MAX_BATCH,
    MAX_BLOCK,
    MLP_GROUP_SIZE,
    QUANTIZATIONS,
    QUANTIZED_INPUTS,
    Backend,
    BuildConfig,
    Dtype,
    KvCacheDtype,
    Quantization,
)
from ..errors import BuildError
from .compilers.choices import Choices, check_choices


def check_backend(
    backend: Backend,
    choices: Choices,
    dtype: Dtype | None,
    max_input_len: int | None,
    logits: bool,
    quantization: Quantization | None,
    kv_cache_dtype: KvCacheDtype,
    group_size: int | None,
) -> None:
    """Refuse what the backend cannot do. Raises BuildError."""
    if backend not in BACKEND_DTYPES:
        raise BuildError(f"--backend is {backend!r}, allowed: {', '.join(BACKEND_DTYPES)}; choose one of them")
    check_choices(backend, choices)
    allowed = BACKEND_DTYPES[backend]
    if dtype is not None and dtype not in allowed:
        raise BuildError(f"--dtype is {dtype!r}, allowed on {backend}: {', '.join(allowed)}; use --dtype {allowed[0]}")
    if backend not in COMPILED and (max_input_len is not None or not logits):
        flag = "--no-logits" if max_input_len is None else "--max-input-len"
        raise BuildError(
            f"{flag}: not a choice of --backend {backend}, allowed: tensorrt-rtx or tensorrt; leave it out or "
            "add --backend tensorrt-rtx"
        )
    if quantization is not None and quantization not in QUANTIZATIONS:
        raise BuildError(
            f"--quantization is {quantization!r}, allowed: {', '.join(QUANTIZATIONS)}; choose one of them or none"
        )
    if quantization is not None and backend not in QUANTIZATIONS[quantization]:
        backends = QUANTIZATIONS[quantization]
        raise BuildError(
            f"--quantization {quantization}: not a choice of --backend {backend}, allowed: "
            f"{', '.join(backends)}; leave it out or add --backend {backends[0]}"
        )
    if quantization == "fp8_dynamic" and dtype == "f16":
        raise BuildError(
            "--dtype f16: not a choice of --quantization fp8_dynamic, whose sums it cannot hold, allowed: bf16, f32; "
            "leave it out"
        )
    if quantization is not None and backend == "onnxruntime" and dtype not in (None, "f32"):
        raise BuildError(
            f"--dtype {dtype}: not a choice of --quantization {quantization}, allowed: f32 for all that is not "
            "quantized; leave it out"
        )
    if group_size is not None and (isinstance(group_size, bool) or group_size not in GROUP_SIZES):
        allowed_sizes = ", ".join(map(str, GROUP_SIZES))
        raise BuildError(f"--group-size is {group_size!r}, allowed: {allowed_sizes}; leave it out")
    if kv_cache_dtype not in KV_CACHE_DTYPES:
        raise BuildError(
            f"--kv-cache-dtype is {kv_cache_dtype!r}, allowed: {', '.join(KV_CACHE_DTYPES)}; choose one of them"
        )
    if backend not in KV_CACHE_DTYPES[kv_cache_dtype]:
        backends = KV_CACHE_DTYPES[kv_cache_dtype]
        raise BuildError(
            f"--kv-cache-dtype {kv_cache_dtype}: not a choice of --backend {backend}, allowed: {', '.join(backends)}; "
            f"leave it out or add --backend {backends[0]}"
        )
    if kv_cache_dtype != "auto" and backend == "onnxruntime" and dtype not in (None, "f32"):
        raise BuildError(
            f"--dtype {dtype}: not a choice of --kv-cache-dtype {kv_cache_dtype} on onnxruntime, allowed: f32 for all "
            "that is not cached; leave it out"
        )


def check_config(config: BuildConfig, model: ModelConfig, backend: Backend) -> None:
    """Refuse what the model or the engine's limits do not allow. Raises BuildError."""
    for flag, value, high, reason in (
        ("--max-seq-len", config.max_seq_len, model.max_position, "the model's max_position_embeddings"),
        ("--max-batch-size", config.max_batch_size, MAX_BATCH, "rows of one forward"),
        ("--block-length", config.block_length, MAX_BLOCK, "the longest block of an engine"),
        ("--max-input-len", config.max_input_len, config.max_seq_len, "--max-seq-len"),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= high:
            raise BuildError(f"{flag} is {value!r}, allowed: 1 to {high} ({reason}); choose a value in that range")
    if model.vision:
        cell, size = model.vision.cell, config.max_image_size
        if type(size) is not int or size < cell or size % cell:
            raise BuildError(f"--max-image-size is {size!r}, allowed: multiples of {cell}; choose one of them")
    elif config.max_image_size:
        raise BuildError("--max-image-size: this model sees no images; leave it out")
    bits = {"--quantization": config.quantization, "--kv-cache-dtype": config.kv_bits}
    flag, kind = next(((flag, kind) for flag, kind in bits.items() if kind), ("", None))
    if kind and backend == "onnxruntime" and model.num_heads == model.num_kv_heads:
        # Attention of one query with one head is another kernel there, so self-speculation would not be ar's equal.
        raise BuildError(
            f"{flag} {kind}: the model has one query head per key/value head, allowed: models "
            "whose query heads share them; leave it out"
        )
    if config.quantization:
        flag, step = f"--quantization {config.quantization}", QUANTIZED_INPUTS[config.quantization]
        if config.quantization == "int4" and config.group_size > step:
            flag, step = f"--group-size {config.group_size}", config.group_size
        for width in widths(model):
            if width % step:
                raise BuildError(f"{flag}: a projection has {width} inputs, allowed: multiples of {step}; leave it out")


def widths(model: ModelConfig) -> tuple[int, ...]:
    """How many inputs the projections have."""
    return model.hidden_size, model.num_heads * model.head_dim, model.intermediate_size


def choose_groups(
    group_size: int | None,
    quantization: Quantization | None,
    kept: Collection[int],
    model: ModelConfig,
) -> tuple[int, int]:
    """The groups of an engine's int4 weights, and of its MLPs; `kept` are those of what a checkpoint has in such bits.

    Unless one is asked for, a checkpoint's own, or the largest part of it that the engine has. Raises BuildError.
    """
    if group_size is not None and quantization != "int4":
        raise BuildError(f"--group-size {group_size}: a choice of --quantization int4; leave it out or add that")
    whole = math.gcd(*kept)  # 0 where nothing is kept
    if group_size is not None:
        if whole % group_size:
            raise BuildError(
                f"--group-size is {group_size}, but a scale of the checkpoint is for {whole} inputs, allowed: divisors "
                "of that; leave it out"
            )
        return group_size, group_size
    if quantization != "int4":
        return GROUP_SIZE, GROUP_SIZE
    if kept:
        own = max((size for size in GROUP_SIZES if not math.gcd(whole, *widths(model)) % size), default=GROUP_SIZE)
        return own, own
    wide = not math.gcd(model.hidden_size, model.intermediate_size) % MLP_GROUP_SIZE
    return GROUP_SIZE, MLP_GROUP_SIZE if wide else GROUP_SIZE

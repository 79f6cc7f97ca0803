"""What a build will make and what it will need, from config and tensor headers alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from .. import main_memory
from ..contract import (
    COMPILED,
    ITEMSIZE,
    Backend,
    BuildConfig,
    cache_slots,
    counted,
    kv_bytes_per_token,
    size_text,
)
from ..tensorrt_info import Profile, logits_bytes
from .checkpoint.carried_notes import regex_notes, sampling_notes
from .checkpoint.checkpoint import Checkpoint
from .resources import disk_free, memory_needed

CARDS = (8, 12, 16, 24, 32, 48, 80)  # GiB that GPUs are sold with
_MOST_RANKS = 8  # GPUs of one machine
CARD_RESERVE = 2**30  # bytes left for the driver, activations and kernels
REGEX_REMEDY = "give --fix-mistral-regex for the right one, unless the model was trained with this one"
LENGTHS = (1024, 4096, 16384, 65536, 262144)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sizes are bytes; `rows_that_fit` maps a sequence length to how many rows' K/V fit beside the weights.

    For the backends of GPUs memory is the GPU's and `rows_that_fit` maps a card's GiB to rows of `max_seq_len`;
    `split_rows_that_fit` does so for every number of GPUs over which --tp-size can split a torch engine.
    `build_memory` is what compiling takes here, 0 where nothing is compiled.
    """

    backend: Backend
    tensors: int
    checkpoint_bytes: int
    parameters: int
    vision_parameters: int
    image_tokens: int  # of an image of the largest size; 0 for a model that sees none
    patches: tuple[int, ...]  # that the profiles of a compiled vision graph take at most
    adapter_rank: int
    weight_bytes: int
    disk_free: int
    kv_bytes_per_token: int
    memory_loaded: int
    memory_here: int
    disk_needed: int
    build_memory: int
    build: BuildConfig
    rows_that_fit: dict[int, int]
    split_rows_that_fit: dict[int, dict[int, int]]
    unknown_fields: tuple[str, ...]
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def lines(self, checkpoint: str, output: Path) -> list[str]:
        """The plan for people."""
        build = self.build
        adapter = f"drafter LoRA of rank {self.adapter_rank}" if self.adapter_rank else "no drafter adapter"
        row = size_text(self.kv_bytes_per_token * build.max_seq_len)
        limits = f"up to {counted(build.max_batch_size, 'row')} of {counted(build.max_seq_len, 'token')}"
        ignored = [f"ignored      unknown config fields: {', '.join(self.unknown_fields)}"]
        return [
            f"checkpoint   {checkpoint}: {counted(self.tensors, 'tensor')}, {size_text(self.checkpoint_bytes)}",
            f"parameters   {self.parameters:,}, {adapter}",
            *([self._image_line()] if self.image_tokens else []),
            f"engine       {self.backend}, {build.dtype_text}, block length {build.block_length}, {limits}",
            f"disk         {size_text(self.disk_needed)} to write under {output}, {size_text(self.disk_free)} free",
            f"KV cache     {self.kv_bytes_per_token:,} bytes per token, {row} for one row of {build.max_seq_len}",
            *(self._processor_lines() if self.backend == "onnxruntime" else self._gpu_lines()),
            *(ignored if self.unknown_fields else []),
            *(f"note         {note}" for note in self.notes),
        ]

    def _image_line(self) -> str:
        size = self.build.max_image_size
        return (
            f"images       {self.vision_parameters:,} parameters of tower and projector, up to {self.image_tokens} "
            f"tokens for an image, of {size} x {size} pixels or larger"
            + (f"; its graph is compiled for up to {' and '.join(map(str, self.patches))} patches" * bool(self.patches))
        )

    def _processor_lines(self) -> list[str]:
        loaded, here = size_text(self.memory_loaded), size_text(self.memory_here)
        fits = ", ".join(f"{rows} x {length}" for length, rows in self.rows_that_fit.items() if rows)
        return [
            f"memory       {loaded} of loaded weights; this machine has {here}",
            f"fits here    {fits} (rows x tokens)" if fits else "fits here    nothing",
        ]

    def _gpu_lines(self) -> list[str]:
        build = self.build
        # The rows of a TensorRT engine have their whole length from the start.
        slots = cache_slots(build) if self.build_memory else build.max_seq_len
        full = size_text(self.memory_loaded + build.max_batch_size * self.kv_bytes_per_token * slots)
        compiling = f"; to compile about {size_text(self.build_memory)} here" if self.build_memory else ""
        logits = ", logits" * bool(self.build_memory and build.gather_generation_logits)
        fits = _first_cards(self.rows_that_fit, build.max_batch_size)
        return [
            f"memory       {full} of GPU memory for weights{logits} and all rows{compiling}; this machine has "
            f"{size_text(self.memory_here)} of main memory",
            f"fits         {fits} (rows of {build.max_seq_len})" if fits else f"fits         no row in {CARDS[-1]} GiB",
            *(
                f"split        --tp-size {size}: {_first_cards(rows, build.max_batch_size) or 'no row'}"
                for size, rows in self.split_rows_that_fit.items()
            ),
        ]


def _first_cards(rows_that_fit: dict[int, int], most: int) -> str:
    """`3 in 24 GiB, 8 in 32 GiB`: up to the first card that holds `most` rows."""
    enough = next((card for card, rows in rows_that_fit.items() if rows >= most), CARDS[-1])
    return ", ".join(f"{rows} in {card} GiB" for card, rows in rows_that_fit.items() if rows and card <= enough)


def _rows_on_cards(weights: int, row: int) -> dict[int, int]:
    return {card: max(0, card * 2**30 - weights - CARD_RESERVE) // row for card in CARDS}


def make_plan(
    checkpoint: Checkpoint,
    weight_bytes: int,
    build: BuildConfig,
    output: Path,
    backend: Backend,
    *,
    profiles: tuple[Profile, ...],
    patches: tuple[int, ...],
    fix_regex: bool,
) -> Plan:
    """Compute the plan; nothing is written and no weight is read.

    `profiles` are a compiled engine's, `patches` of the vision graph's profiles, `fix_regex`: the tokenizer is mended.
    """
    model = checkpoint.model
    adapter = checkpoint.adapter
    tensors = [*checkpoint.tensors.values(), *(adapter.tensors.values() if adapter else ())]
    per_token = kv_bytes_per_token(model, build)
    seeing = model.vision.parameters(model.hidden_size) if model.vision else 0
    memory = main_memory.total()
    compiled = backend in COMPILED
    split: dict[int, dict[int, int]] = {}
    if backend == "onnxruntime":
        # The embedding stays mapped. f16 weights take f32's memory once loaded: ONNX Runtime converts them where the
        # processor has no f16 arithmetic that it uses (benchmarks/build_memory.py).
        embedding = model.vocab_size * model.hidden_size
        loaded = (model.parameters - embedding + seeing) * ITEMSIZE["f32"]
        if build.quantization is not None:
            loaded = weight_bytes - embedding * ITEMSIZE["f32"]
        # Caches grow with use, so a long `max_seq_len` costs nothing until a text is that long.
        lengths = [length for length in LENGTHS if length < build.max_seq_len] + [build.max_seq_len]
        room = {length: max(0, memory - loaded) // (per_token * length) for length in lengths}
    else:
        loaded = weight_bytes
        if profiles and build.gather_generation_logits:
            loaded += logits_bytes(profiles, model.vocab_size)
        row = per_token * (cache_slots(build) if compiled else build.max_seq_len)
        room = _rows_on_cards(loaded, row)
        if not compiled:
            whole = model.vocab_size * model.hidden_size * ITEMSIZE[build.dtype]  # the embedding, which every rank has
            for size in (n for n in model.splits if 1 < n <= _MOST_RANKS):
                split[size] = _rows_on_cards(whole + (weight_bytes - whole) // size, row // size)
    image_tokens = model.vision.most_tokens(build.max_image_size) if model.vision else 0
    return Plan(
        backend=backend,
        tensors=len(tensors),
        checkpoint_bytes=sum(tensor.nbytes for tensor in tensors),
        parameters=model.parameters,
        vision_parameters=seeing,
        image_tokens=image_tokens,
        patches=patches,
        adapter_rank=adapter.rank if adapter else 0,
        weight_bytes=weight_bytes,
        disk_free=disk_free(output),
        kv_bytes_per_token=per_token,
        memory_loaded=loaded,
        memory_here=memory,
        disk_needed=weight_bytes * (2 if compiled else 1),
        build_memory=memory_needed(weight_bytes) if compiled else 0,
        build=build,
        rows_that_fit={key: min(build.max_batch_size, rows) for key, rows in room.items()},
        split_rows_that_fit={
            size: {card: min(build.max_batch_size, rows) for card, rows in cards.items()}
            for size, cards in split.items()
        },
        unknown_fields=model.unknown_fields,
        notes=(
            *checkpoint.notes,
            *sampling_notes(checkpoint.generation),
            *regex_notes(checkpoint.folder, "the engine gets the right one" if fix_regex else REGEX_REMEDY),
            *_image_notes(image_tokens, build),
        ),
    )


def _image_notes(image_tokens: int, build: BuildConfig) -> list[str]:
    """Where the largest images would be refused."""
    if image_tokens < build.max_seq_len:
        return []
    size = build.max_image_size
    return [
        f"an image of {size} x {size} pixels or larger, {image_tokens} tokens, does not fit in rows of "
        f"{build.max_seq_len}; give a smaller --max-image-size, or a larger --max-seq-len"
    ]

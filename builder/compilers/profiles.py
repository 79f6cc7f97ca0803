"""The optimization profiles of TensorRT engines: the sizes of passes and of images that they are compiled for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ...config import ModelConfig
from ...contract import MAX_BLOCK, BuildConfig, cache_slots
from ...errors import BuildError
from ...tensorrt_info import Profile
from ...vision import VisionConfig

Corner = Mapping[str, int]  # a number for each letter of the shapes in `contract.py`
Corners = tuple[Corner, Corner, Corner]  # at least, at best and at most

# Elements. TensorRT names this limit; TensorRT-RTX 1.7 builds past it without a word (2026-11-24), and nothing has run.
LARGEST_TENSOR = 2**31 - 1
PREFILL_LOGITS = 2**30  # bytes of f32; a prefill pass has as many rows as keep its logits below
FEW_PATCHES = 1024  # of an image of 448 pixels a side where a patch has 14


def profiles(model: ModelConfig, build: BuildConfig) -> tuple[Profile, ...]:
    """Choose the optimization profiles. Raises BuildError.

    `block` is for decoding, `prefill` for longer passes: chunks of a prompt, and quadratic self-speculation, which
    needs a prediction of every token. With `max_input_len` no longer than a block there is only the first, which takes
    a whole block however short `max_seq_len` is, as the last one may reach past it.
    """
    length = MAX_BLOCK
    slots = cache_slots(build)
    rows = build.max_batch_size
    widest = {
        "the K/V cache": model.num_kv_heads * slots * model.head_dim,
        "the attention mask": length * slots,
        "the logits": length * model.vocab_size,
    }
    name, most = max(widest.items(), key=lambda pair: pair[1])
    if rows * most > LARGEST_TENSOR:
        raise BuildError(
            f"--max-batch-size is {rows}: {name} of that many rows of {build.max_seq_len} tokens would be a tensor of "
            f"{rows * most:,} elements, allowed: {LARGEST_TENSOR:,}; use --max-batch-size {LARGEST_TENSOR // most} or "
            "a smaller --max-seq-len"
        )
    block = Profile("block", rows, length, length)
    chunk = build.max_input_len
    if chunk <= length:
        return (block,)
    per_row = max(4 * chunk * model.vocab_size / PREFILL_LOGITS, chunk * slots / LARGEST_TENSOR)
    if per_row > 1:
        raise BuildError(
            f"--max-input-len is {chunk}: the logits of one such pass would take {4 * chunk * model.vocab_size:,} "
            f"bytes, allowed: {PREFILL_LOGITS:,}; use --max-input-len {int(chunk / per_row)} or less"
        )
    return (block, Profile("prefill", min(rows, int(1 / per_row)), chunk, chunk))


def corners(profile: Profile) -> Corners:
    """A decoder's letters: one row at best decodes a block, or prefills and needs one prediction."""
    tokens = profile.max_tokens
    rows = profile.max_batch_size
    predicted = profile.max_rows
    best = 1 if profile.name == "prefill" else predicted
    return (
        {"B": 1, "S": 1, "R": 1, "F": 1},
        {"B": 1, "S": tokens, "R": best, "F": tokens},
        {"B": rows, "S": tokens, "R": predicted, "F": rows * tokens},
    )


def image_profiles(vision: VisionConfig, build: BuildConfig) -> tuple[int, ...]:
    """The most patches of each profile of the vision graph, least first. Raises BuildError."""
    most = (build.max_image_size // vision.patch_size) ** 2
    if most**2 > LARGEST_TENSOR:
        size = int(LARGEST_TENSOR**0.25) * vision.patch_size // vision.cell * vision.cell
        raise BuildError(
            f"--max-image-size is {build.max_image_size}: the attention mask of {most} patches would be a tensor of "
            f"{most**2:,} elements, allowed: {LARGEST_TENSOR:,}; use --max-image-size {size} or less"
        )
    few = FEW_PATCHES // vision.merge**2 * vision.merge**2
    return (few, most) if 0 < few < most else (most,)


def image_corners(vision: VisionConfig, patches: int) -> Corners:
    """The vision graph's letter: best is the most, as larger images are scaled down to it."""
    return {"N": vision.merge**2}, {"N": patches}, {"N": patches}


def shape(declared: Sequence[str | int], corner: Corner) -> tuple[int, ...]:
    """An input's shape at a corner of a profile."""
    return tuple(corner[size] if isinstance(size, str) else size for size in declared)

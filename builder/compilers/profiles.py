"""The optimization profiles of a TensorRT engine: the sizes of a pass that it is compiled for."""

from __future__ import annotations

from ...config import ModelConfig
from ...contract import MAX_BLOCK, BuildConfig, cache_slots
from ...engine_folder import Profile
from ...errors import BuildError

# Elements. TensorRT names this limit; TensorRT-RTX 1.7 builds past it without a word (2026-11-24), and nothing has run.
LARGEST_TENSOR = 2**31 - 1
PREFILL_LOGITS = 2**30  # bytes of f32; a prefill pass has as many rows as keep its logits below


def profiles(model: ModelConfig, build: BuildConfig) -> tuple[Profile, ...]:
    """Choose the optimization profiles. Raises BuildError.

    `block` is for decoding, `prefill` for longer passes: chunks of a prompt, and quadratic self-speculation, which
    needs a prediction of every token. With `max_input_len` no longer than a block there is only the first.
    """
    length = min(max(MAX_BLOCK, build.block_length), build.max_seq_len)
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

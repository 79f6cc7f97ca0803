"""The `nemodiff` ops: each file of `ops/` specifies one, with a numpy reference and the stages that run it on a GPU."""

from typing import get_args

from ..contract import KvBits
from .ops import (
    advance,
    arrange,
    block_attention,
    confidence_commit,
    flat_commit,
    head_commit,
    linear,
    paged_attention,
    residual_norm,
    rope_write,
    rotation,
    swiglu,
    token_quantise,
)

KV_BITS: tuple[KvBits | None, ...] = (None, *get_args(KvBits))
OPS = (block_attention.OP, confidence_commit.OP)  # the ops of the graph
SAMPLED = confidence_commit.SAMPLED  # runs after a graph, over its logits
FUSED = (  # the ops of the torch engine
    advance.OP,
    arrange.OP,
    rotation.OP,
    residual_norm.EMBEDDING,
    residual_norm.op(),
    residual_norm.op(linear.MOST_SHARES),
    token_quantise.OP,
    *(rope_write.paged(bits, shares) for shares in (0, linear.MOST_SHARES) for bits in KV_BITS),
    paged_attention.PLAN,
    *map(paged_attention.op, KV_BITS),
    swiglu.op(),
    swiglu.op(linear.MOST_SHARES),
    *(head_commit.flat_op(tile, int8) for int8 in (False, True) for tile in head_commit.TILES),
    flat_commit.SAMPLED,
    flat_commit.OP,
    *(linear.split(kind, tile, linear.MOST_SHARES) for kind in linear.KINDS for tile in linear.TILES),
    *(linear.gated(kind, tile) for kind in linear.KINDS for tile in linear.TILES),
    *(linear.whole(kind, linear.MOST_SHARES) for kind in linear.KINDS if kind),
    linear.share_sum(linear.MOST_SHARES),
)

__all__ = [
    "FUSED",
    "KV_BITS",
    "OPS",
    "SAMPLED",
    "advance",
    "arrange",
    "block_attention",
    "confidence_commit",
    "flat_commit",
    "head_commit",
    "linear",
    "paged_attention",
    "residual_norm",
    "rope_write",
    "rotation",
    "swiglu",
    "token_quantise",
]

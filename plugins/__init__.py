"""The `nemodiff` ops: each file of `ops/` specifies one, with a numpy reference and the stages that run it on a GPU."""

from .ops import (
    block_attention,
    confidence_commit,
    fp8_linear,
    head_commit,
    paged_attention,
    residual_norm,
    rope_write,
    rotation,
    swiglu,
    token_quantise,
)

OPS = (block_attention.OP, confidence_commit.OP)  # the ops of the graph
SAMPLED = confidence_commit.SAMPLED  # runs after a graph, over its logits
FUSED = (  # the ops of the torch engine
    residual_norm.OP,
    rotation.OP,
    token_quantise.OP,
    rope_write.PAGED,
    paged_attention.PLAN,
    paged_attention.OP,
    swiglu.OP,
    *map(head_commit.flat_op, head_commit.TILES),
    confidence_commit.FLAT_SAMPLED,
    *map(fp8_linear.op, fp8_linear.TILES),
)

__all__ = [
    "FUSED",
    "OPS",
    "SAMPLED",
    "block_attention",
    "confidence_commit",
    "fp8_linear",
    "head_commit",
    "paged_attention",
    "residual_norm",
    "rope_write",
    "rotation",
    "swiglu",
    "token_quantise",
]

"""The `nemodiff` ops. Each file holds one: specification, numpy reference, GPU stages; those of the graph a body."""

from .ops import block_attention, confidence_commit, fp8_linear, head_commit, residual_norm, rope_write, swiglu

OPS = (block_attention.OP, confidence_commit.OP)  # those of the graph
SAMPLED = confidence_commit.SAMPLED  # runs after a graph, over its logits
FUSED = (  # of the torch engine
    residual_norm.OP,
    rope_write.OP,
    swiglu.OP,
    *map(head_commit.op, head_commit.ROWS),
    *map(fp8_linear.op, fp8_linear.ROWS),
)

__all__ = [
    "FUSED",
    "OPS",
    "SAMPLED",
    "block_attention",
    "confidence_commit",
    "fp8_linear",
    "head_commit",
    "residual_norm",
    "rope_write",
    "swiglu",
]

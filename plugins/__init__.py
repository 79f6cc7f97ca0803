"""The `nemodiff` ops. Each file holds one op: its specification, numpy reference, ONNX function body and GPU stages."""

from . import block_attention, confidence_commit

OPS = (block_attention.OP, confidence_commit.OP)  # those of the graph

__all__ = ["OPS", "block_attention", "confidence_commit"]

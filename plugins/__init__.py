"""The `nemodiff` ops. Each file holds one op: its specification, numpy reference and ONNX function body."""

from . import block_attention, confidence_commit

__all__ = ["block_attention", "confidence_commit"]

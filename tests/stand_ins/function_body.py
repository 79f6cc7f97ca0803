"""Runs an op's function body alone on ONNX Runtime."""

from typing import Any

import numpy as np
import onnx
from onnx import helper

from nemodiff.contract import DOMAIN


def run(function: onnx.FunctionProto, feeds: dict[str, np.ndarray], results: dict[str, int], **attributes: Any) -> Any:
    """Run a function body alone on ONNX Runtime; `results` maps output names to tensor types."""
    import onnxruntime

    ranks = {"y": 4, "masks_left": 1}
    node = helper.make_node(
        function.name, list(feeds), list(results), domain=DOMAIN, plugin_namespace=DOMAIN, **attributes
    )
    inputs = []
    for name, array in feeds.items():
        kind = helper.np_dtype_to_tensor_dtype(array.dtype)
        inputs.append(helper.make_tensor_value_info(name, kind, array.shape))
    outputs = []
    for name, kind in results.items():
        outputs.append(helper.make_tensor_value_info(name, kind, [None] * ranks.get(name, 2)))
    graph = helper.make_graph([node], "op", inputs, outputs)
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=11, functions=[function])
    onnx.checker.check_model(model, full_check=True)
    return onnxruntime.InferenceSession(model.SerializeToString()).run(None, feeds)

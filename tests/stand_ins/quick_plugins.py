# mypy: ignore-errors
"""Drives the quick plugins on the real registry of TensorRT 11.4's lean runtime.

It reads a job as JSON from standard input and prints what each stage's plugin answers, as JSON too.

The lean wheel has the registry and the plugin interfaces but no builder, so `tensorrt` is put together here: the lean
module, the Python sources of `tensorrt.plugin` out of the bindings wheel, whose own library is in no wheel, and
stand-ins for what only a builder hands out: tensors, formats, and expressions of shapes, which are numbers here.
"""

from __future__ import annotations

import enum
import importlib.util
import json
import sys
import types
from pathlib import Path

import numpy as np

OPERATIONS = {
    "SUM": lambda a, b: a + b,
    "SUB": lambda a, b: a - b,
    "PROD": lambda a, b: a * b,
    "FLOOR_DIV": lambda a, b: a // b,
    "CEIL_DIV": lambda a, b: -(-a // b),
}


class Number:
    """An expression that is a number: what a builder would compute."""

    def __init__(self, value):
        self.value = value

    def is_constant(self):
        return True

    def get_constant_value(self):
        return self.value

    def is_size_tensor(self):
        return False


class Expressions:
    """The expression builder."""

    def constant(self, value):
        return Number(value)

    def operation(self, code, a, b):
        return Number(OPERATIONS[code.name](a.value, b.value))


class Setter(dict):
    nbSymExprs = 0


def load_tensorrt():
    """The module `tensorrt` with its submodule `plugin`."""
    import tensorrt_lean as lean

    trt = types.ModuleType("tensorrt")
    trt.__dict__.update({k: v for k, v in vars(lean).items() if not k.startswith("__")})
    trt.__path__ = []
    trt.__version__ = lean.__version__
    trt.ITensor = type("ITensor", (), {})
    trt.IDimensionExpr = Number
    trt.PluginTensorDesc = types.SimpleNamespace
    trt.ISymExpr = type("ISymExpr", (), {})
    trt.TensorFormat = enum.IntEnum("TensorFormat", {"LINEAR": 0})
    trt.DimsExprs = lambda size: [None] * size
    sys.modules["tensorrt"] = trt
    place = Path(importlib.util.find_spec("tensorrt_bindings").submodule_search_locations[0]) / "plugin"
    spec = importlib.util.spec_from_file_location(
        "tensorrt.plugin", place / "__init__.py", submodule_search_locations=[str(place)]
    )
    trt.plugin = sys.modules["tensorrt.plugin"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(trt.plugin)
    trt.plugin._plugin_class.Shape = lambda described: getattr(described, "desc", described).dims
    return trt


def drive(trt, op, stage, job):
    """Create one stage's plugin by its creator in the registry and ask it everything a build asks."""
    from nemodiff.plugins.op import ceil_div, stage_op

    creator = trt.get_plugin_registry().get_creator(stage.name, "1", "nemodiff")
    kinds = {float: trt.PluginFieldType.FLOAT64, int: trt.PluginFieldType.INT64}
    fields = [trt.PluginField(name, np.array([job["values"][name]]), kinds[kind]) for name, kind in op.attributes]
    collection = trt.PluginFieldCollection(fields)
    ahead = trt.QuickPluginCreationRequest.STRICT_AOT
    plugin = creator.create_plugin(stage.name, "nemodiff", collection, trt.TensorRTPhase.BUILD, ahead)

    one = stage_op(op, stage)
    data = trt.DataType
    builder = Expressions()
    types_ = {"compute": getattr(data, job["compute"]), "logits": data.FLOAT, "f32": data.FLOAT, "i32": data.INT32}
    shapes = [arg.sizes(job["dims"], ceil_div) for arg in one.inputs]
    input_types = [types_[arg.dtype] for arg in one.inputs]
    output_types = plugin.get_output_data_types(input_types, [len(shape) for shape in shapes])
    expressions = [[Number(size) for size in shape] for shape in shapes]
    results = [[size.value for size in shape] for shape in plugin.get_output_shapes(expressions, [], builder)]

    def described(shape, kind):
        inner = types.SimpleNamespace(type=kind, format=trt.TensorFormat.LINEAR, scale=1.0, dims=shape)
        return types.SimpleNamespace(desc=inner, min=shape, max=shape, opt=shape)

    inputs = [described(shape, kind) for shape, kind in zip(shapes, input_types, strict=True)]
    outputs = [described(shape, kind) for shape, kind in zip(results, output_types, strict=True)]
    io = [*inputs, *outputs]
    formats = plugin.get_supported_format_combinations(io, len(shapes))
    plugin.configure_plugin(inputs, outputs)
    plugin.set_tactic(0)
    launch = types.SimpleNamespace()
    scalars = Setter()
    plugin.get_launch_params(expressions, io, len(shapes), launch, scalars, builder)
    entry, ptx = plugin.get_kernel([d.desc for d in inputs], [d.desc for d in outputs])
    return {
        "types": [kind.name for kind in output_types],
        "shapes": results,
        "formats": [f.type.name for f in formats],
        "launch": {name: value.expr.value for name, value in vars(launch).items()},
        "scalars": [scalars[i].expr.value for i in range(scalars.nbSymExprs)],
        "entry": entry,
        "ptx": ptx.decode(),
    }


def main():
    job = json.load(sys.stdin)
    trt = load_tensorrt()
    from nemodiff.plugins import OPS
    from nemodiff.plugins.tensorrt.api import TensorRT
    from nemodiff.plugins.tensorrt.launch import Kernels
    from nemodiff.plugins.tensorrt.register import register
    from nemodiff.tensorrt_info import parse_kernel

    records = [parse_kernel(kernel) for kernel in job["kernels"]]
    api = TensorRT("tensorrt", trt, trt.__version__, None, [])
    register(api, Kernels(Path(job["folder"]), records, job["sm"]))
    answers = {stage.name: drive(trt, op, stage, job) for op in OPS for stage in op.stages}
    sys.stdout.write(json.dumps(answers))


if __name__ == "__main__":
    main()

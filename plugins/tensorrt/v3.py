"""An op as one TensorRT plugin of version 3, which launches all stages over a workspace: the form for TensorRT-RTX."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ...contract import DOMAIN
from ..op import Arg, Op
from .api import TensorRT
from .launch import Kernels, run, workspace_size

_TYPES = {"f32": "FLOAT", "logits": "FLOAT", "i32": "INT32"}
_KEPT: list[Any] = []  # creators, for the life of the process: the registry holds bare pointers to them


def register_v3(api: TensorRT, op: Op, kernels: Kernels | None) -> Any:
    """Register an op as an `IPluginV3` and return its creator."""
    trt: Any = api.module
    base = (trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime)
    io = (*op.inputs, *op.outputs)

    def fields(values: Mapping[str, float]) -> Any:
        kinds = {int: (np.int32, trt.PluginFieldType.INT32), float: (np.float32, trt.PluginFieldType.FLOAT32)}
        collected = []
        for name, kind in op.attributes:
            dtype, field_type = kinds[kind]
            value = np.array([values[name]] if name in values else [], dtype)
            collected.append(trt.PluginField(name, value, field_type))
        return trt.PluginFieldCollection(collected)

    class Plugin(*base):  # type: ignore[misc]
        def __init__(self, values: Mapping[str, float]) -> None:
            for parent in base:
                parent.__init__(self)
            self.num_outputs = len(op.outputs)
            self.plugin_name = op.name
            self.plugin_namespace = DOMAIN
            self.plugin_version = "1"
            self.timing_cache_id = ""
            self.values = dict(values)

        def get_capability_interface(self, kind: Any) -> Any:
            return self

        def get_output_data_types(self, input_types: Sequence[Any]) -> list[Any]:
            return [_data_type(trt, arg, op, input_types) for arg in op.outputs]

        def get_output_shapes(self, inputs: Sequence[Any], shape_inputs: Any, expressions: Any) -> list[Any]:
            dims = op.dims(dict(zip((arg.name for arg in op.inputs), inputs, strict=True)))
            return [_dims_exprs(trt, arg, dims, expressions) for arg in op.outputs]

        def supports_format_combination(self, at: int, in_out: Sequence[Any], num_inputs: int) -> bool:
            described = in_out[at].desc
            if described.format != trt.TensorFormat.LINEAR:
                return False
            if io[at].dtype == "compute" and at == 0:
                return described.type in (trt.DataType.HALF, trt.DataType.BF16)
            expected = _data_type(trt, io[at], op, [d.desc.type for d in in_out[:num_inputs]])
            return bool(described.type == expected)

        def configure_plugin(self, inputs: Any, outputs: Any) -> None:
            pass

        def on_shape_change(self, inputs: Any, outputs: Any) -> None:
            pass

        def get_valid_tactics(self) -> list[int]:
            return [1]

        def set_tactic(self, tactic: int) -> None:
            pass

        def get_workspace_size(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
            return workspace_size(op, [d.max for d in inputs])

        def get_fields_to_serialize(self) -> Any:
            return fields(self.values)

        def attach_to_context(self, context: Any) -> Any:
            return self.clone()

        def clone(self) -> Any:
            return Plugin(self.values)

        def enqueue(
            self,
            input_desc: Sequence[Any],
            output_desc: Sequence[Any],
            inputs: Sequence[int],
            outputs: Sequence[int],
            workspace: int,
            stream: int,
        ) -> int:
            if kernels is None:
                return 1
            run(op, kernels, [d.dims for d in input_desc], inputs, outputs, workspace, stream)
            return 0

    class Creator(trt.IPluginCreatorV3One):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.name = op.name
            self.plugin_namespace = DOMAIN
            self.plugin_version = "1"
            self.field_names = fields({})

        def create_plugin(self, name: str, field_collection: Any, phase: Any) -> Any:
            attributes = dict(op.attributes)
            values = {}
            for field in field_collection:
                if field.name in attributes:
                    values[field.name] = np.asarray(field.data).reshape(-1)[0].item()
            return Plugin(values)

    registry = api.registry()
    if (old := registry.get_creator(op.name, "1", DOMAIN)) is not None:
        registry.deregister_creator(old)
    creator = Creator()
    registry.register_creator(creator, DOMAIN)
    _KEPT.append(creator)
    return creator


def _data_type(trt: Any, arg: Arg, op: Op, input_types: Sequence[Any]) -> Any:
    """A tensor's type; a `compute` tensor has that of the op's first `compute` input."""
    if arg.dtype == "compute":
        dtypes = [other.dtype for other in op.inputs]
        return input_types[dtypes.index("compute")]
    return getattr(trt.DataType, _TYPES[arg.dtype])


class _Symbol:
    """An expression of IPluginV3, with the operators that shapes are written in."""

    def __init__(self, trt: Any, builder: Any, value: Any) -> None:
        self.trt = trt
        self.builder = builder
        self.value = builder.constant(value) if isinstance(value, int) else value

    def _with(self, operation: str, other: Any) -> _Symbol:
        operand = other if isinstance(other, _Symbol) else _Symbol(self.trt, self.builder, other)
        code = getattr(self.trt.DimensionOperation, operation)
        return _Symbol(self.trt, self.builder, self.builder.operation(code, self.value, operand.value))

    def __add__(self, other: Any) -> _Symbol:
        return self._with("SUM", other)

    def __mul__(self, other: Any) -> _Symbol:
        return self._with("PROD", other)

    def __floordiv__(self, other: Any) -> _Symbol:
        return self._with("FLOOR_DIV", other)

    def ceil(self, step: int) -> _Symbol:
        return self._with("CEIL_DIV", step)


def _dims_exprs(trt: Any, arg: Arg, dims: Mapping[str, Any], builder: Any) -> Any:
    """A shape as TensorRT's expressions."""
    symbols = {letter: _Symbol(trt, builder, size) for letter, size in dims.items()}
    sizes = arg.sizes(symbols, _Symbol.ceil)
    shape = trt.DimsExprs(len(sizes))
    for axis, size in enumerate(sizes):
        shape[axis] = size.value if isinstance(size, _Symbol) else builder.constant(size)
    return shape

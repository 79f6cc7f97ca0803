"""Makes TensorRT know the ops, by one adapter for all of them.

In: the loaded TensorRT module and, where something will run, the engine's compiled kernels. Out: creators in the
module's registry, found by the nodes' `plugin_namespace`. TensorRT-RTX gets an op as one `IPluginV3` that launches all
stages over a workspace. The full TensorRT gets each stage as a quick plugin with its PTX, in chains that
`builder/graph/stages.py` writes, so that an engine needs no Python to run. The surprising fact: the registries hold
bare pointers, so what is registered is kept here for the life of the process.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ...contract import DOMAIN
from .. import OPS
from ..op import Arg, Op, Stage, ceil_div
from .api import TensorRT
from .launch import Kernels

_ALIGNMENT = 256  # bytes, of each scratch tensor in a workspace
_KEPT: list[Any] = []
_TYPES = {"f32": "FLOAT", "logits": "FLOAT", "i32": "INT32"}


def register(api: TensorRT, kernels: Kernels | None = None) -> None:
    """Register every op.

    `kernels` may be missing where a TensorRT-RTX engine is built, which runs nothing; the full TensorRT puts them into
    the engine. To register again replaces what runs: one process serves one card's engines.
    """
    for op in OPS:
        if api.backend == "tensorrt-rtx":
            register_v3(api, op, kernels)
        else:
            assert kernels is not None, "quick plugins are made of their kernels"
            for stage in op.stages:
                register_quick(api, op, stage, kernels)


def stage_op(op: Op, stage: Stage) -> Op:
    """One stage as an op of its own, named after the stage."""
    inputs = tuple(op.args[name] for name in stage.inputs)
    return Op(stage.name, inputs, stage.outputs, op.attributes, (stage,))


def register_v3(api: TensorRT, op: Op, kernels: Kernels | None) -> Any:
    """Register an op as an `IPluginV3` and return its creator."""
    trt: Any = api.module
    base = (trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime)
    io = (*op.inputs, *op.outputs)

    def fields(values: Mapping[str, float]) -> Any:
        kinds = {int: (np.int32, trt.PluginFieldType.INT32), float: (np.float32, trt.PluginFieldType.FLOAT32)}
        made = []
        for name, kind in op.attributes:
            dtype, field = kinds[kind]
            made.append(trt.PluginField(name, np.array([values[name]] if name in values else [], dtype), field))
        return trt.PluginFieldCollection(made)

    class Plugin(*base):  # type: ignore[misc]
        def __init__(self, values: Mapping[str, float]) -> None:
            for parent in base:
                parent.__init__(self)
            self.num_outputs = len(op.outputs)
            self.plugin_name, self.plugin_namespace, self.plugin_version = op.name, DOMAIN, "1"
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
            wanted = _data_type(trt, io[at], op, [d.desc.type for d in in_out[:num_inputs]])
            return bool(described.type == wanted)

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
            self.name, self.plugin_namespace, self.plugin_version = op.name, DOMAIN, "1"
            self.field_names = fields({})

        def create_plugin(self, name: str, given: Any, phase: Any) -> Any:
            names = [name for name, _ in op.attributes]
            return Plugin({f.name: np.asarray(f.data).reshape(-1)[0].item() for f in given if f.name in names})

    registry = api.registry()
    if (old := registry.get_creator(op.name, "1", DOMAIN)) is not None:
        registry.deregister_creator(old)
    creator = Creator()
    registry.register_creator(creator, DOMAIN)
    _KEPT.append(creator)
    return creator


def run(
    op: Op,
    kernels: Kernels,
    shapes: Sequence[Sequence[int]],
    inputs: Sequence[int],
    outputs: Sequence[int],
    workspace: int,
    stream: int,
) -> None:
    """Launch every stage of an op.

    Args:
        op: the op.
        kernels: its compiled kernels.
        shapes: of the inputs.
        inputs, outputs: device pointers.
        workspace: device pointer to `workspace_size` bytes.
        stream: CUDA stream handle.
    """
    pointers = {arg.name: pointer for arg, pointer in zip(op.inputs, inputs, strict=True)}
    pointers |= {arg.name: pointer for arg, pointer in zip(op.outputs, outputs, strict=True)}
    for name, size in _scratch(op, shapes):
        pointers[name] = workspace
        workspace += size
    dims = _int_dims(op, shapes)
    for stage in op.stages:
        arguments = [
            *(pointers[name] for name in stage.inputs),
            *(dims[letter] for letter in stage.scalars),
            *(pointers[arg.name] for arg in stage.outputs),
        ]
        kernels.launch(stage.name, stage.grid(dims, ceil_div), arguments, stream)


def workspace_size(op: Op, shapes: Sequence[Sequence[int]]) -> int:
    """Bytes of scratch that `run` needs."""
    return sum(size for _, size in _scratch(op, shapes))


def _int_dims(op: Op, shapes: Sequence[Sequence[int]]) -> dict[str, int]:
    return {d: int(n) for d, n in op.dims(dict(zip((arg.name for arg in op.inputs), shapes, strict=True))).items()}


def _scratch(op: Op, shapes: Sequence[Sequence[int]]) -> list[tuple[str, int]]:
    """Name and bytes of each scratch tensor; all are of 4-byte types."""
    dims = _int_dims(op, shapes)
    sizes = [(arg.name, 4 * int(np.prod(arg.sizes(dims, ceil_div)))) for arg in op.scratch]
    return [(name, ceil_div(size, _ALIGNMENT) * _ALIGNMENT) for name, size in sizes]


def _data_type(trt: Any, arg: Arg, op: Op, input_types: Sequence[Any]) -> Any:
    """A tensor's type; `compute` is that of the op's first input of the kind."""
    if arg.dtype == "compute":
        return input_types[next(i for i, a in enumerate(op.inputs) if a.dtype == "compute")]
    return getattr(trt.DataType, _TYPES[arg.dtype])


class _Symbol:
    """An expression of IPluginV3, with the operators that shapes are written in."""

    def __init__(self, trt: Any, builder: Any, value: Any) -> None:
        self.trt, self.builder = trt, builder
        self.value = builder.constant(value) if isinstance(value, int) else value

    def _with(self, operation: str, other: Any) -> _Symbol:
        right = other if isinstance(other, _Symbol) else _Symbol(self.trt, self.builder, other)
        code = getattr(self.trt.DimensionOperation, operation)
        return _Symbol(self.trt, self.builder, self.builder.operation(code, self.value, right.value))

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
    made = trt.DimsExprs(len(sizes))
    for axis, size in enumerate(sizes):
        made[axis] = size.value if isinstance(size, _Symbol) else builder.constant(size)
    return made


def register_quick(api: TensorRT, op: Op, stage: Stage, kernels: Kernels) -> None:
    """Register one stage as a quick plugin that is compiled ahead of time."""
    import tensorrt.plugin as trtp

    trt: Any = api.module
    one = stage_op(op, stage)
    kernel, ptx = kernels.ptx(stage.name)
    pointers = [argument.split() for argument in kernel.arguments if argument[0] == "*"]
    spelled = {name: _SPELLED[kind] for kind, name in pointers}  # as quick plugins spell them, in the kernel's order
    attributes = {name: inspect.Parameter(name, _KIND, annotation=kind) for name, kind in op.attributes}
    tensors = {arg.name: inspect.Parameter(arg.name, _KIND, annotation=trtp.TensorDesc) for arg in one.inputs}
    described: Any = tuple.__class_getitem__((trtp.TensorDesc,) * len(one.outputs))

    def dims_of(descs: Sequence[Any]) -> dict[str, Any]:
        return one.dims({arg.name: tuple(d.shape_expr) for arg, d in zip(one.inputs, descs, strict=False)})

    def describe(*descs: Any, **values: Any) -> Any:
        dims = dims_of(descs)
        made = [
            trtp.from_shape_expr(arg.sizes(dims, trtp.cdiv), getattr(trt.DataType, _DATA_TYPES[spelled[arg.name]]))
            for arg in one.outputs
        ]
        return tuple(made)

    def tune(*args: Any) -> Any:
        return [trtp.AutoTuneCombination(", ".join(spelled.values()), "LINEAR")]

    def compile_(*args: Any) -> Any:
        dims = dims_of(args)
        launch = trtp.KernelLaunchParams()
        launch.grid_x, launch.grid_y, launch.grid_z = stage.grid(dims, trtp.cdiv)
        launch.block_x, launch.shared_mem = 32 * kernel.num_warps, kernel.shared_bytes
        scalars = trtp.SymIntExprs.from_tuple([trtp.SymInt32(dims[letter]) for letter in stage.scalars])
        return kernel.entry, ptx, launch, scalars

    def signed(function: Callable[..., Any], parameters: Sequence[inspect.Parameter], returns: Any) -> Any:
        function.__signature__ = inspect.Signature(parameters, return_annotation=returns)  # type: ignore[attr-defined]
        return function

    given = [*tensors.values(), *attributes.values()]
    outputs = inspect.Parameter("outputs", _KIND, annotation=described)
    tactic = inspect.Parameter("tactic", _KIND, annotation=int)
    name = f"{DOMAIN}::{stage.name}"
    trtp.register(name)(signed(describe, given, described))
    trtp.autotune(name)(signed(tune, [*tensors.values(), outputs], list[trtp.AutoTuneCombination]))
    compiled = tuple[str, str, trtp.KernelLaunchParams, trtp.SymExprs]
    trtp.aot_impl(name)(signed(compile_, [*given, outputs, tactic], compiled))


_KIND = inspect.Parameter.POSITIONAL_OR_KEYWORD
_SPELLED = {"*fp32": "FP32", "*fp16": "FP16", "*bf16": "BF16", "*i32": "INT32"}
_DATA_TYPES = {"FP32": "FLOAT", "FP16": "HALF", "BF16": "BF16", "INT32": "INT32"}

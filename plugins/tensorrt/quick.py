"""A stage of an op as a quick plugin that carries its PTX: the form for the full TensorRT."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from ...contract import DOMAIN
from ..op import Op, Stage, stage_op
from .api import TensorRT
from .launch import Kernels

_KIND = inspect.Parameter.POSITIONAL_OR_KEYWORD
_FORMATS = {"*fp32": "FP32", "*fp16": "FP16", "*bf16": "BF16", "*i32": "INT32"}
_DATA_TYPES = {"FP32": "FLOAT", "FP16": "HALF", "BF16": "BF16", "INT32": "INT32"}


def register_quick(api: TensorRT, op: Op, stage: Stage, kernels: Kernels) -> None:
    """Register one stage as a quick plugin that is compiled ahead of time."""
    import tensorrt.plugin as trtp

    trt: Any = api.module
    one = stage_op(op, stage)
    kernel, ptx = kernels.ptx(stage.name)
    pointers = [argument.split() for argument in kernel.arguments if argument[0] == "*"]
    formats = {name: _FORMATS[kind] for kind, name in pointers}  # in the order of the kernel's arguments
    attributes = [inspect.Parameter(name, _KIND, annotation=kind) for name, kind in op.attributes]
    tensors = [inspect.Parameter(arg.name, _KIND, annotation=trtp.TensorDesc) for arg in one.inputs]
    described: Any = tuple.__class_getitem__((trtp.TensorDesc,) * len(one.outputs))

    def dims_of(descs: Sequence[Any]) -> dict[str, Any]:
        # TensorRT passes more than the inputs: outputs or attributes follow them.
        return one.dims({arg.name: tuple(d.shape_expr) for arg, d in zip(one.inputs, descs, strict=False)})

    def describe(*descs: Any, **values: Any) -> Any:
        dims = dims_of(descs)
        descriptions = []
        for arg in one.outputs:
            data_type = getattr(trt.DataType, _DATA_TYPES[formats[arg.name]])
            descriptions.append(trtp.from_shape_expr(arg.sizes(dims, trtp.cdiv), data_type))
        return tuple(descriptions)

    def tune(*args: Any) -> Any:
        return [trtp.AutoTuneCombination(", ".join(formats.values()), "LINEAR")]

    def compile_(*args: Any) -> Any:
        dims = dims_of(args)
        launch = trtp.KernelLaunchParams()
        launch.grid_x, launch.grid_y, launch.grid_z = stage.grid(dims, trtp.cdiv)
        launch.block_x = 32 * kernel.num_warps
        launch.shared_mem = kernel.shared_bytes
        scalars = trtp.SymIntExprs.from_tuple([trtp.SymInt32(dims[letter]) for letter in stage.scalars])
        return kernel.entry, ptx, launch, scalars

    def signed(function: Callable[..., Any], parameters: Sequence[inspect.Parameter], returns: Any) -> Any:
        """The function with the signature that TensorRT reads its arguments from."""
        function.__signature__ = inspect.Signature(parameters, return_annotation=returns)  # type: ignore[attr-defined]
        return function

    parameters = [*tensors, *attributes]
    outputs = inspect.Parameter("outputs", _KIND, annotation=described)
    tactic = inspect.Parameter("tactic", _KIND, annotation=int)
    name = f"{DOMAIN}::{stage.name}"
    trtp.register(name)(signed(describe, parameters, described))
    trtp.autotune(name)(signed(tune, [*tensors, outputs], list[trtp.AutoTuneCombination]))
    compiled = tuple[str, str, trtp.KernelLaunchParams, trtp.SymExprs]
    trtp.aot_impl(name)(signed(compile_, [*parameters, outputs, tactic], compiled))

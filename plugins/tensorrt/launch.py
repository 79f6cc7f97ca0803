"""Launches of an engine's compiled kernels through the CUDA driver: one by one, or all stages of an op.

This is what the plugins of TensorRT-RTX run, and what draws tokens after an engine.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...config import ModelConfig
from ...contract import Dtype
from ...tensorrt_info import Kernel
from ..op import Grid, Op, ceil_div
from .driver import call

_ALIGNMENT = 256  # bytes, of each scratch tensor in a workspace


class Kernels:
    """Kernels of one card in an engine folder, each loaded when it is first launched.

    Args:
        folder: the engine folder, whose files the caller has checked.
        kernels: the records of its kernels.
        sm: the card's compute capability.
        driver: the module `cuda.bindings.driver`, or what plays it.
    """

    def __init__(self, folder: Path, kernels: Sequence[Kernel], sm: int, driver: Any = None) -> None:
        self.records = {kernel.stage: kernel for kernel in kernels if kernel.sm == sm}
        self._folder = folder
        self._chosen_driver = driver
        self._loaded: dict[str, tuple[Any, Any]] = {}  # module and function by stage

    def fit(self, op: Op, model: ModelConfig, dtype: Dtype) -> bool:
        """Whether they are all that an op takes, compiled as `run` launches them: another nemodiff's may differ."""
        for stage in op.stages:
            kernel = self.records.get(stage.name)
            if kernel is None or (kernel.entry, kernel.constants) != (stage.entry, stage.constants_for(model, dtype)):
                return False
            if [argument.split()[1] for argument in kernel.arguments] != stage.parameters:
                return False
        return True

    def ptx(self, stage: str) -> tuple[Kernel, str]:
        """A kernel's record and its PTX."""
        kernel = self.records[stage]
        return kernel, (self._folder / kernel.file("ptx")).read_text(encoding="ascii")

    def launch(self, stage: str, grid: Grid, arguments: Sequence[int], stream: int) -> None:
        """Queue one launch.

        Args:
            stage: the kernel's name.
            grid: programs in x, y and z.
            arguments: its pointers and i32 scalars in the record's order.
            stream: CUDA stream handle.

        Raises:
            EngineError: the driver refuses it.
        """
        kernel = self.records[stage]
        if stage not in self._loaded:
            self._loaded[stage] = self._load(kernel)
        kinds = [ctypes.c_void_p if argument[0] == "*" else ctypes.c_int32 for argument in kernel.arguments]
        scratch = (None, None)  # see tensorrt_info.Kernel
        parameters = ((*arguments, *scratch), (*kinds, ctypes.c_void_p, ctypes.c_void_p))
        _, function = self._loaded[stage]
        threads = 32 * kernel.num_warps
        self._call("cuLaunchKernel", function, *grid, threads, 1, 1, kernel.shared_bytes, stream, parameters, 0)

    def _load(self, kernel: Kernel) -> tuple[Any, Any]:
        module = self._call("cuModuleLoadData", (self._folder / kernel.file("cubin")).read_bytes())
        function = self._call("cuModuleGetFunction", module, kernel.entry.encode())
        # Unless its function says so before, a kernel with more than 48 KiB of shared memory is refused at launch.
        attribute = self._driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        self._call("cuFuncSetAttribute", function, attribute, kernel.shared_bytes)
        return module, function

    @property
    def _driver(self) -> Any:
        return self._chosen_driver or importlib.import_module("cuda.bindings.driver")

    def _call(self, name: str, *arguments: Any) -> Any:
        return call(
            self._driver,
            name,
            *arguments,
            subject=f"{self._folder}: a plugin kernel",
            next_step="build the engine again on this machine, or without --plugins",
        )


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
        shapes: shapes of the inputs.
        inputs: device pointers.
        outputs: device pointers.
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
    by_name = {arg.name: shape for arg, shape in zip(op.inputs, shapes, strict=True)}
    return {letter: int(size) for letter, size in op.dims(by_name).items()}


def _scratch(op: Op, shapes: Sequence[Sequence[int]]) -> list[tuple[str, int]]:
    """Name and bytes of each scratch tensor; all are of 4-byte types."""
    dims = _int_dims(op, shapes)
    scratch = []
    for arg in op.scratch:
        nbytes = 4 * int(np.prod(arg.sizes(dims, ceil_div)))
        scratch.append((arg.name, ceil_div(nbytes, _ALIGNMENT) * _ALIGNMENT))
    return scratch

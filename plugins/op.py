"""What an op is, said once, so that every way to run it is derived and none has code of its own per op.

An `Op` lists its arguments and the `Stage`s of its GPU implementation: one kernel launch each, in order, whose outputs
that are not the op's own are scratch for a later stage. From it come the ahead-of-time compiler
(`builder/compilers/kernels.py`), the TensorRT plugins (`registration.py`) and plain launches (`run`). The surprising
fact: a kernel's arguments have a fixed order, input pointers, i32 scalars, output pointers, constants, because
TensorRT's ahead-of-time plugins pass them so, and the scalars may depend on shapes but never on what a tensor holds.

Letters in shapes: B rows, S tokens, R of them predicted, T cache slots are known at run time; H query heads, G
key/value heads, D head size, V vocabulary belong to the model.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from typing import Any, Literal

from ..config import ModelConfig

Dtype = Literal["compute", "logits", "f32", "i32", "u8"]  # compute: the engine's; logits: f32, or what the head gives
Dims = Mapping[str, Any]  # a size per letter: int, or an expression of TensorRT with + * //
Ceil = Callable[[Any, int], Any]  # ceiling division of such a size
Size = str | int | Callable[[Dims, Ceil], Any]
Constants = Mapping[str, int | float]
Grid = tuple[Any, Any, Any]


@dataclasses.dataclass(frozen=True)
class Arg:
    """A tensor; its shape in letters of the module's docstring, numbers, and functions of the letters' sizes."""

    name: str
    dtype: Dtype
    shape: tuple[Size, ...]

    def sizes(self, dims: Dims, ceil: Ceil) -> tuple[Any, ...]:
        """The shape for some sizes of the letters."""
        return tuple(dims[d] if isinstance(d, str) else d if isinstance(d, int) else d(dims, ceil) for d in self.shape)


@dataclasses.dataclass(frozen=True)
class Stage:
    """One kernel launch. `kernel` is `module.function` in `kernels/`, `grid` its number of programs."""

    name: str
    kernel: str
    inputs: tuple[str, ...]
    scalars: tuple[str, ...]  # letters, passed as i32
    outputs: tuple[Arg, ...]
    constants: Callable[[ModelConfig], Constants]
    grid: Callable[[Dims, Ceil], Grid]
    num_warps: int = 4
    num_stages: int = 2

    def load(self) -> Any:
        """The Triton function; imports Triton."""
        module, function = self.kernel.split(".")
        return getattr(importlib.import_module(f".kernels.{module}", __package__), function)


@dataclasses.dataclass(frozen=True)
class Op:
    """An op of the `nemodiff` domain."""

    name: str
    inputs: tuple[Arg, ...]
    outputs: tuple[Arg, ...]
    attributes: tuple[tuple[str, type], ...]
    stages: tuple[Stage, ...]

    @property
    def scratch(self) -> list[Arg]:
        """Outputs of stages that are not the op's own."""
        own = {arg.name for arg in self.outputs}
        return [arg for stage in self.stages for arg in stage.outputs if arg.name not in own]

    @property
    def args(self) -> dict[str, Arg]:
        """Every tensor of the op by name."""
        return {arg.name: arg for arg in (*self.inputs, *self.scratch, *self.outputs)}

    def dims(self, shapes: Mapping[str, Any]) -> dict[str, Any]:
        """Each letter's size, from the shapes of tensors by name."""
        found: dict[str, Any] = {}
        for name, shape in shapes.items():
            pairs = zip(self.args[name].shape, shape, strict=True)
            found.update({letter: size for letter, size in pairs if isinstance(letter, str)})
        return found


def ceil_div(size: int, step: int) -> int:
    """The `Ceil` of plain numbers."""
    return -(-size // step)


def run(op: Op, model: ModelConfig, inputs: Mapping[str, Any], new: Callable[[Arg, tuple[int, ...]], Any]) -> list[Any]:
    """Launch every stage through Triton; returns the op's outputs.

    Args:
        op: the op.
        model: gives the constants.
        inputs: torch tensors by name, contiguous, on a CUDA device (or on the CPU under Triton's interpreter).
        new: makes a tensor for an argument of a shape, of undefined content.
    """
    tensors = dict(inputs)
    dims = op.dims({name: tensor.shape for name, tensor in inputs.items()})
    for stage in op.stages:
        constants = stage.constants(model)
        for arg in stage.outputs:
            tensors[arg.name] = new(arg, arg.sizes(dims, ceil_div))
        stage.load()[stage.grid(dims, ceil_div)](
            *(tensors[name] for name in stage.inputs),
            *(dims[letter] for letter in stage.scalars),
            *(tensors[arg.name] for arg in stage.outputs),
            **constants,
            num_warps=stage.num_warps,
            num_stages=stage.num_stages,
        )
    return [tensors[arg.name] for arg in op.outputs]

"""What an op is: its arguments and the stages that run it on a GPU, described once for every way of running it.

A stage is one kernel launch. Its kernel lives in `plugins/kernels/<same file name>`, so the stages of
`ops/block_attention.py` name functions of `kernels/block_attention.py`. From the description come the ahead-of-time
compiler (`builder/compilers/kernels.py`), the TensorRT plugins (`tensorrt/register.py`) and plain launches (`run`).

Letters in shapes: B rows, S tokens, R of them predicted, T cache slots, N flat tokens, A pages and M of a row are known
at run time; H query heads, G key/value heads, D head size, V vocabulary belong to the model.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from typing import Any, Literal

from ..config import ModelConfig

Dtype = Literal[
    "compute", "logits", "f32", "i32", "i8", "u8"
]  # compute: the engine's; logits: f32, or what the head gives
Dims = Mapping[str, Any]  # a size per letter: int, or an expression of TensorRT with + * //
Ceil = Callable[[Any, int], Any]  # ceiling division of such a size
Size = str | int | Callable[[Dims, Ceil], Any]
Constants = Mapping[str, int | float]
Grid = tuple[Any, Any, Any]
MOST_REGISTERS = 255  # of a thread


@dataclasses.dataclass(frozen=True)
class Arg:
    """A tensor of an op. A size of its shape is a letter (see above), a number, or a function of the letters' sizes."""

    name: str
    dtype: Dtype
    shape: tuple[Size, ...]

    def sizes(self, dims: Dims, ceil: Ceil) -> tuple[Any, ...]:
        """The shape where the letters have the sizes `dims`."""
        return tuple(_size(size, dims, ceil) for size in self.shape)


def _size(size: Size, dims: Dims, ceil: Ceil) -> Any:
    if isinstance(size, str):
        return dims[size]
    if isinstance(size, int):
        return size
    return size(dims, ceil)


@dataclasses.dataclass(frozen=True)
class Stage:
    """One kernel launch; its outputs that are not the op's own are scratch for a later stage.

    A kernel takes input pointers, i32 scalars, output pointers and constants, in this order, as TensorRT's
    ahead-of-time plugins pass them. Scalars and grid may depend on shapes, never on what a tensor holds.
    """

    name: str
    kernel: str  # "module.function" in `kernels/`
    inputs: tuple[str, ...]
    scalars: tuple[str, ...]  # letters, passed as i32
    outputs: tuple[Arg, ...]
    constants: Callable[[ModelConfig], Constants]
    grid: Callable[[Dims, Ceil], Grid]  # its number of programs
    num_warps: int = 4
    num_stages: int = 2  # tiles in shared memory, those that are on their way among them
    constants_f32: Constants = dataclasses.field(default_factory=dict)  # others where compute is f32, for a GPU
    follows: bool = False  # the kernel takes PDL: it may begin while the one before it ends
    all_registers: bool = False  # as in f32: left alone, the assembler spills some bytes to fit more programs

    def constants_for(self, model: ModelConfig, dtype: str) -> Constants:
        """The kernel's constants in an engine's dtype."""
        return {**self.constants(model), **(self.constants_f32 if dtype == "f32" else {})}

    @property
    def parameters(self) -> list[str]:
        """The kernel's parameters in order, without its constants."""
        return [*self.inputs, *self.scalars, *(arg.name for arg in self.outputs)]

    @property
    def entry(self) -> str:
        """The kernel's name where it is compiled."""
        return self.kernel.split(".")[1]

    def options_for(self, dtype: str) -> dict[str, Any]:
        """What the Triton compiler is told in an engine's dtype."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}
        return options | ({"maxnreg": MOST_REGISTERS} if dtype == "f32" or self.all_registers else {})

    def load(self) -> Any:
        """The kernel as a function of the Triton compiler, which this imports."""
        module = self.kernel.split(".")[0]
        return getattr(importlib.import_module(f".kernels.{module}", __package__), self.entry)


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
        """The outputs of stages that are not outputs of the op."""
        own = {arg.name for arg in self.outputs}
        return [arg for stage in self.stages for arg in stage.outputs if arg.name not in own]

    @property
    def args(self) -> dict[str, Arg]:
        """Every tensor of the op by name."""
        return {arg.name: arg for arg in (*self.inputs, *self.scratch, *self.outputs)}

    def dims(self, shapes: Mapping[str, Any]) -> dict[str, Any]:
        """Each letter's size, from the shapes of tensors by name."""
        sizes: dict[str, Any] = {}
        for name, shape in shapes.items():
            for letter, size in zip(self.args[name].shape, shape, strict=True):
                if isinstance(letter, str):
                    sizes[letter] = size
        return sizes


def stage_op(op: Op, stage: Stage) -> Op:
    """One stage as an op of its own, named after the stage."""
    inputs = tuple(op.args[name] for name in stage.inputs)
    return Op(stage.name, inputs, stage.outputs, op.attributes, (stage,))


def ceil_div(size: int, step: int) -> int:
    """The `Ceil` of plain numbers."""
    return -(-size // step)


def run(
    op: Op,
    model: ModelConfig,
    inputs: Mapping[str, Any],
    new: Callable[[Arg, tuple[int, ...]], Any],
    *,
    pdl: bool = False,
) -> list[Any]:
    """Launch every stage with the Triton compiler and return the op's outputs.

    Args:
        op: the op.
        model: the source of the kernels' constants.
        inputs: torch tensors by name, contiguous, on a CUDA device (or on the CPU under Triton's interpreter).
        new: makes the tensor of an output, given its argument and shape; the content may be anything.
        pdl: let kernels begin while those before them end (programmatic dependent launch), on cards from SM 90 on.
    """
    tensors = dict(inputs)
    heads = {"H": model.num_heads, "G": model.num_kv_heads, "D": model.head_dim}
    dims = heads | op.dims({name: tensor.shape for name, tensor in inputs.items()})
    # The interpreter has no registers to be short of and takes the tiles of 16 bits, as it does in every dtype.
    is_f32 = any(op.args[n].dtype == "compute" and t.element_size() == 4 and t.is_cuda for n, t in inputs.items())
    dtype = "f32" if is_f32 else "of 16 bits"
    for stage in op.stages:
        constants = {**stage.constants_for(model, dtype)}
        options = stage.options_for(dtype)
        if stage.follows:
            constants["PDL"] = pdl
            options["launch_pdl"] = pdl
        for arg in stage.outputs:
            tensors[arg.name] = new(arg, arg.sizes(dims, ceil_div))
        stage.load()[stage.grid(dims, ceil_div)](
            *(tensors[name] for name in stage.inputs),
            *(dims[letter] for letter in stage.scalars),
            *(tensors[arg.name] for arg in stage.outputs),
            **constants,
            **options,
        )
    return [tensors[arg.name] for arg in op.outputs]

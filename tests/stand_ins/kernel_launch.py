"""Launches an op's Triton kernels from numpy arrays: in Triton's interpreter, or on a GPU where there is one."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from nemodiff.config import ModelConfig
from nemodiff.plugins.op import Arg, Op, run
from nemodiff.plugins.ops import flat_commit, head_commit, linear

INTERPRETED = os.environ["TRITON_INTERPRET"] == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
TYPES = {
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "i32": torch.int32,
    "i8": torch.int8,
    "u8": torch.uint8,
}
MASK = 100
ON_DEVICE = pytest.mark.torch if INTERPRETED else pytest.mark.gpu  # a test of kernels among others


def _scales_rows() -> bool:
    numbers, scale = torch.zeros(16, 16).to(torch.float8_e4m3fn), torch.ones(16)
    try:
        torch._scaled_mm(numbers, numbers.t(), scale[:, None], scale[None], out_dtype=torch.bfloat16)
    except RuntimeError:
        return False
    return True


# A test of products of 8 bits by 8 bits: on a GPU torch must have them, on a CPU an older one has not.
SCALES_ROWS = pytest.mark.skipif(
    INTERPRETED and not _scales_rows(), reason=f"torch {torch.__version__} has no e4m3 with a scale per row on a CPU"
)

if INTERPRETED and importlib.util.find_spec("triton"):
    from triton.runtime import interpreter

    patch_language = interpreter._patch_lang

    @functools.cache
    def patch_once(function: Callable[..., Any]) -> Any:
        """Triton patches its language for every launch and again for every call of a function from a kernel.

        That was a third of the time of the interpreted tests. Here it is done once for each function, and not undone.
        """
        patch_language(function)
        return interpreter._LangPatchScope()  # of nothing to undo

    interpreter._patch_lang = patch_once
    type_in_table, types_by_name = interpreter._get_np_dtype, dict[str, Any]()

    def type_once(kind: Any) -> Any:
        """Triton looks numpy's type up in a table that it makes anew for every operation."""
        if kind.name not in types_by_name:
            types_by_name[kind.name] = type_in_table(kind)
        return types_by_name[kind.name]

    interpreter._get_np_dtype = type_once
    # It computes every sum and product of integers once more, in 64 bits, for an assertion that only `debug` makes.
    builder = interpreter.interpreter_builder
    assert not builder.options.debug
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)

    # What a kernel reads or writes beside its arguments is memory of something else, where the interpreter mostly finds
    # something harmless. On a GPU it may be anything, or nobody's.
    held = np.zeros((2, 0), np.uint64)  # where the arguments of the launch begin, in order, and where they end
    arguments_of = interpreter.GridExecutor._init_args_hst
    load, store = (getattr(interpreter.InterpreterBuilder, f"create_masked_{what}") for what in ("load", "store"))

    def noted_arguments(self: Any, args: Any, named: Any) -> Any:
        global held
        given = arguments_of(self, args, named)
        tensors = [t for t in (*given[0], *given[1].values()) if isinstance(t, torch.Tensor)]
        places = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in tensors)
        held = np.maximum.accumulate(np.array(places, np.uint64).reshape(-1, 2)).T
        return given

    def check_inside(pointers: Any, mask: Any) -> None:
        at = pointers.data[mask.data]
        begins, ends = held
        argument = np.searchsorted(begins, at, "right") - 1
        size = pointers.get_element_ty().primitive_bitwidth // 8
        assert (argument >= 0).all(), "outside of all arguments"
        assert (at + np.uint64(size) <= ends[argument]).all(), "outside of all arguments"

    def checked_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        check_inside(pointers, mask)
        return load(self, pointers, mask, *rest)

    def checked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        check_inside(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    interpreter.GridExecutor._init_args_hst = noted_arguments
    interpreter.InterpreterBuilder.create_masked_load = checked_load
    interpreter.InterpreterBuilder.create_masked_store = checked_store


@pytest.fixture
def bf16_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make Triton's interpreter multiply bf16 values; it keeps them as u16 and would multiply those."""
    if not INTERPRETED:
        return

    product = interpreter.InterpreterBuilder.create_dot

    def widened(handle: Any) -> Any:
        if handle.data.dtype != np.uint16:
            return handle
        wide = (handle.data.astype(np.uint32) << 16).view(np.float32)
        return interpreter.TensorHandle(wide, interpreter.tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return product(self, widened(a), widened(b), *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


def short_shares(monkeypatch: pytest.MonkeyPatch, inputs: int = 16) -> None:
    """Let products of a tiny model be summed in several shares; of 4 bits in shares of 64 inputs or more."""
    monkeypatch.setattr(linear, "BLOCK_K", inputs)
    monkeypatch.setattr(linear, "LEAST_STEPS", 1)
    for bits, tiles in linear.STEPS.items():
        for tile, steps in tiles.items():
            monkeypatch.setitem(linear.STEPS[bits], tile, steps._replace(inputs=min(steps.inputs, inputs)))


def of_f32(op: Op) -> Op:
    """An op in the tiles that a GPU takes in f32; the interpreter takes those of 16 bits."""
    stages = [dataclasses.replace(s, constants=functools.partial(s.constants_for, dtype="f32")) for s in op.stages]
    return dataclasses.replace(op, stages=tuple(stages))


def launch(op: Op, model: ModelConfig, dtype: str = "f32", **inputs: np.ndarray) -> list[np.ndarray]:
    """Run an op's kernels, with `compute` inputs rounded to `dtype` first; outputs start as NaN."""
    return [as_array(output) for output in launch_tensors(op, model, dtype, **inputs)[0]]


def as_array(tensor: Any) -> np.ndarray:
    """A tensor on the host, in f32 or as integers."""
    array: np.ndarray = (tensor.float() if tensor.is_floating_point() else tensor).cpu().numpy()
    return array


def launch_tensors(op: Op, model: ModelConfig, dtype: str = "f32", **inputs: Any) -> tuple[list[Any], dict[str, Any]]:
    """The same: an op's outputs as tensors, and its inputs as they are afterwards; tensors among them are taken so."""

    def torch_type(arg: Arg) -> Any:
        return TYPES[{"compute": dtype, "logits": "f32"}.get(arg.dtype, arg.dtype)]

    def new(arg: Arg, shape: tuple[int, ...]) -> Any:
        kind = torch_type(arg)
        return torch.full(shape, float("nan") if kind.is_floating_point else -7, dtype=kind, device=DEVICE)

    tensors = {
        arg.name: torch.as_tensor(inputs[arg.name]).to(torch_type(arg)).to(DEVICE).contiguous()
        for arg in op.inputs
        if arg.name in inputs
    }
    return run(op, model, tensors, new), tensors


def launch_head(
    tile: int, model: ModelConfig, dtype: str = "f32", *, int8: bool = False, small: bool = False, **inputs: np.ndarray
) -> list[np.ndarray]:
    """The head and the commit rule of a pass: token, confidence, next_ids; samples where temperatures are given.

    `small` takes the tiles of f32.
    """
    op = head_commit.flat_op(tile, int8)
    (part, best), given = launch_tensors(of_f32(op) if small else op, model, dtype, **inputs)
    found = {"part": part, "best": best}
    if "temperature" in inputs:
        _, found = launch_tensors(flat_commit.SAMPLED, model, **inputs, **found, logits=given["kept"])
        found = {name: found[name] for name in ("part", "best")}
    return [as_array(output) for output in launch_tensors(flat_commit.OP, model, **found, **inputs)[0]]


def normal(seed: int, *shape: int) -> np.ndarray:
    """f32 values of a normal distribution."""
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """f32 values as they are in another dtype."""
    array: np.ndarray = torch.from_numpy(values).to(TYPES[dtype]).float().numpy()
    return array


def causal(start: int, size: int) -> np.ndarray:
    """The `visible` of a causal pass of one row."""
    visible = np.zeros((1, size, 3), np.int32)
    visible[0, :, 0] = np.arange(start, start + size) + 1
    return visible


def groups(start: int, heads: int, size: int) -> np.ndarray:
    """The `visible` of a quadratic pass of one row: heads, then a group for each."""
    visible = np.zeros((1, heads * (size + 1), 3), np.int32)
    visible[0, :heads, 0] = start + 1 + np.arange(heads)
    for j in range(heads):
        at = heads + j * size
        visible[0, at : at + size] = (start + j + 1, start + at, start + at + size)
    return visible


def released(tiny: ModelConfig) -> ModelConfig:
    """The head and vocabulary sizes of the 8B model."""
    return dataclasses.replace(tiny, num_heads=32, num_kv_heads=8, head_dim=128, vocab_size=131072)

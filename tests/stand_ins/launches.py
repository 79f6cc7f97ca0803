"""What a pass of the torch engine puts into a GPU's stream, counted on a CPU: kernels are named, not run."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nemodiff.plugins.op import Stage
from nemodiff.runtime.engines.torch.engine import TorchEngine
from nemodiff.runtime.engines.torch.flat import FlatShape
from nemodiff.runtime.engines.torch.step import Step

# Operations of torch that launch nothing: memory, and other views of it.
_NOTHING = {"alias", "as_strided", "detach", "empty", "flatten", "select", "slice", "split", "t", "unbind", "unsqueeze"}
_NOTHING |= {"reshape", "transpose", "view", "_unsafe_view"}


class _Names(TorchDispatchMode):
    def __init__(self, launched: list[str]) -> None:
        super().__init__()
        self._launched = launched

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        cast_of_nothing = name in ("to", "_to_copy") and result is args[0]
        if name not in _NOTHING and not cast_of_nothing:
            self._launched.append(name)
        return result


def specialisations(engine: TorchEngine, shape: FlatShape, *, fed: bool = False, arranged: int = 0) -> set[Any]:
    """The kernels that a pass needs as Triton compiles them: by constants, types, alignment and kinds of numbers."""
    needed = set[Any]()
    load = Stage.load

    def named(stage: Stage) -> Any:
        kernel = load(stage)
        any_number = kernel.kwargs["do_not_specialize"] or ()

        def launch(*args: Any, **options: Any) -> None:
            named = zip(kernel.arg_names, args, strict=False)  # the others are constants
            kinds = [None if name in any_number else _kind(arg) for name, arg in named]
            needed.add((stage.name, *kinds, *sorted(options.items())))

        return _Kernel(launch)

    step = Step(engine.steps, shape)
    with engine.device.use(engine.folder), mock.patch.object(Stage, "load", named):
        step.fill([], [], [])
        step.sides[0].arranged = arranged
        step.run(before=step if fed else None)
    return needed


def _kind(argument: Any) -> Any:
    """What Triton compiles anew for: a pointer's alignment, and numbers that are 1 or multiples of 16."""
    if isinstance(argument, torch.Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    return argument is None or argument == 1, argument is None or argument % 16 == 0


def launches(engine: TorchEngine, shape: FlatShape, *, fed: bool = False, arranged: int = 0) -> list[tuple[str, bool]]:
    """What a pass launches, in order: stages and torch's operations by name, and whether each may begin early."""
    launched: list[Any] = []

    def named(stage: Stage) -> Any:
        def launch(*args: Any, **options: Any) -> None:
            launched.append((stage.name, options.get("launch_pdl", False)))

        return _Kernel(launch)

    step = Step(engine.steps, shape)
    with engine.device.use(engine.folder), mock.patch.object(Stage, "load", named):
        step.fill([], [], [])
        step.sides[0].arranged = arranged
        with _Names(launched):
            step.run(before=step if fed else None)
    return [each if isinstance(each, tuple) else (each, False) for each in launched]


class _Kernel:
    """A kernel: it takes any grid."""

    def __init__(self, launch: Any) -> None:
        self._launch = launch

    def __getitem__(self, grid: Any) -> Any:
        return self._launch

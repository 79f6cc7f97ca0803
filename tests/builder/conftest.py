"""What the builds of the tests share: the kernels of a model are compiled once in a process, and copied after that."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from nemodiff.builder import build
from nemodiff.builder.compilers.kernels import compile_kernels
from nemodiff.config import ModelConfig
from nemodiff.contract import Dtype
from nemodiff.plugins.op import Op
from nemodiff.tensorrt_info import KERNELS_FOLDER, Kernel


class CompiledOnce:
    """`compiling_kernels` with a memory, and with nothing beside it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.made: dict[object, tuple[Path, tuple[Kernel, ...]]] = {}

    @contextlib.contextmanager
    def __call__(
        self, model: ModelConfig, dtype: Dtype, sms: tuple[int, ...], folder: Path, ops: Sequence[Op]
    ) -> Iterator[Callable[[], tuple[Kernel, ...]]]:
        key = (repr(model), dtype, sms, tuple(op.name for op in ops))
        if key not in self.made:
            kept = self.folder / str(len(self.made))
            kept.mkdir()
            self.made[key] = (kept, compile_kernels(model, dtype, sms, kept, ops))
        kept, kernels = self.made[key]
        if kernels:
            shutil.copytree(kept / KERNELS_FOLDER, folder / KERNELS_FOLDER)
        yield lambda: kernels


@pytest.fixture(scope="package", autouse=True)
def compiled_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "compiling_kernels", CompiledOnce(tmp_path_factory.mktemp("kernels")))
        yield

"""A card of which Triton knows the kind alone: kernels are compiled for it and never launched.

Run as a program, since a process that has imported Triton in interpreter mode cannot compile any more. It loads the
engine folder that it is given several times, as the first of a process does, and prints how many kernels each load has
compiled.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import triton
from stand_ins.torch_graphs import RecordingDevice
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from nemodiff.engine_folder import COMPILED_FOLDER
from nemodiff.engine_info import read_engine
from nemodiff.plugins.kernels import swiglu
from nemodiff.runtime.engines.torch.engine import TorchEngine
from nemodiff.runtime.engines.torch.flat import FlatShape


class Card:
    """What the compiler asks of Triton's driver."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


used = set[JITFunction]()
launch = JITFunction.run


def compiled_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
    used.add(self)
    return launch(self, *args, grid=grid, warmup=True, **options)


def load(folder: Path) -> int:
    """Kernels that a load compiles, whose passes are those of decoding one token."""
    for function in used:
        function.device_caches.clear()  # what the process has compiled already
    engine = TorchEngine(folder, read_engine(folder), RecordingDevice(), kernels=True, graphs=True, pages=8)
    engine.forwards.warm_up([FlatShape(1, 1)])
    return engine.compiled


def main() -> None:
    warnings.simplefilter("ignore")  # of Triton's own defaults
    triton.runtime.driver.set_active(Card())
    JITFunction.run = compiled_only
    folder = Path(sys.argv[1])
    counts = {"first": load(folder), "second": load(folder)}
    cubins = sorted((folder / COMPILED_FOLDER).glob("*/*.cubin"))
    cubins[0].write_bytes(cubins[0].read_bytes()[:-1])
    (cubins[1].parent / "digests").write_text("{")
    cubins[2].unlink()
    counts |= {"damaged": load(folder), "mended": load(folder)}
    moved = folder.rename(folder.with_name("moved"))
    counts["moved"] = load(moved)
    kernel = swiglu.swiglu
    kernel._unsafe_update_src(kernel.src + "\n    # another source\n")
    counts |= {"changed": load(moved), "again": load(moved)}
    sys.stdout.write(json.dumps(counts))


if __name__ == "__main__":
    main()

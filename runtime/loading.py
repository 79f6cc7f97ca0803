"""A loaded engine: its backend, its tokenizer, and what is measured of it."""

from __future__ import annotations

import dataclasses
import functools
import re
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from ..contract import DEFAULT_GPU_MEMORY_UTILIZATION
from ..engine_folder import engine_path
from ..engine_info import EngineInfo, read_engine
from ..errors import EngineError, RequestError
from .engines.drafter import check_gate
from .engines.engine import Engine, SeeingEngine
from .images.sight import Sight
from .planning.cost import GUESS, CostCurve, clock_of, measure, met
from .planning.draft_planner import AcceptanceStatistics
from .planning.kept_curve import cpu_name, read_curve
from .planning.pass_costs import PassCosts
from .text.codec import TextCodec

T = TypeVar("T")
_MOST_THREADS = 1024  # a system may take minutes to start a hundred thousand


@dataclasses.dataclass(frozen=True)
class LoadedEngine:
    """An engine with its tokenizer, ready to generate; made by `load`."""

    folder: Path
    backend: Engine
    text: TextCodec
    load_ms: float
    threads: int | None = None

    @property
    def info(self) -> EngineInfo:
        """The engine's description: model, build choices, manifest."""
        return self.backend.info

    @functools.cached_property
    def cost(self) -> PassCosts:
        """Seconds of a forward by its tokens, learned from those that run.

        It begins with the curve that `nemodiff bench` has left in the folder, with what a warm-up has met, or with one
        that is measured at the first use; with a guess where that takes too long or other requests have all the memory.
        """
        return PassCosts(self._first_curve, clock_of(self.backend))

    def _first_curve(self) -> CostCurve:
        kept = read_curve(self.folder, self.processor, self.threads)
        if curve := kept or met(getattr(self.backend, "pass_seconds", {})):
            return curve
        try:
            return measure(self.backend) or GUESS
        except EngineError:  # if there is more wrong, the next forward will say so
            return GUESS

    @property
    def processor(self) -> str:
        """What forwards run on, as it calls itself."""
        name: str = getattr(getattr(self.backend, "device", None), "name", "cpu")
        if name == "cpu":
            return cpu_name()
        if name.startswith("cuda:"):
            import torch

            return str(torch.cuda.get_device_name(name))
        return name

    @property
    def lost(self) -> str | None:
        """Why the engine will never run again, if it will not: a rank has ended, or a GPU has failed."""
        reason: str | None = getattr(self.backend, "lost", None)
        return reason

    @functools.cached_property
    def sight(self) -> Sight:
        """What the engine sees in images, of a model that sees them."""
        assert isinstance(self.backend, SeeingEngine)
        return Sight(self.backend.see)

    @functools.cached_property
    def acceptance(self) -> AcceptanceStatistics:
        """What drafts have brought so far, over all requests that plan by it."""
        return AcceptanceStatistics()


def load(
    path: str | Path,
    *,
    threads: int | None = None,
    device: int | str | None = None,
    gpu_memory_utilization: float = DEFAULT_GPU_MEMORY_UTILIZATION,
    warmup: bool = True,
    progress: bool = False,
    tp_size: int | None = None,
) -> LoadedEngine:
    """Load an engine folder.

    Args:
        path: a folder made by `nemodiff build`.
        threads: CPU threads of an ONNX Runtime or torch engine; None takes one per physical core.
        device: "cpu", "cuda", or a GPU by CUDA's number, as 1 or "cuda:1"; None is what the engine was built for, and
            for a torch engine a GPU if there is one.
        gpu_memory_utilization: share of a GPU's memory that a torch engine takes for weights, passes and K/V.
        warmup: do at once what makes passes quicker: a torch engine on a GPU captures those of decoding, the weights of
            one for ONNX Runtime move into large pages (Linux).
        progress: show a bar of that on standard error, if it is a terminal.
        tp_size: processes, a GPU each, that hold a torch engine's weights and K/V together (tensor parallelism); they
            are started, unless torchrun has started this one among them. None is torchrun's number, or 1.

    Raises:
        EngineError: with the command that fixes it.
        RequestError: threads, device or gpu_memory_utilization is out of range.
    """
    started = time.perf_counter()
    check_resources(threads, gpu_memory_utilization)
    folder = engine_path(path)
    info = read_engine(folder)
    chosen = check_device(device, info.manifest.backend)
    if tp_size is not None and (not isinstance(tp_size, int) or tp_size < 1):
        raise RequestError(f"tp_size is {tp_size!r}, allowed: 1 or more, or None for torchrun's number")
    if tp_size not in (None, 1) and info.manifest.backend != "torch":
        raise RequestError(
            f"--tp-size {tp_size} needs an engine whose weights are read rank by rank, and {folder} is built for "
            f"{info.manifest.backend}, where an engine holds whole layers; build it with --backend torch"
        )
    text = TextCodec(folder)
    backend: Engine
    if info.manifest.backend == "onnxruntime":
        from .engines.onnxruntime.engine import OnnxRuntimeEngine

        backend = OnnxRuntimeEngine(folder, info, threads, warmup=warmup)
    elif info.manifest.backend == "torch":
        from .engines.torch.rank import open_engine

        backend = open_engine(folder, info, chosen, threads, memory=gpu_memory_utilization, tp_size=tp_size)
        if warmup:
            backend.warm_up(_shown if progress else iter)
    else:
        from .engines.tensorrt.engine import TensorRTEngine

        backend = TensorRTEngine(folder, info, 0 if chosen is None else chosen)
    if info.has_adapter:
        check_gate(backend, folder)
    return LoadedEngine(folder, backend, text, (time.perf_counter() - started) * 1e3, threads)


def _shown(shapes: list[T]) -> Iterable[T]:
    """The shapes, with a bar that counts them."""
    from tqdm import tqdm

    shown: Iterable[T] = tqdm(shapes, desc="warming up", unit="graph", disable=None, file=sys.stderr, leave=False)
    return shown


def check_device(device: object, backend: str) -> Any:
    """A GPU's number, "cpu", or None for the backend's own choice. Raises RequestError."""
    if device is None:
        return None
    allowed = {"onnxruntime": ("cpu",), "torch": ("cpu", "cuda", "cuda:N")}.get(backend, ("cuda", "cuda:N"))
    match = None if isinstance(device, bool) else re.fullmatch(r"(cpu)|cuda|(?:cuda:)?(\d{1,9})", str(device))
    if match is None or ("cpu" if match[1] else "cuda") not in allowed:
        raise RequestError(f"device is {device!r}, allowed on {backend}: {', '.join(allowed)}; choose one of them")
    return "cpu" if match[1] else int(match[2] or 0)


def check_resources(threads: int | None, gpu_memory_utilization: float) -> None:
    """Refuse threads or a share of memory that no machine can give. Raises RequestError."""
    whole = isinstance(threads, int) and not isinstance(threads, bool)
    if threads is not None and not (whole and 1 <= threads <= _MOST_THREADS):
        raise RequestError(f"threads is {threads!r:.60}, allowed: 1 to {_MOST_THREADS}, or None for one per core")
    share: Any = gpu_memory_utilization
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1:
        raise RequestError(f"gpu_memory_utilization is {share!r:.60}, allowed: over 0 to 1")


def check_threads(threads: int, processors: int, machine: str) -> None:
    """Refuse a user's number of threads that a machine has no processors for. Raises RequestError."""
    if threads > processors:
        raise RequestError(
            f"--threads is {threads}, allowed: 1 to {processors}, the processors of {machine}; give fewer, or leave it "
            "out"
        )


def check_engine(engine: object) -> None:
    """Refuse what is no loaded engine, such as the path of one. Raises RequestError."""
    if not isinstance(engine, LoadedEngine):
        raise RequestError(f"engine is {engine!r:.60}, allowed: what load(...) returns; call that first")


def check_rows(info: EngineInfo, rows: object) -> None:
    """Refuse a number of rows that the engine was not built for. Raises RequestError."""
    limit = info.build.max_batch_size
    if not isinstance(rows, int) or not 1 <= rows <= limit:
        raise RequestError(
            f"rows is {rows!r}, allowed: 1 to {limit}; choose one of these, or build the engine with a larger "
            "--max-batch-size"
        )

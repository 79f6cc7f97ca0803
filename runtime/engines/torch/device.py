"""Where torch computes: the CPU, or one GPU with a stream, pinned buffers and captured graphs.

It knows nothing of models.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import importlib.util
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from .... import main_memory
from ....errors import EngineError, RequestError, first_line, install
from ....plugins.ops.paged_attention import PROGRAMS
from ....version import __version__
from ..layout import Layout

if TYPE_CHECKING:
    from torch import Tensor


OLDEST_MAJOR = 8  # compute capability that Triton compiles for


class Graph(Protocol):
    """Captured work."""

    def replay(self) -> None:
        """Run it again, over the same tensors."""
        ...


@dataclasses.dataclass(frozen=True)
class Buffer:
    """The small bindings of one shape, on the host and on the device; on the CPU both are the same memory."""

    host: Tensor  # (nbytes,) u8, pinned if there is a GPU
    there: Tensor  # (nbytes,) u8, on the device
    arrays: dict[str, np.ndarray]  # views of the host's side
    tensors: dict[str, Tensor]  # views of the device's side


def import_torch(folder: Path) -> Any:
    """The module torch. Raises EngineError where it is missing, cannot be loaded or is too old."""
    try:
        import torch
    except (ImportError, OSError) as error:
        missing = isinstance(error, ModuleNotFoundError)
        problem = "is not installed" if missing else f"cannot be loaded ({error})"
        raise EngineError(
            f"{folder}: needs torch, which {problem}; install it with: {install('nemodiff[torch]')}, or build with "
            "--backend onnxruntime"
        ) from None
    if not hasattr(torch, "OutOfMemoryError"):  # the youngest name that the engine uses
        raise EngineError(f"{folder}: needs torch 2.5 or later, here is {torch.__version__}; update torch")
    return torch


class TorchDevice:
    """The CPU or a GPU in this process.

    Args:
        folder: the engine folder, for messages.
        device: a GPU's number as CUDA counts them, "cpu", or None: GPU 0 if there is one, else the CPU.
        threads: of the CPU, for all of torch in this process; None leaves torch's choice.

    Raises:
        EngineError: torch is missing.
        RequestError: there is no such GPU, or it is older than Triton compiles for.
    """

    def __init__(self, folder: Path, device: int | Literal["cpu"] | None = None, threads: int | None = None) -> None:
        torch = import_torch(folder)
        self._torch = torch
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if device is None:
            device = 0 if count else "cpu"
        if device != "cpu" and not 0 <= device < count:
            gpus = f", cuda:0 to cuda:{count - 1}" if count else f" (torch {torch.__version__} finds no GPU)"
            raise RequestError(f"device is cuda:{device}, allowed: cpu{gpus}; choose one that is here")
        self.is_gpu = device != "cpu"
        self.name = f"cuda:{device}" if self.is_gpu else "cpu"
        self.lost: str | None = None  # why nothing will ever run here again
        if threads is not None:
            torch.set_num_threads(threads)
        if self.is_gpu:
            if importlib.util.find_spec("triton") is None:
                raise EngineError(
                    f"{folder}: needs the package triton for its kernels on a GPU; install it with: pip install "
                    "triton, or run with --device cpu"
                )
            major, minor = torch.cuda.get_device_capability(self.name)
            if major < OLDEST_MAJOR:
                raise RequestError(
                    f"{self.name} has compute capability {major}.{minor}, allowed: {OLDEST_MAJOR}.0 or later, for "
                    "which the kernels can be compiled; run with --device cpu"
                )
            self._stream = torch.cuda.Stream(self.name)

    @contextlib.contextmanager
    def use(self, folder: Path) -> Iterator[None]:
        """Compute here, without gradients, in one stream; errors as in `watched`."""
        torch = self._torch
        with self.watched(folder), torch.inference_mode():
            if not self.is_gpu:
                yield
                return
            with torch.cuda.device(self.name), torch.cuda.stream(self._stream):
                yield

    @contextlib.contextmanager
    def watched(self, folder: Path) -> Iterator[None]:
        """Wait for what computes here, which needs no more than this.

        Raises EngineError where memory is short, or where an error has broken the GPU for this process.
        """
        torch = self._torch
        try:
            yield
        except torch.OutOfMemoryError as error:
            reason = str(error).split(". ")[1:2] or [str(error)]
            raise EngineError(
                f"{folder}: {self.name} has too little memory ({reason[0]}); end what else uses it, ask for fewer "
                "rows or a shorter text, or build again with --dtype bf16"
            ) from None
        except RuntimeError as error:
            if self.answers():
                raise
            self.lost = f"{self.name} has failed ({first_line(error)})"
            raise EngineError(f"{folder}: {self.lost}; start the process again") from None

    def answers(self) -> bool:
        """Whether it still computes: after an error on a GPU nothing runs there in the same process any more."""
        if self.is_gpu:
            try:
                self._torch.cuda.synchronize(self.name)
            except RuntimeError:
                return False
        return True

    @property
    def overlaps_launches(self) -> bool:
        """Whether a kernel can begin while the one before it ends (programmatic dependent launch)."""
        return self.is_gpu and self._torch.cuda.get_device_capability(self.name)[0] >= 9

    @property
    def identity(self) -> dict[str, str]:
        """What a measurement of kernels holds for: the card and the versions. Empty on a CPU."""
        if not self.is_gpu:
            return {}
        import triton

        version = ctypes.c_int()
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
        return {
            "card": str(self._torch.cuda.get_device_name(self.name)),
            "driver": f"CUDA {version.value // 1000}.{version.value % 1000 // 10}",
            "torch": str(self._torch.__version__),
            "triton": str(triton.__version__),
            "nemodiff": __version__,
        }

    @property
    def programs(self) -> int:
        """Programs of attention that fill the card, two for each multiprocessor."""
        if not self.is_gpu:
            return PROGRAMS
        return 2 * int(self._torch.cuda.get_device_properties(self.name).multi_processor_count)

    def memory(self) -> tuple[int, int]:
        """Bytes that can be allocated yet, on the card or in what torch holds, and all of them; of a CPU's RAM too."""
        if not self.is_gpu:
            total = main_memory.total()
            return main_memory.free() or total, total
        cuda = self._torch.cuda
        held = cuda.memory_reserved(self.name) - cuda.memory_allocated(self.name)
        free, total = cuda.mem_get_info(self.name)
        return int(free) + int(held), int(total)

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> Tensor:
        """Zeroed memory; on the CPU it takes none before it is written."""
        torch = self._torch
        if self.is_gpu:
            made: Tensor = torch.zeros(shape, dtype=dtype, device=self.name)
        else:
            made = torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)
        return made

    def table(self, rows: np.ndarray) -> Tensor:
        """A page table on the device."""
        torch = self._torch
        made: Tensor = torch.tensor(rows, device=self.name)
        return made

    def copy_row(self, table: Tensor, pages: np.ndarray, row: int) -> None:
        """Bring one row of a page table to the device, in the stream's order."""
        source = self._torch.from_numpy(pages)
        table[row].copy_(source.pin_memory() if self.is_gpu else source, non_blocking=True)

    def bytes(self, count: int) -> Tensor:
        """Zeroed memory, (count,) u8."""
        made: Tensor = self._torch.zeros(count, dtype=self._torch.uint8, device=self.name)
        return made

    def pinned(self, count: int) -> Tensor:
        """Zeroed memory of the host for copies to the device and from it, (count,) u8."""
        made: Tensor = self._torch.zeros(count, dtype=self._torch.uint8, pin_memory=self.is_gpu)
        return made

    def buffer(self, layout: Layout, there: Tensor, host: Tensor) -> Buffer:
        """Some bindings at `there` on the device and at `host` on the host; on the CPU they are at `there` alone."""
        torch = self._torch
        host = host[: layout.nbytes] if self.is_gpu else there
        types: dict[type, Any] = {np.int32: torch.int32, np.float32: torch.float32}
        tensors = {}
        for name, (at, dtype, shape) in layout.places.items():
            nbytes = 4 * int(np.prod(shape))
            tensors[name] = there[at : at + nbytes].view(types[dtype]).view(shape)
        return Buffer(host, there, layout.views(host.numpy()), tensors)

    def upload(self, buffer: Buffer) -> None:
        """Copy the host's side to the device's, in the stream's order."""
        if self.is_gpu:
            buffer.there.copy_(buffer.host, non_blocking=True)

    def download(self, buffer: Buffer) -> None:
        """Copy the device's side to the host's, in the stream's order."""
        if self.is_gpu:
            buffer.host.copy_(buffer.there, non_blocking=True)

    def fetch(self, tensor: Tensor) -> Tensor:
        """A copy of a tensor's values on the host; they are there after the next `wait`."""
        if not self.is_gpu:
            return tensor.clone()
        host: Tensor = self._torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return host.copy_(tensor, non_blocking=True)

    def mark(self) -> Any:
        """A point in the stream that can be waited for."""
        if not self.is_gpu:
            return time.perf_counter()
        event = self._torch.cuda.Event(enable_timing=True)
        event.record(self._stream)
        return event

    def wait(self, mark: Any) -> None:
        """Wait until everything in the stream before a mark is done, if there is one."""
        if self.is_gpu and mark is not None:
            mark.synchronize()

    def between(self, begin: Any, end: Any) -> float:
        """Seconds from one mark to another, both of which have been waited for; on a GPU by its own clock."""
        return float(begin.elapsed_time(end)) / 1e3 if self.is_gpu else end - begin

    def seconds(self, work: Callable[[], None], times: int) -> float:
        """What some work takes here, the mean of so many times in a row; on a GPU by its own clock."""
        begin = self.mark()
        for _ in range(times):
            work()
        end = self.mark()
        self.wait(end)
        return self.between(begin, end) / times

    def graph_pool(self) -> Any:
        """Memory that graphs share, since no two of them run at once; it is gone for good with the last of them."""
        return self._torch.cuda.graph_pool_handle() if self.is_gpu else None

    def capture(self, work: Callable[[], None], pool: Any = None) -> Graph | str:
        """Record what `work` puts into the stream, without running it; the graph, or the reason why there is none."""
        if not self.is_gpu:
            return "a CPU has no graphs"
        torch = self._torch
        graph = torch.cuda.CUDAGraph()
        try:
            with _keeping(), torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"):
                work()
        except RuntimeError as error:
            return first_line(error)
        captured: Graph = graph
        return captured


@contextlib.contextmanager
def _keeping() -> Iterator[None]:
    """Collect no garbage, in which may be events and graphs: what frees those may not be done in a capture."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()

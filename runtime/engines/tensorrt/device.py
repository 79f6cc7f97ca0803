"""One CUDA device: memory, a stream's copies and waits, captured graphs. It knows nothing of engines.

`Memory` and `Pinned` free themselves when nothing refers to them.
"""

from __future__ import annotations

import ctypes
import dataclasses
import importlib
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np

from ....errors import EngineError, RequestError, install
from ....plugins.tensorrt.driver import call, status_name


@dataclasses.dataclass(eq=False)
class Memory:
    """Bytes on the device."""

    address: int
    nbytes: int


@dataclasses.dataclass(eq=False)
class Pinned:
    """Bytes on the host that the device copies from and to without a detour."""

    address: int
    array: np.ndarray  # (nbytes,) u8


@dataclasses.dataclass(eq=False)
class Graph:
    """Work captured from a stream, ready to be launched again."""

    executable: Any


class Device:
    """A GPU in this process.

    Args:
        number: as CUDA counts them, which CUDA_VISIBLE_DEVICES changes.
        driver: the module `cuda.bindings.driver`, or a stand-in, with which all of this runs without a GPU.

    Raises:
        EngineError: no package, no driver or no GPU.
        RequestError: there is no device of this number.
    """

    def __init__(self, number: int = 0, driver: Any = None) -> None:
        self.number = number
        elsewhere = "run the engine on a machine with one, or build for this one: --backend onnxruntime"
        if driver is None:
            try:
                driver = importlib.import_module("cuda.bindings.driver")
            except ImportError as error:
                raise EngineError(
                    f"a TensorRT engine needs the package cuda-bindings, which cannot be imported ({error}); install "
                    f"it with: {install('nemodiff[trt]')}"
                ) from None
        self.driver = driver
        try:
            code = int(driver.cuInit(0)[0])
        except RuntimeError:  # cuda.bindings finds no driver library
            raise EngineError(f"a TensorRT engine needs an NVIDIA driver, and none is here; {elsewhere}") from None
        count = 0 if code else int(self._call("cuDeviceGetCount"))
        if not count:
            raise EngineError(f"a TensorRT engine needs a GPU, and the driver finds none; {elsewhere}")
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < count:
            raise RequestError(f"device is {number!r}, allowed: 0 to {count - 1}; choose one of the GPUs that are here")
        handle = self._call("cuDeviceGet", number)
        self.name = self._call("cuDeviceGetName", 128, handle).split(b"\0")[0].decode()
        attribute = driver.CUdevice_attribute
        major = int(self._call("cuDeviceGetAttribute", attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, handle))
        minor = int(self._call("cuDeviceGetAttribute", attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, handle))
        self.sm = 10 * major + minor
        self._context = self._call("cuDevicePrimaryCtxRetain", handle)  # the one that TensorRT uses too
        self.use()
        self._stream = self._call("cuStreamCreate", int(driver.CUstream_flags.CU_STREAM_NON_BLOCKING))
        self.stream = int(self._stream)  # the one stream of this device object

    def use(self) -> None:
        """Make this the device of the calling thread."""
        self._call("cuCtxSetCurrent", self._context)

    def memory(self) -> tuple[int, int]:
        """Free and total bytes on the device; what other processes hold counts as used."""
        self.use()
        free, total = self._call("cuMemGetInfo")
        return int(free), int(total)

    def allocate(self, nbytes: int) -> Memory:
        """Device memory, its content undefined. Raises EngineError when there is not enough."""
        self.use()
        address = int(self._call("cuMemAlloc", max(nbytes, 1)))
        memory = Memory(address, nbytes)
        weakref.finalize(memory, self._release, "cuMemFree", address)
        return memory

    def pinned(self, nbytes: int) -> Pinned:
        """Pinned host memory, zeroed."""
        self.use()
        address = int(self._call("cuMemHostAlloc", max(nbytes, 1), 0))
        array = np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address))
        array[:] = 0
        memory = Pinned(address, array)
        weakref.finalize(memory, self._release, "cuMemFreeHost", address)
        return memory

    def upload(self, target: int, source: int, nbytes: int) -> None:
        """Copy pinned host memory to the device, in the stream's order."""
        self._call("cuMemcpyHtoDAsync", target, source, nbytes, self._stream)

    def download(self, target: int, source: int, nbytes: int) -> None:
        """Copy device memory to pinned host memory, in the stream's order."""
        self._call("cuMemcpyDtoHAsync", target, source, nbytes, self._stream)

    def copy(self, target: int, source: int, nbytes: int) -> None:
        """Copy within the device, in the stream's order."""
        self._call("cuMemcpyDtoDAsync", target, source, nbytes, self._stream)

    def zero(self, target: int, nbytes: int) -> None:
        """Fill device memory with zeros, in the stream's order."""
        self._call("cuMemsetD8Async", target, 0, nbytes, self._stream)

    def wait(self) -> None:
        """Return when everything in the stream is done."""
        self._call("cuStreamSynchronize", self._stream)

    def answers(self) -> bool:
        """Whether it still computes: after an error in a kernel nothing runs there in the same process any more."""
        return not int(self.driver.cuStreamSynchronize(self._stream)[0])

    def capture(self, work: Callable[[], bool]) -> Graph | str:
        """Record what `work` puts into the stream, without running it.

        Returns:
            The graph, or the reason why there is none: `work` answered False, or did what cannot be captured.
        """
        mode = self.driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._call("cuStreamBeginCapture", self._stream, mode)
        done = False
        reason = "the backend did not enqueue"
        try:
            done = work()
        except EngineError as error:
            reason = str(error)
        finally:  # the capture ends in any case, or the stream could not be used again
            code, captured = self.driver.cuStreamEndCapture(self._stream)
        if int(code):
            return status_name(code)
        if not done:
            self._call("cuGraphDestroy", captured)
            return reason
        code, executable = self.driver.cuGraphInstantiate(captured, 0)
        self._call("cuGraphDestroy", captured)
        if int(code):
            return status_name(code)
        graph = Graph(executable)
        weakref.finalize(graph, self._release, "cuGraphExecDestroy", executable)
        return graph

    def launch(self, graph: Graph) -> None:
        """Run captured work, in the stream's order."""
        self._call("cuGraphLaunch", graph.executable, self._stream)

    def _call(self, name: str, *arguments: Any) -> Any:
        return call(
            self.driver,
            name,
            *arguments,
            subject=f"device {self.number}",
            next_step="free memory on the GPU or end what else uses it, see nvidia-smi",
        )

    def _release(self, name: str, handle: Any) -> None:
        """Give a handle back to the driver; no error, since at the end of a process the driver may be gone already."""
        self.driver.cuCtxSetCurrent(self._context)
        getattr(self.driver, name)(handle)

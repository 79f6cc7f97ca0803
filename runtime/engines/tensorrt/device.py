"""One CUDA device: memory, a stream's copies and waits, captured graphs.

In: a device's number. Out: `Device`, over the driver functions of `cuda.bindings`; `Memory` and `Pinned` free
themselves when nothing refers to them. It knows nothing of engines. The surprising fact: the driver module is an
argument, so the tests play the driver in host memory and every line here runs without a GPU.
"""

from __future__ import annotations

import ctypes
import dataclasses
import importlib
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np

from ....errors import EngineError, RequestError


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
        driver: the module `cuda.bindings.driver`, or what plays it.

    Raises:
        EngineError: no package, no driver or no GPU.
        RequestError: there is no device of this number.
    """

    def __init__(self, number: int = 0, driver: Any = None) -> None:
        elsewhere = "run the engine on a machine with one, or build for this one: --backend onnxruntime"
        if driver is None:
            try:
                driver = importlib.import_module("cuda.bindings.driver")
            except ImportError as error:
                raise EngineError(
                    f"a TensorRT engine needs the package cuda-bindings, which cannot be imported ({error}); install "
                    "it with: pip install 'nemodiff[trt]'"
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
        self.number = number
        self.name = self._call("cuDeviceGetName", 128, handle).split(b"\0")[0].decode()
        attribute = driver.CUdevice_attribute
        major, minor = (
            int(self._call("cuDeviceGetAttribute", getattr(attribute, f"CU_DEVICE_ATTRIBUTE_{name}"), handle))
            for name in ("COMPUTE_CAPABILITY_MAJOR", "COMPUTE_CAPABILITY_MINOR")
        )
        self.sm = 10 * major + minor
        self._context = self._call("cuDevicePrimaryCtxRetain", handle)  # the one that TensorRT uses too
        self.use()
        self._stream = self._call("cuStreamCreate", int(driver.CUstream_flags.CU_STREAM_NON_BLOCKING))
        self.stream = int(self._stream)  # the one stream of this device object

    def use(self) -> None:
        """Make this the device of the calling thread."""
        self._call("cuCtxSetCurrent", self._context)

    def memory(self) -> tuple[int, int]:
        """Free and total bytes on the device, other processes' counted as used."""
        self.use()
        free, total = self._call("cuMemGetInfo")
        return int(free), int(total)

    def allocate(self, nbytes: int) -> Memory:
        """Device memory, its content undefined. Raises EngineError when there is not enough."""
        self.use()
        address = int(self._call("cuMemAlloc", max(nbytes, 1)))
        made = Memory(address, nbytes)
        weakref.finalize(made, self._release, "cuMemFree", address)
        return made

    def pinned(self, nbytes: int) -> Pinned:
        """Pinned host memory, zeroed."""
        self.use()
        address = int(self._call("cuMemHostAlloc", max(nbytes, 1), 0))
        array = np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address))
        array[:] = 0
        made = Pinned(address, array)
        weakref.finalize(made, self._release, "cuMemFreeHost", address)
        return made

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

    def capture(self, work: Callable[[], bool]) -> Graph | str:
        """Record what `work` puts into the stream, without running it.

        Returns the graph, or why there is none: `work` answered False, or did what cannot be captured.
        """
        mode = self.driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._call("cuStreamBeginCapture", self._stream, mode)
        done, reason = False, "the backend did not enqueue"
        try:
            done = work()
        except EngineError as error:
            reason = str(error)
        finally:  # the capture ends in any case, or the stream could not be used again
            code, captured = self.driver.cuStreamEndCapture(self._stream)
        if int(code):
            return self._name(code)
        if not done:
            self._call("cuGraphDestroy", captured)
            return reason
        code, executable = self.driver.cuGraphInstantiate(captured, 0)
        self._call("cuGraphDestroy", captured)
        if int(code):
            return self._name(code)
        made = Graph(executable)
        weakref.finalize(made, self._release, "cuGraphExecDestroy", executable)
        return made

    def launch(self, graph: Graph) -> None:
        """Run captured work, in the stream's order."""
        self._call("cuGraphLaunch", graph.executable, self._stream)

    def _call(self, name: str, *arguments: Any) -> Any:
        """Call the driver; what it returns after its code. Raises EngineError."""
        code, *results = getattr(self.driver, name)(*arguments)
        if int(code):
            raise EngineError(
                f"device {getattr(self, 'number', 0)}: {name} failed with {self._name(code)}; "
                "free memory on the GPU or end what else uses it, see nvidia-smi"
            )
        return results[0] if len(results) == 1 else results

    def _name(self, code: Any) -> str:
        return str(getattr(code, "name", code))

    def _release(self, name: str, handle: Any) -> None:
        """Give something back; at the end of a process the driver may be gone already."""
        self.driver.cuCtxSetCurrent(self._context)
        getattr(self.driver, name)(handle)

"""A GPU played in host memory: what `cuda.bindings.driver` and a TensorRT module do for the engine, and nothing more.

`Driver` has the driver's functions, with real addresses of host memory and with streams that can be captured and
replayed; a launched kernel runs in Triton's interpreter. `make_api` gives a TensorRT facade whose engine runs the
folder's own ONNX graph with ONNX Runtime over the addresses that it gets. So tests see which bytes the engine puts
where, when, in which shape and order, but not whether CUDA or TensorRT do the same, how fast, or with which rounding.
"""

from __future__ import annotations

import ctypes
import dataclasses
import enum
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper

from nemodiff.engine_folder import MODEL_FILE, VISION_MODEL_FILE
from nemodiff.engine_info import EngineInfo
from nemodiff.plugins import SAMPLED
from nemodiff.plugins.op import Stage
from nemodiff.plugins.tensorrt.api import TensorRT

OK, INVALID_VALUE, OUT_OF_MEMORY, NO_DEVICE, LAUNCH_FAILED, CAPTURE_INVALIDATED = 0, 1, 2, 100, 719, 901
STREAM, CONTEXT = 7, 5  # handles
FRESH = 0xFF  # what fresh memory is filled with: NaN in every float


class Driver:
    """Host memory in the device's place; every address is checked against what is allocated."""

    CUdevice_attribute = types.SimpleNamespace(
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR="major", CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR="minor"
    )
    CUfunction_attribute = types.SimpleNamespace(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES="shared")
    CUstream_flags = enum.IntEnum("CUstream_flags", {"CU_STREAM_NON_BLOCKING": 1})
    CUstreamCaptureMode = enum.IntEnum("CUstreamCaptureMode", {"CU_STREAM_CAPTURE_MODE_THREAD_LOCAL": 1})

    def __init__(self, *, sm: int = 89, count: int = 1, total: int = 2**33, capturable: bool = True) -> None:
        self.sm = sm
        self.count = count
        self.total = total
        self.capturable = capturable
        self.device: dict[int, Any] = {}  # address -> what holds its bytes
        self.host: dict[int, Any] = {}
        self.graphs = 0
        self.recording: list[Callable[[], None]] | None = None
        self.model: Any = None  # whose constants the kernels have
        self.stages = {stage.name: stage for stage in SAMPLED.stages}  # a cubin file holds a stage's name
        self.calls: list[str] = []  # of the stream, replays as one
        self.pending: list[Callable[[], None]] = []  # a stream's work is done when it is waited for
        self.failure = OK  # what waiting answers, as every call does once a kernel has failed

    @property
    def used(self) -> int:
        return sum(len(memory) for memory in self.device.values())

    def enqueue(self, name: str, work: Callable[[], None]) -> None:
        """Put work into the stream, or into the graph that is being captured."""
        if self.recording is not None:
            self.recording.append(work)
        else:
            self.calls.append(name)
            self.pending.append(work)

    def span(self, places: dict[int, Any], address: int, nbytes: int) -> np.ndarray:
        """The bytes at an address, which must lie in one allocation."""
        for start, memory in places.items():
            if start <= address and address + nbytes <= start + len(memory):
                return np.frombuffer(memory, np.uint8, nbytes, address - start)
        raise AssertionError(f"{nbytes} bytes at {address} are not allocated")

    def cuInit(self, Flags: int) -> tuple[int]:
        return (OK if self.count else NO_DEVICE,)

    def cuDeviceGetCount(self) -> tuple[int, int]:
        return OK, self.count

    def cuDeviceGet(self, ordinal: int) -> tuple[int, int]:
        return OK, ordinal

    def cuDeviceGetName(self, length: int, dev: int) -> tuple[int, bytes]:
        return OK, b"Host memory\0\0"

    def cuDeviceGetAttribute(self, attrib: str, dev: int) -> tuple[int, int]:
        return OK, self.sm // 10 if attrib == "major" else self.sm % 10

    def cuDevicePrimaryCtxRetain(self, dev: int) -> tuple[int, int]:
        return OK, CONTEXT

    def cuCtxSetCurrent(self, ctx: int) -> tuple[int]:
        return (OK if ctx == CONTEXT else INVALID_VALUE,)

    def cuStreamCreate(self, Flags: int) -> tuple[int, int]:
        return OK, STREAM

    def cuMemGetInfo(self) -> tuple[int, int, int]:
        return OK, self.total - self.used, self.total

    def cuMemAlloc(self, bytesize: int) -> tuple[int, int]:
        return self._new(self.device, bytesize, self.total - self.used)

    def cuMemHostAlloc(self, bytesize: int, Flags: int) -> tuple[int, int]:
        return self._new(self.host, bytesize, bytesize)

    def _new(self, places: dict[int, Any], bytesize: int, free: int) -> tuple[int, int]:
        if bytesize > free:
            return OUT_OF_MEMORY, 0
        raw = (ctypes.c_uint8 * (bytesize + 256))()
        shift = -ctypes.addressof(raw) % 256
        memory = (ctypes.c_uint8 * bytesize).from_buffer(raw, shift)
        ctypes.memset(memory, FRESH, bytesize)
        places[ctypes.addressof(memory)] = memory
        return OK, ctypes.addressof(memory)

    def cuMemFree(self, dptr: int) -> tuple[int]:
        del self.device[dptr]
        return (OK,)

    def cuMemFreeHost(self, p: int) -> tuple[int]:
        del self.host[p]
        return (OK,)

    def cuMemcpyHtoDAsync(self, dstDevice: int, srcHost: int, ByteCount: int, hStream: int) -> tuple[int]:
        return self._copy("upload", self.device, dstDevice, self.host, srcHost, ByteCount)

    def cuMemcpyDtoHAsync(self, dstHost: int, srcDevice: int, ByteCount: int, hStream: int) -> tuple[int]:
        return self._copy("download", self.host, dstHost, self.device, srcDevice, ByteCount)

    def cuMemcpyDtoDAsync(self, dstDevice: int, srcDevice: int, ByteCount: int, hStream: int) -> tuple[int]:
        return self._copy("copy", self.device, dstDevice, self.device, srcDevice, ByteCount)

    def _copy(self, name: str, into: Any, target: int, out_of: Any, source: int, nbytes: int) -> tuple[int]:
        target_bytes = self.span(into, target, nbytes)
        source_bytes = self.span(out_of, source, nbytes)
        self.enqueue(name, lambda: np.copyto(target_bytes, source_bytes))
        return (OK,)

    def cuMemsetD8Async(self, dstDevice: int, uc: int, N: int, hStream: int) -> tuple[int]:
        target_bytes = self.span(self.device, dstDevice, N)
        self.enqueue("zero", lambda: target_bytes.fill(uc))
        return (OK,)

    def cuModuleLoadData(self, image: bytes) -> tuple[int, Stage]:
        return OK, self.stages[image.decode()]

    def cuModuleGetFunction(self, hmod: Stage, name: bytes) -> tuple[int, Stage]:
        return (OK if hmod.kernel.endswith(f".{name.decode()}") else INVALID_VALUE), hmod

    def cuFuncSetAttribute(self, hfunc: Stage, attrib: str, value: int) -> tuple[int]:
        return (OK if attrib == "shared" else INVALID_VALUE,)

    def cuLaunchKernel(
        self,
        f: Stage,
        gridDimX: int,
        gridDimY: int,
        gridDimZ: int,
        blockDimX: int,
        blockDimY: int,
        blockDimZ: int,
        sharedMemBytes: int,
        hStream: int,
        kernelParams: Any,
        extra: int,
    ) -> tuple[int]:
        assert (blockDimX, blockDimY, blockDimZ, hStream) == (32 * f.num_warps, 1, 1, STREAM)
        values, kinds = kernelParams
        assert values[-2:] == (None, None)
        arguments = []
        for name, value, kind in zip(f.parameters, values, kinds, strict=False):
            arguments.append(value if kind is ctypes.c_int32 else self._tensor(name, value))
        grid = (gridDimX, gridDimY, gridDimZ)
        constants = f.constants(self.model)
        self.enqueue("kernel", lambda: f.load()[grid](*arguments, **constants))
        return (OK,)

    def _tensor(self, name: str, address: int) -> torch.Tensor:
        """The memory from an address to its allocation's end."""
        end = next(s + len(m) for s, m in self.device.items() if s <= address < s + len(m))
        types = {arg.name: arg.dtype for arg in SAMPLED.args.values()}
        dtype = torch.int32 if types[name] == "i32" else torch.float32
        return torch.from_numpy(self.span(self.device, address, (end - address) // 4 * 4)).view(dtype)

    def cuStreamSynchronize(self, hStream: int) -> tuple[int]:
        assert self.recording is None
        while self.pending and not self.failure:
            self.pending.pop(0)()
        return (self.failure,)

    def cuStreamBeginCapture(self, hStream: int, mode: int) -> tuple[int]:
        assert self.recording is None
        self.recording = []
        return (OK,)

    def cuStreamEndCapture(self, hStream: int) -> tuple[int, Any]:
        recorded = self.recording
        self.recording = None
        return (OK, recorded) if self.capturable else (CAPTURE_INVALIDATED, None)

    def cuGraphInstantiate(self, hGraph: Any, flags: int) -> tuple[int, Any]:
        self.graphs += 1
        return OK, list(hGraph)

    def cuGraphDestroy(self, hGraph: Any) -> tuple[int]:
        return (OK,)

    def cuGraphLaunch(self, hGraphExec: Any, hStream: int) -> tuple[int]:
        self.calls.append("launch")
        self.pending += hGraphExec
        return (OK,)

    def cuGraphExecDestroy(self, hGraphExec: Any) -> tuple[int]:
        self.graphs -= 1
        return (OK,)


@dataclasses.dataclass
class Made:
    """What a stand-in TensorRT has made, for tests to look at."""

    contexts: list[Context] = dataclasses.field(default_factory=list)
    executed: list[tuple[int, ...]] = dataclasses.field(default_factory=list)  # profile, B, S, R; of a tower profile, N


class Engine:
    """The folder's ONNX graph in an engine's place."""

    num_layers = 1
    merge = 1

    def __init__(self, path: Path, profiles: list[dict[str, int]], driver: Driver, made: Made) -> None:
        import onnxruntime

        self.profiles = profiles  # the most of each letter
        self.driver = driver
        self.made = made
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        graph = onnx.load(path, load_external_data=False).graph
        self.values = {v.name: v.type.tensor_type for v in [*graph.input, *graph.output]}
        self.inputs = [v.name for v in graph.input]
        self.names = list(self.values)
        self.num_io_tensors = len(self.names)
        self.num_optimization_profiles = len(profiles)

    def declared(self, name: str) -> list[str | int]:
        return [d.dim_param or d.dim_value for d in self.values[name].shape.dim]

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def get_tensor_shape(self, name: str) -> list[int]:
        return [d.dim_value or -1 for d in self.values[name].shape.dim]

    def get_device_memory_size_for_profile_v2(self, profile: int) -> int:
        return 4096

    def create_execution_context(self, strategy: Any = None) -> Context:
        self.made.contexts.append(Context(self))
        return self.made.contexts[-1]


class Context:
    """Shapes and addresses, and a run over them; as strict as the real one where that can be known."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.profile: int | None = None
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.scratch = 0

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.profile = index
        return stream == STREAM and index < len(self.engine.profiles)

    def set_device_memory(self, address: int, size: int) -> None:
        self.engine.driver.span(self.engine.driver.device, address, size)
        self.scratch = size

    def set_input_shape(self, name: str, shape: Any) -> bool:
        assert self.profile is not None
        limit = self.engine.profiles[self.profile]
        self.shapes[name] = tuple(shape)
        declared = zip(self.engine.declared(name), shape, strict=True)
        return all(1 <= size <= limit[d] if isinstance(d, str) else d == size for d, size in declared)

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return name in self.engine.values and address % 256 == 0

    def infer_shapes(self) -> list[str]:
        return [name for name in self.engine.inputs if name not in self.shapes]

    def execute_async_v3(self, stream: int) -> bool:
        import onnxruntime

        assert self.scratch >= 4096
        assert self.infer_shapes() == []
        assert self.profile is not None
        letters: dict[str | int, int] = {}
        for name, given in self.shapes.items():
            for letter, size in zip(self.engine.declared(name), given, strict=True):
                assert letters.setdefault(letter, size) == size
        vision = "N" in letters
        if vision:
            letters["M"] = letters["N"] // self.engine.merge**2
        binding = self.engine.session.io_binding()
        kept = list[Any]()  # what the binding points to
        for name in self.engine.names:
            value = self.engine.values[name]
            shape = [letters.get(d, d) for d in self.engine.declared(name)]
            assert self.shapes.get(name, tuple(shape)) == tuple(shape)
            dtype = helper.tensor_dtype_to_np_dtype(value.elem_type)
            nbytes = int(np.prod(shape)) * dtype.itemsize
            raw = self.engine.driver.span(self.engine.driver.device, self.addresses[name], nbytes)
            array = raw.view(dtype).reshape(shape)
            ort = onnxruntime.OrtValue.ortvalue_from_numpy(array)
            kept.append((array, ort))
            if name in self.engine.inputs:
                binding.bind_ortvalue_input(name, ort)
            else:
                binding.bind_ortvalue_output(name, ort)
            if name.endswith("_out"):
                assert self.addresses[name] == self.addresses[name.removesuffix("_out")]
        executed = (
            self.profile,
            *(letters["N"] if vision else letters[letter] for letter in ("N" if vision else "BSR")),
        )

        def run() -> None:
            assert kept
            self.engine.made.executed.append(executed)
            self.engine.session.run_with_iobinding(binding)

        self.engine.driver.enqueue("execute", run)
        return True


def make_api(folder: Path, info: EngineInfo, driver: Driver) -> tuple[TensorRT, Made]:
    """A facade whose runtime gives the stand-in engine, and what it makes."""
    about = info.manifest.tensorrt
    made = Made()
    assert about is not None
    passes = [
        {"B": p.max_batch_size, "S": p.max_tokens, "R": p.max_rows, "F": p.max_batch_size * p.max_tokens}
        for p in about.profiles
    ]

    class Runtime:
        engine_host_code_allowed = False

        def __init__(self, logger: Any) -> None:
            pass

        def deserialize_cuda_engine(self, data: Any) -> Engine | None:
            assert driver.cuCtxSetCurrent(CONTEXT) == (OK,)
            if bytes(data[:4]) == b"play":
                return Engine(folder / MODEL_FILE, passes, driver, made)
            if bytes(data[:4]) == b"look" and about is not None and about.vision is not None:
                tower = Engine(folder / VISION_MODEL_FILE, [{"N": most} for most in about.vision.patches], driver, made)
                assert info.model.vision is not None
                tower.merge = info.model.vision.merge
                return tower
            return None

    module = types.SimpleNamespace(
        Runtime=Runtime, ExecutionContextAllocationStrategy=types.SimpleNamespace(USER_MANAGED="user")
    )
    backend: Any = info.manifest.backend
    return TensorRT(backend, module, about.version, None, [("ERROR", "it is not the right magic")]), made


def with_about(info: EngineInfo, **changes: Any) -> EngineInfo:
    """A description that says something else of TensorRT."""
    assert info.manifest.tensorrt is not None
    about = dataclasses.replace(info.manifest.tensorrt, **changes)
    return dataclasses.replace(info, manifest=dataclasses.replace(info.manifest, tensorrt=about))

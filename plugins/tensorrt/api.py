"""One typed face of `tensorrt` and `tensorrt_rtx`, which have the same API and no types of their own.

In: a backend's name. Out: `TensorRT`, the loaded module with its logger, whose methods make the objects that builder
and runtime use; the Protocols below name just the calls they make. What the library says is collected in
`TensorRT.messages`, because its functions answer None or False and give the reason to the logger alone. The surprising
fact: the ONNX parser of TensorRT-RTX opens its own library by a name that the wheel does not ship, and a process that
parses a plugin without `library_folder` dies.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from ...contract import Backend
from ...errors import NemodiffError

MODULES: dict[Backend, str] = {"tensorrt-rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}
INSTALL: dict[Backend, str] = {"tensorrt-rtx": "pip install 'nemodiff[trt]'", "tensorrt": "pip install tensorrt-cu13"}

Shape = Sequence[int]


class Tensor(Protocol):
    """A tensor of a network."""

    name: str
    shape: Shape
    dtype: Any


class Layer(Protocol):
    """A layer of a network; `type` is a LayerType."""

    name: str
    type: Any
    num_inputs: int
    num_outputs: int

    def get_input(self, index: int) -> Tensor | None: ...
    def get_output(self, index: int) -> Tensor | None: ...


class Network(Protocol):
    """A network under construction."""

    num_layers: int
    num_inputs: int
    num_outputs: int

    def get_layer(self, index: int) -> Layer: ...
    def get_input(self, index: int) -> Tensor: ...
    def get_output(self, index: int) -> Tensor: ...


class ParserError(Protocol):
    """Why a node could not be parsed."""

    def desc(self) -> str: ...
    def node_name(self) -> str: ...


class Parser(Protocol):
    """The ONNX parser; external weights are found beside `path`."""

    num_errors: int

    def parse(self, model: bytes, path: str) -> bool: ...
    def get_error(self, index: int) -> ParserError: ...


class OptimizationProfile(Protocol):
    """Minimum, optimum and maximum shape per input."""

    def set_shape(self, name: str, minimum: Shape, optimum: Shape, maximum: Shape) -> None: ...


class TimingCache(Protocol):
    """Measured tactics of earlier builds."""

    def serialize(self) -> Any: ...


class Config(Protocol):
    """How to build."""

    builder_optimization_level: int
    num_compute_capabilities: int
    profiling_verbosity: Any

    def add_optimization_profile(self, profile: OptimizationProfile) -> int: ...
    def set_compute_capability(self, capability: Any, index: int) -> bool: ...
    def set_flag(self, flag: Any) -> None: ...
    def set_preview_feature(self, feature: Any, enable: bool) -> None: ...
    def set_memory_pool_limit(self, pool: Any, size: int) -> None: ...
    def create_timing_cache(self, data: bytes) -> TimingCache: ...
    def set_timing_cache(self, cache: TimingCache, ignore_mismatch: bool) -> bool: ...
    def get_timing_cache(self) -> TimingCache | None: ...


class Builder(Protocol):
    """Compiles networks."""

    def create_network(self, flags: int) -> Network: ...
    def create_builder_config(self) -> Config: ...
    def create_optimization_profile(self) -> OptimizationProfile: ...
    def build_serialized_network_to_stream(self, network: Network, config: Config, writer: Any) -> bool: ...


class Registry(Protocol):
    """Where plugin creators are found by name, version and namespace."""

    def register_creator(self, creator: Any, namespace: str) -> bool: ...
    def deregister_creator(self, creator: Any) -> bool: ...
    def get_creator(self, name: str, version: str, namespace: str) -> Any: ...


class Inspector(Protocol):
    """What an engine says about its own layers; `form` is a LayerInformationFormat."""

    def get_engine_information(self, form: Any) -> str: ...


class Context(Protocol):
    """State of an execution; addresses are device pointers, streams are CUDA handles."""

    def set_optimization_profile_async(self, index: int, stream: int) -> bool: ...
    def set_input_shape(self, name: str, shape: Shape) -> bool: ...
    def set_tensor_address(self, name: str, address: int) -> bool: ...
    def infer_shapes(self) -> list[str]: ...
    def set_device_memory(self, address: int, size: int) -> None: ...
    def execute_async_v3(self, stream: int) -> bool: ...


class Engine(Protocol):
    """A deserialized engine."""

    num_io_tensors: int
    num_layers: int
    num_optimization_profiles: int
    device_memory_size_v2: int

    def get_tensor_name(self, index: int) -> str: ...
    def get_tensor_shape(self, name: str) -> Shape: ...
    def get_device_memory_size_for_profile_v2(self, profile: int) -> int: ...
    def get_aliased_input_tensor(self, name: str) -> str | None: ...
    def create_execution_context(self, strategy: Any = ...) -> Context | None: ...
    def create_runtime_config(self) -> Any: ...
    def create_engine_inspector(self) -> Inspector: ...


class Runtime(Protocol):
    """Loads engines."""

    engine_host_code_allowed: bool

    def deserialize_cuda_engine(self, data: Any) -> Engine | None: ...


@dataclasses.dataclass(frozen=True)
class TensorRT:
    """A loaded module. `module` is for enums and plugin base classes, everything else is a typed method.

    Keep it alive as long as anything made with it: the library holds a bare pointer to `logger`.
    """

    backend: Backend
    module: Any
    version: str
    logger: Any
    messages: list[tuple[str, str]]  # (severity name, text) of warnings and errors, oldest first

    def builder(self) -> Builder:
        made: Builder = self.module.Builder(self.logger)
        return made

    def network(self, builder: Builder) -> Network:
        """An empty network that computes in the types it is written in."""
        flags = self.module.NetworkDefinitionCreationFlag
        return builder.create_network(1 << int(flags.STRONGLY_TYPED) if hasattr(flags, "STRONGLY_TYPED") else 0)

    def parser(self, network: Network) -> Parser:
        made: Parser = self.module.OnnxParser(network, self.logger)
        return made

    def registry(self) -> Registry:
        made: Registry = self.module.get_plugin_registry()
        return made

    def runtime(self) -> Runtime:
        """Needs a driver: without one TensorRT-RTX answers None later, and full TensorRT may end the process here."""
        made: Runtime = self.module.Runtime(self.logger)
        return made

    def sms(self) -> tuple[int, ...]:
        """Compute capabilities that can be built for without the GPU at hand; empty: only for the GPU at hand."""
        names = getattr(getattr(self.module, "ComputeCapability", None), "__members__", ())
        return tuple(sorted(int(name[2:]) for name in names if name.startswith("SM")))

    def stream_writer(self, write: Callable[[memoryview], int]) -> Any:
        """An object the builder writes an engine to, piece by piece."""
        base: Any = self.module.IStreamWriter

        class Writer(base):  # type: ignore[misc]
            def __init__(self) -> None:
                base.__init__(self)

            def write(self, data: Any) -> int:
                return write(memoryview(data))

        return Writer()

    def errors(self) -> str:
        """The errors the library has logged, as one line; empty if there is none.

        That the driver is missing is logged with every error of a build that needs none, so it is left out.
        """
        logged = [text for severity, text in self.messages if severity.endswith("ERROR")]
        return " | ".join(" ".join(text.split()) for text in logged if "cudaError 35" not in text)


def load(backend: Backend, error: type[NemodiffError]) -> TensorRT:
    """Import the backend's module. Raises `error` with the command that installs it."""
    name = MODULES[backend]
    try:
        module = importlib.import_module(name)
    except ImportError as problem:
        raise error(
            f"--backend {backend}: the package {name} cannot be imported ({problem}); install it with: "
            f"{INSTALL[backend]}"
        ) from None
    messages: list[tuple[str, str]] = []
    return TensorRT(backend, module, str(module.__version__), _logger(module, messages), messages)


def _logger(module: Any, messages: list[tuple[str, str]]) -> Any:
    worst_first = ("INTERNAL_ERROR", "ERROR", "WARNING")
    kept = {getattr(module.ILogger, name): name for name in worst_first}

    class Logger(module.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            module.ILogger.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            if severity in kept:
                messages.append((kept[severity], text))

    return Logger()


def device_sm() -> int | None:
    """Compute capability of the first GPU (89 is 8.9), None without a driver or a GPU."""
    try:
        driver = importlib.import_module("cuda.bindings.driver")
        if int(driver.cuInit(0)[0]):
            return None
        attribute = driver.CUdevice_attribute
        major, minor = (
            int(driver.cuDeviceGetAttribute(getattr(attribute, f"CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_{part}"), 0)[1])
            for part in ("MAJOR", "MINOR")
        )
    except (ImportError, RuntimeError):  # no package; no driver library
        return None
    return 10 * major + minor


def library_folder(folder: Path) -> dict[str, str]:
    """Fill `folder` so that a process with the environment variables given back can parse plugins in TensorRT-RTX.

    The parser calls dlopen("libtensorrt_rtx.so"), and the wheel holds only libtensorrt_rtx.so.1 (TensorRT-RTX 1.7.1,
    2026-11-23). The loader reads LD_LIBRARY_PATH when a process starts, so this is for a child process.
    """
    try:
        libraries = importlib.import_module("tensorrt_rtx_libs")
    except ImportError:  # an installation from the archive, which has both names
        return {}
    for place in libraries.__path__:
        for library in Path(place).glob("libtensorrt_rtx.so.*"):
            (folder / "libtensorrt_rtx.so").symlink_to(library)
            before = os.environ.get("LD_LIBRARY_PATH")
            return {"LD_LIBRARY_PATH": f"{folder}{os.pathsep}{before}" if before else str(folder)}
    return {}

"""One typed facade of `tensorrt` and `tensorrt_rtx`, which have the same API: `load` gives it for a backend."""

from __future__ import annotations

import dataclasses
import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...contract import Backend
from ...errors import NemodiffError, install
from .protocols import Builder, Network, Parser, Registry, Runtime

MODULES: dict[Backend, str] = {"tensorrt-rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}
INSTALL: dict[Backend, str] = {
    "tensorrt-rtx": f"{install('nemodiff[trt]')} (on Linux)",
    "tensorrt": install("tensorrt-cu13"),
}
RTX_SMS = (80, 86, 89, 120, 121)  # of TensorRT-RTX 1.7 in bf16: 75 has none, and it knows no 90 and no 100


@dataclasses.dataclass(frozen=True)
class TensorRT:
    """A loaded module with its logger; `module` is for enums and plugin base classes, the rest are typed methods.

    Keep it alive as long as anything made with it: the library holds a bare pointer to `logger`.
    """

    backend: Backend
    module: Any
    version: str
    logger: Any
    # Severity and text of warnings and errors, oldest first. The library's functions answer None or False and give the
    # reason to the logger alone.
    messages: list[tuple[str, str]]

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
        """What loads engines. Without a driver TensorRT-RTX answers None later; full TensorRT may end the process."""
        made: Runtime = self.module.Runtime(self.logger)
        return made

    def sms(self) -> tuple[int, ...]:
        """Compute capabilities that can be built for without such a GPU; none where it must be the GPU at hand."""
        return buildable_sms(self.module)

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
        """The errors the library has logged, as one line; empty if there are none."""
        # cudaError 35, the missing driver, is logged with every error of a build that needs none.
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


def buildable_sms(module: Any) -> tuple[int, ...]:
    """See `TensorRT.sms`."""
    names = getattr(getattr(module, "ComputeCapability", None), "__members__", ())
    return tuple(sm for sm in RTX_SMS if f"SM{sm}" in names)


def device_sm() -> int | None:
    """Compute capability of the first GPU (89 is 8.9), None without a driver or a GPU."""
    try:
        driver = importlib.import_module("cuda.bindings.driver")
        if int(driver.cuInit(0)[0]):
            return None
        attribute = driver.CUdevice_attribute
        _, major = driver.cuDeviceGetAttribute(attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, 0)
        _, minor = driver.cuDeviceGetAttribute(attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, 0)
    except (ImportError, RuntimeError):  # no package; no driver library
        return None
    return 10 * int(major) + int(minor)


def library_folder(folder: Path) -> dict[str, str]:
    """Put TensorRT-RTX's library into `folder` under the name that its ONNX parser opens.

    Returns:
        Environment variables for a child process; without them it dies when it parses a plugin.
    """
    # The parser calls dlopen("libtensorrt_rtx.so"), and the wheel holds only libtensorrt_rtx.so.1 (TensorRT-RTX 1.7.1,
    # 2026-11-23). The loader reads LD_LIBRARY_PATH only when a process starts.
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

"""The compiled kernels of one engine, for one card.

In: an engine folder's kernel records and files. Out: PTX for TensorRT's ahead-of-time plugins, and launches through the
CUDA driver for those of TensorRT-RTX and for what runs after an engine. The surprising fact: a kernel with more than
48 KiB of shared memory is refused at launch unless its function has been told so before.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...engine_folder import Kernel
from ...errors import EngineError
from ..op import Grid


class Kernels:
    """Kernels of `sm` in an engine folder, whose files the caller has checked; nothing is loaded yet.

    `driver` is the module `cuda.bindings.driver`, or what plays it.

    Raises:
        EngineError: the engine has no kernels for the card.
    """

    def __init__(self, folder: Path, kernels: Sequence[Kernel], sm: int, driver: Any = None) -> None:
        self.records = {kernel.stage: kernel for kernel in kernels if kernel.sm == sm}
        self._folder, self._loaded, self._given_driver = folder, dict[str, tuple[Any, Any]](), driver
        if not self.records:
            built = ", ".join(map(str, sorted({kernel.sm for kernel in kernels}))) or "none"
            raise EngineError(
                f"{folder}: has no plugin kernels for SM {sm}, allowed: {built}; build it again with --plugins and "
                f"--sm {sm}"
            )

    def ptx(self, stage: str) -> tuple[Kernel, str]:
        """A kernel's record and its PTX."""
        kernel = self.records[stage]
        return kernel, (self._folder / kernel.file("ptx")).read_text(encoding="ascii")

    def launch(self, stage: str, grid: Grid, arguments: Sequence[int], stream: int) -> None:
        """Queue one launch.

        Args:
            stage: the kernel's name.
            grid: programs in x, y and z.
            arguments: its pointers and i32 scalars in the record's order.
            stream: CUDA stream handle.

        Raises:
            EngineError: the driver refuses it.
        """
        kernel = self.records[stage]
        if stage not in self._loaded:
            self._loaded[stage] = self._load(kernel)
        kinds = [ctypes.c_void_p if argument[0] == "*" else ctypes.c_int32 for argument in kernel.arguments]
        scratch = (None, None)  # see contract.Kernel
        parameters = ((*arguments, *scratch), (*kinds, ctypes.c_void_p, ctypes.c_void_p))
        _, function = self._loaded[stage]
        threads = 32 * kernel.num_warps
        self._call("cuLaunchKernel", function, *grid, threads, 1, 1, kernel.shared_bytes, stream, parameters, 0)

    def _load(self, kernel: Kernel) -> tuple[Any, Any]:
        (module,) = self._call("cuModuleLoadData", (self._folder / kernel.file("cubin")).read_bytes())
        (function,) = self._call("cuModuleGetFunction", module, kernel.entry.encode())
        attribute = self._driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        self._call("cuFuncSetAttribute", function, attribute, kernel.shared_bytes)
        return module, function

    @property
    def _driver(self) -> Any:
        return self._given_driver or importlib.import_module("cuda.bindings.driver")

    def _call(self, name: str, *args: Any) -> Any:
        status, *values = getattr(self._driver, name)(*args)
        if int(status):
            raise EngineError(
                f"{self._folder}: the CUDA driver refuses a plugin kernel ({name}: {status.name}); build the engine "
                "again on this machine, or without --plugins"
            )
        return values

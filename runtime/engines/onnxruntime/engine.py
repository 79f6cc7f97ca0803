"""The CPU engine: ONNX Runtime over the graph, with caches updated in place.

All inputs and outputs of a forward live in numpy arrays bound once per shape, so a step writes a few integers, runs,
and reads a few integers.
"""

from __future__ import annotations

import platform
import re
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from ....contract import CONVOLVED, Binding, on_x86, vision_inputs
from ....engine_folder import MODEL_FILE, VISION_MODEL_FILE, WEIGHTS_FILE, build_again
from ....engine_info import EngineInfo
from ....errors import EngineError
from ...images.image import Image
from . import large_pages
from .cache import OnnxRuntimeCache
from .forward import Bindings
from .memory import FIRST_ROOM

_KEPT_CACHES = 4  # closed ones; binding a shape anew costs as much as a small model's forward


class OnnxRuntimeEngine:
    """An engine folder loaded on the CPU.

    Args:
        folder: the engine folder.
        info: its description, from `engine_info.read_engine`.
        threads: CPU threads of a forward; None lets ONNX Runtime take one per physical core.
        warmup: move the weights into large pages, where they are more than a processor's cache holds.

    Raises:
        EngineError: the graph cannot be loaded.
    """

    samples = False
    pages = None
    # Of what passes cost. Windows counts a thread's time in ticks of 15.6 ms.
    clock = staticmethod(time.perf_counter if sys.platform == "win32" else time.thread_time)

    def __init__(self, folder: Path, info: EngineInfo, threads: int | None = None, *, warmup: bool = False) -> None:
        self._bindings = Bindings(info)
        self.session = _open_session(folder / MODEL_FILE, self._bindings.inputs, threads)
        vision = info.model.vision
        self._vision = (
            _open_session(folder / VISION_MODEL_FILE, vision_inputs(vision), threads) if vision is not None else None
        )
        if warmup and (folder / WEIGHTS_FILE).stat().st_size >= large_pages.LEAST:
            large_pages.gather()
        self.info = info
        self._closed: list[OnnxRuntimeCache] = []
        self._lock = threading.Lock()  # of _closed: requests may run in several threads

    def open(self, rows: int) -> OnnxRuntimeCache:
        """A cache of `rows` rows: a closed one with its bound forwards if there is one, else a new one."""
        with self._lock:
            for cache in self._closed:
                if cache.rows == rows:
                    self._closed.remove(cache)
                    return cache
        return OnnxRuntimeCache(self.session, self.info, self._bindings, rows, self.take_back)

    def see(self, image: Image) -> np.ndarray:
        """See `engine.SeeingEngine.see`."""
        assert self._vision is not None
        visible = np.zeros((1, len(image.patches), 3), np.int32)
        visible[:, :, 2] = len(image.patches)
        inputs = {"patches": image.patches, "positions": image.positions, "visible": visible}
        (features,) = self._vision.run(["features"], inputs)
        return np.asarray(features)

    def take_back(self, cache: OnnxRuntimeCache) -> None:
        """Keep a closed cache for the next request, unless its memory has grown."""
        if cache.memory.room <= FIRST_ROOM:
            cache.memory.free_all()
            with self._lock:
                self._closed = [*self._closed, cache][-_KEPT_CACHES:]


def _bytes_overflow() -> bool:
    """Whether this processor may add products of bytes in 16 bits, as those of x86 do that have no VNNI."""
    if not on_x86():
        return False
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return True  # it does not say
    return not re.search(r"\bavx(512)?_vnni\b", flags)


def _open_session(path: Path, bindings: list[Binding], threads: int | None) -> Any:
    """A session of a graph whose inputs are those bindings. Raises EngineError."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    if _bytes_overflow():
        options.add_session_config_entry("session.x64quantprecision", "1")  # a slower way, 1.7 times with VNNI
    if threads is not None:
        options.intra_op_num_threads = threads
    again = build_again(path.parent)
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime raises classes of its own without a common base
        reason = str(error).strip().splitlines()[0]
        raise EngineError(
            f"{path}: ONNX Runtime {onnxruntime.__version__} cannot load it ({reason}); {again}"
        ) from None
    if CONVOLVED in session.get_modelmeta().custom_metadata_map and not on_x86():
        raise EngineError(
            f"{path}: its products are made for processors of x86, this one is of {platform.machine()}; {again}"
        )
    expected = {binding.name for binding in bindings}
    declared = {item.name for item in session.get_inputs()}
    if declared != expected:
        raise EngineError(
            f"{path}: its inputs are not those of the engine's description (one of "
            f"{', '.join(sorted(expected ^ declared)[:3])}); {again}"
        )
    return session

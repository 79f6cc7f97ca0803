"""The torch engine: `TorchModel` over pages of one memory, on the CPU or on a GPU.

A forward is flat tokens of any rows. On a GPU it is one upload, the network, captured as a CUDA graph for a number of
tokens and of predictions, which are rounded up, and one download; the sizes of decoding are captured when the engine is
loaded. The CPU has no graphs, so there a pass costs by its tokens, and attention ends where a row does.
"""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ....contract import DEFAULT_GPU_MEMORY_UTILIZATION, MAX_BLOCK, PREFILL_CHUNK, counted
from ....engine_info import EngineInfo
from ....errors import EngineError, RequestError
from ....tuned import Choice, read_tuned
from ...images.image import Image
from ..pages import Pages
from .cache import MOST_TOKENS, TorchCache
from .device import TorchDevice
from .flat import FlatShape, graph_shapes
from .forwards import Forwards
from .memory import Memory, page_count, pass_bytes
from .model import TorchModel
from .projections import OWN
from .step import Steps
from .vision import TorchVision

if TYPE_CHECKING:
    from .ranks import Ranks


class TorchEngine:
    """An engine folder loaded into torch.

    Args:
        folder: the engine folder.
        info: its description, from `engine_info.read_engine`.
        device: a GPU's number, "cpu", None for a GPU if there is one, or a device made before.
        threads: CPU threads, for all of torch in this process; None leaves torch's choice.
        kernels: run the project's Triton kernels; default on a GPU.
        graphs: capture CUDA graphs; default on a GPU. False runs every pass eagerly, for comparison.
        ahead: start passes before those that they follow have ended; default on a GPU, as a CPU gains nothing.
        memory: share of the GPU's memory that weights, passes and K/V may take together.
        pages: pages of K/V; None takes what `memory` allows.
        ranks: that hold the model together; this process serves requests if it is rank 0, else it calls `mirror`.
        pdl: let kernels begin while those before them end, on cards that can (SM 90 and later). Tokens are the same
            with it and without. None is what the environment variable NEMODIFF_PDL says, 1 or 0, or if it is not set
            what `nemodiff tune` has chosen for this card and these versions, or else no.
        own_products: projections, of `projections.OWN`, that the project's kernels multiply in passes of up to 64
            tokens. None is likewise those that NEMODIFF_OWN_PRODUCTS lists, separated by commas, or those chosen, or
            none.

    Raises:
        EngineError: torch is missing, or the weights do not belong to the description, or do not fit.
        RequestError: there is no such device, or no such projection.
    """

    def __init__(
        self,
        folder: Path,
        info: EngineInfo,
        device: int | Literal["cpu"] | TorchDevice | None = None,
        threads: int | None = None,
        *,
        kernels: bool | None = None,
        graphs: bool | None = None,
        ahead: bool | None = None,
        memory: float = DEFAULT_GPU_MEMORY_UTILIZATION,
        pages: int | None = None,
        ranks: Ranks | None = None,
        pdl: bool | None = None,
        own_products: Collection[str] | None = None,
    ) -> None:
        self.device = device if isinstance(device, TorchDevice) else TorchDevice(folder, device, threads)
        self.info = info
        self.folder = folder
        self.lock: Any = threading.RLock()  # of the stream and the memory: requests may run in several threads
        is_gpu = self.device.is_gpu
        self.ranks = ranks
        with_kernels = is_gpu if kernels is None else kernels
        self.choice = self._chosen(pdl, own_products, with_kernels)
        with self.device.use(folder):
            self.model = TorchModel(folder, info, self.device, with_kernels, ranks, *self.choice)
            own = dataclasses.replace(info, model=self.model.config)
            # Rank 0 alone looks at images; the others get what it sees as embeddings.
            seeing = info.model.vision is not None and (ranks is None or ranks.rank == 0)
            self._vision = TorchVision(folder, info, self.device.name) if seeing else None
            if pages is None:
                size = 1 if ranks is None else ranks.size
                largest = pass_bytes(own, MOST_TOKENS + PREFILL_CHUNK, _most_decoded(info), size)
                pages = page_count(self.device, folder, own, largest, memory)
            if ranks is not None:
                pages = ranks.agree(pages)
            self.memory = Memory(self.device, own, self.model.dtype, pages)
            if ranks is not None and ranks.rank == 0:
                self.memory.record()
            ahead = is_gpu if ahead is None else ahead
            graphs = is_gpu if graphs is None else graphs
            shapes = graph_shapes(_most_decoded(info), images=info.model.vision is not None)
            self.steps = Steps(folder, self.device, self.model, self.memory, info, shapes, graphs)
            self.forwards = Forwards(folder, self.steps, ahead, self.lock)
        self.pass_seconds: dict[int, float] = {}  # of a pass by its tokens, as the warm-up has met them
        self.samples = self.model.kernels and ranks is None  # drawing needs the whole vocabulary

    @property
    def pages(self) -> Pages:
        """See `engine.Engine`."""
        return self.memory.pages

    @property
    def captured(self) -> int:
        """Graphs made since the engine was loaded."""
        return self.steps.captured

    @property
    def compiled(self) -> int:
        """Kernels that had to be compiled since the engine was loaded."""
        return 0 if self.steps.kernels is None else self.steps.kernels.compiled

    @property
    def eager_shapes(self) -> dict[FlatShape, str]:
        """Shapes that cannot be captured, and why."""
        return self.steps.eager_shapes

    @property
    def lost(self) -> str | None:
        """Why the engine will never run again, if it will not."""
        return self.device.lost if self.ranks is None else self.ranks.lost or self.device.lost

    def open(self, rows: int) -> TorchCache:
        """A cache of `rows` empty rows. Raises EngineError where all rows of the page table are taken."""
        with self.lock:
            numbers = self.pages.open(rows)
        if numbers is None:
            raise EngineError(
                f"{self.folder}: {counted(rows, 'row')} asked for, {self.pages.open_rows} in use, allowed together: "
                f"{len(self.pages.table) - 1}; close what is not needed, or build with a larger --max-batch-size"
            )
        return TorchCache(self.forwards, numbers)

    def see(self, image: Image) -> np.ndarray:
        """See `engine.SeeingEngine.see`."""
        assert self._vision is not None
        with self.lock, self.device.use(self.folder):
            return self._vision.see(image)

    def choose(self, choice: Choice) -> None:
        """Run the kernels in another way from here on, and forget what was captured."""
        self.choice = choice
        self.model.vary(self.model.kernels, *choice)
        self.steps.forget()

    def _chosen(self, pdl: bool | None, own: Collection[str] | None, kernels: bool) -> Choice:
        """By argument, else by environment, else as tuned here, which is of one card and not of ranks, else neither."""
        variable, listed = (os.environ.get(f"NEMODIFF_{name}") for name in ("PDL", "OWN_PRODUCTS"))
        pdl = variable == "1" if pdl is None and variable is not None else pdl
        own = list(filter(None, listed.split(","))) if own is None and listed is not None else own
        tuned = Choice()
        if kernels and self.ranks is None and (pdl is None or own is None) and (kept := read_tuned(self.folder, OWN)):
            tuned = next((one.choice for one in kept if one.here == self.device.identity), tuned)
        names = tuned.own_products if own is None else frozenset(own)
        if names - set(OWN):
            raise RequestError(
                f"NEMODIFF_OWN_PRODUCTS or own_products holds {min(names - set(OWN))!r}, allowed: {', '.join(OWN)}; "
                "name some of them, separated by commas"
            )
        return Choice((tuned.pdl if pdl is None else pdl) and self.device.overlaps_launches, names)

    def warm_up(self, show: Callable[[list[FlatShape]], Iterable[FlatShape]] = iter) -> None:
        """Compile and capture the shapes of decoding, which `show` sees go by; nothing where there are no graphs."""
        if self.steps.graphs:
            self.pass_seconds = self.forwards.warm_up(show(self.steps.shapes))

    def mirror(self) -> None:
        """Compute what rank 0 does until it ends; for the other ranks."""
        assert self.ranks is not None
        self.forwards.mirror(self.ranks)


def _most_decoded(info: EngineInfo) -> int:
    """Tokens of a forward where all rows decode: a chunk of a prompt with masks, beside a block of every other row."""
    blocks = min(MOST_TOKENS, (info.build.max_batch_size - 1) * info.build.block_length)
    return blocks + PREFILL_CHUNK + MAX_BLOCK

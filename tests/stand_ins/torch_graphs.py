"""CUDA graphs played on the CPU: what torch does while it is captured, done again over the very same tensors.

A replay repeats each operation that touched memory, with the arguments it had, and writes to the tensors it had written
to. So whatever a capture would freeze is frozen here too: a number read on the host, a slice whose length the inputs
decide, a tensor that is made anew. It does not show that CUDA can capture the operations, nor that launches of Triton
kernels are captured; the engine runs torch's own attention here.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nemodiff.runtime.engines.torch.device import Graph, TorchDevice


def _tensors(values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


class Recorded:
    """The operations of one capture."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Any, Any, list[torch.Tensor]]] = []
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        with torch.inference_mode(), torch._C._DisableTorchDispatch():
            for function, args, kwargs, results in self.calls:
                again = _tensors(function(*args, **kwargs))
                for old, new in zip(results, again, strict=True):
                    if old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                        old.copy_(new)


class _Recorder(TorchDispatchMode):
    def __init__(self, graph: Recorded) -> None:
        super().__init__()
        self._graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "a value is read on the host"
        results = func(*args, **(kwargs or {}))
        self._graph.calls.append((func, args, kwargs or {}, _tensors(results)))
        return results


class Operations(TorchDispatchMode):
    """The names of what runs outside graphs."""

    def __init__(self) -> None:
        super().__init__()
        self.names = set[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


class RecordingDevice(TorchDevice):
    """The CPU, with graphs. `refuses` is the number of captures that fail first.

    A pool is gone with the last capture that held it, as torch's allocator has it.
    """

    def __init__(self, refuses: int = 0) -> None:
        super().__init__(Path("engine"), "cpu")
        self.graphs: list[Recorded] = []
        self._refuses = refuses
        self._bytes: list[torch.Tensor] = []
        self._held = list[object]()  # pools that a graph holds
        self._gone = list[object]()

    def graph_pool(self) -> object:
        return object()

    def bytes(self, count: int) -> torch.Tensor:
        self._bytes.append(super().bytes(count))
        return self._bytes[-1]

    def capture(self, work: Callable[[], None], pool: Any = None) -> Graph | str:
        if pool in self._gone:
            return "it->second->use_count > 0 INTERNAL ASSERT FAILED"
        if self._refuses:
            self._refuses -= 1
            self._gone += [] if pool in self._held else [pool]
            return "operation not permitted when stream is capturing"
        graph = Recorded()
        before = [memory.clone() for memory in self._bytes]
        with _Recorder(graph):
            work()
        for memory, held in zip(self._bytes, before, strict=True):
            memory.copy_(held)  # a capture runs nothing
        self.graphs.append(graph)
        self._held.append(pool)
        return graph

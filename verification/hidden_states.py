"""The hidden states of a torch engine on a CPU, seen where its network normalizes them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager

import numpy as np

from ..engine_info import EngineInfo

Seen = list[np.ndarray]


def watched(info: EngineInfo, wanted: bool) -> AbstractContextManager[Seen]:
    """Collects what every norm of a forward is given, (S, E) f32 each, from torch if they are wanted.

    On a GPU a kernel adds and normalizes at once, so fewer are seen, and `named` takes none of them.
    """
    return _watched() if wanted and info.manifest.backend == "torch" else contextlib.nullcontext([])


def named(seen: Seen, layers: int, size: int) -> dict[str, np.ndarray]:
    """The states by the names of the graph's tensors, if they are all there: before each layer's norms and the last."""
    if len(seen) != 2 * layers + 1 or any(len(state) != size for state in seen):
        return {}
    halves = [f"layers.{layer}.{half}.residual" for layer in range(layers) for half in ("self_attn", "mlp")]
    return dict(zip(["embed_tokens", *halves], seen, strict=True))


@contextlib.contextmanager
def _watched() -> Iterator[Seen]:
    import torch
    from torch.overrides import TorchFunctionMode

    seen: Seen = []
    norm = torch.nn.functional.rms_norm

    class Watch(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if function is norm:
                state = args[0]
                seen.append(state.reshape(-1, state.shape[-1]).float().cpu().numpy().copy())
            return function(*args, **(kwargs or {}))

    with Watch():
        yield seen

"""Weights of a checkpoint as a CPU engine packs them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

_PACKED = (("self_attn", "qkv", ("q", "k", "v")), ("mlp", "gate_up", ("gate", "up")))


def packed(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """By the engine's names, (out, in): what shares an input is one, the outputs one after the other."""
    mine = {name.removeprefix("encoder."): weight for name, weight in weights.items()}
    layers = {name.split(".")[1] for name in mine if name.startswith("layers.")}
    for layer in layers:
        for half, name, parts in _PACKED:
            at = f"layers.{layer}.{half}"
            whole = [mine.pop(f"{at}.{part}_proj.weight") for part in parts]
            mine[f"{at}.{name}_proj.weight"] = np.concatenate(whole)
    return mine

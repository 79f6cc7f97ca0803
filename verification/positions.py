"""How positions enter the decoder, by the checkpoint's config.json: rotation, YaRN, and the query scale."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np


def rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """The positions' parameters under either of their names."""
    outside = {"rope_theta": config["rope_theta"]} if "rope_theta" in config else {}
    values = config.get("rope_parameters") or config["rope_scaling"]
    return {**outside, **values, "rope_type": values.get("rope_type", values.get("type"))}


def inverse_frequencies(rope: Mapping[str, Any], width: int) -> np.ndarray:
    """Radians per position of each pair of a head, (width / 2,) f32."""
    theta = float(rope["rope_theta"])
    fast: np.ndarray = theta ** -(np.arange(width // 2) * 2.0 / width)
    if rope["rope_type"] == "default":
        return fast.astype(np.float32)

    def pair(turns: float) -> float:  # the pair that turns this often within the original length
        length = float(rope["original_max_position_embeddings"])
        return width / 2 * math.log(length / (2 * math.pi * turns), theta)

    low, high = pair(rope.get("beta_fast") or 32.0), pair(rope.get("beta_slow") or 1.0)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    slowed = np.clip((np.arange(width // 2) - low) / max(high - low, 0.001), 0, 1)  # share that is stretched
    mixed: np.ndarray = fast * (1 - slowed) + fast / float(rope["factor"]) * slowed
    return mixed.astype(np.float32)


def attention_factor(rope: Mapping[str, Any]) -> float:
    """What YaRN multiplies cos and sin by."""
    if rope["rope_type"] == "default":
        return 1.0
    if rope.get("attention_factor"):
        return float(rope["attention_factor"])
    grows = math.log(rope["factor"]) / 10 if rope["factor"] > 1 else 0.0
    above, below = rope.get("mscale"), rope.get("mscale_all_dim")
    return (above * grows + 1) / (below * grows + 1) if above and below else grows + 1


def query_scale(pos: np.ndarray, rope: Mapping[str, Any]) -> np.ndarray | None:
    """What each query is multiplied by, (T,) f64; None where the model has no such scale."""
    beta = rope.get("llama_4_scaling_beta")
    if not beta:
        return None
    return np.asarray(1 + beta * np.log1p(pos // int(rope["original_max_position_embeddings"])), np.float64)

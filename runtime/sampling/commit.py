"""Which masks of a block a denoise pass commits: an order, and how many from its start."""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Policy:
    """How diffusion commits; see `Options` for each field."""

    name: str = "threshold"
    threshold: float = 0.0
    per_step: int = 1
    entropy_bound: float = 0.0
    steps: int | None = None

    @property
    def by_entropy(self) -> bool:
        """Whether `commits` needs the entropy."""
        return self.name == "entropy"

    @property
    def everything(self) -> bool:
        """Whether every mask is committed, whatever its confidence."""
        return self.name == "threshold" and self.threshold <= 0

    @property
    def by_engine(self) -> bool:
        """Whether the engine's own commit rule is this one."""
        return self.name == "threshold" and self.steps is None

    def commits(self, confidence: np.ndarray, entropy: np.ndarray | None, passes: int) -> np.ndarray:
        """Indices of the masks to commit.

        confidence (M,) f32 of the masks from left to right; entropy (M,) f64, nats, for the policy that uses it;
        passes: how many this block has had before.
        """
        sure = confidence >= np.float32(self.threshold)
        order = np.arange(confidence.size)
        count = 1
        if self.by_entropy:
            assert entropy is not None
            order = np.argsort(entropy, kind="stable")
            count = int(np.count_nonzero(entropy <= self.entropy_bound))
        elif self.name == "left_to_right":
            count = confidence.size if sure.all() else int(sure.argmin())
        else:
            order = np.argsort(-confidence, kind="stable")
            count = self.per_step if self.name == "topk" else int(np.count_nonzero(sure))
        if self.steps is not None:
            count = max(count, -(-confidence.size // max(1, self.steps - passes)))
        return order[: max(1, count)]

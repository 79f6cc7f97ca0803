"""The language model's head and what it chooses: by kernels, in plain torch, or by all ranks together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ....config import ModelConfig
from ....plugins.ops import confidence_commit, flat_commit, head_commit
from . import plain
from .launcher import Launcher, tile
from .projections import Projections
from .quantized import Quantized

if TYPE_CHECKING:
    from torch import Tensor

    from .ranks import Ranks


class Head:
    """Chooses a token for each prediction of a pass.

    Args:
        weight: (V, E), or with ranks this one's part of the vocabulary.
        config: of the whole model.
        first: the first id that `weight` has.
        project: multiplies by it in plain torch.
        launch: of the kernels, or None.
        ranks: that have the other parts.
    """

    def __init__(
        self,
        weight: Tensor | Quantized,
        config: ModelConfig,
        first: int,
        project: Projections,
        launch: Launcher | None,
        ranks: Ranks | None,
    ) -> None:
        self.weight = weight
        self._config = config
        self._first = first
        self._project = project
        self._launch = launch
        self._ranks = ranks

    def choose(
        self, x: Tensor, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor], place: Tensor | None
    ) -> None:
        """Write the outputs of `flat.py`, and the logits to `place`.

        Args:
            x: the last norm of all tokens, (N, E) compute.
            inputs: those of `flat.py`.
            outputs: token, confidence and next_ids.
            place: where logits go, (R, V) f32, or a smaller one that holds those of some predictions at a time, just
                for the samples to be drawn. None makes none, and the kernels draw no samples then.
        """
        if self._launch is not None and self._ranks is None:
            self._by_kernels(self._launch, x, inputs, outputs, place)
            return
        index, mask = inputs["index"].long(), self._config.mask_id  # (R,)
        logits = self._logits(x[index])  # (R, V), or with ranks (R, V / ranks)
        if self._ranks is None:
            found = plain.best(logits, mask)
        else:
            found = self._best_of_ranks(self._ranks, plain.best(logits, mask - self._first))
        plain.commit(found, inputs["ids"][index], inputs, outputs, mask)
        if place is not None and len(place) == len(index):
            if self._ranks is None:
                place.copy_(logits)
            else:
                self._gather(self._ranks, logits, place)

    def _by_kernels(
        self,
        launch: Launcher,
        x: Tensor,
        inputs: Mapping[str, Tensor],
        outputs: Mapping[str, Tensor],
        place: Tensor | None,
    ) -> None:
        """HeadCommit's kernels, SampledCommit's where there are logits, and the rule."""
        import torch

        weight: dict[str, Any] = {"weight": self.weight}
        if isinstance(self.weight, Quantized):
            weight = {name: self.weight.tensors[name] for name in ("weight", "scale")}
        count = len(inputs["index"])
        op = head_commit.flat_op(tile(head_commit.TILES, count), "scale" in weight)
        shares = -(-self._config.vocab_size // confidence_commit.SHARE)
        part = torch.empty((count, shares, 4), dtype=torch.float32, device=x.device)
        best = torch.empty((count, shares), dtype=torch.int32, device=x.device)
        nothing = torch.empty((count, 0), dtype=torch.float32, device=x.device)
        step = count if place is None else len(place)
        tokens = {name: inputs[name] for name in ("ids", "pos")}
        for begin in range(0, count, step):
            some = slice(begin, min(begin + step, count))
            found = {"part": part[some], "best": best[some]}
            kept = nothing[some] if place is None else place[: len(found["part"])]
            launch(op, {"x": x, **weight, "index": inputs["index"][some], "kept": kept}, found)
            if place is not None:
                drawing = {name: inputs[name][some] for name in ("temperature", "seed", "index")}
                launch(flat_commit.SAMPLED, {"logits": kept, **drawing, **tokens, **found})
        rule = {name: inputs[name] for name in ("ids", "index", "span", "threshold")}
        launch(flat_commit.OP, {"part": part, "best": best, **rule}, outputs)

    def _logits(self, x: Tensor) -> Tensor:
        """Logits in plain torch, (R, V) f32."""
        from torch.nn import functional

        if not isinstance(self.weight, Quantized):
            return functional.linear(x, self.weight).float()
        if self._launch is None:
            return functional.linear(x, self.weight.tensors["values"]).float() * self.weight.tensors["scale"]
        return self._project(x, self.weight).float()

    def _best_of_ranks(self, ranks: Ranks, own: plain.Best) -> plain.Best:
        """The best of the whole vocabulary from that of each rank's part, three numbers per prediction."""
        import torch

        token = own.token + self._first
        # In f64, which holds a token's id and every f32 exactly.
        bests = ranks.gather(torch.stack([own.logit.double(), own.total.double(), token.double()]))  # (ranks, 3, R)
        logit, rank = bests[:, 0].max(0)  # the first rank of equals has the lower ids
        total = (bests[:, 1] * (bests[:, 0] - logit).exp()).sum(0)
        return plain.Best(bests[:, 2].gather(0, rank[None])[0].long(), logit.float(), total.float())

    def _gather(self, ranks: Ranks, logits: Tensor, place: Tensor) -> None:
        """Write the logits of the whole vocabulary, (R, V), from each rank's part."""
        from torch.nn import functional

        own = -(-self._config.vocab_size // ranks.size)
        padded = functional.pad(logits, (0, own - logits.shape[1]))
        for rank, part in enumerate(ranks.gather(padded)):
            target = place[:, rank * own : (rank + 1) * own]
            target.copy_(part[:, : target.shape[1]])

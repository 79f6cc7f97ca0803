"""Orthogonalised Nesterov momentum for the matrices of the layers (Muon), AdamW for embeddings, head and norms."""

from __future__ import annotations

import math
from typing import Any

import torch
from model import TinyChat
from torch import Tensor, nn

MUON_RATE = 0.02
MUON_MOMENTUM = 0.95
MUON_DECAY = 2e-4
ADAM_RATE = 3e-3
QUERY = 8  # how many times faster queries move: scores are divided by the root of their size
CLIP = 1.0  # the largest norm of either part's gradient


def orthogonalise(matrices: Tensor) -> Tensor:  # (K, M, N)
    """Push the singular values towards 1 by five Newton-Schulz steps with Muon's coefficients, in bf16."""
    x = (matrices / (matrices.norm(dim=(-2, -1), keepdim=True) + 1e-7)).bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.mT if tall else x).float()


class Optimiser:
    """One step of both parts, without frozen parameters. Matrices of one shape are orthogonalised together."""

    def __init__(self, model: TinyChat) -> None:
        alike: dict[tuple[bool, torch.Size], list[nn.Parameter]] = {}
        rest = []
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            if parameter.ndim == 2 and "layers" in name:
                alike.setdefault(("q_proj" in name, parameter.shape), []).append(parameter)
            else:
                rest.append(parameter)
        self._groups = list(alike.values())
        self._rates = [
            MUON_RATE * (QUERY if query else 1) * math.sqrt(max(1, shape[0] / shape[1])) for query, shape in alike
        ]
        self._rest = rest
        self._momenta = [torch.zeros_like(torch.stack(group)) for group in self._groups]  # of a shape (K, M, N)
        self._adamw = torch.optim.AdamW(rest, lr=ADAM_RATE, betas=(0.9, 0.95), weight_decay=0.01)

    @torch.no_grad()
    def step(self, scale: float) -> float:
        """Apply and clear the gradients; `scale` multiplies all rates. Returns the norm of the matrices' gradient.

        A clipped gradient weighs no more in the momentum than others, so one bad batch does not turn it.
        """
        nn.utils.clip_grad_norm_(self._rest, CLIP)
        for group in self._adamw.param_groups:
            group["lr"] = ADAM_RATE * scale
        self._adamw.step()
        self._adamw.zero_grad()
        norm = float(nn.utils.clip_grad_norm_([weight for group in self._groups for weight in group], CLIP))
        for weights, momentum, rate in zip(self._groups, self._momenta, self._rates, strict=True):
            gradient = torch.stack([weight.grad for weight in weights if weight.grad is not None])
            momentum.mul_(MUON_MOMENTUM).add_(gradient)
            update = orthogonalise(gradient + MUON_MOMENTUM * momentum)
            torch._foreach_mul_(weights, 1 - MUON_DECAY * scale)
            torch._foreach_add_(weights, list((update * (-rate * scale)).unbind()))
            for weight in weights:
                weight.grad = None
        return norm

    def state(self) -> dict[str, Any]:
        """What `restore` takes."""
        return {"momenta": self._momenta, "adamw": self._adamw.state_dict()}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where another optimiser of the same network stood."""
        for mine, saved in zip(self._momenta, state["momenta"], strict=True):
            mine.copy_(saved)
        self._adamw.load_state_dict(state["adamw"])

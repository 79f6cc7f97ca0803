"""The vision tower and the projector in plain PyTorch, with the inputs of `contract.vision_inputs` but the spans.

One image at a time, so that nothing has to be hidden and torch's fused attention holds no scores.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ....engine_folder import VISION_TENSORS_FILE
from ....engine_info import EngineInfo
from ....vision import CHANNELS, NORM_EPS, VisionConfig
from ...images.image import Image
from .weights import WeightsFile

if TYPE_CHECKING:
    from torch import Tensor


@dataclasses.dataclass(frozen=True)
class _Layer:
    """One layer's weights; projections that share their input are stacked."""

    attention_norm: Tensor  # (E,)
    qkv: Tensor  # (3 E, E)
    o: Tensor  # (E, E)
    ffn_norm: Tensor  # (E,)
    gate_up: Tensor  # (2 F, E)
    down: Tensor  # (E, F)


class TorchVision:
    """Tower and projector on a device. Raises EngineError where the weights file is not what `info` says."""

    def __init__(self, folder: Path, info: EngineInfo, device: str) -> None:
        import torch

        vision = info.model.vision
        assert vision is not None
        self._vision: VisionConfig = vision
        self._device = device
        self._eps = info.model.rms_norm_eps
        build = dataclasses.replace(info.build, quantization=None)
        weights = WeightsFile(folder / VISION_TENSORS_FILE, device, build, kernels=False)
        size = vision.hidden_size
        inner = vision.intermediate_size
        hidden = info.model.hidden_size
        self._dtype = weights.dtype
        shape = (size, CHANNELS, vision.patch_size, vision.patch_size)
        self._patch = weights.take("patch_conv", *shape).reshape(size, -1)
        self._ln_pre = weights.take("ln_pre", size)
        self._layers = [_layer(weights, f"layers.{n}", size, inner) for n in range(vision.num_layers)]
        self._norm = weights.take("projector.norm", size)
        self._merger = weights.take("projector.patch_merger.merging_layer", size, size * vision.merge**2)
        self._linear_1 = weights.take("projector.linear_1", hidden, size)
        self._linear_2 = weights.take("projector.linear_2", hidden, hidden)
        self._turns = torch.from_numpy(vision.inv_freq()).to(device)  # (2, D/2) f32

    def see(self, image: Image) -> np.ndarray:
        """The embeddings of an image's tokens, (rows * columns, E) f32."""
        import torch
        from torch.nn import functional

        vision = self._vision
        size, merge = vision.hidden_size, vision.merge
        with torch.inference_mode():
            patches = torch.from_numpy(image.patches).to(self._device, self._dtype)
            x = self._normed(functional.linear(patches, self._patch), self._ln_pre, NORM_EPS)  # (N, E)
            # Not a product, which a GPU may round to fewer bits: each angle is a row's or a column's alone.
            at = torch.from_numpy(image.positions).to(self._device).float()
            angle = at[:, :1] * self._turns[0] + at[:, 1:] * self._turns[1]
            cos, sin = angle.cos().to(self._dtype), angle.sin().to(self._dtype)  # (N, D/2)
            for layer in self._layers:
                x = x + self._attend(self._normed(x, layer.attention_norm, NORM_EPS), layer, cos, sin)
                both = functional.linear(self._normed(x, layer.ffn_norm, NORM_EPS), layer.gate_up)
                gate, up = both.chunk(2, dim=-1)
                act = functional.gelu(gate) if vision.hidden_act == "gelu" else functional.silu(gate)
                x = x + functional.linear(act * up, layer.down)
            x = self._normed(x, self._norm, self._eps)
            x = x.view(-1, merge * merge, size).transpose(1, 2).reshape(-1, size * merge * merge)
            x = functional.linear(functional.linear(x, self._merger), self._linear_1)
            return np.asarray(functional.linear(functional.gelu(x), self._linear_2).float().cpu().numpy())

    def _attend(self, x: Tensor, layer: _Layer, cos: Tensor, sin: Tensor) -> Tensor:
        """Attention over all patches, (N, E)."""
        import torch
        from torch.nn import functional

        vision = self._vision
        heads = functional.linear(x, layer.qkv).view(len(x), 3, vision.num_heads, vision.head_dim)
        q, k, v = heads.permute(1, 2, 0, 3)  # (H, N, D)

        def rotated(part: Tensor) -> Tensor:
            a, b = part.chunk(2, dim=-1)
            return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

        mixed = functional.scaled_dot_product_attention(rotated(q)[None], rotated(k)[None], v[None])[0]
        return functional.linear(mixed.transpose(0, 1).reshape(len(x), -1), layer.o)

    def _normed(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        from torch.nn import functional

        return functional.rms_norm(x, weight.shape, weight, eps)


def _layer(weights: WeightsFile, at: str, size: int, inner: int) -> _Layer:
    import torch

    qkv = [weights.take(f"{at}.attention.{part}_proj", size, size) for part in "qkv"]
    gate_up = [weights.take(f"{at}.feed_forward.{part}_proj", inner, size) for part in ("gate", "up")]
    return _Layer(
        weights.take(f"{at}.attention_norm", size),
        torch.cat(qkv),
        weights.take(f"{at}.attention.o_proj", size, size),
        weights.take(f"{at}.ffn_norm", size),
        torch.cat(gate_up),
        weights.take(f"{at}.feed_forward.down_proj", size, inner),
    )

"""The oracle's model in plain numpy, written from docs/semantics.md and the checkpoint's layout, not from the product.

There is no KV cache: every pass recomputes prefix and pass together under one explicit mask, so a cache bug of the
engine cannot be repeated here. Equal passes are remembered, nothing else is.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  # registers the name bfloat16 with numpy, without which safetensors cannot read the file
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Tensors = Mapping[str, NDArray[Any]]

MEMO_LIMIT = 20_000  # passes; about 1 KB each


def yarn_inv_freq(rope_parameters: Mapping[str, Any], head_dim: int) -> Floats:
    """Inverse frequencies (head_dim / 2,) of the rotary pairs, before the attention factor."""
    rope = rope_parameters
    theta = float(rope["rope_theta"])
    exponent = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    fast = theta**-exponent
    if rope["rope_type"] == "default":
        return fast.astype(np.float32)
    if rope["rope_type"] != "yarn":
        raise ValueError(f"rope_type {rope['rope_type']!r}, known are 'yarn' and 'default'")

    def correction(turns: float) -> float:
        original = float(rope["original_max_position_embeddings"])
        return head_dim * math.log(original / (2 * math.pi * turns)) / (2 * math.log(theta))

    low = max(math.floor(correction(float(rope.get("beta_fast", 32.0)))), 0)
    high = min(math.ceil(correction(float(rope.get("beta_slow", 1.0)))), head_dim - 1)
    pairs = np.arange(head_dim // 2)
    # The 0.001 keeps a range of no width from dividing by zero; it makes the ramp a step.
    ramp = np.clip((pairs - low) / max(high - low, 0.001), 0.0, 1.0)
    return np.asarray((1 - ramp) * fast + ramp * fast / float(rope["factor"]), np.float32)


def yarn_attention_factor(rope_parameters: Mapping[str, Any]) -> float:
    """The factor on cos and sin: 1.0 for every released model, because mscale equals mscale_all_dim."""
    if rope_parameters["rope_type"] != "yarn":
        return 1.0
    factor = float(rope_parameters["factor"])

    def scale(m: float) -> float:
        return 0.1 * m * math.log(factor) + 1.0 if factor > 1 else 1.0

    m, m_all = rope_parameters.get("mscale"), rope_parameters.get("mscale_all_dim")
    return scale(m) / scale(m_all) if m and m_all else scale(1.0)


def llama4_scale(pos: Sequence[int] | Ints, rope_parameters: Mapping[str, Any]) -> Floats:
    """Factor (S,) on the rotated queries, never on the keys, by absolute position."""
    at = np.asarray(pos, dtype=np.int64)
    beta = rope_parameters.get("llama_4_scaling_beta")
    if not beta:
        return np.ones(at.shape, np.float32)
    turns = at // int(rope_parameters["original_max_position_embeddings"])
    return np.asarray(1 + beta * np.log1p(turns.astype(np.float64)), np.float32)


def visibility(prefix: int, length: int, bidirectional: bool) -> NDArray[np.bool_]:
    """Which key each query sees: (P + S, P + S) bool. Queries of the prefix are causal whatever the pass is."""
    total = prefix + length
    mask = np.tril(np.ones((total, total), bool))
    if bidirectional:
        mask[prefix:] = True
    return mask


class _Layer(NamedTuple):
    """Weights of one layer, f32; the matrices are stored (in, out) so that a row of activations goes on the left."""

    norm_in: Floats  # (E,)
    qkv: Floats  # (E, (H + 2G) D)
    out: Floats  # (H D, E)
    lora: tuple[Floats, Floats] | None  # (H D, r), (r, E) with the scale in it
    norm_post: Floats  # (E,)
    gate_up: Floats  # (E, 2F)
    down: Floats  # (F, E)


class ReferenceModel:
    """One checkpoint in f32. `eos` and `mask_id` come from the files; the loops take `eos` as an argument."""

    def __init__(
        self,
        config: Mapping[str, Any],
        tensors: Tensors,
        adapter: Tensors | None = None,
        adapter_scale: float = 1.0,
        eos: Iterable[int] | None = None,
    ) -> None:
        self.mask_id = int(config["mask_token_id"])
        self.eos = frozenset(_ids(config.get("eos_token_id")) if eos is None else eos)
        self.heads = int(config["num_attention_heads"])
        self.groups = int(config["num_key_value_heads"])
        self.head_dim = int(config["head_dim"])
        self.eps = np.float32(config["rms_norm_eps"])
        self.rope: Mapping[str, Any] = config["rope_parameters"]
        self.has_adapter = adapter is not None
        self._inv_freq = yarn_inv_freq(self.rope, self.head_dim)
        self._embed = np.asarray(tensors["encoder.embed_tokens.weight"], np.float32)  # (V, E)
        self._norm = np.asarray(tensors["encoder.norm.weight"], np.float32)
        tied = bool(config.get("tie_word_embeddings"))
        self._head = _matrix(tensors["encoder.embed_tokens.weight" if tied else "diffusion_head.weight"])  # (E, V)
        self._layers = [_layer(n, tensors, adapter, adapter_scale) for n in range(int(config["num_hidden_layers"]))]
        self.image_pad = 19
        self.images: Floats | None = None  # what stands in the place of the pads' embeddings, in order
        self._memo: dict[tuple[object, ...], tuple[Ints, Floats]] = {}

    @classmethod
    def load(cls, folder: str | Path) -> "ReferenceModel":
        """Read a checkpoint folder; `linear_spec_lora/` is used if it is there and never taken for base weights."""
        root = Path(folder)
        config = json.loads((root / "config.json").read_text("utf-8"))
        tensors: dict[str, NDArray[Any]] = {}
        for file in sorted(root.glob("*.safetensors")):
            tensors.update(load_file(file))
        eos = _ids(config.get("eos_token_id"))
        if (root / "generation_config.json").exists():
            generation = json.loads((root / "generation_config.json").read_text("utf-8"))
            eos = [*_ids(generation.get("eos_token_id")), *eos]
        lora = root / "linear_spec_lora"
        if not lora.is_dir():
            return cls(config, tensors, eos=eos)
        settings = json.loads((lora / "adapter_config.json").read_text("utf-8"))
        adapter = load_file(lora / "adapter_model.safetensors")
        return cls(config, tensors, adapter, settings["lora_alpha"] / settings["r"], eos)

    def clear(self) -> None:
        """Forget the remembered passes."""
        self._memo.clear()

    def forward(
        self, prefix_ids: Sequence[int], pass_ids: Sequence[int], bidirectional: bool, adapter: bool = False
    ) -> tuple[Ints, Floats]:
        """Best token (S,) and its probability (S,) f32 at the positions of the pass, the mask id left out of both."""
        key = (tuple(prefix_ids), tuple(pass_ids), bidirectional, adapter and self.has_adapter)
        if key not in self._memo:
            if len(self._memo) >= MEMO_LIMIT:
                self.clear()
            logits = self.logits(prefix_ids, pass_ids, bidirectional, adapter)
            logits[:, self.mask_id] = -np.inf
            token = logits.argmax(axis=1)  # the first of equals, which is the smallest id
            # The best entry is exp(0) = 1 once the maximum is taken off, so its probability is 1 / sum.
            confidence = 1 / np.exp(logits - logits.max(axis=1, keepdims=True)).sum(axis=1)
            token.flags.writeable = confidence.flags.writeable = False
            self._memo[key] = token, confidence
        return self._memo[key]

    def logits(
        self, prefix_ids: Sequence[int], pass_ids: Sequence[int], bidirectional: bool, adapter: bool = False
    ) -> Floats:
        """Raw logits (S, V) f32 at the positions of the pass, the mask id still in."""
        p, s = len(prefix_ids), len(pass_ids)
        pos = np.arange(p + s)
        angle = pos[:, None].astype(np.float32) * self._inv_freq  # (P + S, D / 2)
        factor = np.float32(yarn_attention_factor(self.rope))
        cos, sin = np.cos(angle) * factor, np.sin(angle) * factor
        query_scale = llama4_scale(pos, self.rope) / np.float32(math.sqrt(self.head_dim))
        bias = np.where(visibility(p, s, bidirectional), np.float32(0), np.float32(-np.inf))

        ids = np.array([*prefix_ids, *pass_ids], dtype=np.int64)
        x = self._embed[ids]  # (P + S, E)
        if self.images is not None:  # a prompt's images are whole, so every pass of it has all of them
            x[ids == self.image_pad] = self.images
        for layer in self._layers:
            mixed = self._attention(_rms_norm(x, layer.norm_in, self.eps) @ layer.qkv, cos, sin, query_scale, bias)
            x = x + mixed @ layer.out
            if adapter and layer.lora is not None:
                # A draft's adapter acts on the pass only; the prefix goes through the plain o_proj.
                x[p:] += mixed[p:] @ layer.lora[0] @ layer.lora[1]
            gate, up = np.split(_rms_norm(x, layer.norm_post, self.eps) @ layer.gate_up, 2, axis=1)
            x = x + (_silu(gate) * up) @ layer.down
        return _rms_norm(x[p:], self._norm, self.eps) @ self._head

    def _attention(self, qkv: Floats, cos: Floats, sin: Floats, query_scale: Floats, bias: Floats) -> Floats:
        """Scaled dot-product attention: (N, (H + 2G) D) to (N, H D); query heads j H/G ... share K/V head j."""
        n = len(qkv)
        h = self.heads
        g = self.groups
        d = self.head_dim
        heads = qkv.reshape(n, h + 2 * g, d).transpose(1, 0, 2)  # (H + 2G, N, D)
        q = _rotate(heads[:h], cos, sin) * query_scale[:, None]
        k = _rotate(heads[h : h + g], cos, sin)
        v = heads[h + g :]
        scores = q.reshape(g, h // g, n, d) @ k[:, None].swapaxes(-1, -2) + bias  # (G, H / G, N, N)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        mixed: Floats = weights @ v[:, None]  # (G, H / G, N, D)
        return mixed.reshape(h, n, d).transpose(1, 0, 2).reshape(n, h * d)


def _ids(value: int | list[int] | None) -> list[int]:
    return [value] if isinstance(value, int) else list(value or [])


def _matrix(*weights: NDArray[Any]) -> Floats:
    """Checkpoint matrices (out, in), stacked by their outputs, as one contiguous f32 (in, out)."""
    return np.ascontiguousarray(np.concatenate([np.asarray(w, np.float32) for w in weights]).T)


def _layer(n: int, tensors: Tensors, adapter: Tensors | None, adapter_scale: float) -> _Layer:
    def vector(name: str) -> Floats:
        return np.asarray(tensors[f"encoder.layers.{n}.{name}.weight"], np.float32)

    def matrix(*names: str) -> Floats:
        return _matrix(*(tensors[f"encoder.layers.{n}.{name}.weight"] for name in names))

    lora = None
    if adapter is not None:
        prefix = f"base_model.model.encoder.layers.{n}.self_attn.o_proj"
        down, up = (_matrix(adapter[f"{prefix}.lora_{part}.weight"]) for part in "AB")
        lora = down, up * np.float32(adapter_scale)
    return _Layer(
        norm_in=vector("input_layernorm"),
        qkv=matrix("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        out=matrix("self_attn.o_proj"),
        lora=lora,
        norm_post=vector("post_attention_layernorm"),
        gate_up=matrix("mlp.gate_proj", "mlp.up_proj"),
        down=matrix("mlp.down_proj"),
    )


def _rms_norm(x: Floats, weight: Floats, eps: np.float32) -> Floats:
    inverse: Floats = 1 / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + eps)
    return x * inverse * weight


def _silu(x: Floats) -> Floats:
    # exp(80) still fits f32; below -80 the result is 0 to every digit anyway.
    grown: Floats = np.exp(-np.maximum(x, np.float32(-80)))
    return x / (1 + grown)


def _rotate(x: Floats, cos: Floats, sin: Floats) -> Floats:
    """Half-split rotation: pair i is (i, i + D/2). (heads, N, D) with cos, sin (N, D / 2)."""
    a, b = np.split(x, 2, axis=-1)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

"""The decoder in plain numpy, written from the checkpoint's own files: it shares no code with builder and runtime.

It knows no cache: every token of a `Script` is computed under an explicit mask. All scripts go through a layer together
and a layer's weights are read when it is their turn, so memory is that of one layer and of the tokens.

Everything is computed twice: more precisely than the engine does, and with every result rounded as the engine rounds
it. How far the two lie apart is what rounding does to this model on these tokens, from which bounds follow.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from .arithmetic import Arithmetic, Part
from .positions import attention_factor, inverse_frequencies, query_scale, rope_parameters
from .script import Script
from .weights import Weights

_HEAD_TOKENS = 16  # of a script, whose logits exist at once


@dataclasses.dataclass
class Answer:
    """What is right for each token of a script; the mask id is no candidate."""

    token: np.ndarray  # (T,) i64
    best: np.ndarray  # (T,) the logit of `token`
    total: np.ndarray  # (T,) logarithm of the sum of all candidates' exponentials
    logits: np.ndarray  # (T, C) of the wanted ids
    ids: np.ndarray  # (C,) i64, which those are
    noise: np.ndarray  # (T,) f64, what rounding does to a logit, root mean square
    states: dict[str, np.ndarray]  # by the names of the graph's tensors, (T, width)
    state_noise: dict[str, float]  # what rounding does to them, mean of absolute differences

    def logit(self, place: int, token: int) -> float:
        """One of the wanted logits."""
        return float(self.logits[place, np.searchsorted(self.ids, token)])


class _Tokens:
    """The tokens of a script in one row, and which of them each sees."""

    def __init__(self, script: Script) -> None:
        text = script.tokens.size
        self.ids = np.concatenate([script.tokens, *(block.ids for block in script.blocks)]).astype(np.int64)
        positions = np.arange(script.offset, script.offset + text)
        self.pos = np.concatenate([positions, *(block.pos for block in script.blocks)]).astype(np.int64)
        self.gate = np.concatenate([np.zeros(text, np.float32), *(block.gate for block in script.blocks)])
        self.parts = [(slice(0, text), np.arange(text), np.tri(text, dtype=bool))]
        for at, block in zip(script.starts(), script.blocks, strict=True):
            size = block.ids.size
            keys = np.concatenate([np.arange(block.prefix), np.arange(at, at + size)])
            mask = np.concatenate([np.ones((size, block.prefix), bool), block.seen], axis=1)
            self.parts.append((slice(at, at + size), keys, mask))


class _Pass:
    """One script in one arithmetic on its way through the layers."""

    def __init__(self, config: Mapping[str, Any], tokens: _Tokens, arithmetic: Arithmetic, embed: np.ndarray) -> None:
        self._heads = int(config["num_attention_heads"])
        self._groups = int(config["num_key_value_heads"])
        self._width = int(config["head_dim"])
        self._eps = float(config["rms_norm_eps"])
        self._tokens = tokens
        self._round = arithmetic.round
        self.arithmetic = arithmetic
        self.states: dict[str, np.ndarray] | None = {}
        rope = rope_parameters(config)
        # The released code takes angles in f32, and far positions show it.
        angle = tokens.pos.astype(np.float32)[:, None] * inverse_frequencies(rope, self._width)
        factor = attention_factor(rope)
        self._cos, self._sin = (
            self._round((f(angle.astype(arithmetic.compute)) * factor).astype(arithmetic.compute))
            for f in (np.cos, np.sin)
        )
        scale = query_scale(tokens.pos, rope)
        self._scale = None if scale is None else self._round(scale.astype(arithmetic.compute))[:, None, None]
        self.x = self._note("embed_tokens", arithmetic.weight(embed[tokens.ids]))

    def layer(self, number: int, w: Mapping[str, np.ndarray]) -> None:
        """Go through a layer; `w` holds its weights by their part of the name, in this arithmetic."""
        at = f"layers.{number}"
        attention = f"{at}.self_attn"
        x = self._norm(f"{at}.input_layernorm", w["input_layernorm"])
        heads = {}
        for part in "qkv":
            flat = self._times(f"{attention}.{part}_proj", x, w[f"self_attn.{part}_proj"])
            heads[part] = flat.reshape(len(flat), -1, self._width)
        q = self._rotate(heads["q"])
        if self._scale is not None:
            q = self._round(q * self._scale)
        self._note(f"{attention}.q_rope", q)
        k = self._note(f"{attention}.k_rope", self._rotate(heads["k"]))
        k = self._note(f"k_cache_{number}", self.arithmetic.cached(k))
        v = self._note(f"v_cache_{number}", self.arithmetic.cached(heads["v"]))
        mixed = self._note(attention, self._round(self._attend(q, k, v)))
        out = self._times(f"{attention}.o_proj", mixed, w["self_attn.o_proj"])
        if "lora_A" in w:
            low = self._round(mixed @ w["lora_A"].T) * self._tokens.gate[:, None].astype(self.arithmetic.compute)
            out = self._note(f"{attention}.o_proj.lora.sum", self._round(out + self._round(low @ w["lora_B"].T)))
        self.x = self._note(f"{attention}.residual", self._round(self.x + out))
        x = self._norm(f"{at}.post_attention_layernorm", w["post_attention_layernorm"])
        gate = self._times(f"{at}.mlp.gate_proj", x, w["mlp.gate_proj"])
        up = self._times(f"{at}.mlp.up_proj", x, w["mlp.up_proj"])
        silu = self._note(f"{at}.mlp.silu", self._round(gate / (1 + np.exp(np.minimum(-gate, 80)))))
        inner = self._note(f"{at}.mlp.gated", self._round(silu * up))
        down = self._times(f"{at}.mlp.down_proj", inner, w["mlp.down_proj"])
        self.x = self._note(f"{at}.mlp.residual", self._round(self.x + down))

    def logits(self, norm: np.ndarray, head: np.ndarray, places: slice) -> np.ndarray:
        """(n, V) of some tokens."""
        x = self.x[places]
        normed = self._round(_normed(x, self._eps) * norm)
        return self._round(self.arithmetic.inputs(normed, "head") @ head.T)

    def _note(self, name: str, value: np.ndarray) -> np.ndarray:
        if self.states is not None:
            self.states[name] = value.reshape(len(value), -1).astype(np.float32)
        return value

    def _norm(self, name: str, weight: np.ndarray) -> np.ndarray:
        return self._note(name, self._round(_normed(self.x, self._eps) * weight))

    def _times(self, name: str, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return self._note(name, self._round(self.arithmetic.inputs(x, _part(name)) @ weight.T))

    def _rotate(self, x: np.ndarray) -> np.ndarray:
        """The first half of a head is turned against the second; (T, heads, D)."""
        a, b = np.split(x, 2, axis=-1)
        cos, sin = self._cos[:, None], self._sin[:, None]
        return self._round(np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1))

    def _attend(self, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        """(T, H, D), (T, G, D), (T, G, D) -> (T, H D)."""
        grouped = q.reshape(len(q), self._groups, -1, self._width).transpose(1, 2, 0, 3)  # (G, H / G, T, D)
        mixed = np.empty_like(grouped)
        keys_of, values_of = k.transpose(1, 2, 0), v.transpose(1, 0, 2)  # (G, D, T), (G, T, D)
        for queries, keys, mask in self._tokens.parts:
            scores = grouped[:, :, queries] @ keys_of[:, None, :, keys] / math.sqrt(self._width)
            scores = np.where(mask, scores, -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            mixed[:, :, queries] = weights / weights.sum(-1, keepdims=True) @ values_of[:, None, keys]
        return mixed.transpose(2, 0, 1, 3).reshape(len(q), -1)


class Network:
    """A checkpoint that answers scripts.

    Args:
        weights: the checkpoint's tensors.
        judged: how the engine that is judged computes; the reference is f64 for f32, and f32 for 16 bits or fewer.
        threads: scripts computed at once, in either arithmetic; None has one per core.
    """

    def __init__(self, weights: Weights, judged: Arithmetic, threads: int | None = None) -> None:
        self._weights = weights
        self.precision = "f64" if judged.stored is np.float32 and judged.quantization is None else "f32"
        exact = Arithmetic(np.float64 if self.precision == "f64" else np.float32)
        self._arithmetics = (exact, dataclasses.replace(judged, kept=weights.kept(judged.quantization)))
        self._threads = threads or os.cpu_count() or 1

    def answer(self, scripts: Sequence[Script], columns: np.ndarray, *, states: bool = False) -> list[Answer]:
        """What is right, for each script; `columns` are ids whose logits are wanted of every token.

        states: keep every layer's intermediate values too.
        """
        config = self._weights.config
        tokens = [_Tokens(script) for script in scripts]
        embed = self._weights.read("encoder.embed_tokens.weight")
        passes = [[_Pass(config, one, arithmetic, embed) for arithmetic in self._arithmetics] for one in tokens]
        del embed
        every = list(itertools.chain.from_iterable(passes))
        if not states:
            for pass_ in every:
                pass_.states = None
        with ThreadPoolExecutor(self._threads) as pool:
            for number in range(int(config["num_hidden_layers"])):
                layer = self._weights.layer(number)
                weights = [
                    {name: arithmetic.weight(value, _part(name)) for name, value in layer.items()}
                    for arithmetic in self._arithmetics
                ]
                list(pool.map(_Pass.layer, every, itertools.repeat(number), itertools.cycle(weights)))
            mask = int(config["mask_token_id"])
            norm = self._weights.read("encoder.norm.weight")
            head = self._weights.read("diffusion_head.weight")
            prepared = [(a.weight(norm), a.weight(head, "head")) for a in self._arithmetics]
            ids = [np.union1d(columns, sorted(script.wanted)).astype(np.int64) for script in scripts]
            return list(pool.map(_answered, passes, ids, itertools.repeat(prepared), itertools.repeat(mask)))


def _answered(
    passes: list[_Pass], ids: np.ndarray, prepared: Sequence[tuple[np.ndarray, np.ndarray]], mask: int
) -> Answer:
    """What is right for a script after all layers; `prepared` holds norm and head of each arithmetic."""
    pieces = []
    for at in range(0, len(passes[0].x), _HEAD_TOKENS):
        places = slice(at, at + _HEAD_TOKENS)
        exact, rounded = (pass_.logits(*weights, places) for pass_, weights in zip(passes, prepared, strict=True))
        noise = np.sqrt(np.square(rounded.astype(np.float64) - exact).mean(-1))
        wanted = exact[:, ids].copy()
        exact[:, mask] = -np.inf
        best = exact.max(-1)
        total = best + np.log(np.exp(exact - best[:, None]).sum(-1))
        pieces.append(Answer(exact.argmax(-1), best, total, wanted, ids, noise, {}, {}))
    return _joined(passes, pieces)


def _joined(passes: list[_Pass], pieces: list[Answer]) -> Answer:
    exact, rounded = passes
    joined = {
        name: np.concatenate([getattr(piece, name) for piece in pieces])
        for name in ("token", "best", "total", "logits", "noise")
    }
    states = exact.states or {}
    theirs = rounded.states or {}
    noise = {name: float(np.abs(value - theirs[name]).mean()) for name, value in states.items()}
    return Answer(**joined, ids=pieces[0].ids, states=states, state_noise=noise)


def _part(name: str) -> Part:
    """What a weight or a product of a layer is part of, by its name."""
    if not name.endswith("proj"):
        return "other"
    return "mlp" if "mlp." in name else "projection"


def _normed(x: np.ndarray, eps: float) -> np.ndarray:
    """x over its root mean square."""
    normed: np.ndarray = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + x.dtype.type(eps))
    return normed

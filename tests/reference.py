"""The oracle: model and decoding loops in plain numpy, written from docs/semantics.md without sight of the product.

In: a checkpoint folder, or a config dict with its tensors. Out: per pass the best token and its confidence, per request
the tokens, the finish reason and the counts.
There is no KV cache: every pass recomputes prefix and pass together under one explicit mask, so a cache bug of the
engine cannot be repeated here. Equal passes are remembered, nothing else is.
Surprising: the adapter of a draft acts on the rows of the pass only, so inside one forward the rows of the prefix go
through a different o_proj than the rows after them.
"""

import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import ml_dtypes  # noqa: F401  # registers the name bfloat16 with numpy, without which safetensors cannot read the file
import numpy as np
from numpy.typing import NDArray
from reference_choice import Control, Law, choose, commits
from safetensors.numpy import load_file

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Tensors = Mapping[str, NDArray[Any]]

KINDS = ("prefill", "decode", "denoise", "draft", "verify", "commit")
MEMO_LIMIT = 20_000  # passes; about 1 KB each


class Predictor(Protocol):
    """What the loops need of a model; see `ReferenceModel.forward`."""

    mask_id: int

    def forward(
        self, prefix_ids: Sequence[int], pass_ids: Sequence[int], bidirectional: bool, adapter: bool = False
    ) -> tuple[Ints, Floats]: ...

    def logits(
        self, prefix_ids: Sequence[int], pass_ids: Sequence[int], bidirectional: bool, adapter: bool = False
    ) -> Floats: ...


@dataclass(frozen=True)
class Reference:
    """What one request must give. `nfe` has every kind of pass, also those that never ran."""

    tokens: list[int]
    finish_reason: str
    nfe: dict[str, int]
    acceptance: list[int]


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
    """Which key each query sees: (P + S, P + S) bool. Rows of the prefix are causal whatever the pass is."""
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
    """One checkpoint in f32. `eos` and `mask_id` are what the files say; the loops take `eos` as an argument."""

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
            eos = _ids(generation.get("eos_token_id")) or eos
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

        x = self._embed[np.array([*prefix_ids, *pass_ids], dtype=np.int64)]  # (P + S, E)
        for layer in self._layers:
            mixed = self._attention(_rms_norm(x, layer.norm_in, self.eps) @ layer.qkv, cos, sin, query_scale, bias)
            x = x + mixed @ layer.out
            if adapter and layer.lora is not None:
                x[p:] += mixed[p:] @ layer.lora[0] @ layer.lora[1]
            gate, up = np.split(_rms_norm(x, layer.norm_post, self.eps) @ layer.gate_up, 2, axis=1)
            x = x + (_silu(gate) * up) @ layer.down
        return _rms_norm(x[p:], self._norm, self.eps) @ self._head

    def _attention(self, qkv: Floats, cos: Floats, sin: Floats, query_scale: Floats, bias: Floats) -> Floats:
        """Scaled dot-product attention: (N, (H + 2G) D) to (N, H D); query heads j H/G ... share K/V head j."""
        n, h, g, d = len(qkv), self.heads, self.groups, self.head_dim
        heads = qkv.reshape(n, h + 2 * g, d).transpose(1, 0, 2)  # (H + 2G, N, D)
        q = _rotate(heads[:h], cos, sin) * query_scale[:, None]
        k = _rotate(heads[h : h + g], cos, sin)
        v = heads[h + g :]
        scores = q.reshape(g, h // g, n, d) @ k[:, None].swapaxes(-1, -2) + bias  # (G, H / G, N, N)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        mixed: Floats = weights @ v[:, None]  # (G, H / G, N, D)
        return mixed.reshape(h, n, d).transpose(1, 0, 2).reshape(n, h * d)


def ar(
    model: Predictor, prompt: Sequence[int], max_new_tokens: int, eos: Collection[int], law: Law | None = None
) -> Reference:
    """Autoregressive decoding, greedy without a law."""
    out = _Emission(max_new_tokens, eos)
    out.emit(out.prefill(model, prompt, law))
    while not out.stopped:
        token, _ = predict(model, law, [*prompt, *out.tokens[:-1]], out.tokens[-1:], bidirectional=False)
        out.nfe["decode"] += 1
        out.emit(int(token[0]))
    return out.result()


def diffusion(
    model: Predictor,
    prompt: Sequence[int],
    max_new_tokens: int,
    block_length: int,
    threshold: float,
    eos: Collection[int],
    law: Law | None = None,
    control: Control | None = None,
) -> Reference:
    """Block diffusion: every block starts with the causal seed and is committed causally when it is full."""
    out = _Emission(max_new_tokens, eos)
    committed, mask, size = list(prompt), model.mask_id, block_length
    seed, early = out.prefill(model, prompt, law), False
    while not out.stopped:
        block, passes = _with_end(law, [seed] + [mask] * (size - 1), committed[len(prompt) :]), 0
        end = law.end_think if law else -1
        held = next((i for i in range(1, size) if block[i] == end), size)
        emitted = out.emit_decided(block, 0, mask)
        while not out.stopped and mask in block:
            if early:  # what the commit pass said of masks, the seed's place masked too
                said = _masks_behind(model, law, committed, block)
            else:
                said = _denoise(model, law, control, committed, block)
                out.nfe["denoise"] += 1
            early = False
            if control is None:
                block = commit_rule(mask, block, threshold, eos, *said[:2])
            else:
                places = [i for i, t in enumerate(block) if t == mask]
                for n in commits(control, threshold, said[1][places], said[2][places], passes):
                    block[places[n]] = int(said[0][places[n]])
                block = _closed(block, mask, eos)
            passes += 1
            if held < size and end in block[:held]:
                block[held], held = mask, size
            emitted = out.emit_decided(block, emitted, mask)
        if not out.stopped:
            token, _ = predict(model, law, committed, block, bidirectional=False)
            out.nfe["commit"] += 1
            committed += block
            seed, early = int(token[-1]), control is not None and control.merge_commit
    return out.result()


def linear_spec(
    model: Predictor,
    prompt: Sequence[int],
    max_new_tokens: int,
    block_length: int,
    threshold: float,
    eos: Collection[int],
    adapter: bool = False,
    law: Law | None = None,
) -> Reference:
    """Linear self-speculation: a bidirectional draft, then one causal pass that keeps what AR would have said."""
    out = _Emission(max_new_tokens, eos)
    acceptance = []
    out.emit(out.prefill(model, prompt, law))
    while not out.stopped:
        committed = [*prompt, *out.tokens[:-1]]
        length = min(block_length, max_new_tokens - len(out.tokens))
        block = [out.tokens[-1]] + [model.mask_id] * (length - 1)
        block = _with_end(law, block, out.tokens[:-1])
        while model.mask_id in block:
            prediction = predict(model, law, committed, block, bidirectional=True, adapter=adapter)
            block = commit_rule(model.mask_id, block, threshold, eos, *prediction)
            out.nfe["draft"] += 1
        token, _ = predict(model, law, committed, block, bidirectional=False)
        out.nfe["verify"] += 1
        matched = 0
        while matched < length - 1 and token[matched] == block[matched + 1]:
            matched += 1
        before = len(out.tokens)
        for i in range(matched + 1):
            out.emit(int(token[i]))
        acceptance.append(len(out.tokens) - before)
    return out.result(acceptance)


def quadratic_spec(
    model: Predictor,
    prompt: Sequence[int],
    max_new_tokens: int,
    block_length: int,
    eos: Collection[int],
    adapter: bool = False,
    law: Law | None = None,
) -> Reference:
    """Quadratic self-speculation with all groups; each group is computed alone, as a pass after its heads."""
    out = _Emission(max_new_tokens, eos)
    acceptance = []

    def propose(context: Sequence[int], emitted: int, first: int) -> list[int]:
        size = min(block_length, max_new_tokens - len(out.tokens) - emitted)
        if size < 2:
            return []
        token, _ = predict(
            model, law, context, [model.mask_id] * size, bidirectional=True, adapter=adapter, first=first
        )
        tokens = [int(t) for t in token[1:]]
        return tokens[: next((i for i, t in enumerate(tokens) if t in eos), len(tokens))]

    seed = out.prefill(model, prompt, law)
    draft = propose(prompt, 0, seed)
    out.emit(seed)
    while not out.stopped:
        committed = [*prompt, *out.tokens[:-1]]
        heads = [out.tokens[-1], *draft][: max_new_tokens - len(out.tokens)]
        token, _ = predict(model, law, committed, heads, bidirectional=False)
        out.nfe["verify"] += 1
        accepted = 1
        while accepted < len(heads) and token[accepted - 1] == heads[accepted]:
            accepted += 1
        draft = propose([*committed, *heads[:accepted]], accepted, int(token[accepted - 1]))
        before = len(out.tokens)
        for i in range(accepted):
            out.emit(int(token[i]))
        acceptance.append(len(out.tokens) - before)
    return out.result(acceptance)


def ar_margin(model: ReferenceModel, prompt: Sequence[int], tokens: Sequence[int]) -> float:
    """Smallest lead, in logits, of AR's choices over their runners-up along `tokens`.

    Near zero the choice is rounding's, and even this oracle flips between a one-token and a many-token pass.
    """
    logits = model.logits(prompt[:-1], [prompt[-1], *tokens[:-1]], bidirectional=False)
    logits[:, model.mask_id] = -np.inf
    best = np.sort(logits, axis=1)
    return float((best[:, -1] - best[:, -2]).min())


def commit_rule(
    mask_id: int, block: list[int], threshold: float, eos: Collection[int], token: Ints, confidence: Floats
) -> list[int]:
    """The block after one bidirectional pass: commits among the masks, then the EOS rule."""
    masked = [i for i, t in enumerate(block) if t == mask_id]
    best = max(masked, key=lambda i: (confidence[i], -i))
    # Both sides in f32, as an engine compares them: 0.9 in f64 is not the 0.9 a f32 confidence can equal.
    sure = [i for i in masked if confidence[i] >= np.float32(threshold)]
    result = list(block)
    for i in {best, *sure}:
        result[i] = int(token[i])
    return _closed(result, mask_id, eos)


def _closed(block: list[int], mask_id: int, eos: Collection[int]) -> list[int]:
    """The EOS rule."""
    first = next((i for i, t in enumerate(block) if t in eos), len(block))
    return [block[first] if i > first and t == mask_id else t for i, t in enumerate(block)]


def predict(
    model: Predictor,
    law: Law | None,
    prefix: Sequence[int],
    pass_ids: Sequence[int],
    bidirectional: bool,
    adapter: bool = False,
    first: int | None = None,
) -> tuple[Ints, Floats]:
    """Chosen token (S,) and its probability (S,) f32 at the positions of a pass; without a law the best token.

    first: what the first of the pass's masks turns out to be, where that is not the pass's to choose.
    """
    if law is None:
        return model.forward(prefix, pass_ids, bidirectional, adapter)
    logits = model.logits(prefix, pass_ids, bidirectional, adapter)
    return _chosen(logits, law, [*prefix, *pass_ids], len(prefix), model.mask_id, bidirectional, first)


def _chosen(
    logits: Floats, law: Law, ids: list[int], start: int, mask_id: int, bidirectional: bool, first: int | None = None
) -> tuple[Ints, Floats]:
    token = np.zeros(len(logits), np.int64)
    filled = list(ids)
    for row in range(len(logits)):
        at = start + row
        if not bidirectional:
            token[row] = choose(logits[row], law, ids[len(law.prompt) : at + 1], mask_id)
        elif row == 0 and first is not None:
            filled[at] = first
        elif ids[at] == mask_id:
            token[row] = filled[at] = choose(logits[row], law, filled[len(law.prompt) : at], mask_id)
    logits[:, mask_id] = -np.inf
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return token, weights[np.arange(len(token)), token] / weights.sum(axis=1)


Said = tuple[Ints, Floats, NDArray[np.float64]]  # token, confidence and entropy of each position of a block


def _denoise(
    model: Predictor, law: Law | None, control: Control | None, committed: list[int], block: list[int]
) -> Said:
    token, confidence = predict(model, law, committed, block, bidirectional=True)
    if control is None or control.policy != "entropy":
        return token, confidence, np.zeros(len(block))
    return token, confidence, _entropy(model.logits(committed, block, True), model.mask_id)


def _masks_behind(model: Predictor, law: Law | None, committed: list[int], block: list[int]) -> Said:
    """The first pass of a block that the commit of the block before it made: all its places were masks."""
    logits = model.logits(committed, [model.mask_id] * len(block), True)
    entropy = _entropy(logits, model.mask_id)
    if law is not None:
        return (*_chosen(logits, law, [*committed, *block], len(committed), model.mask_id, True), entropy)
    return (*model.forward(committed, [model.mask_id] * len(block), True), entropy)


def _entropy(logits: Floats, mask_id: int) -> NDArray[np.float64]:
    """Nats of each row's distribution, the mask id left out."""
    scores = np.delete(logits.astype(np.float64), mask_id, axis=1)
    chances = np.exp(scores - scores.max(axis=1, keepdims=True))
    chances /= chances.sum(axis=1, keepdims=True)
    entropy: NDArray[np.float64] = -np.where(chances > 0, chances * np.log(np.maximum(chances, 1e-300)), 0).sum(axis=1)
    return entropy


def _with_end(law: Law | None, block: list[int], before: Sequence[int]) -> list[int]:
    """The block, which comes after the emitted tokens `before`, with the end of thinking at its place."""
    if law is None or law.thinking_budget is None or law.end_think in [*before, block[0]]:
        return block
    at = law.thinking_budget - len(before)
    if not 0 < at < len(block):
        return block
    return [*block[:at], law.end_think, *block[at + 1 :]]


class _Emission:
    """Tokens on their way out: stops at the first EOS or at the limit, and takes nothing after that."""

    def __init__(self, limit: int, eos: Collection[int]) -> None:
        if limit < 1:
            raise ValueError(f"max_new_tokens {limit}, at least 1 is needed")
        self.tokens: list[int] = []
        self.nfe = dict.fromkeys(KINDS, 0)
        self._limit = limit
        self._eos = eos

    @property
    def stopped(self) -> bool:
        return bool(self.tokens) and (self.tokens[-1] in self._eos or len(self.tokens) == self._limit)

    def prefill(self, model: Predictor, prompt: Sequence[int], law: Law | None = None) -> int:
        """The seed. The last prompt token stands alone in the pass, since only its prediction is wanted."""
        self.nfe["prefill"] += 1
        return int(predict(model, law, prompt[:-1], prompt[-1:], bidirectional=False)[0][0])

    def emit(self, token: int) -> None:
        if not self.stopped:
            self.tokens.append(token)

    def emit_decided(self, block: list[int], start: int, mask_id: int) -> int:
        """Emit the decided run of the block from `start` on; returns where the run ends."""
        while start < len(block) and block[start] != mask_id:
            self.emit(block[start])
            start += 1
        return start

    def result(self, acceptance: list[int] | None = None) -> Reference:
        reason = "stop" if self.tokens[-1] in self._eos else "length"
        return Reference(self.tokens, reason, self.nfe, acceptance or [])


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

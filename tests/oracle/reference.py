"""The oracle's decoding loops, written from docs/semantics.md without sight of the product.

Every loop keeps whole token lists and no cache, so whether a token is committed, drafted or scratch only depends on the
list that a pass gets. `reference_choice` chooses the tokens.
"""

import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from oracle.reference_choice import Control, SamplingParams, choose, commits
from oracle.reference_model import Floats, Ints, ReferenceModel

KINDS = ("prefill", "decode", "denoise", "draft", "verify", "commit")


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
    """The result that one request must give. `nfe` has every kind of pass, also those that never ran."""

    tokens: list[int]
    finish_reason: str
    nfe: dict[str, int]
    acceptance: list[int]


def ar(
    model: Predictor,
    prompt: Sequence[int],
    max_new_tokens: int,
    eos: Collection[int],
    params: SamplingParams | None = None,
) -> Reference:
    """Autoregressive decoding, greedy without `params`."""
    out = _Emission(max_new_tokens, eos)
    out.emit(out.prefill(model, prompt, params))
    while not out.stopped:
        token, _ = predict(model, params, [*prompt, *out.tokens[:-1]], out.tokens[-1:], bidirectional=False)
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
    params: SamplingParams | None = None,
    control: Control | None = None,
) -> Reference:
    """Block diffusion: every block starts with the causal seed and is committed causally when it is full."""
    out = _Emission(max_new_tokens, eos)
    committed = list(prompt)
    mask = model.mask_id
    size = block_length
    seed, early = out.prefill(model, prompt, params), False
    while not out.stopped:
        block, passes = _with_end(params, [seed] + [mask] * (size - 1), committed[len(prompt) :]), 0
        end = params.end_think if params else -1
        held = next((i for i in range(1, size) if block[i] == end), size)
        emitted = out.emit_decided(block, 0, mask)
        while not out.stopped and mask in block:
            if early:  # predictions of the commit pass for masks, the seed's place masked too
                prediction = _masks_after(model, params, committed, block)
            else:
                prediction = _denoise(model, params, control, committed, block)
                out.nfe["denoise"] += 1
            early = False
            if control is None:
                block = commit_rule(mask, block, threshold, eos, *prediction[:2])
            else:
                places = [i for i, t in enumerate(block) if t == mask]
                for n in commits(control, threshold, prediction[1][places], prediction[2][places], passes):
                    block[places[n]] = int(prediction[0][places[n]])
                block = _closed(block, mask, eos)
            passes += 1
            if held < size and end in block[:held]:
                block[held] = mask
                held = size
            emitted = out.emit_decided(block, emitted, mask)
        if not out.stopped:
            token, _ = predict(model, params, committed, block, bidirectional=False)
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
    params: SamplingParams | None = None,
) -> Reference:
    """Linear self-speculation: a bidirectional draft, then one causal pass that keeps AR's tokens."""
    out = _Emission(max_new_tokens, eos)
    acceptance = []
    out.emit(out.prefill(model, prompt, params))
    while not out.stopped:
        committed = [*prompt, *out.tokens[:-1]]
        length = min(block_length, max_new_tokens - len(out.tokens))
        block = [out.tokens[-1]] + [model.mask_id] * (length - 1)
        block = _with_end(params, block, out.tokens[:-1])
        while model.mask_id in block:
            drafting = _drafting(params)
            prediction = predict(model, drafting, committed, block, bidirectional=True, adapter=adapter)
            block = commit_rule(model.mask_id, block, threshold, eos, *prediction)
            out.nfe["draft"] += 1
        token, _ = predict(model, params, committed, block, bidirectional=False)
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
    params: SamplingParams | None = None,
) -> Reference:
    """Quadratic self-speculation with all groups; each group is computed alone, as a pass after its heads."""
    out = _Emission(max_new_tokens, eos)
    acceptance = []

    def propose(context: Sequence[int], emitted: int, first: int) -> list[int]:
        size = min(block_length, max_new_tokens - len(out.tokens) - emitted)
        if size < 2:
            return []
        token, _ = predict(
            model,
            _drafting(params),
            context,
            [model.mask_id] * size,
            bidirectional=True,
            adapter=adapter,
            first=first,
        )
        tokens = [int(t) for t in token[1:]]
        return tokens[: next((i for i, t in enumerate(tokens) if t in eos), len(tokens))]

    seed = out.prefill(model, prompt, params)
    draft = propose(prompt, 0, seed)
    out.emit(seed)
    while not out.stopped:
        committed = [*prompt, *out.tokens[:-1]]
        heads = [out.tokens[-1], *draft][: max_new_tokens - len(out.tokens)]
        token, _ = predict(model, params, committed, heads, bidirectional=False)
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


def _drafting(params: SamplingParams | None) -> SamplingParams | None:
    """The parameters by which a draft is drawn."""
    return None if params is None else dataclasses.replace(params, temperature=params.temperature * 0.5)


def predict(
    model: Predictor,
    params: SamplingParams | None,
    prefix: Sequence[int],
    pass_ids: Sequence[int],
    bidirectional: bool,
    adapter: bool = False,
    first: int | None = None,
) -> tuple[Ints, Floats]:
    """Chosen token (S,) and its probability (S,) f32 at the positions of a pass; without `params` the best token.

    first: the token of the pass's first mask, where the pass does not choose it.
    """
    if params is None:
        return model.forward(prefix, pass_ids, bidirectional, adapter)
    logits = model.logits(prefix, pass_ids, bidirectional, adapter)
    return _chosen(logits, params, [*prefix, *pass_ids], len(prefix), model.mask_id, bidirectional, first)


def _chosen(
    logits: Floats,
    params: SamplingParams,
    ids: list[int],
    start: int,
    mask_id: int,
    bidirectional: bool,
    first: int | None = None,
) -> tuple[Ints, Floats]:
    token = np.zeros(len(logits), np.int64)
    filled = list(ids)
    for index in range(len(logits)):
        at = start + index
        if not bidirectional:
            token[index] = choose(logits[index], params, ids[len(params.prompt) : at + 1], mask_id)
        elif index == 0 and first is not None:
            filled[at] = first
        elif ids[at] == mask_id:
            token[index] = filled[at] = choose(logits[index], params, filled[len(params.prompt) : at], mask_id)
    logits[:, mask_id] = -np.inf
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return token, weights[np.arange(len(token)), token] / weights.sum(axis=1)


Predicted = tuple[Ints, Floats, NDArray[np.float64]]  # token, confidence and entropy of each position of a block


def _denoise(
    model: Predictor, params: SamplingParams | None, control: Control | None, committed: list[int], block: list[int]
) -> Predicted:
    token, confidence = predict(model, params, committed, block, bidirectional=True)
    if control is None or control.policy != "entropy":
        return token, confidence, np.zeros(len(block))
    return token, confidence, _entropy(model.logits(committed, block, True), model.mask_id)


def _masks_after(model: Predictor, params: SamplingParams | None, committed: list[int], block: list[int]) -> Predicted:
    """The first pass of a block that the commit of the block before it made: all its places were masks."""
    logits = model.logits(committed, [model.mask_id] * len(block), True)
    entropy = _entropy(logits, model.mask_id)
    if params is not None:
        return (*_chosen(logits, params, [*committed, *block], len(committed), model.mask_id, True), entropy)
    return (*model.forward(committed, [model.mask_id] * len(block), True), entropy)


def _entropy(logits: Floats, mask_id: int) -> NDArray[np.float64]:
    """Nats of each position's distribution, the mask id left out."""
    scores = np.delete(logits.astype(np.float64), mask_id, axis=1)
    chances = np.exp(scores - scores.max(axis=1, keepdims=True))
    chances /= chances.sum(axis=1, keepdims=True)
    entropy: NDArray[np.float64] = -np.where(chances > 0, chances * np.log(np.maximum(chances, 1e-300)), 0).sum(axis=1)
    return entropy


def _with_end(params: SamplingParams | None, block: list[int], before: Sequence[int]) -> list[int]:
    """The block, which comes after the emitted tokens `before`, with the end of thinking at its place."""
    if params is None or params.thinking_budget is None or params.end_think in [*before, block[0]]:
        return block
    at = params.thinking_budget - len(before)
    if not 0 < at < len(block):
        return block
    return [*block[:at], params.end_think, *block[at + 1 :]]


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

    def prefill(self, model: Predictor, prompt: Sequence[int], params: SamplingParams | None = None) -> int:
        """The seed. The last prompt token stands alone in the pass, since only its prediction is needed."""
        self.nfe["prefill"] += 1
        return int(predict(model, params, prompt[:-1], prompt[-1:], bidirectional=False)[0][0])

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

"""Chooses what one request says next, from its sampling parameters, what it has emitted, and what must come next."""

from __future__ import annotations

import collections
import dataclasses

import numpy as np

from ..engines.passes import Pass, Prediction
from ..sampling.grammar import Matcher
from ..sampling.noise import Noise
from ..sampling.sampler import BadWords, SamplingParams, draw, penalise
from ..sampling.softmax import chance
from .settings import Settings
from .token_logprobs import TokenLogprobs, measure

_HOTTEST = float(np.finfo(np.float32).max)  # engines hold f32
_DRAFT_SHARE = 0.5  # of the temperature: of 0 to 1 what loses least whatever is asked (docs/log.md, 2026-11-28)


class TokenSelector:
    """Chooses the tokens of one request, by the same rule in every mode.

    A loop chooses and emits, and the emitted token becomes part of the history; a draft walks ahead on the same history
    and back again. A draft that a verify will judge is cooler than the request: a mask's distribution spreads over all
    that may come to stand before it, and the verify's does not, so noise counts for less there.

    Args:
        settings: of the request.
        prompt: its ids.
        mask_id: never chosen.
        stops: ids that end the answer.
        vocab: entries of the vocabulary.
        samples: whether the engine draws tokens by itself.
    """

    def __init__(
        self,
        settings: Settings,
        prompt: list[int],
        mask_id: int,
        stops: frozenset[int],
        vocab: int,
        samples: bool = False,
    ) -> None:
        self._params = self._mask_params = settings.params
        if settings.mode != "diffusion":
            cooler = _DRAFT_SHARE * settings.params.temperature
            self._mask_params = dataclasses.replace(settings.params, temperature=cooler)
        self._start = len(prompt)
        self._mask_id = mask_id
        self._stops = stops
        self._budget = settings.thinking_budget
        self._end_think = settings.end_think
        self._top_logprobs = settings.logprobs
        self._noise = Noise(settings.params.seed, vocab)
        self._prompt = np.unique(np.array(prompt if settings.params.repetition_penalty != 1 else [], np.int64))
        self._biased = np.array([token for token, _ in settings.params.logit_bias], np.int64)
        self._biases = np.array([bias for _, bias in settings.params.logit_bias])
        self._bad_words = BadWords(settings.params.bad_words)
        self._emitted: list[int] = []
        self._penalised = settings.params.penalised
        self._counts: collections.Counter[int] = collections.Counter()
        self._thought = 0  # how many `</think>` have been emitted
        self._matcher: Matcher | None = settings.grammar.matcher() if settings.grammar is not None else None
        self._after_thinking = settings.thinking and self._matcher is not None
        self.logprobs: list[TokenLogprobs] = []
        drawn = samples and settings.params.only_temperature
        # Whether the engine's own token is the choice; if not, a pass must bring its logits.
        self.plain = (settings.params.greedy or drawn) and self._matcher is None and settings.logprobs is None
        # Whether every next token is the engine's own, whatever has been emitted before.
        self.as_predicted = self.plain and self._budget is None
        self.drawn = drawn and self.plain  # by the engine

    def with_sampling(self, pass_: Pass) -> Pass:
        """A pass as an engine that draws must get it: with temperatures and seed."""
        heat, of_masks = (min(params.temperature, _HOTTEST) for params in (self._params, self._mask_params))
        return pass_._replace(temperature=heat, mask_temperature=of_masks, seed=self._params.seed)

    def next(self, prediction: Prediction, index: int) -> int:
        """The token after all that has been emitted, from the causal prediction of that index."""
        if self.plain:
            token: int = prediction.token.item(index)
            forced = None if self.as_predicted else self.forced()
            return token if forced is None else forced
        assert prediction.logits is not None
        logits = prediction.logits[index]
        token = self._choose(logits, self._params)
        if self._top_logprobs is not None:
            self.logprobs += measure(logits[None], [token], self._top_logprobs, self._mask_id)
        return token

    def propose(
        self, prediction: Prediction, tokens: list[int], indices: range, chances: list[float] | None = None
    ) -> list[int]:
        """A block's tokens with a choice for every mask, left to right, each after the tokens before it.

        tokens: what follows the history, masks included; indices: of the prediction for each of them. `chances` gets
        each token's probability among what may stand there, at temperature 1: a verify chooses among the same, so what
        a grammar leaves alone is certain, however unlikely the model holds it.
        """
        chosen = list[int]()
        for token, index in zip(tokens, indices, strict=True):
            if token == self._mask_id:
                assert prediction.logits is not None
                token = self._choose(prediction.logits[index], self._mask_params, chances)
            elif chances is not None:
                chances.append(1.0)
            chosen.append(token)
            self.push([token])
        self.pop(len(chosen))
        return chosen

    def forced(self) -> int | None:
        """The id that must come next whatever the model says, if there is one."""
        if self._budget is None or self._thought or len(self._emitted) < self._budget:
            return None
        return self._end_think

    def with_end_of_thinking(self, tokens: list[int]) -> list[int]:
        """Tokens that are to follow, with the end of thinking where the budget is used up."""
        if self._budget is None or self._thought or self._end_think is None:
            return tokens
        at = max(0, self._budget - len(self._emitted))
        if at < len(tokens) and self._end_think not in tokens[:at]:
            tokens[at] = self._end_think
        return tokens

    def push(self, tokens: list[int]) -> None:
        """Take tokens into the history."""
        self._emitted += tokens
        if self._penalised:
            self._counts.update(tokens)
        if self._matcher is None:
            self._thought += tokens.count(self._end_think)  # type: ignore[arg-type]
            return
        for token in tokens:
            if (matcher := self._guide) is not None:
                matcher.push(token)
            self._thought += token == self._end_think

    def pop(self, count: int) -> None:
        """Take the last tokens out of the history again."""
        for _ in range(count):
            token = self._emitted.pop()
            self._thought -= token == self._end_think
            if self._penalised:
                self._counts[token] -= 1
                if not self._counts[token]:
                    del self._counts[token]
            if (matcher := self._guide) is not None:
                matcher.pop()

    @property
    def _guide(self) -> Matcher | None:
        """What restricts the next token and takes it in: nothing while a structured answer still thinks."""
        return None if self._after_thinking and not self._thought else self._matcher

    def _forbid_end(self, scores: np.ndarray) -> None:
        """Set what would end the answer to -inf, unless a grammar leaves nothing else; scores (V,) f64."""
        stops = list(self._stops)
        ends = scores[stops]
        scores[stops] = -np.inf
        if self._guide is not None and np.isneginf(scores.max()):
            scores[stops] = ends

    def _choose(self, logits: np.ndarray, params: SamplingParams, chances: list[float] | None = None) -> int:
        """The choice after the history, logits (V,) f32; `chances` gets its own."""
        forced = self.forced()
        if forced is not None:
            if chances is not None:
                chances.append(1.0)
            return forced
        scores = logits.astype(np.float64)
        if self._penalised:
            penalise(scores, params, self._prompt, self._counts)
        if params.logit_bias:
            scores[self._biased] += self._biases
        scores[self._mask_id] = -np.inf
        guide = self._guide
        thinking = guide is not self._matcher
        if params.bad_words:
            scores[self._bad_words.banned(self._emitted)] = -np.inf
        if guide is not None:
            guide.restrict(scores)
        if thinking or len(self._emitted) < params.min_tokens:
            self._forbid_end(scores)
        position = self._start + len(self._emitted)
        if chances is None:
            return draw(scores, params, self._noise, position)
        token = draw(scores.copy(), params, self._noise, position)
        chances.append(chance(scores, token))
        return token

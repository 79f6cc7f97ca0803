"""How likely texts are: continuations of a prompt, and whole texts, in one causal pass each and without sampling."""

from __future__ import annotations

import dataclasses
import numbers
from collections import deque
from collections.abc import Iterable, Iterator

from ..errors import RequestError
from .events.events import answers
from .generate import sequence_events
from .loading import LoadedEngine, check_engine, check_rows
from .requests.options import LOGPROBS, Options
from .requests.prepare import Prompt, encode, prepare
from .requests.sequence import Sequence
from .requests.token_logprobs import TokenLogprobs
from .text.checks import check_list, check_text

Continuation = str | list[int]


@dataclasses.dataclass(frozen=True)
class Score:
    """How likely a continuation is after its prompt; logarithms are natural.

    logprob: of the whole continuation, the sum over its tokens. logprobs: one per token of `token_ids`. greedy: whether
    mode ar, greedily, would have said exactly these tokens.
    """

    logprob: float
    greedy: bool
    token_ids: list[int]
    logprobs: list[TokenLogprobs]


def score(
    engine: LoadedEngine,
    prompt: Prompt,
    continuations: Iterable[Continuation],
    *,
    chat: bool = True,
    top: int = 0,
    rows: int = 1,
) -> list[Score]:
    """Score each continuation after the same prompt.

    Every token's probability is the model's own as mode ar has it, the mask id left out, and exact: each continuation
    is forwarded once, causally, in chunks; the prompt is forwarded once for all.

    Args:
        engine: from `load`.
        prompt: as in `generate`; it may not be empty.
        continuations: text, encoded by itself without special tokens, or token ids, which may be special; at least one
            token each. With `chat` they are what the assistant would say; its end is the model's EOS id.
        chat: put a text through the chat template, or take it as it is.
        top: likeliest ids to tell at each position, 0 to 100.
        rows: continuations at a time, at most the engine's max_batch_size.

    Raises:
        RequestError: an argument is out of range, or prompt and continuation do not fit.
    """
    check_list(continuations, "continuations", "texts or of token ids")
    return list(score_many(engine, ((prompt, one) for one in continuations), chat=chat, top=top, rows=rows))


def score_many(
    engine: LoadedEngine,
    pairs: Iterable[tuple[Prompt, Continuation]],
    *,
    chat: bool = True,
    top: int = 0,
    rows: int = 1,
) -> Iterator[Score]:
    """Score pairs of a prompt and a continuation, in order; see `score`.

    What a prompt shares with an earlier one, or with one beside it, is not computed again. Pairs are taken as rows
    become free. Raises RequestError.
    """
    check_engine(engine)
    check_list(pairs, "pairs", "pairs of a prompt and a continuation")
    check_rows(engine.info, rows)
    LOGPROBS.check("top", top, numbers.Integral)
    options = Options(chat=chat, prompt_logprobs=top, max_new_tokens=0)
    begun: deque[list[int]] = deque()  # the continuations that have no score yet

    def sequences() -> Iterator[Sequence]:
        for pair in pairs:
            if not isinstance(pair, (tuple, list)) or len(pair) != 2:
                raise RequestError(f"a pair is {pair!r:.60}, allowed: a prompt and a continuation")
            prompt, continuation = pair
            ids = _encoded(engine, continuation)
            before = encode(engine, prompt, options)
            sequence = prepare(engine, [*before, *ids], options)
            sequence.score_from(len(before))
            begun.append(ids)
            yield sequence

    for answer in answers(sequence_events(engine, sequences(), rows=rows, prefix_reuse=True, text=False)):
        assert answer.prompt_logprobs is not None
        ids = begun.popleft()
        logprobs = [one for one in answer.prompt_logprobs[-len(ids) :] if one is not None]
        yield Score(sum(one.logprob for one in logprobs), all(one.rank == 1 for one in logprobs), ids, logprobs)


def _encoded(engine: LoadedEngine, continuation: Continuation) -> list[int]:
    """A continuation's ids; `prepare` checks that they are ids of the model. Raises RequestError."""
    if isinstance(continuation, str):
        check_text(continuation, "continuation")
        ids = engine.text.encode_plain(continuation)
    elif isinstance(continuation, list) and all(isinstance(i, int) and not isinstance(i, bool) for i in continuation):
        ids = continuation
    else:
        raise RequestError(f"continuation is {continuation!r:.60}, allowed: text or a list of token ids")
    if not ids:
        raise RequestError("a continuation is empty; give at least one token")
    return ids

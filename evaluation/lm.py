"""An engine as lm-eval sees a language model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from ..contract import counted
from ..errors import RequestError
from ..runtime.engines.passes import PASS_KINDS, PassKind
from ..runtime.events.events import answers
from ..runtime.generate import sequence_events
from ..runtime.loading import LoadedEngine
from ..runtime.requests.generation import Generation
from ..runtime.requests.options import make_options
from ..runtime.requests.prepare import prepare
from ..runtime.requests.sequence import Sequence as Request
from ..runtime.score import score_many

_NEW_TOKENS = 256  # where a task gives no limit, as in lm-eval's own models
_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")

_Pair = tuple[tuple[int, ...], tuple[int, ...]]


@dataclasses.dataclass
class Work:
    """What the generated answers to a task took; seconds are the sum of each answer's own."""

    tokens: int = 0
    nfe: dict[PassKind, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(PASS_KINDS, 0))
    seconds: float = 0.0

    def add(self, answer: Generation) -> None:
        """Count one more answer."""
        self.tokens += len(answer.token_ids)
        self.seconds += answer.timings_ms["total"] / 1e3
        for kind, passes in answer.nfe.items():
            self.nfe[kind] += passes


class EngineLM(TemplateLM):  # type: ignore[misc]
    """Scores and generates with an engine, in a mode that may change between two evaluations.

    Scores are causal in every mode, so they are computed once and kept.

    Args:
        engine: from `load`.
        rows: requests at a time.
        chat: whether texts come from `apply_chat_template`, so that special tokens in them are tokens.
        thinking: whether the chat template lets the model think; thoughts are no part of a chat's answer.
    """

    def __init__(self, engine: LoadedEngine, *, rows: int, chat: bool = False, thinking: bool = False) -> None:
        super().__init__()
        self.options: Mapping[str, Any] = {}  # of generation: the mode, and what the user chose
        self.work: dict[str, Work] = {}  # by task, since it was last cleared
        self._engine = engine
        self._text = engine.text
        self._rows = rows
        self._chat = chat
        self._thinking = thinking
        self._scores: dict[_Pair, tuple[float, bool]] = {}

    @property
    def eot_token_id(self) -> int:
        """What ends a text."""
        return self._engine.info.model.eos_ids[0]

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that is scored from its first token on, and for a prompt without any."""
        return self.eot_token_id if self._text.bos is None else self._text.bos

    @property
    def tokenizer_name(self) -> str:
        return str(self._engine.folder)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self._text.template.source if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text, up to the assistant's turn or to the end of the beginning that is given of it."""
        return self._text.render_chat(chat_history, self._thinking, continued=not add_generation_prompt)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a text."""
        if self._chat:
            return self._text.encode_rendered(string)
        return self._text.encode_plain(string) if add_special_tokens is False else self._text.encode(string)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """The log-probability of each continuation after its context, and whether mode ar would say it."""
        scores: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return scores

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each text after the prefix token, in windows if it is longer than the engine takes."""
        windows: list[list[_Pair]] = []
        for request in requests:
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            cut = get_rolling_token_windows(ids, self.prefix_token_id, self._limit - 1, 1)
            windows.append([(tuple(before), tuple(after)) for before, after in map(make_disjoint_window, cut)])
        scores = self._scored([pair for each in windows for pair in each], disable_tqdm)
        return [sum(scores[pair][0] for pair in each) for each in windows]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The answer to each prompt, by the task's own limits and sampling, in the mode that `options` chooses."""

        def prepared() -> Iterator[Request]:
            for number, request in enumerate(requests):
                context, settings = request.args
                chosen = {**_options(settings), **self.options, "chat": self._chat}
                if chosen.get("temperature"):  # a question that a task asks several times is answered anew
                    chosen["seed"] = chosen.get("seed", 0) + number
                options = make_options(chosen)
                new_tokens = options.max_new_tokens or _NEW_TOKENS
                room = self._limit - new_tokens
                if room < 1:
                    raise RequestError(
                        f"a task asks for {counted(new_tokens, 'token')}, allowed: fewer than the engine's "
                        f"{self._limit}; lower max_gen_toks in its file or build with a larger --max-seq-len"
                    )
                ids = self.tok_encode(context)[-room:] or [self.prefix_token_id]
                yield prepare(self._engine, ids, options)

        said = list[str]()
        events = sequence_events(self._engine, prepared(), rows=self._rows, prefix_reuse=True, text=False)
        progress = tqdm(answers(events), total=len(requests), desc="answering", disable=disable_tqdm or None)
        for request, answer in zip(requests, progress, strict=True):
            self.work.setdefault(request.task_name or "", Work()).add(answer)
            said.append(answer.content)
        return said

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        pairs = []
        for texts, context, continuation in requests:
            # lm-eval cuts the encoded whole where the context would end, and one token may hold the rest.
            continuation = continuation or self._text.encode_plain(texts[1])
            room = self._limit - len(continuation)
            pairs.append((tuple(context[-room:]), tuple(continuation)))
        scores = self._scored(pairs, disable_tqdm)
        return [scores[pair] for pair in pairs]

    def _scored(self, pairs: Sequence[_Pair], disable_tqdm: bool) -> Mapping[_Pair, tuple[float, bool]]:
        """The scores of all pairs; sorted, so that prompts which begin alike follow each other."""
        new = sorted({pair for pair in pairs if pair[1]} - self._scores.keys())
        prompts = ((list(before), list(after)) for before, after in new)
        scored = score_many(self._engine, prompts, rows=self._rows)
        for pair, score in zip(
            new, tqdm(scored, total=len(new), desc="scoring", disable=disable_tqdm or None), strict=True
        ):
            self._scores[pair] = (score.logprob, score.greedy)
        return self._scores | {pair: (0.0, True) for pair in pairs if not pair[1]}

    @property
    def _limit(self) -> int:
        return self._engine.info.build.max_seq_len


def _options(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a task's `generation_kwargs`. Raises RequestError for what has no meaning here."""
    given = dict(settings)
    until = given.pop("until", None) or []
    samples = given.pop("do_sample", None)
    limits = [value for name in _LIMITS if (value := given.pop(name, None)) is not None]
    options = {name: value for name in _SAMPLING if (value := given.pop(name, None)) is not None}
    if given:
        raise RequestError(
            f"a task's generation_kwargs have {', '.join(given)}, allowed: until, do_sample, {', '.join(_LIMITS)}, "
            f"{', '.join(_SAMPLING)}; change the task"
        )
    if samples is False:
        options.pop("temperature", None)
    elif samples:
        options.setdefault("temperature", 1.0)
    stops = [until] if isinstance(until, str) else until
    return {
        **options,
        "stop": [stop for stop in stops if stop],
        "max_new_tokens": int(limits[0]) if limits else _NEW_TOKENS,
    }

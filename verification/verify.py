"""Does an engine give what its model gives? Every mode runs, and every pass that ran is judged by a reference.

The exact modes must give mode ar's tokens, alone and beside other requests. The reference answers each pass anew: the
checkpoint's own network, another engine, or the same engine in a fresh cache.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from ..contract import counted
from ..errors import CheckpointError, EngineError, RequestError, first_line
from ..runtime.batching.batch import KEPT_PREFIXES
from ..runtime.engines.passes import bidirectional, causal
from ..runtime.generate import decode
from ..runtime.loading import LoadedEngine
from ..runtime.requests.options import Options
from ..runtime.requests.prepare import prepare
from .network import Answer
from .recorder import RecordedPass, Recorder
from .report import Report
from .script import Script, Slots
from .verdict import commit_error, is_near_tie, judge

# The exact modes with their options. All groups of a short draft: every way that a verdict may fall, in few tokens.
EXACT: dict[str, dict[str, Any]] = {"linear_spec": {}, "quadratic_spec": {"groups": "all", "block_length": 8}}
TOGETHER = ", side by side"  # what a mode is called whose requests share a batch
_ROWS = 4  # of such a batch
_PROBED = 8  # masks of a probe's block


class Reference(Protocol):
    """What says which predictions are right."""

    precision: str

    def answer(self, scripts: Sequence[Script], columns: np.ndarray, *, states: bool = False) -> list[Answer]:
        """What is right for each token of each script; see `network.Network.answer`.

        Raises EngineError where it is an engine and fails.
        """
        ...


@dataclasses.dataclass
class _Run:
    """What an engine did for one prompt in one mode, or to a probe."""

    prompt: int
    mode: str
    passes: list[RecordedPass]
    script: Script
    places: list[int] = dataclasses.field(default_factory=list)  # where each pass's answers begin

    def place_passes(self) -> Iterator[str]:
        """Find every pass in the script; what a pass reads that it should not."""
        slots = Slots(self.script)
        for number, recorded in enumerate(self.passes):
            place, wrong = slots.add(recorded.pass_)
            self.script.wanted.update(recorded.token.tolist())
            self.places.append(place)
            if wrong:
                yield f"{self.name(number)}: {wrong}"

    def name(self, number: int) -> str:
        """A pass in words."""
        return f"prompt {self.prompt}, {self.mode}, pass {number} ({self.passes[number].pass_.kind})"


def verify(
    engine: LoadedEngine,
    prompts: Sequence[list[int]],
    reference: Reference,
    *,
    max_new_tokens: int,
    advance: Callable[[int], object] = lambda steps: None,
) -> tuple[Report, list[Script]]:
    """Run every mode over the prompts and judge all of it; also the scripts, for a look into the layers.

    Args:
        engine: the engine that is judged.
        prompts: as token ids.
        reference: what says which predictions are right.
        max_new_tokens: of each answer.
        advance: gets 1 after each prompt, and at last for the reference.
    """
    work = _Work(engine, prompts, Report(len(prompts), reference.precision), max_new_tokens)
    for number in range(len(prompts)):
        work.run_alone(number)
        advance(1)
    work.run_side_by_side()
    work.judge(reference)
    advance(1)
    return work.report, list(work.scripts.values())


@contextlib.contextmanager
def failures(report: Report, name: str) -> Iterator[None]:
    """An engine that fails is wrong, whatever it raises; what a user can mend is no verdict."""
    try:
        yield
    except (RequestError, CheckpointError, MemoryError):
        raise
    except Exception as error:
        report.findings.append(f"{name}: fails ({first_line(error)})")


class _Work:
    """One verification: what has run, and what it is compared with."""

    def __init__(self, engine: LoadedEngine, prompts: Sequence[list[int]], report: Report, max_new_tokens: int) -> None:
        self.report = report
        self.scripts: dict[tuple[int, ...], Script] = {}  # by offset and tokens
        self._engine = engine
        self._prompts = prompts
        self._recorder = Recorder(engine.backend)
        self._recorded = dataclasses.replace(engine, backend=self._recorder)
        self._max_new_tokens = max_new_tokens
        # Side by side of different lengths, so that rows leave at different times and others move into their places.
        self._limits = [max(1, max_new_tokens * (1 + number % _ROWS) // _ROWS) for number in range(len(prompts))]
        self._runs: list[_Run] = []
        self._answers: dict[str, list[list[int]]] = {}  # tokens of each prompt's answer by mode

    def run_alone(self, number: int) -> None:
        """Answer a prompt in each mode, and probe its text."""
        prompt = self._prompts[number]
        for mode in ("ar", *EXACT, "diffusion"):
            options = {"mode": mode, **EXACT.get(mode, {})}
            name = f"prompt {number}, {mode}"
            (tokens,) = _answers(self.report, name, self._recorded, [prompt], options, [self._max_new_tokens])
            self._answers.setdefault(mode, []).append(tokens)
            self._take(number, mode, [*prompt, *tokens], 0)
        text = [*prompt, *self._answers["ar"][number]]
        for offset in sorted({0, _far(self._engine, len(text))}):
            mode = f"probe at {offset}" if offset else "probe"
            with failures(self.report, f"prompt {number}, {mode}"):
                _probe(self._recorder, text, offset)
            self._take(number, mode, text, offset)

    def run_side_by_side(self) -> None:
        """Answer the prompts in one batch, in each exact mode."""
        if self._engine.info.build.max_batch_size == 1 or len(self._prompts) == 1:
            return
        for mode, options in {"ar": {}, **EXACT}.items():
            name = f"{mode}{TOGETHER}"
            values = {"mode": mode, **options}
            self._answers[name] = _answers(self.report, name, self._engine, self._prompts, values, self._limits)

    def judge(self, reference: Reference) -> None:
        """Compare the exact modes with ar, and every prediction with the reference's."""
        ar = self._answers["ar"]
        texts = [(0, *prompt, *tokens) for prompt, tokens in zip(self._prompts, ar, strict=True)]
        for given in self._answers.values():
            for key, tokens in zip(texts, given, strict=True):
                self.scripts[key].wanted.update(tokens)
        try:
            answers = reference.answer(list(self.scripts.values()), self._recorder.columns)
        except EngineError as error:
            self.report.findings.append(f"the reference: fails ({error})")
            return
        right = dict(zip(self.scripts, answers, strict=True))
        for mode, given in self._answers.items():
            if mode not in ("ar", "diffusion"):
                limits = self._limits if mode.endswith(TOGETHER) else [self._max_new_tokens] * len(ar)
                expected = [tokens[:limit] for tokens, limit in zip(ar, limits, strict=True)]
                _judge_mode(self.report, mode, self._prompts, given, expected, [right[key] for key in texts])
        for run in self._runs:
            _judge_passes(self.report, run, right[(run.script.offset, *run.script.tokens.tolist())], self._recorder)

    def _take(self, number: int, mode: str, tokens: list[int], offset: int) -> None:
        """Note the passes since the last time as a run over this text."""
        script = self.scripts.setdefault((offset, *tokens), Script(tokens, offset))
        run = _Run(number, mode, self._recorder.passes, script)
        self.report.findings += run.place_passes()
        self._runs.append(run)
        self._recorder.passes = []


def _answers(
    report: Report,
    name: str,
    engine: LoadedEngine,
    prompts: Sequence[list[int]],
    options: dict[str, Any],
    limits: Sequence[int],
) -> list[list[int]]:
    """The answers' tokens, as far as they come."""
    rows = min(_ROWS, engine.info.build.max_batch_size, len(prompts))
    sequences = [
        prepare(engine, prompt, Options(max_new_tokens=limit, **options))
        for prompt, limit in zip(prompts, limits, strict=True)
    ]
    with failures(report, name):
        # No cost curve, so that rows always share a forward and are padded.
        for _ in decode(engine.backend, sequences, rows, kept=KEPT_PREFIXES if rows > 1 else None):
            pass
    return [sequence.tokens for sequence in sequences]


def _far(engine: LoadedEngine, size: int) -> int:
    """A position where YaRN has stretched what it stretches and the query scale has grown; 0 where there is none."""
    model = engine.info.model
    far = min(3 * model.rope.original_max_position + 17, model.max_position - size - _PROBED)
    return max(0, far)


def _probe(recorder: Recorder, text: list[int], offset: int) -> None:
    """Passes that predict after every token of a text, at positions from `offset` on, and blocks of masks after it."""
    model = recorder.info.model
    cache = recorder.open(1)
    shift = np.int32(offset)
    masks = [text[0]] + [model.mask_id] * (_PROBED - 1)
    step = min(100, recorder.info.build.max_input_len)
    for at in range(0, len(text), step):
        pass_ = causal("prefill", text[at : at + step], at, predict_all=True)
        cache.forward([pass_._replace(pos=pass_.pos + shift)])
    for adapter in (False, True)[: 1 + recorder.info.has_adapter]:
        block = bidirectional("draft" if adapter else "denoise", masks, len(text), 0.5, adapter=adapter)
        cache.forward([block._replace(pos=block.pos + shift)])
    cache.close()


def _judge_mode(
    report: Report,
    mode: str,
    prompts: Sequence[list[int]],
    given: list[list[int]],
    right_tokens: list[list[int]],
    right: list[Answer],
) -> None:
    """Compare an exact mode with ar: what differs first is a near tie or wrong, what follows is another text."""
    tally = report.modes[mode]
    for number, (prompt, got, expected, answer) in enumerate(zip(prompts, given, right_tokens, right, strict=True)):
        pairs = enumerate(zip(got, expected, strict=False))
        at = next((i for i, (a, b) in pairs if a != b), min(len(got), len(expected)))
        tally.equal += at
        place = len(prompt) + at - 1
        where = f"prompt {number}, {mode}: token {at}"
        if at < min(len(got), len(expected)):
            gap = answer.logit(place, expected[at]) - answer.logit(place, got[at])
            if is_near_tie(gap, float(answer.best[place] - answer.total[place]), answer, place):
                tally.near_ties += 1
            else:
                tally.wrong += 1
                report.findings.append(f"{where} is {got[at]}, where ar has {expected[at]}, {gap:.3g} apart in logits")
        elif len(got) != len(expected):
            tally.wrong += 1
            report.findings.append(f"{where} of {len(got)}, where ar has {counted(len(expected), 'token')}")


def _judge_passes(report: Report, run: _Run, answer: Answer, recorder: Recorder) -> None:
    """Judge every prediction of a run, and what its passes have committed."""
    for number, (recorded, start) in enumerate(zip(run.passes, run.places, strict=True)):
        tally = report.passes[recorded.pass_.kind]
        for index, token in enumerate(recorded.pass_.predicted.tolist()):
            verdict = judge(recorded, index, answer, start + token, recorder.columns)
            tally.add(verdict)
            if verdict.reason:
                report.findings.append(f"{run.name(number)}, token {token}: {verdict.reason}")
        wrong = commit_error(recorded, recorder.info.model.mask_id)
        if wrong:
            report.findings.append(f"{run.name(number)}: {wrong}")

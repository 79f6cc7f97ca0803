"""`nemodiff bench`: tests of one engine, or of two in turns, with warm-up and rounds."""

from __future__ import annotations

import dataclasses
import itertools
import os
import random
from collections.abc import Callable, Sequence

from ..contract import MODES
from ..errors import RequestError
from ..runtime.loading import LoadedEngine, check_engine, check_rows
from ..runtime.planning.cost import CostCurve, measure
from ..runtime.requests.option_types import Range
from ..runtime.requests.options import AUTO, Options, make_options
from ..runtime.requests.prepare import Prompt, prepare
from .figures import Figures, figures, ratios
from .machine import machine
from .round import Request, Round, serve

WAYS = (*MODES, AUTO)
_CURVE_SECONDS = 3.0  # for the curve to begin with
_INPUT_LEN = 512
# Used where no prompts are given: short and long answers, words, numbers and code.
PROMPTS = (
    "Count from 3 to 12.",
    "What is the capital of France, and what is it known for?",
    "Write a Python function that returns the n-th Fibonacci number.",
    "List five fruits as a JSON array of strings.",
    "Explain in two sentences why the sky is blue.",
    "Show the times table of 7 up to 5.",
)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is measured.

    input_lens: prompt tokens of the prefill tests, None: 512, or as many as all engines take. concurrency: requests at
    a time, each a test of every mode. rounds come after `warmup` others, which are dropped. Raises RequestError where
    that would be nothing.
    """

    prompts: Sequence[Prompt] = PROMPTS
    modes: Sequence[str] = WAYS
    concurrency: Sequence[int] = (1,)
    input_lens: Sequence[int] | None = None
    max_new_tokens: int = 64
    block_length: int | str | None = None
    rounds: int = 5
    warmup: int = 1

    def __post_init__(self) -> None:
        for name in ("prompts", "modes", "concurrency", "input_lens"):
            value = getattr(self, name)
            if name == "input_lens" and value is None:
                continue
            if isinstance(value, str) or not isinstance(value, Sequence):
                raise RequestError(f"{name} is {value!r:.60}, allowed: a list")
        if not self.prompts:
            raise RequestError(f"prompts is {self.prompts!r}, allowed: one or more")
        for length in self.input_lens or ():
            Range(1).check("input_lens", length, int)
        Range(1).check("rounds", self.rounds, int)
        Range(0).check("warmup", self.warmup, int)


@dataclasses.dataclass(frozen=True)
class Test:
    """A way to answer requests, which every round does once."""

    name: str
    concurrency: int
    requests: Sequence[Request]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """All figures of one engine, the cost curve that its passes have taught, and the load before the first test."""

    figures: list[Figures]
    curve: CostCurve
    load: float | None  # None on Windows, which knows none


def tests(engine: LoadedEngine, plan: Plan) -> list[Test]:
    """The plan's tests in order: prefill, then by concurrency every mode. Raises RequestError."""
    check_engine(engine)
    rng, model = random.Random(0), engine.info.model
    planned = []
    for length in dict.fromkeys(plan.input_lens or ()):
        limit = engine.info.build.max_seq_len - 1
        if length > limit:
            raise RequestError(f"input_len is {length}, allowed: 1 to {limit}; give a shorter one with --input-len")
        drawn = (rng.randrange(model.vocab_size) for _ in itertools.count())
        ids = list(itertools.islice((token for token in drawn if token != model.mask_id), length))
        options = make_options({"mode": "ar", "max_new_tokens": 1})
        planned.append(Test(f"pp{length}", 1, [Request(ids, options)]))
    for concurrency in dict.fromkeys(plan.concurrency):
        check_rows(engine.info, concurrency)
        # As many as keep all rows at work for a while.
        prompts = [plan.prompts[i % len(plan.prompts)] for i in range(max(len(plan.prompts), 2 * concurrency))]
        # ar comes first: the answers of the others are compared with its.
        for mode in sorted(dict.fromkeys(plan.modes), key=lambda mode: mode != "ar"):
            options = _options(mode, plan)
            planned.append(Test(mode, concurrency, [Request(prompt, options) for prompt in prompts]))
    for test in planned:
        for request in test.requests:
            prepare(engine, request.prompt, request.options)  # refuses now what would be refused in the middle
    if plan.block_length is not None:  # which the plan's modes may have no use for
        drafts = make_options({"mode": "linear_spec", "block_length": plan.block_length, "max_new_tokens": 1})
        prepare(engine, plan.prompts[0], drafts)
    return planned


def names(engines: Sequence[LoadedEngine]) -> list[str]:
    """What the engines are called: their folders' names, or whole paths where these would be the same."""
    folders = [engine.folder.resolve() for engine in engines]
    alike = len({folder.name for folder in folders}) < len(folders)
    return [str(folder) if alike else folder.name for folder in folders]


def bench(
    engines: Sequence[LoadedEngine], plan: Plan, report: Callable[[str], None] = lambda text: None
) -> list[Outcome]:
    """Measure engines, each test in turns of all of them, so that what else the machine does falls on all alike.

    `report` is told what is measured next. Raises RequestError.
    """
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    for engine in engines:
        check_engine(engine)
    if plan.input_lens is None:
        most = (engine.info.build.max_seq_len - 1 for engine in engines)
        plan = dataclasses.replace(plan, input_lens=(min(_INPUT_LEN, *most),))
    planned = []
    for engine, name in zip(engines, names(engines), strict=True):
        try:
            planned.append(tests(engine, plan))
        except RequestError as error:
            if len(engines) == 1:
                raise
            raise RequestError(f"{name}: {error}") from None
    for engine, name in zip(engines, names(engines), strict=True):
        report(f"cost curve of {name}")
        if curve := measure(engine.backend, _CURVE_SECONDS):
            engine.cost.begin(curve)
    results: list[list[Figures]] = [[] for _ in engines]
    exact: dict[tuple[int, int], Round] = {}  # by engine and concurrency
    for number, test in enumerate(planned[0]):
        report(f"{test.name}, {test.concurrency} at a time")
        rounds: list[list[Round]] = [[] for _ in engines]
        for turn in range(plan.warmup + plan.rounds):
            for index in range(len(engines)) if turn % 2 else reversed(range(len(engines))):
                served = serve(engines[index], planned[index][number].requests, test.concurrency)
                if turn >= plan.warmup:
                    rounds[index].append(served)
        for index, done in enumerate(rounds):
            if test.name == "ar":
                exact[index, test.concurrency] = done[-1]
            ar = exact.get((index, test.concurrency))
            results[index].append(figures(test.name, test.concurrency, done, ar))
    return [Outcome(own, engine.cost.curve, load) for own, engine in zip(results, engines, strict=True)]


def described(engine: LoadedEngine, name: str) -> dict[str, object]:
    """What was measured."""
    info = engine.info
    return {
        "name": name,
        "checkpoint": info.manifest.checkpoint.get("name"),
        "backend": info.manifest.backend,
        "dtype": info.build.dtype,
        "quantization": info.build.quantization,
        **info.build.groups,
        "kv_cache_dtype": info.build.kv_cache_dtype,
        "parameters": info.model.parameters,
        "versions": info.manifest.versions,
        "processor": engine.processor,
        "threads": engine.threads,
        "load_ms": engine.load_ms,
    }


def result(engines: Sequence[LoadedEngine], outcomes: Sequence[Outcome], plan: Plan) -> dict[str, object]:
    """Everything as one JSON object; of a comparison, `ratios` are the first engine's over the second's."""
    values: dict[str, object] = {
        "machine": {**machine(), "load_before": outcomes[0].load},
        "prompts": len(plan.prompts),
        "max_new_tokens": plan.max_new_tokens,
        "rounds": plan.rounds,
        "warmup": plan.warmup,
        "engines": [
            {
                **described(engine, name),
                "cost_curve_ms": dict(zip(outcome.curve.sizes, (1e3 * t for t in outcome.curve.times), strict=True)),
                "tests": [dataclasses.asdict(one) for one in outcome.figures],
            }
            for engine, name, outcome in zip(engines, names(engines), outcomes, strict=True)
        ],
    }
    if len(outcomes) > 1:
        pairs = zip(outcomes[0].figures, outcomes[1].figures, strict=True)
        values["ratios"] = [
            {"test": own.test, "concurrency": own.concurrency, **dataclasses.asdict(ratios(own, other))}
            for own, other in pairs
        ]
    return values


def _options(mode: str, plan: Plan) -> Options:
    block = plan.block_length
    if mode in ("ar", AUTO) or (mode == "diffusion" and block == AUTO):
        block = None  # there is none, or it is the mode's to choose
    return make_options({"mode": mode, "block_length": block, "max_new_tokens": plan.max_new_tokens})

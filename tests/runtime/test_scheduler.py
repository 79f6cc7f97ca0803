"""Many requests at once: whatever joins, leaves, is cancelled or fails, every request gets what it would get alone.

Schedules are random and run on an engine without a model (`toy_engine`), whose answers are a hash of exactly what each
query sees; the last tests run tiny-chat. Nothing is timed.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import gc
import itertools
import random
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import PATIENCE, eventually
from hypothesis import given, settings
from hypothesis import strategies as st
from stand_ins.toy_engine import ToyEngine, toy

import nemodiff
from nemodiff.contract import MODES
from nemodiff.runtime.batching.batch import Batch
from nemodiff.runtime.batching.prefix_cache import PrefixCache, common
from nemodiff.runtime.events.reporter import Reporter
from nemodiff.runtime.planning.cost import CostCurve, split
from nemodiff.runtime.planning.pass_costs import PassCosts
from nemodiff.runtime.requests.generation import finished_generation
from nemodiff.runtime.requests.options import Options
from nemodiff.runtime.requests.prepare import prepare
from nemodiff.runtime.requests.sequence import Sequence

SYSTEM = [200 + i * 7 % 300 for i in range(60)]
FILLING = ("denoise", "draft")
CONTROLS: tuple[dict[str, Any], ...] = (  # of diffusion
    {},
    {"merge_commit": True},
    {"merge_commit": True, "policy": "topk", "per_step": 2, "threshold": None},
    {"merge_commit": True, "policy": "left_to_right", "frequency_penalty": 0.5, "block_steps": 2},
)
FLAT, STEEP = (CostCurve((1, 2), times) for times in ((10.0, 10.01), (0.1, 1.1)))


@pytest.fixture(scope="module")
def real(tiny_engine: Path) -> nemodiff.LoadedEngine:
    return nemodiff.load(tiny_engine, threads=1)


@pytest.fixture(scope="module")
def engine(real: nemodiff.LoadedEngine) -> nemodiff.LoadedEngine:
    return toy(real)


def backend(engine: nemodiff.LoadedEngine) -> ToyEngine:
    assert isinstance(engine.backend, ToyEngine)
    return engine.backend


@dataclasses.dataclass(frozen=True)
class Request:
    """A request of a random schedule."""

    prompt: tuple[int, ...]
    options: Options


def requests() -> st.SearchStrategy[Request]:
    prompts = st.builds(
        lambda system, length, salt: (*SYSTEM[:system], *(130 + (salt * i * i + salt) % 500 for i in range(length))),
        st.sampled_from([0, 20, 60]),
        st.integers(1, 40),
        st.integers(1, 3),
    )
    options = st.builds(
        lambda mode, control, **rest: Options(mode=mode, **rest | (control if mode == "diffusion" else {})),
        mode=st.sampled_from(MODES),
        control=st.sampled_from(CONTROLS),
        max_new_tokens=st.integers(1, 30),
        block_length=st.sampled_from([1, 2, 5, 8]),
        groups=st.sampled_from(["all"]),
        threshold=st.sampled_from([None, 0.0, 0.5, 0.9]),
        prefill_chunk=st.sampled_from([7, 512]),
        temperature=st.sampled_from([0.0, 0.0, 0.8]),
        seed=st.integers(0, 3),
    )
    return st.builds(Request, prompts, options)


def sequence(engine: nemodiff.LoadedEngine, request: Request) -> Sequence:
    return prepare(engine, list(request.prompt), request.options)


@functools.lru_cache(maxsize=4096)
def _alone(engine_id: int, request: Request) -> nemodiff.Generation:
    values = {f.name: getattr(request.options, f.name) for f in dataclasses.fields(Options)}
    return nemodiff.generate(_ENGINES[engine_id], list(request.prompt), **values)


_ENGINES: dict[int, nemodiff.LoadedEngine] = {}


def alone(engine: nemodiff.LoadedEngine, request: Request) -> nemodiff.Generation:
    """The result of the request by itself."""
    _ENGINES[id(engine)] = engine
    return _alone(id(engine), request)


def check(engine: nemodiff.LoadedEngine, request: Request, got: nemodiff.Generation) -> None:
    """What holds of every request that has ended."""
    whole = alone(engine, request)
    assert engine.info.model.mask_id not in got.token_ids
    assert got.token_ids == whole.token_ids[: len(got.token_ids)]
    text = engine.text.decode(got.token_ids)
    assert got.text in (text, text.removesuffix("\ufffd"))  # without a character that has only begun
    assert 0 <= got.reused_tokens < max(1, got.prompt_tokens)
    if got.finish_reason != "cancelled":
        assert (got.token_ids, got.finish_reason) == (whole.token_ids, whole.finish_reason)
        assert {k: n for k, n in got.nfe.items() if k != "prefill"} == {
            k: n for k, n in whole.nfe.items() if k != "prefill"
        }
        assert got.acceptance == whole.acceptance
        rest = got.prompt_tokens - got.reused_tokens
        assert got.nfe["prefill"] == -(-rest // request.options.prefill_chunk)


@settings(max_examples=120, deadline=None)
@given(
    data=st.data(),
    rows=st.integers(1, 5),
    kept=st.sampled_from([None, 0, 1, 2]),
    cost=st.sampled_from([None, FLAT, STEEP]),
    budget=st.sampled_from([1, 30, 512]),
)
def test_any_schedule_gives_what_each_request_gives_alone(
    engine: nemodiff.LoadedEngine,
    data: st.DataObject,
    rows: int,
    kept: int | None,
    cost: CostCurve | None,
    budget: int,
) -> None:
    waiting = data.draw(st.lists(requests(), min_size=1, max_size=8))
    before = backend(engine).open_caches
    batch = Batch(
        engine.backend, rows, cost=None if cost is None else PassCosts(cost), kept=kept, prefill_tokens=budget
    )
    running: dict[Sequence, Request] = {}
    cut = 0
    while waiting or running:
        for _ in range(data.draw(st.integers(0, 2), label="joining") if running else 1):
            if waiting and len(batch) < rows:
                request = waiting.pop()
                running[new := sequence(engine, request)] = request
                batch.add(new)
        if len(running) > 1 and data.draw(st.integers(0, 9), label="cancel?") == 0:
            victim = data.draw(st.sampled_from(sorted(running, key=lambda s: s.submitted)), label="cancelled")
            batch.remove(victim)
            request = running.pop(victim)
            assert victim.tokens == alone(engine, request).token_ids[: len(victim.tokens)]
            cut += 1
        served = list(batch.step())
        assert len({s.sequence for s in served}) == len(served) > 0
        decoding = {s for s in running if s.tokens and not s.ended}
        assert decoding <= {s.sequence for s in served}
        for done in [s for s in running if s.ended]:
            check(engine, running.pop(done), finished_generation(engine, done))
        assert len(batch) == len(running)
        assert batch.cache_slots == sum(s.length for s in running)
        widths = [slot.width for slot in batch._rows.slots]
        assert widths == sorted(widths)  # rows that ask for equally many tokens are neighbours
    batch.close()
    assert backend(engine).open_caches == before


def test_what_the_last_pass_gave_comes_with_the_end(engine: nemodiff.LoadedEngine) -> None:
    """A listener that wakes somebody for each outcome wakes him once for both."""
    heard: list[Any] = []
    with nemodiff.Scheduler(engine, rows=1) as scheduler:
        handle = scheduler.submit([130], mode="ar", max_new_tokens=5, min_tokens=5, listener=heard.append)
        assert len(handle.result(PATIENCE).token_ids) == 5
    assert len(heard) == 5  # one for each pass that gave a token
    assert [type(event).__name__ for event in heard[-1]] == ["Text", "Finished"]


@settings(max_examples=50, deadline=None)
@given(data=st.data(), rows=st.integers(1, 4), reuse=st.booleans(), seed=st.integers(0, 1000))
def test_threads_cancels_and_a_scheduler_lose_nothing(
    engine: nemodiff.LoadedEngine, data: st.DataObject, rows: int, reuse: bool, seed: int
) -> None:
    schedule = data.draw(st.lists(requests(), min_size=1, max_size=10))
    before, rng = backend(engine).open_caches, random.Random(seed)
    cancelled = [rng.random() < 0.2 for _ in schedule]

    def ask(item: tuple[Request, bool]) -> list[nemodiff.Event]:
        a, cancel = item
        handle = scheduler.submit(list(a.prompt), steps=True, **dataclasses.asdict(a.options))
        events = []
        for event in handle:
            events.append(event)
            if cancel and isinstance(event, nemodiff.Step):
                handle.cancel()
        assert handle.done
        assert list(handle) == []
        return events

    with (
        nemodiff.Scheduler(engine, rows=rows, prefix_reuse=reuse) as scheduler,
        concurrent.futures.ThreadPoolExecutor(4) as pool,
    ):
        streams = list(pool.map(ask, zip(schedule, cancelled, strict=True), timeout=PATIENCE))
        statistics = scheduler.statistics
    assert backend(engine).open_caches == before
    answers = [check_events(engine, a, events) for a, events in zip(schedule, streams, strict=True)]
    assert (statistics.running, statistics.waiting, statistics.slots, statistics.failed) == (0, 0, 0, 0)
    assert statistics.finished + statistics.cancelled == len(schedule)
    assert statistics.cancelled == sum(a.finish_reason == "cancelled" for a in answers)
    assert statistics.emitted_tokens == sum(len(a.token_ids) for a in answers)
    assert statistics.prompt_tokens == sum(a.prompt_tokens for a in answers)
    assert statistics.reused_tokens == sum(a.reused_tokens for a in answers)
    assert statistics.nfe == {kind: sum(a.nfe[kind] for a in answers) for kind in statistics.nfe}
    if not reuse:
        assert (statistics.reused_tokens, statistics.kept_prefixes) == (0, 0)


def check_events(engine: nemodiff.LoadedEngine, request: Request, events: list[nemodiff.Event]) -> nemodiff.Generation:
    """One request's stream: its order, and that its parts add up to its end."""
    first, last = events[0], events[-1]
    assert isinstance(first, nemodiff.Started)
    assert isinstance(last, nemodiff.Finished)
    answer = last.generation
    check(engine, request, answer)
    assert "".join(e.text for e in events if isinstance(e, nemodiff.Text)) == answer.text
    steps = [e for e in events if isinstance(e, nemodiff.Step)]
    assert {kind: sum(s.kind == kind for s in steps) for kind in answer.nfe} == answer.nfe
    assert first.reused_tokens == answer.reused_tokens
    decided = {c.position: c.token for s in steps if s.kind != "draft" for c in s.committed}
    start = answer.prompt_tokens
    eos = engine.info.model.eos_ids
    emitted = dict(enumerate(answer.token_ids, start))
    filled = {at for at, token in emitted.items() if token in eos and at not in decided}  # by the rule on EOS
    assert {at: token for at, token in emitted.items() if at not in filled}.items() <= decided.items()
    blocks, out = list[int](), 0
    for step in steps:
        if step.kept is not None:
            assert step.kept <= step.emitted - out
            assert step.after[: step.kept] == step.before[1 : step.kept + 1]
            assert step.refused == step.before[step.kept + 1 :][: len(step.refused)]
        out = step.emitted
        if step.kind in FILLING and blocks[-1:] != [step.start]:
            blocks.append(step.start)
        if step.kind == "commit" and len(step.committed) > 1:  # masks stand after what is committed
            blocks.append(step.start + request.options.block_length)
    assert [e.start for e in events if isinstance(e, nemodiff.BlockStarted)] == blocks
    return answer


def test_waiting_requests_start_in_the_order_they_came(engine: nemodiff.LoadedEngine) -> None:
    with nemodiff.Scheduler(engine, rows=2) as scheduler:
        handles = [scheduler.submit([130 + i], mode="ar", max_new_tokens=9) for i in range(12)]
        starts = [next(e.at for e in h if isinstance(e, nemodiff.Started)) for h in handles]
    assert starts == sorted(starts)


def test_a_full_queue_refuses_with_one_line_and_recovers(engine: nemodiff.LoadedEngine) -> None:
    slow, gate = gated(engine)
    with nemodiff.Scheduler(slow, rows=1, waiting=2) as scheduler:
        handles = [scheduler.submit([140 + i], max_new_tokens=3) for i in range(3)]
        with pytest.raises(nemodiff.BusyError, match=r"^3 requests running or waiting, allowed: 1 and 2; [^\n]+$"):
            scheduler.submit([150], max_new_tokens=3)
        handles[-1].cancel()  # a waiting request ends at once, though the running one stands still
        gate.set()
        for handle in handles[:-1]:
            assert handle.result(PATIENCE).finish_reason in ("stop", "length")
        last = handles[-1].result(PATIENCE)
        assert (last.finish_reason, last.token_ids, last.text) == ("cancelled", [], "")
        assert min(last.timings_ms.values()) >= 0 < last.timings_ms["queued"]
        assert scheduler.submit([150], max_new_tokens=3).result(PATIENCE).token_ids
    with pytest.raises(nemodiff.BusyError, match="closed"):
        scheduler.submit([1])


def test_answers_to_one_prompt_encode_it_once(engine: nemodiff.LoadedEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever else differs, such as the options, each answer is the one that its request would get alone."""
    encoded = list[str]()
    encode_plain = engine.text.encode_plain

    def count(text: str) -> list[int]:
        encoded.append(text)
        return encode_plain(text)

    prompt, other = "Count from 3 to 9.", "Sort: b, a."
    requests: list[tuple[str, dict[str, Any]]] = [
        *((prompt, {"max_new_tokens": 8, "temperature": 2.0, "seed": seed, "stop": ["zz"]}) for seed in (4, 5, 6)),
        (prompt, {"max_new_tokens": 5, "temperature": 2.0, "seed": 4, "mode": "auto"}),
        *((other, {"max_new_tokens": 8, "temperature": 2.0, "seed": seed, "chat": False}) for seed in (4, 5)),
    ]
    expected = [nemodiff.generate(engine, one, **options) for one, options in requests]
    monkeypatch.setattr(engine.text, "encode_plain", count)
    with nemodiff.Scheduler(engine, rows=3) as scheduler:
        answers = [handle.result(PATIENCE) for handle in scheduler.submit_many(requests)]
    assert [answer.text for answer in answers] == [one.text for one in expected]
    assert len({answer.text for answer in answers}) > 4
    assert [sum(text in part for part in encoded) for text in (prompt, other)] == [2, 1]


def test_several_requests_are_queued_all_or_none(engine: nemodiff.LoadedEngine) -> None:
    slow, gate = gated(engine)
    heard: list[tuple[int, Any]] = []

    def many(count: int) -> list[tuple[list[int], dict[str, Any]]]:
        return [([140 + i], {"max_new_tokens": 3}) for i in range(count)]

    with nemodiff.Scheduler(slow, rows=2, waiting=3) as scheduler:
        with pytest.raises(nemodiff.RequestError, match=r"^6 answers are asked for at once, allowed: 5 \(2 .* 3 "):
            scheduler.submit_many(many(6))
        with pytest.raises(nemodiff.RequestError, match="max_new_tokens is 0"):
            scheduler.submit_many([*many(2), ([150], {"max_new_tokens": 0})])
        first = scheduler.submit([150], max_new_tokens=3)
        with pytest.raises(nemodiff.BusyError, match=r"^1 request running or waiting, and 5 more are asked for, allow"):
            scheduler.submit_many(many(5))
        statistics = scheduler.statistics
        assert statistics.running + statistics.waiting == 1
        handles = scheduler.submit_many(many(4), listener=lambda *outcome: heard.append(outcome))
        gate.set()
        answers = [handle.result(PATIENCE) for handle in (first, *handles)]
        assert scheduler.submit_many([]) == []
    assert [a.token_ids for a in answers[1:]] == [
        nemodiff.generate(engine, prompt, **options).token_ids for prompt, options in many(4)
    ]
    for index in range(4):
        assert isinstance([outcome for place, outcome in heard if place == index][-1][-1], nemodiff.Finished)


class Gated(ToyEngine):
    """Every forward waits for the gate."""

    gate: threading.Event

    def open(self, rows: int) -> Any:
        cache = super().open(rows)
        forward = cache.forward

        def waiting(passes: Any, first: int = 0) -> Any:
            assert self.gate.wait(PATIENCE)
            return forward(passes, first)

        cache.forward = waiting  # type: ignore[method-assign]
        return cache


def gated(engine: nemodiff.LoadedEngine) -> tuple[nemodiff.LoadedEngine, threading.Event]:
    """The engine standing still until the event is set."""
    backend = Gated(engine.info)
    backend.gate = threading.Event()
    backend.gate.set()
    slow = dataclasses.replace(engine, backend=backend)
    assert slow.cost.curve.times  # measured while the gate is open
    backend.gate.clear()
    return slow, backend.gate


def test_closing_without_draining_cancels(engine: nemodiff.LoadedEngine) -> None:
    slow, gate = gated(engine)
    scheduler = nemodiff.Scheduler(slow, rows=2)
    handles = [scheduler.submit([130 + i], max_new_tokens=30, mode="ar") for i in range(5)]
    threading.Timer(0.05, gate.set).start()
    scheduler.close(drain=False)
    assert {h.result(0).finish_reason for h in handles} <= {"cancelled", "stop"}
    assert handles[-1].result(0).finish_reason == "cancelled"
    assert backend(slow).open_caches == 0


def test_an_engine_error_fails_what_runs_and_the_rest_goes_on(engine: nemodiff.LoadedEngine) -> None:
    broken, gate = gated(engine)
    backend(broken).fails_at = {backend(broken).forwards + 4}
    with nemodiff.Scheduler(broken, rows=2) as scheduler:
        handles = [scheduler.submit([130 + i], max_new_tokens=20, mode="ar") for i in range(5)]
        gate.set()
        for handle in handles[:2]:
            with pytest.raises(nemodiff.EngineError, match=r"^the engine failed \(the device has gone\); [^\n]+$"):
                handle.result(PATIENCE)
            with pytest.raises(nemodiff.EngineError):
                list(handle)
        for i, handle in enumerate(handles[2:], 2):
            expected = nemodiff.generate(engine, [130 + i], max_new_tokens=20, mode="ar")
            assert handle.result(PATIENCE).token_ids == expected.token_ids
        assert (scheduler.statistics.failed, scheduler.statistics.finished) == (2, 3)


def test_an_engine_that_cannot_open_a_cache_hangs_nobody(
    engine: nemodiff.LoadedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(rows: int) -> Any:
        raise MemoryError

    broken = toy(engine)
    broken.cost.curve  # noqa: B018  (measured while it still works)
    monkeypatch.setattr(broken.backend, "open", refuse)
    with nemodiff.Scheduler(broken, rows=2) as scheduler:
        for handle in [scheduler.submit([130], max_new_tokens=3) for _ in range(5)]:
            with pytest.raises(nemodiff.EngineError, match=r"MemoryError"):
                handle.result(PATIENCE)


def test_one_request_with_broken_numbers_fails_alone(
    engine: nemodiff.LoadedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A denoise pass that commits nothing would never end; the row beside it is not affected."""
    from stand_ins.toy_engine import ToyCache

    monkeypatch.setattr(ToyCache, "_commit", lambda self, ids, *rest: ids.copy())
    with nemodiff.Scheduler(engine, rows=2) as scheduler:
        bad = scheduler.submit([130], mode="diffusion", max_new_tokens=20)
        good = scheduler.submit([131], mode="ar", max_new_tokens=20)
        with pytest.raises(nemodiff.EngineError, match="committed no token"):
            bad.result(PATIENCE)
        assert good.result(PATIENCE).token_ids
        assert len(scheduler.statistics.nfe) == 6


@pytest.mark.parametrize("place", ["passed", "finished", "listener"])
def test_a_request_that_cannot_be_told_of_fails_alone(
    engine: nemodiff.LoadedEngine, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    def broken(self: Reporter, *given: Any) -> Any:
        if self.sequence.prompt == [130]:
            raise RecursionError("too deep")
        return told(self, *given)

    def deaf(outcome: Any) -> None:
        raise RecursionError("too deep")

    slow, gate = gated(engine)
    listener = deaf if place == "listener" else None
    if place != "listener":
        told = getattr(Reporter, place)
        monkeypatch.setattr(Reporter, place, broken)
    with nemodiff.Scheduler(slow, rows=2) as scheduler:
        good = scheduler.submit([131], mode="ar", max_new_tokens=20)
        bad = scheduler.submit([130], mode="ar", max_new_tokens=20, listener=listener)
        waiting = scheduler.submit([132], mode="ar", max_new_tokens=20)
        dropped = scheduler.submit([130], mode="ar", max_new_tokens=20, listener=listener)
        dropped.cancel()
        gate.set()
        for handle in (bad, *(() if place == "passed" else (dropped,))):
            with pytest.raises(nemodiff.EngineError, match=r"too deep"):
                handle.result(PATIENCE)
        for number, handle in ((131, good), (132, waiting)):
            expected = nemodiff.generate(engine, [number], max_new_tokens=20, mode="ar")
            assert handle.result(PATIENCE).token_ids == expected.token_ids
        ended = scheduler.statistics
    assert (ended.running, ended.waiting, ended.finished) == (0, 0, 2)
    assert ended.failed + ended.cancelled == 2


def test_an_error_of_a_listener_says_so(engine: nemodiff.LoadedEngine) -> None:
    def deaf(outcome: Any) -> None:
        raise KeyError("mine")

    said = r"^the request's listener failed \(KeyError: 'mine'\); mend it, the engine goes on$"
    with nemodiff.Scheduler(engine, rows=1) as scheduler:
        handle = scheduler.submit([130], mode="ar", max_new_tokens=5, listener=deaf)
        with pytest.raises(nemodiff.EngineError, match=said) as failed:
            handle.result(PATIENCE)
    assert isinstance(failed.value.__cause__, KeyError)


@pytest.mark.parametrize("request_", ["Hi", ("Hi",), ("Hi", None), ("Hi", {}, {}), 5])
def test_what_is_no_request_is_refused(engine: nemodiff.LoadedEngine, request_: Any) -> None:
    with (
        nemodiff.Scheduler(engine, rows=1) as scheduler,
        pytest.raises(
            nemodiff.RequestError, match=r"^a request is .*, allowed: a prompt and a mapping of its options$"
        ),
    ):
        scheduler.submit_many([([130], {"max_new_tokens": 1}), request_])


def test_a_request_that_has_ended_lets_go_of_its_listener(engine: nemodiff.LoadedEngine) -> None:
    class Asker:
        handle: nemodiff.Handle

        def hear(self, outcome: object) -> None:
            pass

    asker = Asker()
    gone = weakref.ref(asker)
    gc.disable()  # which would find the cycle of the two, some time
    try:
        with nemodiff.Scheduler(engine, rows=1) as scheduler:
            asker.handle = scheduler.submit([130], mode="ar", max_new_tokens=5, listener=asker.hear)
        del asker
        assert gone() is None
    finally:
        gc.enable()


def test_a_listener_may_close_the_scheduler(engine: nemodiff.LoadedEngine) -> None:
    """It is in the thread that closing waits for."""
    slow, gate = gated(engine)
    scheduler = nemodiff.Scheduler(slow, rows=1)
    handle = scheduler.submit([130], mode="ar", max_new_tokens=5, listener=lambda outcome: scheduler.close())
    waiting = scheduler.submit([131], mode="ar", max_new_tokens=5)
    gate.set()
    assert handle.result(PATIENCE).token_ids
    assert waiting.result(PATIENCE).token_ids
    with pytest.raises(nemodiff.BusyError, match="closed"):
        scheduler.submit([132])
    scheduler.close()


def test_a_cancelled_row_is_free_in_the_next_step(engine: nemodiff.LoadedEngine) -> None:
    batch = Batch(engine.backend, 2)
    first, second, third = (sequence(engine, Request((130 + i,), Options("ar", 30))) for i in range(3))
    batch.add(first)
    batch.add(second)
    list(batch.step())
    batch.remove(first)
    batch.add(third)
    assert {s.sequence for s in batch.step()} == {second, third}
    batch.close()


def test_a_long_prompt_does_not_stall_the_others(engine: nemodiff.LoadedEngine) -> None:
    """While 900 tokens are prefilled in pieces of 100, a decoding row gets a token in every step."""
    batch = Batch(engine.backend, 3, cost=PassCosts(STEEP), prefill_tokens=100)
    runner = sequence(engine, Request((130,), Options("ar", 300)))
    batch.add(runner)
    list(batch.step())
    long, second = (
        sequence(engine, Request(tuple(130 + i * i % 500 for i in range(900)), Options("ar", 5, prefill_chunk=100)))
        for _ in range(2)
    )
    batch.add(long)
    batch.add(second)
    steps = 0
    while not second.tokens and not runner.finish:
        had = len(runner.tokens)
        served = list(batch.step())
        assert len(runner.tokens) == had + 1
        assert sum(s.pass_.ids.size for s in served if s.pass_.kind == "prefill") <= 100
        assert all(s.rows == 1 for s in served if s.pass_.kind == "prefill")  # nobody is padded to 100
        steps += 1
        assert (second.nfe["prefill"] > 0) <= bool(long.tokens)  # in order of arrival
    assert runner.finish or steps >= 18
    batch.close()


def test_a_shared_system_prompt_is_computed_once(engine: nemodiff.LoadedEngine) -> None:
    prompts = [[*SYSTEM, 300 + i] for i in range(6)]
    for reuse, reused in ((True, 5 * len(SYSTEM)), (False, 0)):
        answers = list(nemodiff.generate_many(engine, prompts, rows=3, prefix_reuse=reuse, mode="ar", max_new_tokens=8))
        assert sum(a.reused_tokens for a in answers) == reused
        assert [a.token_ids for a in answers] == [
            nemodiff.generate(engine, p, mode="ar", max_new_tokens=8).token_ids for p in prompts
        ]


def test_a_conversation_reuses_its_own_turns(engine: nemodiff.LoadedEngine) -> None:
    with nemodiff.Scheduler(engine, rows=1) as scheduler:
        turn, before = list(SYSTEM), 0
        for number in range(4):
            answer = scheduler.submit(turn, mode=MODES[number], max_new_tokens=12).result(PATIENCE)
            assert answer.token_ids == nemodiff.generate(engine, turn, mode=MODES[number], max_new_tokens=12).token_ids
            assert answer.reused_tokens >= before
            before = answer.prompt_tokens
            turn = [*turn, *answer.token_ids, 400 + number, 401]
        assert scheduler.statistics.kept_prefixes == 1


def test_memory_of_long_requests_is_given_back_when_idle(engine: nemodiff.LoadedEngine) -> None:
    open_caches = backend(engine).open_caches
    with nemodiff.Scheduler(engine, rows=2) as scheduler:
        scheduler.submit(SYSTEM, max_new_tokens=4).result(PATIENCE)
        eventually(lambda: scheduler.statistics.running == 0)
        assert scheduler.statistics.kept_slots >= len(SYSTEM)
        assert backend(engine).open_caches == open_caches + 1
        scheduler.submit([130], max_new_tokens=400, mode="ar").cancel()
        long = scheduler.submit([130 + i for i in range(300)], max_new_tokens=4)
        assert long.result(PATIENCE).reused_tokens == 0
        eventually(lambda: scheduler.statistics.running == 0)
        assert scheduler.statistics.kept_prefixes == 2  # as long as what is kept needs the cache
        for first in (200, 300):  # the kept prompts are short again, the cache is not
            scheduler.submit([first + i for i in range(20)], max_new_tokens=1).result(PATIENCE)
        eventually(lambda: backend(engine).open_caches == open_caches)
        assert (scheduler.statistics.kept_prefixes, scheduler.statistics.slots) == (0, 0)
        assert scheduler.submit(SYSTEM, max_new_tokens=4).result(PATIENCE).reused_tokens == 0
    assert backend(engine).open_caches == open_caches


@settings(max_examples=100, deadline=None)
@given(sizes=st.lists(st.sampled_from([1, 2, 8, 32, 512]), min_size=1, max_size=7), base=st.floats(0, 100))
def test_cuts_are_the_cheapest_there_are(sizes: list[int], base: float) -> None:
    cost = CostCurve((1, 2), (base + 1, base + 2))

    def price(ends: tuple[int, ...]) -> float:
        return sum(cost.seconds(max(sizes[a:b]) * (b - a)) for a, b in itertools.pairwise((0, *ends)))

    cuts = split(tuple(sizes), cost)
    assert cuts[-1] == len(sizes)
    every = ((*cuts, len(sizes)) for n in range(len(sizes)) for cuts in itertools.combinations(range(1, len(sizes)), n))
    assert price(tuple(cuts)) == pytest.approx(min(map(price, every)))


@given(st.lists(st.integers(0, 2), max_size=12), st.lists(st.integers(0, 2), max_size=12))
def test_common_prefix(a: list[int], b: list[int]) -> None:
    expected = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    assert common(a, b) == expected


def test_kept_prefixes_are_bounded_and_the_least_used_goes() -> None:
    prefixes = PrefixCache(4, 2)
    one, two, three = ([n] * 40 for n in (1, 2, 3))
    assert [prefixes.keep(one), prefixes.keep(two)] == [4, 5]
    assert prefixes.keep([*one, 7]) == 4  # it extends what is there
    assert prefixes.keep([*one, 8]) is None  # half of it is there
    assert prefixes.find([*two, 9]) == (5, 40)
    assert prefixes.keep(three) == 4
    assert (prefixes.count, prefixes.tokens, prefixes.longest) == (2, 80, 40)
    assert prefixes.find([*one, 7])[1] == 0
    assert PrefixCache(4, 0).keep(one) is None
    assert prefixes.keep([5] * 15) is None


@pytest.fixture(scope="module")
def mixed(real: nemodiff.LoadedEngine) -> Iterator[nemodiff.Scheduler]:
    with nemodiff.Scheduler(real, rows=4) as scheduler:
        yield scheduler


@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_mixed_requests_on_the_real_engine_equal_themselves_alone(
    real: nemodiff.LoadedEngine, mixed: nemodiff.Scheduler, seed: int
) -> None:
    rng = random.Random(seed)
    schedule = []
    for _ in range(6):
        messages = [{"role": "user", "content": f"Count from {rng.randint(1, 9)} to {rng.randint(10, 20)}."}]
        if rng.random() < 0.7:
            messages = [{"role": "system", "content": "Answer shortly, and in the form that was asked for."}, *messages]
        options = {"mode": rng.choice(MODES), "max_new_tokens": rng.randint(1, 40), "block_length": rng.choice([4, 8])}
        schedule.append((messages, options))
    handles = [mixed.submit(messages, **options) for messages, options in schedule]
    for (messages, options), handle in zip(schedule, handles, strict=True):
        assert handle.result(PATIENCE).token_ids == nemodiff.generate(real, messages, **options).token_ids
    assert mixed.statistics.reused_tokens > 0


def test_a_listener_hears_all_events_and_the_error_of_a_failure(engine: nemodiff.LoadedEngine) -> None:
    heard: list[Any] = []
    with nemodiff.Scheduler(engine, rows=1) as scheduler:
        handle = scheduler.submit([200, 300, 400], steps=True, listener=heard.append, max_new_tokens=9)
        answer = handle.result(PATIENCE)
        events = [event for batch in heard for event in batch]
        assert list(handle) == []
        assert isinstance(events[-1], nemodiff.Finished)
        assert events[-1].generation == answer
        assert "".join(e.text for e in events if isinstance(e, nemodiff.Text)) == answer.text
        heard.clear()
        backend(engine).fails_at = {backend(engine).forwards + 1}
        failing = scheduler.submit([200, 300, 400], listener=heard.append)
        with pytest.raises(nemodiff.EngineError):
            failing.result(PATIENCE)
    assert [type(batch) for batch in heard] == [nemodiff.EngineError]

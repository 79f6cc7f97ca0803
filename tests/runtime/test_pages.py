"""Rows of pages: sharing, copy on write, eviction, admission, preemption and cancel, and no page is ever lost.

Schedules are random and run on an engine without a model (`toy_engine`), whose answers are a hash of exactly what each
query sees, so a page that is shared, copied or given away wrongly changes an answer.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import gc
import itertools
import random
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import eventually
from hypothesis import given, settings
from hypothesis import strategies as st
from stand_ins.toy_engine import PagedToyCache, PagedToyEngine, ToyFlight, toy

import nemodiff
from nemodiff.contract import MODES, PAGE
from nemodiff.runtime.batching.batch import Batch
from nemodiff.runtime.engines.pages import Copy, Pages
from nemodiff.runtime.engines.passes import Pass, causal
from nemodiff.runtime.planning.cost import CostCurve
from nemodiff.runtime.planning.pass_costs import PassCosts
from nemodiff.runtime.requests.options import Options
from nemodiff.runtime.requests.prepare import prepare
from nemodiff.runtime.requests.sequence import Sequence

SYSTEM = [200 + i * 7 % 300 for i in range(150)]


@pytest.fixture(scope="module")
def real(tiny_engine: Path) -> nemodiff.LoadedEngine:
    return nemodiff.load(tiny_engine, threads=1)


@pytest.fixture(scope="module")
def dense(real: nemodiff.LoadedEngine) -> nemodiff.LoadedEngine:
    return toy(real)


def paged(real: nemodiff.LoadedEngine, pages: int, *, late: bool = False, ahead: bool = False) -> nemodiff.LoadedEngine:
    return dataclasses.replace(real, backend=PagedToyEngine(real.info, pages, late=late, ahead=ahead))


def backend(engine: nemodiff.LoadedEngine) -> PagedToyEngine:
    assert isinstance(engine.backend, PagedToyEngine)
    return engine.backend


def opened(count: int, rows: int = 3) -> tuple[Pages, list[int]]:
    pages = Pages(count, 8, 8)
    numbers = pages.open(rows)
    assert numbers is not None
    return pages, numbers


def test_a_row_takes_a_page_at_its_border() -> None:
    pages, (a, *_) = opened(5)
    assert pages.reserve(a, 0, PAGE) == []
    assert pages.free == 4
    assert pages.reserve(a, PAGE - 1, PAGE) == []
    assert pages.free == 4
    assert pages.reserve(a, PAGE, PAGE + 1) == []
    assert pages.free == 3
    page = pages.table[a, :2].tolist()
    slots = pages.slots_of(a, np.array([PAGE - 1, PAGE]))
    assert slots.tolist() == [page[0] * PAGE + PAGE - 1, page[1] * PAGE]
    assert pages.table[a, 2:].tolist() == [0] * 6


def test_what_is_shared_is_copied_before_it_is_written() -> None:
    pages, (a, b, c) = opened(6)
    pages.reserve(a, 0, 3 * PAGE)
    before = pages.table[a].tolist()
    assert pages.share(a, b, 2 * PAGE + 1) == 2 * PAGE + 1
    assert pages.free == 3
    assert pages.table[b].tolist() == before
    (copy,) = pages.reserve(b, 2 * PAGE + 1, 2 * PAGE + 9) or ()
    assert copy == Copy(before[2], pages.table[b, 2])
    assert pages.table[b, :2].tolist() == before[:2]
    assert pages.reserve(a, 2 * PAGE + 1, 3 * PAGE) == []  # it is alone with its page again
    pages.share(b, c, PAGE)
    pages.close([a, b, c])
    assert pages.free == 6


def test_memory_that_is_short_changes_nothing() -> None:
    pages, (a, b, _) = opened(3)
    pages.reserve(a, 0, 2 * PAGE)
    pages.share(a, b, 2 * PAGE)
    assert pages.reserve(b, PAGE, 3 * PAGE) is None  # a copy and a new page, where one is free
    assert pages.table[a].tolist() == pages.table[b].tolist()
    assert pages.free == 1
    pages.drop(b)
    pages.set_spare(a)
    assert pages.reserve(a, 0, 4 * PAGE) is None  # a row is not emptied for itself
    assert np.count_nonzero(pages.table[a]) == 2


def test_spare_rows_go_first_the_oldest_before_the_others() -> None:
    pages, (a, b, c) = opened(4)
    for row in (a, b):
        pages.reserve(row, 0, PAGE)
        before = pages.freed
        pages.set_spare(row)
        assert pages.freed > before  # else who waits for pages would not look
    assert (pages.free, pages.spare) == (2, 2)
    pages.share(a, c, PAGE)  # a has been used after b
    assert pages.spare == 1
    assert pages.reserve(c, PAGE, 4 * PAGE) == []
    assert pages.table[b].tolist() == [0] * 8
    assert pages.share(b, a, PAGE) == 0


def test_no_row_without_pages_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nemodiff.runtime.engines.pages._PATIENCE", 0.01)
    pages, (a, *_) = opened(1)
    pages.reserve(a, 0, PAGE)
    looks = itertools.count()
    assert not pages.wait(pages.freed, lambda: next(looks) > 9)


def test_spare_pages_may_be_counted_while_another_thread_closes_rows() -> None:
    """As the statistics of a server do; the rows are closed before each of the instructions in turn."""
    for moment in itertools.count():
        pages, rows = opened(5)
        for row in rows:
            pages.reserve(row, 0, PAGE)
            pages.set_spare(row)
        instructions = itertools.count()

        def close(frame: Any, event: str, _: object) -> Any:
            frame.f_trace_opcodes = True
            if event == "opcode" and next(instructions) == moment:  # noqa: B023  (it is called in this turn)
                pages.close(rows)  # noqa: B023
            return close

        before = sys.gettrace()
        sys.settrace(close)
        try:
            spare = pages.spare
        finally:
            sys.settrace(before)
        assert 0 <= spare <= 3
        if pages.open_rows:
            break
    assert moment > 9


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5), st.integers(0, 5), st.integers(1, 6 * PAGE))))
def test_pages_are_counted(steps: list[tuple[int, int, int, int]]) -> None:
    """After anything, each page is free or held by exactly as many rows as its count says."""
    pages, rows = opened(9, rows=6)
    for what, one, other, slots in steps:
        a, b = rows[one], rows[other]
        if what == 0:
            pages.reserve(a, max(0, slots - 70), slots)
        elif what == 1 and a != b:
            pages.share(a, b, slots)
        elif what == 2:
            pages.drop(a)
        elif what == 3:
            pages.set_spare(a)
        held = [page for row in rows for page in pages._rows[row]]
        assert pages._holders[1:] == [held.count(page) for page in range(1, 10)]
        assert sorted(pages._free) == sorted(set(range(1, 10)) - set(held))
        for row in rows:
            np.testing.assert_array_equal(np.trim_zeros(pages.table[row], "b"), pages._rows[row])
    pages.close(rows)
    assert pages.free == 9


# --- whole requests ---


def requests() -> st.SearchStrategy[tuple[list[int], dict[str, Any]]]:
    prompts = st.builds(
        lambda system, length, salt: [*SYSTEM[:system], *(130 + (salt * i * i + salt) % 500 for i in range(length))],
        st.sampled_from([0, 64, 100, 150]),
        st.integers(1, 90),
        st.integers(1, 3),
    )
    options = st.builds(
        lambda mode, **rest: {"mode": mode, "merge_commit": mode == "diffusion", **rest},
        mode=st.sampled_from(MODES),
        max_new_tokens=st.integers(1, 60),
        block_length=st.sampled_from([1, 5, 8]),
        groups=st.sampled_from(["all"]),
        prefill_chunk=st.sampled_from([30, 512]),
        temperature=st.sampled_from([0.0, 0.0, 0.8]),
    )
    return st.tuples(prompts, options)


@settings(max_examples=40, deadline=None)
@given(
    data=st.data(),
    rows=st.integers(1, 5),
    kept=st.sampled_from([None, 0, 1, 3]),
    count=st.sampled_from([14, 16, 24, 60]),
    budget=st.sampled_from([1, 30, 512]),
    late=st.booleans(),
    ahead=st.booleans(),
)
def test_any_schedule_gives_what_each_request_gives_alone(
    dense: nemodiff.LoadedEngine,
    real: nemodiff.LoadedEngine,
    data: st.DataObject,
    rows: int,
    kept: int | None,
    count: int,
    budget: int,
    late: bool,
    ahead: bool,
) -> None:
    """With memory for all of them, or for hardly more than one."""
    waiting = data.draw(st.lists(requests(), min_size=1, max_size=7))
    engine = paged(real, count, late=late, ahead=ahead)
    pages = backend(engine).pages
    batch = Batch(engine.backend, rows, kept=kept, prefill_tokens=budget)
    running: dict[Sequence, tuple[list[int], dict[str, Any]]] = {}
    idle = 0
    while waiting or running:
        while waiting and len(batch) < rows and (not running or data.draw(st.booleans(), label="joins")):
            prompt, options = waiting.pop()
            new = prepare(engine, prompt, Options(**options))
            running[new] = (prompt, options)
            batch.add(new)
        if len(running) > 1 and data.draw(st.integers(0, 14), label="cancel?") == 0:
            victim = data.draw(st.sampled_from(sorted(running, key=lambda s: s.submitted)), label="cancelled")
            batch.remove(victim)
            prompt, options = running.pop(victim)
            assert victim.tokens == nemodiff.generate(dense, prompt, **options).token_ids[: len(victim.tokens)]
        served = list(batch.step())
        idle = 0 if served else idle + 1
        assert idle < 100  # a step may compute again what a row has lost, and then yields nothing
        for done in [s for s in running if s.ended]:
            prompt, options = running.pop(done)
            assert done.tokens == nemodiff.generate(dense, prompt, **options).token_ids
        assert len(batch) == len(running)
    batch.close()
    assert (pages.free, pages.open_rows) == (count, 0)


def test_the_youngest_gives_its_pages_up_and_goes_on_later(
    dense: nemodiff.LoadedEngine, real: nemodiff.LoadedEngine
) -> None:
    engine = paged(real, 7)
    batch = Batch(engine.backend, 3)
    prompts = [[130 + i + n for n in range(60)] for i in range(3)]
    options: dict[str, Any] = {"mode": "ar", "max_new_tokens": 150, "min_tokens": 150}
    sequences = [prepare(engine, prompt, Options(**options)) for prompt in prompts]
    for sequence in sequences:
        batch.add(sequence)
    ends = list[Sequence]()
    while len(batch):
        ends += [result.sequence for result in batch.step() if result.sequence.ended]
    assert ends[-1] is sequences[2]
    assert batch.counts.preempted > 0
    assert batch.counts.rebuilt > 60
    for prompt, sequence in zip(prompts, sequences, strict=True):
        assert sequence.tokens == nemodiff.generate(dense, prompt, **options).token_ids
    batch.close()
    assert batch.counts.padding == 0


def test_prompts_and_what_is_computed_again_keep_to_the_budget(
    real: nemodiff.LoadedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = collections.Counter[int]()
    launch = PagedToyCache.launch

    def noted(cache: PagedToyCache, passes: list[Pass], rows: list[int]) -> ToyFlight:
        sizes[sum(each.ids.size for each in passes if each.kind == "prefill")] += 1
        return launch(cache, passes, rows)

    monkeypatch.setattr(PagedToyCache, "launch", noted)
    engine = paged(real, 7)
    batch = Batch(engine.backend, 3, prefill_tokens=100)
    for n in range(3):
        prompt = [130 + n + i for i in range(60)]
        batch.add(prepare(engine, prompt, Options("ar", 150, min_tokens=150, prefill_chunk=100)))
    while len(batch):
        list(batch.step())
    batch.close()
    assert batch.counts.preempted > 0
    assert max(sizes) == 100
    assert sizes[60] >= 3


def test_ar_runs_a_pass_ahead_and_drops_what_comes_after_the_end(
    dense: nemodiff.LoadedEngine, real: nemodiff.LoadedEngine
) -> None:
    """The limit is known before, EOS and a stop string are not: they cost one token that is computed for nobody."""
    ends = list[str | None]()
    for number in range(24):
        prompt, limit = SYSTEM[number : number + 20], 4 + number
        options: dict[str, Any] = {"mode": "ar", "max_new_tokens": limit}
        if number % 3 == 0:
            options["stop"] = nemodiff.generate(dense, prompt, mode="ar", max_new_tokens=4).text[-2:]
        expected = nemodiff.generate(dense, prompt, **options)
        engine = paged(real, 12, ahead=True)
        cost = PassCosts(CostCurve((1, 32), (1.0, 2.0)))
        batch = Batch(engine.backend, 1, kept=1, cost=cost)
        sequence = prepare(engine, prompt, Options(**options))
        batch.add(sequence)
        while len(batch):
            list(batch.step())
        assert sequence.tokens == expected.token_ids
        assert sequence.nfe == expected.nfe
        dropped = int(len(sequence.tokens) < limit)
        passes = sum(expected.nfe.values())
        assert (backend(engine).forwards, backend(engine).followed.total()) == (passes + dropped, passes - 1 + dropped)
        list(batch.step())
        assert (batch.counts.forwards, batch.counts.padding) == (passes + dropped, dropped)
        assert cost._learned == passes + dropped - expected.nfe["prefill"]
        batch.close()
        assert backend(engine).pages.free == 12
        ends.append(expected.finish_reason)
    assert {ends.count("stop") > 3, ends.count("length") > 3} == {True}


@pytest.mark.parametrize("late", [False, True])
def test_rows_of_ar_run_ahead_together(dense: nemodiff.LoadedEngine, real: nemodiff.LoadedEngine, late: bool) -> None:
    """Others join and leave in between: rows of other modes, or with a grammar, penalties, logprobs, stop strings."""
    engine = paged(real, 60, late=late, ahead=True)
    kinds: list[dict[str, Any]] = [
        *({} for _ in range(8)),
        {"mode": "linear_spec", "block_length": 6},
        {"repetition_penalty": 1.3},
        {"logprobs": 1},
        {"temperature": 0.9, "seed": 5},
        {"regex": "[a-z]{9,30}"},
        {"mode": "diffusion", "block_length": 5},
    ]
    asked = [
        (SYSTEM[: 30 + 4 * n % 64], {"mode": "ar", "max_new_tokens": 20 + 7 * n, **kind})
        for n, kind in enumerate([*kinds, *kinds])
    ]
    with nemodiff.Scheduler(engine, rows=4) as scheduler:
        handles = [scheduler.submit(prompt, **options) for prompt, options in asked]
        cancelled = scheduler.submit(SYSTEM[:40], mode="ar", max_new_tokens=900, min_tokens=0)
        next(iter(cancelled))
        cancelled.cancel()
        for handle, (prompt, options) in zip(handles, asked, strict=True):
            expected = nemodiff.generate(dense, prompt, **options)
            assert handle.result(20).token_ids == expected.token_ids
            assert handle.result().nfe == expected.nfe
        assert cancelled.result(20).finish_reason in ("cancelled", "stop")
        assert scheduler.statistics.reused_tokens > 0
    assert backend(engine).followed.total() > 0
    assert backend(engine).pages.free == 60


def test_a_request_that_can_never_fit_is_refused_with_numbers(real: nemodiff.LoadedEngine) -> None:
    engine = paged(real, 4)
    with pytest.raises(nemodiff.RequestError, match=r"has 100 tokens and .* is 200, .* holds 256 in mode ar"):
        nemodiff.generate(engine, SYSTEM[:100], mode="ar", max_new_tokens=200)
    assert nemodiff.generate(engine, SYSTEM[:100], mode="ar", max_new_tokens=156).token_ids


def test_a_system_prompt_is_held_once(real: nemodiff.LoadedEngine) -> None:
    engine = paged(real, 40)
    pages = backend(engine).pages
    batch = Batch(engine.backend, 8, kept=4)
    for number in range(8):
        batch.add(prepare(engine, [*SYSTEM[:128], 400 + number], Options("ar", 20)))
    for _ in range(3):
        list(batch.step())
    assert batch.counts.reused == 7 * 128
    assert pages.count - pages.free == 2 + 8
    batch.close()


def test_who_waits_for_pages_sleeps_until_some_are_freed(
    dense: nemodiff.LoadedEngine, real: nemodiff.LoadedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By another cache: it is woken once, and asks for nothing meanwhile."""
    engine = paged(real, 6)
    other = engine.backend.open(1)
    other.forward([causal("prefill", [130] * 300, 0)])
    asked = list[int]()
    reserve = backend(engine).pages.reserve

    def counted(row: int, begin: int, end: int) -> list[Copy] | None:
        asked.append(row)
        copies: list[Copy] | None = reserve(row, begin, end)
        return copies

    monkeypatch.setattr(backend(engine).pages, "reserve", counted)
    with nemodiff.Scheduler(engine, rows=1) as scheduler:
        handle = scheduler.submit(SYSTEM[:100], mode="ar", max_new_tokens=9)
        eventually(lambda: bool(asked))
        time.sleep(0.05)
        assert len(asked) == 1
        other.free(0)
        assert (
            handle.result(5).token_ids == nemodiff.generate(dense, SYSTEM[:100], mode="ar", max_new_tokens=9).token_ids
        )


@pytest.mark.parametrize("ends", ["cancel", "close"])
def test_who_waits_for_pages_can_be_cancelled(real: nemodiff.LoadedEngine, ends: str) -> None:
    engine = paged(real, 6)
    other = engine.backend.open(1)
    other.forward([causal("prefill", [130] * 300, 0)])
    with nemodiff.Scheduler(engine, rows=1) as scheduler:
        handle = scheduler.submit(SYSTEM[:100], mode="ar", max_new_tokens=9)
        eventually(lambda: scheduler.statistics.steps > 0)
        time.sleep(0.02)
        if ends == "cancel":
            handle.cancel()
        else:
            scheduler.close(drain=False)
        assert handle.result(5).finish_reason == "cancelled"
    other.close()
    assert backend(engine).pages.free == 6


@pytest.mark.parametrize("closes", [False, True])
def test_answers_of_one_thread_do_not_wait_for_each_other(
    dense: nemodiff.LoadedEngine, real: nemodiff.LoadedEngine, monkeypatch: pytest.MonkeyPatch, closes: bool
) -> None:
    """Who is asked for the second cannot go on with the first meanwhile; one that another thread goes on with can."""
    monkeypatch.setattr("nemodiff.runtime.engines.pages._PATIENCE", 0.05)
    engine = paged(real, 5)
    options: dict[str, Any] = {"mode": "ar", "max_new_tokens": 40, "min_tokens": 40}
    one, two = (nemodiff.stream(engine, SYSTEM[n:], **options) for n in (0, 9))
    assert next(one)
    if closes:
        one.close()  # type: ignore[attr-defined]
    else:
        with pytest.raises(nemodiff.EngineError, match=r"128 of 320 slots.*this thread has begun.*generate_many"):
            next(two)
        assert list(one)[-1].token_ids == nemodiff.generate(dense, SYSTEM, **options).token_ids
        two = nemodiff.stream(engine, SYSTEM[9:], **options)
    assert list(two)[-1].token_ids == nemodiff.generate(dense, SYSTEM[9:], **options).token_ids
    assert (backend(engine).pages.free, backend(engine).pages.open_rows) == (5, 0)


def test_an_answer_may_pass_from_thread_to_thread(
    dense: nemodiff.LoadedEngine, real: nemodiff.LoadedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a web server's do: the one that holds the memory is gone on with elsewhere, so who waits goes on waiting."""
    monkeypatch.setattr("nemodiff.runtime.engines.pages._PATIENCE", 0.3)
    engine = paged(real, 5)
    options: dict[str, Any] = {"mode": "ar", "max_new_tokens": 40, "min_tokens": 40}
    one, two = (nemodiff.stream(engine, SYSTEM[n:], **options) for n in (0, 9))
    assert next(one)
    with concurrent.futures.ThreadPoolExecutor() as other:

        def rest() -> list[Any]:
            got = [next(one)]
            time.sleep(1)
            return [*got, *one]

        going = other.submit(rest)
        assert list(two)[-1].token_ids == nemodiff.generate(dense, SYSTEM[9:], **options).token_ids
        assert going.result(5)[-1].token_ids == nemodiff.generate(dense, SYSTEM, **options).token_ids


def test_who_waits_holds_no_page_that_others_wait_for(
    dense: nemodiff.LoadedEngine, real: nemodiff.LoadedEngine
) -> None:
    """Two begin with pages of a shorter request, which ends; neither has room for more while the other holds those."""
    engine = paged(real, 13)
    with nemodiff.Scheduler(engine, rows=2) as a, nemodiff.Scheduler(engine, rows=2) as b:
        other = engine.backend.open(1)
        other.forward([causal("prefill", [130] * 2 * PAGE, 0)])
        longer = list[tuple[nemodiff.Handle, list[int]]]()
        for scheduler, base in ((a, 150), (b, 170)):
            prompt = [base + n % 97 for n in range(300)]
            more = [*prompt, *range(140, 140 + 7 * PAGE)]
            short = (prompt, {"mode": "ar", "max_new_tokens": 20})
            longer.append((scheduler.submit_many([short, (more, {"mode": "ar", "max_new_tokens": 9})])[1], more))
            eventually(lambda: scheduler.statistics.finished == 1)  # noqa: B023  (asked at once)
            assert scheduler.statistics.reused_tokens == 300
        time.sleep(0.05)
        other.close()
        for handle, prompt in longer:
            expected = nemodiff.generate(dense, prompt, mode="ar", max_new_tokens=9)
            assert handle.result(10).token_ids == expected.token_ids
    assert (backend(engine).pages.free, backend(engine).pages.open_rows) == (13, 0)


@pytest.mark.parametrize("ahead", [False, True])
def test_a_failed_engine_gives_all_pages_back_at_once(
    dense: nemodiff.LoadedEngine, real: nemodiff.LoadedEngine, ahead: bool
) -> None:
    """Else who comes next would wait for them until Python happens to look for garbage."""
    engine = paged(real, 12, ahead=ahead)
    gc.disable()
    try:
        with nemodiff.Scheduler(engine, rows=2) as scheduler:
            backend(engine).said = dict.fromkeys(range(500), 200)  # no EOS
            for fails_behind in (1, 2, 4):
                backend(engine).fails_at = {backend(engine).forwards + fails_behind}
                with pytest.raises(nemodiff.EngineError, match="the device has gone"):
                    scheduler.submit(SYSTEM, mode="ar", max_new_tokens=300).result(20)
            backend(engine).said = {}
            expected = nemodiff.generate(dense, SYSTEM, mode="ar", max_new_tokens=9)
            assert scheduler.submit(SYSTEM, mode="ar", max_new_tokens=9).result(20).token_ids == expected.token_ids
            assert backend(engine).open_caches == 1
    finally:
        gc.enable()
    assert (backend(engine).pages.free, backend(engine).pages.open_rows) == (12, 0)


def test_a_prefix_that_was_given_up_for_another_is_counted_no_more(real: nemodiff.LoadedEngine) -> None:
    with nemodiff.Scheduler(paged(real, 2), rows=1) as scheduler:
        for prompt, kept in ((SYSTEM[:20], 1), (SYSTEM[20:40], 2), (SYSTEM[40:], 1)):  # of 1, 1 and 2 pages
            scheduler.submit(prompt, mode="ar", max_new_tokens=1).result(20)
            eventually(lambda: scheduler.statistics.running == 0)
            statistics = scheduler.statistics
            assert (statistics.kept_prefixes, statistics.slots) == (kept, 0)


def test_where_the_best_prefix_was_given_up_the_next_best_is_taken(real: nemodiff.LoadedEngine) -> None:
    engine = paged(real, 6)
    batch = Batch(engine.backend, 1, kept=4)
    reused = []
    for rest in (SYSTEM[:80], SYSTEM[80:], None, SYSTEM[:40] + SYSTEM[60:90]):
        prompt = SYSTEM[:PAGE] + rest if rest else SYSTEM[100:] + SYSTEM[:40]  # which needs what the first one has
        sequence = prepare(engine, prompt, Options(mode="ar", max_new_tokens=1))
        batch.add(sequence)
        while len(batch):
            list(batch.step())
        reused.append(sequence.reused)
    batch.close()
    assert reused == [0, PAGE, 0, PAGE]


def test_a_thousand_requests_leave_no_page_behind(real: nemodiff.LoadedEngine) -> None:
    rng = random.Random(1)
    engine = paged(real, 40)
    pages = backend(engine).pages
    with nemodiff.Scheduler(engine, rows=6, waiting=2000) as scheduler:
        handles = []
        for number in range(1000):
            prompt = [*SYSTEM[: rng.choice((0, 64, 90))], *(130 + number % 7 + n for n in range(rng.randint(1, 9)))]
            mode = MODES[number % 4]
            handles.append(scheduler.submit(prompt, mode=mode, max_new_tokens=rng.randint(1, 4), block_length=4))
            if rng.random() < 0.1:
                rng.choice(handles).cancel()
        for handle in handles:
            handle.result(60)
        assert pages.count - pages.free == pages.spare
    assert (pages.free, pages.open_rows) == (40, 0)

"""Passes that are begun before the host knows what those that they follow have given: nothing is other than without.

Over an engine without a model, over a card that lags behind its host, and over recorded graphs; docs/design.md.
"""

from __future__ import annotations

import collections
import dataclasses
import importlib
import itertools
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import equality
import numpy as np
import pytest
from oracle.reference import ReferenceModel
from oracle.reference import linear_spec as oracle_linear_spec
from stand_ins.chats import chat_ids
from stand_ins.checkpoints import TINY_CHAT, TINY_CHAT_2, write_checkpoint
from stand_ins.lagging_device import DEVICES, LaggingDevice
from stand_ins.torch_graphs import RecordingDevice
from stand_ins.torch_pair import (
    PROMPT,
    QUESTIONS,
    Asked,
    Pair,
    adapted,
    crowd,
    make_pair,
    one_leaves,
    torch_backend,
    without_times,
)
from stand_ins.toy_engine import PagedToyCache, PagedToyEngine

import nemodiff
from nemodiff.builder.build import Builder
from nemodiff.contract import PAGE
from nemodiff.engine_info import read_engine
from nemodiff.runtime.batching.batch import Batch
from nemodiff.runtime.engines.grouping import Grouping
from nemodiff.runtime.engines.passes import Feed, Following, Pass, Prediction, bidirectional, causal, with_masks
from nemodiff.runtime.engines.torch.engine import TorchEngine
from nemodiff.runtime.engines.torch.flat import FlatShape, Source, fill, flat_layouts
from nemodiff.runtime.generate import decode
from nemodiff.runtime.modes.ar import over_next
from nemodiff.runtime.modes.diffusion import _first as diffusion_first
from nemodiff.runtime.modes.diffusion import _last, _next
from nemodiff.runtime.modes.linear_spec import _draft, _first, _verify
from nemodiff.runtime.modes.quadratic_spec import _without_draft
from nemodiff.runtime.planning.pass_costs import PassCosts
from nemodiff.runtime.requests.options import Options
from nemodiff.runtime.requests.prepare import prepare
from nemodiff.runtime.requests.sequence import Sequence as Request

TEXT = [200 + i * 7 % 300 for i in range(150)]
LINEAR: dict[str, Any] = {"mode": "linear_spec"}


@pytest.fixture(scope="module")
def real(tiny_engine: Path) -> nemodiff.LoadedEngine:
    return nemodiff.load(tiny_engine, threads=1)


def toy(
    real: nemodiff.LoadedEngine, *, ahead: bool, pages: int = 60, late: bool = False, endless: bool = False
) -> nemodiff.LoadedEngine:
    backend = PagedToyEngine(real.info, pages, late=late, ahead=ahead)
    if endless:  # there is no EOS
        backend.said = dict.fromkeys(range(500), 200)
    return dataclasses.replace(real, backend=backend)


def told(request: Request) -> dict[str, Any]:
    """What a request has come to, times left out."""
    names = ("tokens", "finish", "nfe", "accepted", "verified", "adapter_tokens", "confidences")
    return {name: getattr(request, name) for name in names}


def told_by(answer: nemodiff.Generation) -> dict[str, Any]:
    """The same of an answer."""
    values = without_times(answer)
    return {name: value for name, value in values.items() if name not in ("reused_tokens", "logprobs")}


def run(engine: nemodiff.LoadedEngine, asked: Sequence[Asked], rows: int = 1) -> tuple[list[dict[str, Any]], Batch]:
    """Requests that join as rows become free, and their batch."""
    batch = Batch(engine.backend, rows, kept=1)
    requests = [prepare(engine, prompt, Options(**options)) for prompt, options in asked]
    waiting = list(reversed(requests))
    while waiting or len(batch):
        while waiting and len(batch) < rows:
            batch.add(waiting.pop())
        list(batch.step())
    list(batch.step())  # what was begun for nobody
    batch.close()
    return [told(request) for request in requests], batch


# --- over an engine without a model


def test_a_request_of_linear_spec_waits_at_its_ends_alone(real: nemodiff.LoadedEngine) -> None:
    """The last blocks may be shorter. A draft that is accepted whole moves the next one onto a page's first slot."""
    engine = toy(real, ahead=True, endless=True)  # all drafts are right
    backend = engine.backend
    assert isinstance(backend, PagedToyEngine)
    asked: Asked = (TEXT[:41], {**LINEAR, "block_length": 8, "max_new_tokens": 200})
    ((result,), batch) = run(engine, [asked])
    passes = result["nfe"]["draft"] + result["nfe"]["verify"]
    assert result["accepted"][:3] == [8, 8, 8]
    assert passes == 50
    gaps = passes - backend.followed.total()
    assert gaps <= 2  # the draft of the last block, which is shorter
    assert set(backend.followed) == {"draft", "verify"}
    assert batch.counts.padding == 0


def test_passes_that_are_begun_ahead_tell_what_they_cost(
    real: nemodiff.LoadedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = toy(real, ahead=True, endless=True)
    assert isinstance(engine.backend, PagedToyEngine)
    met, learn = list[int](), PassCosts.learn
    monkeypatch.setattr(PassCosts, "learn", lambda self, size, s: met.append(size) or learn(self, size, s))
    requests = [prepare(engine, TEXT[:40], Options(**LINEAR, block_length=8, max_new_tokens=80))]
    for _ in decode(engine.backend, requests, 1, costs=engine.cost):
        pass
    assert met == [8] * 18 + [7] * 2
    assert engine.backend.followed.total() > 17


def test_a_planned_linear_spec_waits_where_a_plan_is_made_alone(real: nemodiff.LoadedEngine) -> None:
    """Its verifies are of whole drafts, which are known before those are."""
    engine = toy(real, ahead=True, endless=True)
    backend = engine.backend
    assert isinstance(backend, PagedToyEngine)
    requests = [prepare(engine, TEXT[:40], Options(mode="linear_spec", block_length="auto", max_new_tokens=400))]
    for _ in decode(backend, requests, 1, costs=engine.cost):
        pass
    nfe = requests[0].nfe
    assert nfe["verify"] > 8
    assert backend.followed["verify"] >= nfe["verify"] - 1
    assert backend.followed["draft"] >= nfe["draft"] / 2


@pytest.mark.parametrize("block", [1, 2, 4, 5, 8, 32])
def test_limits_at_every_border(real: nemodiff.LoadedEngine, block: int) -> None:
    borders = {1, 2, *range(block - 1, block + 3), *range(2 * block - 1, 2 * block + 3), 4 * block + 1, 70}
    for limit in borders - {0}:
        asked = [(TEXT[n : n + 30], {**LINEAR, "block_length": block, "max_new_tokens": limit}) for n in (0, 9)]
        before, _ = run(toy(real, ahead=False), asked, rows=2)
        assert run(toy(real, ahead=True), asked, rows=2)[0] == before


def test_an_end_within_a_draft(real: nemodiff.LoadedEngine) -> None:
    """The loop's verify ends there and the one begun ahead does not; EOS, stop ids, stop strings, refused ones too."""
    eos = real.info.model.eos_ids[0]
    reasons, refused = collections.Counter[str](), 0
    followed = 0
    for at in range(2, 30, 3):  # at every place in a block of 7
        engine, plain = (toy(real, ahead=ahead) for ahead in (True, False))
        asked: list[Asked] = [(TEXT[at : at + 20], {**LINEAR, "block_length": 7, "max_new_tokens": 64})]
        asked.append((TEXT[:20], {**asked[0][1], "stop": [nemodiff.generate(plain, TEXT[:20], **LINEAR).text[3:5]]}))
        asked.append((TEXT[:20], {**asked[0][1], "stop_token_ids": [130 + 9 * at]}))
        for each in (engine, plain):
            assert isinstance(each.backend, PagedToyEngine)
            each.backend.said = {20 + at: eos}
        before, _ = run(plain, asked, rows=2)
        got, _ = run(engine, asked, rows=2)
        assert got == before
        reasons.update(result["finish"] for result in got)
        refused += sum(v < 7 for result in got for v in result["verified"][:-1])
        followed += engine.backend.followed.total()  # type: ignore[attr-defined]
    assert reasons["stop"] > 9
    assert followed > 99


def test_an_end_near_the_end_of_a_page(real: nemodiff.LoadedEngine) -> None:
    """The verify begun ahead goes on behind it, and so does the draft that follows; its row has a page there."""
    eos = real.info.model.eos_ids[0]
    for begin, end in itertools.product((36, 40, 44), (1, 2, 5, 9, 15)):
        engine = toy(real, ahead=True)
        assert isinstance(engine.backend, PagedToyEngine)
        engine.backend.said = {**dict.fromkeys(range(500), 200), begin + end: eos}  # all drafts are right
        (result,), _ = run(engine, [(TEXT[:begin], {**LINEAR, "block_length": 16, "max_new_tokens": 64})], rows=1)
        assert result["tokens"] == [200] * end + [eos]


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(("pages", "rows"), [(10, 4), (60, 4), (60, 17)])
def test_rows_of_all_modes_and_arrivals(
    real: nemodiff.LoadedEngine, monkeypatch: pytest.MonkeyPatch, late: bool, pages: int, rows: int
) -> None:
    """With memory for all, and with so little that there are no pages for a shift and rows lose theirs.

    Among many rows a few are left out.
    """
    monkeypatch.setattr(PagedToyCache, "most_tokens", 10 * rows)
    choose = random.Random(pages)
    followed = collections.Counter[str]()
    kinds: list[dict[str, Any]] = [
        *({**LINEAR, "block_length": size} for size in (4, 8, 8, 16, 32)),
        {**LINEAR, "block_length": 6, "threshold": 0.6},
        {**LINEAR, "block_length": 6, "temperature": 0.7},
        *([{"mode": "auto"}] if pages == 60 else []),
        *({"mode": "ar"} for _ in range(4)),
        {"mode": "ar", "prefill_chunk": 7},
        {"mode": "diffusion", "block_length": 5},
        {"mode": "diffusion", "block_length": 8, "threshold": 0.6, "confidences": True},
        {"mode": "diffusion", "block_length": 3, "threshold": 0.3, "merge_commit": True},
    ]
    for turn in range(4):
        some = kinds if turn % 2 else [*kinds[:5], *kinds[-3:], {"mode": "ar"}]  # all of which run ahead
        asked: list[Asked] = []
        for kind in choose.choices(some, k=5 + rows):
            prompt = TEXT[: choose.choice([0, 60, 100])] + TEXT[: choose.randint(1, 40)]
            asked.append((prompt, {**kind, "max_new_tokens": choose.choice([3, 40, 90, 150])}))
        before, _ = run(toy(real, ahead=False), asked, rows=rows)
        engine = toy(real, ahead=True, late=late, pages=pages)
        got, _ = run(engine, asked, rows=rows)
        for one, other, (_, options) in zip(got, before, asked, strict=True):
            if "prefill_chunk" in options:  # how much of a prompt is found elsewhere depends on when it begins
                for each in (one, other):
                    each["nfe"] = {**each["nfe"], "prefill": None}
            if options["mode"] == "auto":  # whose passes depend on the clock
                assert one["tokens"] == other["tokens"]
            else:
                assert one == other
        followed += engine.backend.followed  # type: ignore[attr-defined]
        assert engine.backend.pages.free == pages  # type: ignore[attr-defined]
    kinds_ahead = ("prefill", "decode", "draft", "verify", "denoise", "commit")
    assert min(followed[kind] for kind in kinds_ahead) > (4 if pages == 60 else 0)


def test_a_row_may_leave_in_mid_flight(real: nemodiff.LoadedEngine) -> None:
    """Its pages go to the next one while passes that were begun for it are under way."""
    for moment in range(1, 12):
        engine = toy(real, ahead=True, late=bool(moment % 2), pages=9)
        asked: list[Asked] = [(TEXT[n : n + 50], {**LINEAR, "block_length": 8, "max_new_tokens": 60}) for n in range(3)]
        first, second, third = one_leaves(engine, asked, moment)
        before, _ = run(toy(real, ahead=False), asked, rows=2)
        assert [told(second), told(third)] == before[1:]
        assert first.tokens == before[0]["tokens"][: len(first.tokens)]
        assert engine.backend.pages.free == 9  # type: ignore[attr-defined]


def test_a_draft_of_broken_numbers_is_no_verify(real: nemodiff.LoadedEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A confidence that is no number leaves its mask, so what was begun ahead is dropped and another draft comes."""
    row = PagedToyEngine.__mro__[0].open(toy(real, ahead=True).backend, 1)._row.__func__  # type: ignore[attr-defined]

    def broken(cache: Any, slots: np.ndarray, p: Any) -> Prediction:
        made: Prediction = row(cache, slots, p)
        if p.kind != "draft" or (p.ids == real.info.model.mask_id).sum() < 7:
            return made
        next_ids = made.next_ids.copy()
        next_ids[3] = real.info.model.mask_id
        return made._replace(next_ids=next_ids)

    monkeypatch.setattr("stand_ins.toy_engine.ToyCache._row", broken)
    asked: list[Asked] = [(TEXT[:30], {**LINEAR, "block_length": 8, "max_new_tokens": 60})]
    (before,), _ = run(toy(real, ahead=False), asked)
    (got,), batch = run(toy(real, ahead=True), asked)
    assert got == before
    assert got["nfe"]["draft"] > got["nfe"]["verify"] > 0
    assert batch.counts.padding > 0


# --- diffusion, whose passes are guessed


@pytest.mark.parametrize("block", [1, 2, 3, 8])
@pytest.mark.parametrize("merge", [False, True])
def test_diffusion_at_every_border(real: nemodiff.LoadedEngine, block: int, merge: bool) -> None:
    """Limits, EOS, stop strings and thresholds: tokens, confidences and passes are those without running ahead."""
    followed = collections.Counter[str]()
    options = {"mode": "diffusion", "block_length": block, "merge_commit": merge, "confidences": True}
    for limit in (1, 2, *range(max(1, block - 1), 2 * block + 3), 40):
        asked: list[Asked] = [
            (TEXT[n : n + 30], {**options, "threshold": threshold, "max_new_tokens": limit})
            for n, threshold in enumerate((0.0, 0.3, 0.6, 1.5))
        ]
        ((text, _), *_) = asked
        said = nemodiff.generate(toy(real, ahead=False), text, mode="diffusion", block_length=block).text
        asked.append((text, {**asked[0][1], "stop": [said[3:5] or "x"]}))
        before, _ = run(toy(real, ahead=False), asked, rows=2)
        engine = toy(real, ahead=True)
        assert run(engine, asked, rows=2)[0] == before
        followed += engine.backend.followed  # type: ignore[attr-defined]
    assert followed["denoise"] > 9 or block == 1
    assert followed["commit"] > 9


def counted_over(engine: nemodiff.LoadedEngine, options: dict[str, Any]) -> tuple[int, int, int]:
    """Of one request after the other: their passes, those begun ahead that served, and those in vain."""
    backend = engine.backend
    assert isinstance(backend, PagedToyEngine)
    passes = 0
    for number in range(4):
        ((result,), _) = run(engine, [(TEXT[number : number + 20], {"mode": "diffusion", **options})])
        passes += sum(result["nfe"].values())
    vain = backend.forwards - passes
    return passes, backend.begun_ahead - vain, vain


@pytest.mark.parametrize("block", [8, 16, 32])
def test_few_passes_of_diffusion_are_begun_in_vain(
    real: nemodiff.LoadedEngine, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    """By confidences that are drawn anew in each pass, by those of the benchmark's script, and where all is decided."""
    monkeypatch.setattr(PagedToyCache, "most_tokens", 64)
    for threshold in (0.0, 0.3, 0.6, 0.9):
        engine = toy(real, ahead=True, pages=400, endless=True)
        options = {"block_length": block, "threshold": threshold, "max_new_tokens": 300}
        passes, served, vain = counted_over(engine, options)
        assert vain <= 0.02 * passes
        assert served > 0.65 * passes
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    script = importlib.import_module("gpu.script")

    def scripted(cache: Any, slots: np.ndarray, p: Any) -> Prediction:
        said: Prediction = script.ScriptedCache(cache, real.info.model.mask_id)._said(p)
        next_ids = cache._commit(p.ids[p.predicted], said.token, said.confidence, p.threshold)
        return said._replace(next_ids=next_ids)

    monkeypatch.setattr(PagedToyCache, "_row", scripted)
    passes, served, vain = counted_over(
        toy(real, ahead=True, pages=400), {"block_length": block, "max_new_tokens": 300}
    )
    assert vain <= 0.02 * passes
    assert served > 0.6 * passes


# --- rows that join a forward begun ahead, and rows that it leaves out


def waits(engine: nemodiff.LoadedEngine) -> int:
    """Forwards that were begun when the one before had ended."""
    backend = engine.backend
    assert isinstance(backend, PagedToyEngine)
    return backend.forwards - backend.begun_ahead


@pytest.mark.parametrize("kind", [{"mode": "ar"}, {**LINEAR, "block_length": 5}], ids=str)
def test_a_prompt_stops_nobody(real: nemodiff.LoadedEngine, kind: dict[str, Any]) -> None:
    """Its parts follow one another, the first pass of decoding follows them, and newcomers join what runs."""
    asked: list[Asked] = [(TEXT[:47], {**kind, "max_new_tokens": 40, "prefill_chunk": 8})]
    engine = toy(real, ahead=True)
    ((alone,), _) = run(engine, asked)
    assert alone["nfe"]["prefill"] == 6
    assert engine.backend.followed["prefill"] == 5  # type: ignore[attr-defined]
    assert waits(engine) == 1 if kind["mode"] == "ar" else waits(engine) < 5
    asked = [(TEXT[n : n + 40], {"mode": "ar", "max_new_tokens": 9 + 4 * n}) for n in range(12)]
    before, _ = run(toy(real, ahead=False), asked, rows=3)
    engine = toy(real, ahead=True)
    assert run(engine, asked, rows=3)[0] == before
    assert engine.backend.followed["prefill"] > 6  # type: ignore[attr-defined]
    assert waits(engine) < 4


def in_which(engine: nemodiff.LoadedEngine, asked: list[Asked]) -> tuple[list[dict[str, Any]], list[set[int]]]:
    """What requests that begin together come to, and the numbers of those in each forward with several of them."""
    batch = Batch(engine.backend, len(asked), kept=0)
    requests = [prepare(engine, prompt, Options(**options)) for prompt, options in asked]
    for request in requests:
        batch.add(request)
    served = list[set[int]]()
    while len(batch):
        served.append({requests.index(result.sequence) for result in batch.step()})
    batch.close()
    return [told(request) for request in requests], [each for each in served if len(each) > 1]


@pytest.mark.parametrize("rows", [4, 7, 8, 16])
def test_a_row_that_cannot_follow_stops_few(
    real: nemodiff.LoadedEngine, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    """Of many rows it is left out of a forward, then of none until it was in two in a row; of few all wait for it."""
    monkeypatch.setattr(PagedToyCache, "most_tokens", 10 * rows)
    asked: list[Asked] = [(TEXT[n : n + 20], {"mode": "ar", "max_new_tokens": 60}) for n in range(rows)]
    asked[2][1].update(repetition_penalty=1.1, max_new_tokens=40)
    before, _ = in_which(toy(real, ahead=False, endless=True), asked)
    engine = toy(real, ahead=True, endless=True)
    got, served = in_which(engine, asked)
    assert got == before
    its = [2 in each for each in served[:40]]
    if rows < 8:
        assert all(its)
        return
    assert its.count(False) > len(its) / 4
    pairs = list(itertools.pairwise(its))
    assert (False, False) not in pairs
    left = [at for at, there in enumerate(its) if not there]
    assert all(later - earlier >= 3 for earlier, later in itertools.pairwise(left))
    assert waits(engine) < 0.5 * len(served)


def test_more_rows_than_a_forward_takes_have_their_turns(real: nemodiff.LoadedEngine) -> None:
    """Also where forwards are begun ahead: no row is passed over."""
    options = {**LINEAR, "block_length": 16, "max_new_tokens": 200}
    asked: list[Asked] = [(TEXT[n : n + 20], options) for n in range(5)]
    before, _ = in_which(toy(real, ahead=False, endless=True), asked)
    engine = toy(real, ahead=True, endless=True)
    got, served = in_which(engine, asked)
    assert got == before
    middle = served[5:45]
    assert {len(each) for each in middle} == {2}
    for row in range(5):
        turns = [at for at, each in enumerate(middle) if row in each]
        assert {later - earlier for earlier, later in itertools.pairwise(turns)} == {2, 3}
    assert waits(engine) < 0.2 * len(served)


def guesses() -> Iterator[tuple[str, str, Callable[[Request, Any], Following]]]:
    """Followers that are wrong: where they stand in, and what they make."""
    yield "over_next", "ar", lambda request, p: Following(causal("decode", [7], p.write_at + p.ids.size), None)
    yield (
        "over_next",
        "ar",
        lambda request, p: Following(causal("verify", [7], p.write_at + p.ids.size, predict_all=True), "token"),
    )
    for feed in (None, "token"):
        yield (
            "_verify",
            "linear_spec",
            lambda request, p, feed=feed: Following(
                causal("verify", [7] * p.ids.size, p.write_at, predict_all=True), feed
            ),
        )
    yield (
        "_draft",
        "linear_spec",
        lambda size, request, p: Following(
            bidirectional("draft", [7, *[request.model.mask_id] * 7], p.write_at + p.ids.size, 0.0), None
        ),
    )


@pytest.mark.parametrize(("place", "mode", "guess"), list(guesses()))
def test_a_wrong_guess_is_no_wrong_token(
    real: nemodiff.LoadedEngine, monkeypatch: pytest.MonkeyPatch, place: str, mode: str, guess: Any
) -> None:
    """What was begun is dropped where the loop wants another pass, and that joins the forward after it."""
    asked: list[Asked] = [(TEXT[n : n + 20], {"mode": mode, "max_new_tokens": 50}) for n in range(3)]
    for _, options in asked:
        options |= {"block_length": 8} if mode == "linear_spec" else {}
    before, _ = run(toy(real, ahead=False), asked, rows=3)
    monkeypatch.setattr(importlib.import_module(f"nemodiff.runtime.modes.{mode}"), place, guess)
    engine = toy(real, ahead=True)
    got, batch = run(engine, asked, rows=3)
    assert got == before
    assert batch.counts.padding > 9
    assert engine.backend.begun_ahead > 9  # type: ignore[attr-defined]


# --- what a following pass is


def seen(p: Pass) -> np.ndarray:
    """What is visible; an interval of none may be any."""
    return np.where(p.visible[:, 1:2] == p.visible[:, 2:], p.visible * [1, 0, 0], p.visible)


@pytest.mark.parametrize("mask", [0, 100])
def test_a_following_pass_is_what_the_loop_wants(real: nemodiff.LoadedEngine, mask: int) -> None:
    """Ids that stand for others are no mask, which would be drawn by another temperature and position."""
    info = dataclasses.replace(real.info, model=dataclasses.replace(real.info.model, mask_id=mask))
    backend = PagedToyEngine(info, 400, ahead=True)
    backend.samples = True
    engine = dataclasses.replace(real, backend=backend)
    request = prepare(engine, TEXT[:40], Options(mode="linear_spec", temperature=0.8, seed=3, block_length=4))
    token = np.array([301, 302, 303, 304], np.int32)
    masks = [mask] * 3
    given = Prediction(token, np.ones(4, np.float32), np.array([300, 301, 302, 7], np.int32), None)
    following = over_next(request, causal("decode", [300], 8))
    assert following is not None
    pairs = [
        (following, given._replace(token=token[:1]), causal("decode", [301], 9)),
        (
            _first(request, causal("prefill", TEXT[:5], 3)),
            given._replace(token=token[:1]),
            bidirectional("draft", [301, *masks], 8, 0.0, adapter=True),
        ),
        (
            _verify(request, bidirectional("draft", [300, *masks], 8, 0.0)),
            given,
            causal("verify", [300, 301, 302, 7], 8, predict_all=True),
        ),
        (
            _draft(4, request, causal("verify", [300, 301, 302, 7], 8, predict_all=True)),
            given,
            bidirectional("draft", [303, *masks], 11, 0.0, adapter=True),
        ),
    ]
    block = prepare(engine, TEXT[:40], Options(mode="diffusion", temperature=0.8, seed=3, block_length=4))
    half = given._replace(next_ids=np.array([300, 301, mask, 7], np.int32))
    denoise = [bidirectional("denoise", ids, 8, block.settings.threshold) for ids in ([300, *masks], half.next_ids)]
    one_left = denoise[1]._replace(ids=np.array([300, 301, mask, 7], np.int32))
    block.emit([300])
    commit = causal("commit", [300, 301, 302, 7], 8)
    merging = prepare(engine, TEXT[:40], Options(mode="diffusion", block_length=4, merge_commit=True))
    merging.emit([300])
    pairs += [
        (_next(block, denoise[0]), half, denoise[1]),
        (_last(block, one_left), given, commit),
        (_last(merging, one_left), given, with_masks(commit, 4, mask)),
        (
            diffusion_first(block, commit),
            given._replace(token=token[:1]),
            bidirectional("denoise", [301, *masks], 12, block.settings.threshold),
        ),
    ]
    grouping: dict[str, Any] = {"mode": "quadratic_spec", "groups": "all", "block_length": 4}
    grouped = prepare(engine, TEXT[:40], Options(**grouping, temperature=0.8, seed=3))
    verify = causal("verify", [300, 301, 302, 7], 8, predict_all=True)
    grouped.length = 8
    group = Grouping(1, {1: 4}).inputs([303], 11, mask)
    expected = Pass("verify", group.ids, group.pos, 11, group.visible, np.arange(5, dtype=np.int32), 0.0, group.adapter)
    pairs.append((_without_draft(grouped, verify), given, expected))
    for following, prediction, known in pairs:
        assert following is not None
        made = following.after(prediction)
        for name in known._fields:
            values = [getattr(p, name) if name != "visible" else seen(p) for p in (made, known)]
            np.testing.assert_array_equal(*values, name)
        assert following.serves(prediction, known)
        others = [
            known._replace(kind="prefill"),
            known._replace(write_at=known.write_at - 1),
            known._replace(ids=known.ids + np.int32(1)),
            known._replace(ids=np.append(known.ids, np.int32(5))),
            *([known._replace(ids=known.ids[:-1])] if known.kind in ("draft", "denoise", "commit") else []),
        ]
        assert not any(following.serves(prediction, other) for other in others)
        if known.kind == "verify":  # the loop's own ends at a drafted EOS
            assert following.serves(prediction, known._replace(ids=known.ids[:2], visible=known.visible[:2]))
            assert not following.serves(prediction, known._replace(ids=known.ids[:2], visible=known.visible[1:3]))
        size = known.ids.size
        inputs, _ = flat_layouts(FlatShape(size, size, sampled=True), info)
        drawn = []
        for pass_ in (following.pass_, known):
            arrays = inputs.views(np.zeros(inputs.nbytes, np.uint8))
            fill(arrays, [(block if known.kind == "denoise" else request).for_engine(pass_)], [1], backend.pages, mask)
            drawn.append(
                {name: arrays[name].tolist() for name in ("temperature", "seed", "span", "index", "threshold")}
            )
        assert drawn[0] == drawn[1]


# --- over a card that lags behind, and over graphs


@pytest.fixture(params=DEVICES)
def ahead(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., nemodiff.LoadedEngine]:
    """Makes an engine that runs ahead out of one for torch."""

    graphs, devices = request.param != "eager", list[Any]()

    def make(engine: nemodiff.LoadedEngine, pages: int = 40) -> nemodiff.LoadedEngine:
        if not devices:  # from here on no other device runs
            devices.append(DEVICES[request.param](monkeypatch))
        backend = TorchEngine(
            engine.folder, engine.info, devices[0], kernels=False, graphs=graphs, ahead=True, pages=pages
        )
        counted(backend)
        return dataclasses.replace(engine, backend=backend)

    return make


def counted(backend: TorchEngine) -> None:
    """Note in the engine what is begun ahead, by kind of pass."""
    followed = backend.followed = collections.Counter[str]()  # type: ignore[attr-defined]
    follow = backend.forwards.follow

    def noted(flight: Any, passes: Sequence[Following], *rest: Any) -> Any:
        begun = follow(flight, passes, *rest)
        if begun is not None:
            followed.update(following.pass_.kind for following in passes)
        return begun

    backend.forwards.follow = noted  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """One layer, random, with an adapter."""
    folder = tmp_path_factory.mktemp("small")
    sizes: dict[str, Any] = {"num_hidden_layers": 1, "num_key_value_heads": 1, "dtype": "f32"}
    return make_pair(folder, adapted(write_checkpoint(folder / "checkpoint", seed=7, **sizes), 0.1))


@pytest.mark.parametrize("pages", [9, 40])
def test_a_card_gives_what_onnx_runtime_gives(
    small: Pair, ahead: Callable[..., nemodiff.LoadedEngine], pages: int
) -> None:
    """Blocks of every length, page borders, kept prefixes, short memory, cancels, rows of all modes; an adapter."""
    engine = ahead(small.ours, pages)
    choose = random.Random(pages)
    asked: list[Asked] = []
    for _ in range(12):
        prompt = (PROMPT * 3)[: choose.choice([16, 50, 63, 64, 65, 100])]
        prompt += [300 + choose.randrange(3)] * choose.randint(0, 9)
        options = {"mode": "linear_spec", "block_length": choose.choice([4, 7, 16, 32])}
        options |= choose.choice([{}, {}, {}, {"mode": "ar"}, {"threshold": 0.01}, {"mode": "diffusion"}])
        asked.append((prompt, {**options, "max_new_tokens": choose.choice([2, 9, 60, 90])}))
    answers, statistics = crowd(engine, small.theirs, asked, {"mode": "linear_spec", "max_new_tokens": 150}, 120)
    for answer, expected in answers:
        assert told_by(answer) == told_by(expected)
    backend = torch_backend(engine)
    assert statistics.preempted > 0 or pages == 40
    followed = backend.followed  # type: ignore[attr-defined]
    assert min(followed[kind] for kind in ("verify", "draft", "denoise")) > (5 if pages == 40 else 0)
    assert backend.pages.free == pages
    assert backend.eager_shapes == {}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> equality.Setup:
    """tiny-chat, with drafts that are right, and spoiled by an adapter; the oracle remembers its passes."""
    folder = tmp_path_factory.mktemp("trained")
    checkpoint = adapted(shutil.copytree(TINY_CHAT, folder / "checkpoint"), 0.2)
    plain, spoiled = (
        nemodiff.load(Builder(source, folder / name, backend="torch", dtype="f32").run(), device="cpu")
        for source, name in ((TINY_CHAT, "plain"), (checkpoint, "adapted"))
    )
    return equality.Setup(plain, spoiled, ReferenceModel.load(checkpoint))


def test_a_trained_model_gives_what_the_oracle_gives(
    trained: equality.Setup, ahead: Callable[..., nemodiff.LoadedEngine]
) -> None:
    """Tokens, ends, passes by kind, acceptance."""
    setup = dataclasses.replace(trained, plain=ahead(trained.plain), adapted=ahead(trained.adapted))
    cases = [*equality.grid((4, 16), (0.0,), (30,)), *equality.grid((4,), (0.95,), (7,))]
    assert [difference for _, difference in equality.compare_prompt(setup, QUESTIONS[0], cases) if difference] == []
    for engine in (setup.plain, setup.adapted):
        followed = torch_backend(engine).followed  # type: ignore[attr-defined]
        assert min(followed[kind] for kind in ("draft", "verify")) > 5


def test_the_demonstration_model_waits_at_its_ends_alone(
    tmp_path: Path, ahead: Callable[..., nemodiff.LoadedEngine]
) -> None:
    folder = Builder(TINY_CHAT_2, tmp_path / "engine", backend="torch", dtype="f32").run()
    plain = nemodiff.load(folder, device="cpu")
    engine = ahead(plain)
    model = ReferenceModel.load(TINY_CHAT_2)
    question = "Show the times table of 7 up to 9."
    prompt = chat_ids(plain.text, [{"role": "user", "content": question}])
    expected = oracle_linear_spec(model, prompt, 200, 16, 0.0, model.eos)
    got = nemodiff.generate(engine, question, mode="linear_spec", block_length=16, max_new_tokens=200)
    assert (got.token_ids, got.nfe, got.acceptance.lengths) == (expected.tokens, expected.nfe, expected.acceptance)
    passes = expected.nfe["draft"] + expected.nfe["verify"]
    assert passes > 6
    followed = torch_backend(engine).followed.total()  # type: ignore[attr-defined]
    assert passes <= followed <= passes + 1  # all, and one for nobody where the host saw the end late


def kinds_of_choice() -> Iterator[dict[str, Any]]:
    """Requests whose next passes the host alone can know, and ones that it needs not choose for."""
    yield {"repetition_penalty": 1.2}
    yield {"logprobs": 1}
    yield {"regex": "[a-z]{9,30}"}
    yield {"thinking": True, "thinking_budget": 5}
    yield {"temperature": 0.8, "top_k": 5}


@pytest.mark.parametrize("kind", list(kinds_of_choice()), ids=str)
def test_what_the_host_chooses_does_not_run_ahead(small: Pair, monkeypatch: pytest.MonkeyPatch, kind: Any) -> None:
    backend = TorchEngine(small.ours.folder, small.ours.info, LaggingDevice(monkeypatch), kernels=False, pages=40)
    counted(backend)
    options: dict[str, Any] = {**LINEAR, "block_length": 6, "max_new_tokens": 30, **kind}
    engine = small.with_backend(backend)
    expected = nemodiff.generate(small.theirs, QUESTIONS[0], **options)
    assert told_by(nemodiff.generate(engine, QUESTIONS[0], **options)) == told_by(expected)
    followed = backend.followed  # type: ignore[attr-defined]
    assert followed["draft"] == 0
    assert bool(followed["verify"]) == ("thinking_budget" in kind)  # whose draft has the end of thinking in it


@pytest.mark.parametrize(("mode", "kind"), [("linear_spec", "draft"), ("diffusion", "denoise")])
def test_samples_of_the_device_are_those_without(
    small: Pair, monkeypatch: pytest.MonkeyPatch, mode: Any, kind: str
) -> None:
    """By the kernels in Triton's interpreter, at every position's own noise."""
    answers = []
    options = {"mode": mode, "block_length": 3, "temperature": 0.9, "seed": 4, "max_new_tokens": 4}
    for runs_ahead in (False, True):
        with monkeypatch.context() as context:
            device = LaggingDevice(context)
            backend = TorchEngine(
                small.ours.folder, small.ours.info, device, kernels=True, graphs=True, ahead=runs_ahead, pages=40
            )
            assert backend.samples
            counted(backend)
            answers.append(told_by(nemodiff.generate(small.with_backend(backend), PROMPT[:3], **options)))
            assert bool(backend.followed[kind]) == runs_ahead  # type: ignore[attr-defined]
    assert answers[0] == answers[1]


@pytest.mark.parametrize("bits", ["int8", "fp8"])
def test_a_cache_of_8_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bits: Any) -> None:
    folder = Builder(TINY_CHAT, tmp_path / "engine", backend="torch", dtype="f32", kv_cache_dtype=bits).run()
    plain = nemodiff.load(folder, device="cpu")
    options: dict[str, Any] = {**LINEAR, "block_length": 8, "max_new_tokens": 80}
    before = [nemodiff.generate(plain, question, **options).token_ids for question in QUESTIONS]
    backend = TorchEngine(folder, read_engine(folder), LaggingDevice(monkeypatch), kernels=False, pages=40)
    counted(backend)
    engine = dataclasses.replace(plain, backend=backend)
    assert [nemodiff.generate(engine, question, **options).token_ids for question in QUESTIONS] == before
    assert backend.followed["draft"] > 3  # type: ignore[attr-defined]


def test_a_pass_that_fails_ahead_is_told(small: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that was begun in its turn; the engine goes on with the next request."""
    backend = TorchEngine(small.ours.folder, small.ours.info, LaggingDevice(monkeypatch), kernels=False, pages=40)
    engine = small.with_backend(backend)
    options: dict[str, Any] = {**LINEAR, "block_length": 6, "max_new_tokens": 60}
    expected = nemodiff.generate(engine, PROMPT, **options).token_ids
    advance = backend.model.advance
    turns = iter([False, False, True])

    def fails(*arguments: Any) -> None:
        if next(turns, False):
            raise ValueError("gone")
        advance(*arguments)

    with nemodiff.Scheduler(engine, rows=2) as scheduler:
        monkeypatch.setattr(backend.model, "advance", fails)
        with pytest.raises(nemodiff.EngineError, match="gone"):
            scheduler.submit(PROMPT, **options).result(60)
        assert scheduler.submit(PROMPT, **options).result(60).token_ids == expected
    assert backend.pages.free == 40


def test_ctrl_c_while_two_passes_are_under_way(small: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever of them is waited for; the engine goes on, and no page is lost."""
    device = LaggingDevice(monkeypatch)
    backend = TorchEngine(small.ours.folder, small.ours.info, device, kernels=False, pages=40)
    counted(backend)
    engine = small.with_backend(backend)
    options: dict[str, Any] = {**LINEAR, "block_length": 6, "max_new_tokens": 60}
    expected = nemodiff.generate(engine, PROMPT, **options).token_ids
    wait = device.wait
    for moment in range(2, 7):
        turns = iter(range(99))

        def interrupted(mark: int) -> None:
            if next(turns) == moment:  # noqa: B023  (it is called in this turn)
                raise KeyboardInterrupt
            wait(mark)

        with monkeypatch.context() as context:
            context.setattr(device, "wait", interrupted)
            with pytest.raises(KeyboardInterrupt):
                nemodiff.generate(engine, PROMPT, **options)
        assert nemodiff.generate(engine, PROMPT, **options).token_ids == expected
        assert backend.pages.free == 40
    assert backend.followed["draft"] > 9  # type: ignore[attr-defined]


def test_sources_lie_where_the_forward_before_leaves_its_results(small: Pair) -> None:
    """Whatever its rows and its size."""
    backend = TorchEngine(small.ours.folder, small.ours.info, RecordingDevice(), graphs=True, ahead=True, pages=40)
    cache = backend.open(2)
    for row in (0, 1):
        assert cache.reserve(row, 0, 2 * PAGE)
    passes = [causal("decode", [300], 0), causal("verify", [300, 301, 302], 0, predict_all=True)]
    flight = cache.launch(passes, [0, 1])
    draft = Following(bidirectional("draft", [0, 5, 5], 0, 0.0), "accepted")
    sources = flight.sources([draft], [1])
    assert sources == [Source("accepted", 1, 1 + 2 * 64, 3)]
    inputs, _ = flat_layouts(FlatShape(16, 16), backend.info)
    arrays = inputs.views(np.zeros(inputs.nbytes, np.uint8))
    feeds: list[Feed | None] = [None, "token", "next_ids", "accepted"]
    begun = [draft.pass_] * len(feeds)
    fill(arrays, begun, [1] * len(feeds), backend.pages, 5, [sources[0]._replace(feed=feed) for feed in feeds])
    ids = [*[-1] * 3, *[3, -1, -1], *[129, 130, 131], *[1, -1, -1], *[-1] * 4]
    assert arrays["source"].tolist() == ids
    assert arrays["verified"].tolist() == [*[[0, 0, 0]] * 9, *[[1, 129, 3]] * 3, *[[0, 0, 0]] * 4]
    results = flight.step.results.numpy()
    _, verified = flight.finish()
    np.testing.assert_array_equal(results[1:4], verified.token)
    np.testing.assert_array_equal(results[129:132], verified.next_ids)


def test_plain_torch_looks_at_every_page_that_a_pass_may_move_to(small: Pair) -> None:
    """The host says how many pages a row has, and knows no more than how far the pass moves at most."""
    backend = TorchEngine(small.ours.folder, small.ours.info, RecordingDevice(), kernels=False, ahead=True, pages=40)
    cache = backend.open(1)
    for start, pages in ((PAGE - 6, 1), (PAGE - 5, 2)):
        assert cache.reserve(0, 0, 2 * PAGE)
        verify = causal("verify", [300, 301, 302], start, predict_all=True)
        draft = Following(bidirectional("draft", [0, 5, 5], start, 0.0), "accepted")
        flight = cache.follow(cache.launch([verify], [0]), [draft], [0], [0])
        assert flight is not None
        views = flight.step.sides[flight.turn].views
        assert views is not None
        assert views[0].pages == pages

"""Passes of quadratic_spec that are arranged on the device: they are the ones that the loop wants, and nothing is lost.

Over an engine without a model, over a card that lags behind its host, and over recorded graphs; docs/design.md.
"""

from __future__ import annotations

import collections
import dataclasses
import random
import shutil
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracle.reference import ReferenceModel
from oracle.reference import ar as oracle_ar
from stand_ins.chats import chat_ids
from stand_ins.checkpoints import TINY_CHAT
from stand_ins.lagging_device import DEVICES, LaggingDevice
from stand_ins.torch_pair import QUESTIONS, Asked, adapted, one_leaves
from stand_ins.toy_engine import PagedToyCache, PagedToyEngine

import nemodiff
from nemodiff.builder.build import Builder
from nemodiff.plugins.ops import arrange
from nemodiff.runtime.batching.batch import Batch
from nemodiff.runtime.engines.grouping import Arranged, Arrangement, Grouping
from nemodiff.runtime.engines.pages import Pages
from nemodiff.runtime.engines.passes import Following, Pass, causal, most_end
from nemodiff.runtime.engines.torch.engine import TorchEngine
from nemodiff.runtime.engines.torch.flat import FlatShape, Source, fill, flat_layouts, room
from nemodiff.runtime.planning.cost import CostCurve
from nemodiff.runtime.planning.pass_costs import PassCosts
from nemodiff.runtime.requests.options import Options
from nemodiff.runtime.requests.prepare import prepare
from nemodiff.runtime.requests.sequence import Sequence as Request

TEXT = [200 + i * 7 % 300 for i in range(150)]
QUADRATIC: dict[str, Any] = {"mode": "quadratic_spec"}
CURVE = CostCurve((1, 64, 256, 512), (0.0052, 0.0063, 0.0101, 0.0176))  # about that of an 8B shape on an H200


@pytest.fixture(scope="module")
def real(tiny_engine: Path) -> nemodiff.LoadedEngine:
    return nemodiff.load(tiny_engine, threads=1)


def toy(
    real: nemodiff.LoadedEngine, *, ahead: bool = True, pages: int = 60, late: bool = False, curve: CostCurve = CURVE
) -> nemodiff.LoadedEngine:
    engine = dataclasses.replace(real, backend=PagedToyEngine(real.info, pages, late=late, ahead=ahead))
    vars(engine)["cost"] = PassCosts(curve)
    return engine


@pytest.fixture(autouse=True)
def ran(monkeypatch: pytest.MonkeyPatch) -> dict[int, list[Pass]]:
    """The passes that a row's pages have met, by the row's number."""
    passes = dict[int, list[Pass]]()
    run = PagedToyCache.run

    def noted(cache: PagedToyCache, number: int, p: Pass) -> Any:
        passes.setdefault(number, []).append(p)
        return run(cache, number, p)

    monkeypatch.setattr(PagedToyCache, "run", noted)
    monkeypatch.setattr(PagedToyCache, "most_tokens", 2048)
    return passes


def run(
    engine: nemodiff.LoadedEngine, asked: Sequence[Asked], ran: dict[int, list[Pass]], rows: int = 1
) -> list[Request]:
    """Requests that join as rows become free; a pass of quadratic_spec that has run is what its loop wanted."""
    ran.clear()
    batch = Batch(engine.backend, rows, kept=1)
    requests = [prepare(engine, prompt, Options(**options)) for prompt, options in asked]
    wanted = list[Pass]()
    waiting = list(reversed(requests))
    while waiting or len(batch):
        while waiting and len(batch) < rows:
            batch.add(waiting.pop())
        for result in batch.step():
            assert result.error is None
            wanted += [result.pass_] if result.sequence.settings.mode == "quadratic_spec" else []
    list(batch.step())  # what was begun for nobody
    batch.close()
    engine.backend.preempted = batch.counts.preempted  # type: ignore[attr-defined]
    met = collections.Counter(as_key(p) for passes in ran.values() for p in passes)
    missing = collections.Counter(map(as_key, wanted)) - met
    if missing:  # a group was begun that is not worth it any more
        assert set(missing) <= {as_key(p, 1) for passes in ran.values() for p in passes}
    return requests


def as_key(p: Pass, count: int | None = None) -> tuple[Any, ...]:
    """What a pass is, or its first tokens."""
    adapter = np.broadcast_to(np.float32(p.adapter), p.ids.shape)
    arrays = (p.ids, p.pos, p.visible, p.predicted, adapter)
    return p.kind, p.write_at, p.threshold, *(array[:count].tobytes() for array in arrays)


def ars(real: nemodiff.LoadedEngine, asked: Sequence[Asked], said: dict[int, int] | None = None) -> list[list[int]]:
    """The tokens of mode ar; `said` are those that are no hash."""
    engine, tokens = toy(real, ahead=False), list[list[int]]()
    engine.backend.said = said or {}  # type: ignore[attr-defined]
    for prompt, options in asked:
        kept = {name: value for name, value in options.items() if name not in ("block_length", "groups")}
        tokens.append(nemodiff.generate(engine, prompt, **{**kept, "mode": "ar"}).token_ids)
    return tokens


def followed(engine: nemodiff.LoadedEngine) -> int:
    return engine.backend.followed.total()  # type: ignore[attr-defined, no-any-return]


def test_a_request_waits_at_its_ends_alone(real: nemodiff.LoadedEngine, ran: Any) -> None:
    """The first pass follows the prompt, whose token the host chooses; the next one is what it chooses a size for."""
    engine = toy(real)
    engine.backend.said = dict.fromkeys(range(500), 200)  # type: ignore[attr-defined]  # all drafts are right
    asked: list[Asked] = [(TEXT[:40], {**QUADRATIC, "block_length": 8, "max_new_tokens": 200})]
    (request,) = run(engine, asked, ran)
    passes = request.nfe["verify"]
    assert request.tokens == [200] * 200
    assert passes < 80
    assert passes - followed(engine) <= 3


@pytest.mark.parametrize("options", [{"block_length": "auto"}, {"mode": "auto"}], ids=str)
def test_passes_of_a_plan_that_stands(
    real: nemodiff.LoadedEngine, ran: Any, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """They are arranged on the device, and planned where a new plan is due."""
    arranged, draft = list[Arrangement](), Arrangement.draft
    monkeypatch.setattr(Arrangement, "draft", lambda self, *given: arranged.append(self) or draft(self, *given))
    asked: list[Asked] = [(TEXT[n : n + 30], {**QUADRATIC, "max_new_tokens": 400, **options}) for n in range(4)]
    engine = toy(real)
    engine.backend.said = {at: 200 + at % 9 for at in range(500)}  # type: ignore[attr-defined]  # all drafts are right
    requests = run(engine, asked, ran)
    assert [request.tokens for request in requests] == ars(real, asked, engine.backend.said)  # type: ignore[attr-defined]
    passes = sum(request.nfe["verify"] for request in requests)
    assert passes > 40
    assert len(arranged) > 0.2 * passes  # plans go by the clock


@pytest.mark.parametrize("options", [{"block_length": 8}, {"block_length": "auto"}, {"mode": "auto"}], ids=str)
def test_where_no_draft_is_worth_its_price(real: nemodiff.LoadedEngine, ran: Any, options: dict[str, Any]) -> None:
    """Each pass is known before, but where a plan is made."""
    asked: list[Asked] = [(TEXT[n : n + 30], {**QUADRATIC, "max_new_tokens": 150, **options}) for n in range(3)]
    for rows in (1, 3):
        engine = toy(real, curve=CostCurve((1, 512), (1.0, 512.0)))
        engine.backend.said = dict.fromkeys(range(500), 200)  # type: ignore[attr-defined]  # there is no end
        requests = run(engine, asked, ran, rows=rows)
        assert [request.tokens for request in requests] == [[200] * 150] * 3
        passes = sum(sum(request.nfe.values()) for request in requests)
        assert followed(engine) > (0.9 if options == {"block_length": 8} else 0.5) * passes  # plans go by the clock


@pytest.mark.parametrize("block", [2, 4, 5, 8, 32])
def test_limits_at_every_border(real: nemodiff.LoadedEngine, ran: Any, block: int) -> None:
    begun = 0
    borders = {1, 2, *range(block - 1, block + 3), *range(2 * block - 1, 2 * block + 3), 4 * block + 1, 70}
    for limit in borders - {0}:
        options = {**QUADRATIC, "block_length": block, "max_new_tokens": limit}
        asked: list[Asked] = [(TEXT[n : n + 30], options) for n in (0, 9)]
        engine = toy(real)
        assert [request.tokens for request in run(engine, asked, ran, rows=2)] == ars(real, asked)
        begun += followed(engine)
    assert begun > 20


def test_an_end_within_a_draft(real: nemodiff.LoadedEngine, ran: Any) -> None:
    """EOS, stop ids, stop strings; a draft that ends where the answer would, whatever becomes of it."""
    eos = real.info.model.eos_ids[0]
    reasons = collections.Counter[str]()
    begun = 0
    for at in range(2, 30, 3):  # at every place in a block of 7
        engine = toy(real)
        plain = toy(real, ahead=False)
        common = {**QUADRATIC, "block_length": 7, "max_new_tokens": 64}
        asked: list[Asked] = [(TEXT[at : at + 20], common)]
        asked.append((TEXT[:20], {**common, "stop": [nemodiff.generate(plain, TEXT[:20], **common).text[3:5]]}))
        asked.append((TEXT[:20], {**common, "stop_token_ids": [130 + 9 * at]}))
        asked.append((TEXT[:30], {**common, "stop_token_ids": list(range(130 + at, 150 + at))}))  # too many
        engine.backend.said = {20 + at: eos}  # type: ignore[attr-defined]
        requests = run(engine, asked, ran, rows=2)
        for request, (prompt, options) in zip(requests, asked, strict=True):
            plain.backend.said = {20 + at: eos}  # type: ignore[attr-defined]
            expected = nemodiff.generate(plain, prompt, **{**options, "mode": "ar", "block_length": None})
            assert request.tokens == expected.token_ids
            assert request.finish == expected.finish_reason
        reasons.update(str(request.finish) for request in requests)
        begun += followed(engine)
    assert reasons["stop"] > 9
    assert begun > 99


def test_what_was_begun_is_used_if_it_is_what_the_loop_wants() -> None:
    arrangement = Arrangement(Grouping(3, {2: 4}), (), 100, (), 0)
    following = Following(causal("verify", [1] * 9, 60), arrangement)
    made = Arranged(Grouping(2, {1: 3}), 2, [7, 8])
    prediction: Any = None  # that has been looked at
    wanted = following.after(prediction, made)
    assert (wanted.write_at, wanted.ids.tolist(), wanted.pos.tolist()) == (62, [7, 8, 0, 0, 0], [62, 63, 63, 64, 65])
    assert following.serves(prediction, wanted, made)
    others = [
        wanted._replace(ids=np.array([7, 9, 0, 0, 0], np.int32)),
        wanted._replace(ids=wanted.ids[:4]),
        wanted._replace(write_at=61),
        wanted._replace(kind="draft"),
    ]
    assert not any(following.serves(prediction, other, made) for other in others)


def test_memory_for_the_longest_way() -> None:
    """All heads of the pass before may be accepted, and the next have as many tokens as it may."""
    verify, before = causal("verify", [1] * 9, 60), Grouping(5, {5: 4})
    arrangement = Arrangement(before, (), 100, (), 0)
    assert most_end(Following(verify, arrangement), 9) == 60 + 5 + 100
    assert [most_end(Following(verify, feed), 7) for feed in (None, "token", "accepted")] == [69, 69, 69 + 7]


def test_a_forward_shares_out_what_it_has_beside_others(real: nemodiff.LoadedEngine) -> None:
    """Of tokens and of predictions, of which a prompt has few."""
    pages, mask = Pages(20, 4, 20), real.info.model.mask_id
    (row, other) = pages.open(2) or ()
    assert pages.reserve(row, 0, 512) is not None
    prompt, placeholder = causal("prefill", [7] * 512, 0), causal("verify", [7] * 140, 40, predict_all=True)
    before = Grouping(1, {1: 8})
    sources = [Source(None, 0, 0, 0), Source(Arrangement(before, ((8, 256),), 256, (), mask), 0, 600, 9)]
    for shape, expected in ((FlatShape(768, 256), 255), (FlatShape(640, 256), 128)):
        assert room(shape, [prompt, placeholder], sources) == expected
        inputs, _ = flat_layouts(shape, real.info)
        arrays = inputs.views(np.zeros(inputs.nbytes, np.uint8))
        fill(arrays, [prompt, placeholder], [row, other], pages, mask, sources)
        known = arrange.Known(*arrays["known"][0, : arrange.LENGTHS].tolist())
        assert (known.first, known.budget, known.row, known.position) == (512, expected, other, 40)
        assert arrays["index"].tolist() == [511, *range(512, 512 + expected), *[shape.tokens - 1] * (255 - expected)]


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("pages", [12, 60])
def test_rows_of_all_modes_and_arrivals(real: nemodiff.LoadedEngine, ran: Any, late: bool, pages: int) -> None:
    """With memory for all, and with so little that rows lose their pages."""
    choose = random.Random(pages)
    begun = preempted = 0
    kinds: list[dict[str, Any]] = [
        *({**QUADRATIC, "block_length": size} for size in (4, 8, 8, 16, 32)),
        {**QUADRATIC, "block_length": 6, "groups": "all"},
        *({"mode": "linear_spec", "block_length": 8} for _ in range(2)),
        *({"mode": "ar"} for _ in range(2)),
        {**QUADRATIC, "block_length": "auto"},
        {"mode": "auto"},
    ]
    for turn in range(8):
        some = kinds if turn % 2 else kinds[:5]
        asked: list[Asked] = []
        for kind in choose.choices(some, k=9):
            prompt = TEXT[choose.randrange(9) :][: choose.choice([1, 70, 90])] + TEXT[: choose.randint(1, 30)]
            asked.append((prompt, {**kind, "max_new_tokens": choose.choice([3, 40, 70])}))
        engine = toy(real, late=late, pages=pages)
        requests = run(engine, asked, ran, rows=choose.choice([1, 2, 4]) if pages == 60 else 9)
        assert [request.tokens for request in requests] == ars(real, asked)
        begun += followed(engine)
        preempted += engine.backend.preempted  # type: ignore[attr-defined]
        assert engine.backend.pages.free == pages  # type: ignore[union-attr]
    assert begun > 99
    assert (preempted > 0) == (pages == 12)


# --- over a card that lags behind, and over graphs


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Engines of a model that drafts well, without an adapter and with one."""
    folder = tmp_path_factory.mktemp("engines")
    shutil.copytree(TINY_CHAT, folder / "checkpoint")
    checkpoints = {"plain": TINY_CHAT, "adapted": adapted(folder / "checkpoint", 0.2)}
    return {
        name: Builder(checkpoint, folder / name, backend="torch", dtype="f32").run()
        for name, checkpoint in checkpoints.items()
    }


def on_device(
    folder: Path, make: Callable[[], Any], *, pages: int = 40, kernels: bool = False
) -> nemodiff.LoadedEngine:
    """An engine that runs ahead, and notes in its backend how often."""
    plain = nemodiff.load(folder, device="cpu")  # before there is another device
    device = make()
    backend = TorchEngine(folder, plain.info, device, kernels=kernels, graphs=device != "cpu", ahead=True, pages=pages)
    begun = backend.followed = collections.Counter[str]()  # type: ignore[attr-defined]
    follow = backend.forwards.follow

    def noted(flight: Any, passes: Any, *rest: Any) -> Any:
        flight = follow(flight, passes, *rest)
        if flight is not None:
            begun.update("arranged" if isinstance(p.feed, Arrangement) else str(p.feed) for p in passes)
        return flight

    backend.forwards.follow = noted  # type: ignore[method-assign]
    engine = dataclasses.replace(plain, backend=backend)
    costs = vars(engine)["cost"] = PassCosts(CURVE)
    costs.learn = lambda *_: None  # type: ignore[method-assign]  # the passes of a CPU
    return engine


@pytest.fixture(scope="module")
def model() -> ReferenceModel:
    """The oracle, which remembers its passes."""
    return ReferenceModel.load(TINY_CHAT)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["plain", "adapted"])
def test_a_trained_model_gives_what_the_oracle_gives(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, model: ReferenceModel, device: str, name: str
) -> None:
    """One request, and several whose rows have passes of one size."""
    engine = on_device(folders[name], lambda: DEVICES[device](monkeypatch))
    options = {**QUADRATIC, "max_new_tokens": 24}
    prompts = [chat_ids(engine.text, [{"role": "user", "content": question}]) for question in QUESTIONS[:3]]
    expected = [oracle_ar(model, prompt, 24, model.eos).tokens for prompt in prompts]
    begun = engine.backend.followed  # type: ignore[attr-defined]
    for block in (4, 16):
        answer = nemodiff.generate(engine, prompts[0], **options, block_length=block)
        assert answer.token_ids == expected[0]
        assert begun["arranged"] > 1
    with nemodiff.Scheduler(engine, rows=3) as scheduler:
        handles = [scheduler.submit(prompt, **options, block_length=8) for prompt in prompts]
        assert [handle.result(60).token_ids for handle in handles] == expected
    assert engine.backend.pages.free == 40  # type: ignore[union-attr]


def test_the_kernels_arrange_what_plain_torch_does(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """In Triton's interpreter: tokens, passes, what each accepts, and what the adapter acts on."""
    told = list[Any]()
    for kernels in (False, True):
        with monkeypatch.context() as context:
            engine = on_device(folders["adapted"], lambda: LaggingDevice(context), kernels=kernels)
            answer = nemodiff.generate(engine, QUESTIONS[0], **QUADRATIC, block_length=4, max_new_tokens=6)
            told.append((answer.token_ids, answer.nfe, answer.acceptance, answer.adapter_tokens))
            assert engine.backend.followed["arranged"] > 0  # type: ignore[attr-defined]
    assert told[0] == told[1]


def test_a_forward_does_not_keep_those_before_it(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    engine = on_device(folders["plain"], lambda: LaggingDevice(monkeypatch))
    forwards: Any = engine.backend.forwards  # type: ignore[attr-defined]
    flights, follow, most = weakref.WeakSet[Any](), forwards.follow, list[int]()

    def noted(*given: Any) -> Any:
        flight = follow(*given)
        flights.add(flight)
        most.append(len(flights))
        return flight

    monkeypatch.setattr(forwards, "follow", noted)
    nemodiff.generate(engine, QUESTIONS[0], **QUADRATIC, block_length=4, max_new_tokens=40)
    assert len(most) > 9
    assert max(most) <= 3


KINDS: list[dict[str, Any]] = [
    {"repetition_penalty": 1.2},
    {"logprobs": 1},
    {"temperature": 0.8},
    {"thinking": True, "thinking_budget": 5},
    {"groups": "all", "block_length": 8},
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_what_the_host_chooses_does_not_run_ahead(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, kind: dict[str, Any]
) -> None:
    engine = on_device(folders["plain"], lambda: LaggingDevice(monkeypatch))
    options = {"block_length": 8, **kind, **QUADRATIC, "max_new_tokens": 30}
    assert len(nemodiff.generate(engine, QUESTIONS[0], **options).token_ids) > 5
    assert not engine.backend.followed  # type: ignore[attr-defined]


def test_ctrl_c_while_two_passes_are_under_way(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever of them is waited for; the engine goes on, and no page is lost."""
    engine = on_device(folders["plain"], lambda: LaggingDevice(monkeypatch))
    backend: Any = engine.backend
    options: dict[str, Any] = {**QUADRATIC, "block_length": 8, "max_new_tokens": 40}
    expected = nemodiff.generate(engine, QUESTIONS[0], **options).token_ids
    wait = backend.device.wait
    for moment in range(2, 6):
        turns = iter(range(99))

        def interrupted(mark: int) -> None:
            if next(turns) == moment:  # noqa: B023  (it is called in this turn)
                raise KeyboardInterrupt
            wait(mark)

        with monkeypatch.context() as context:
            context.setattr(backend.device, "wait", interrupted)
            with pytest.raises(KeyboardInterrupt):
                nemodiff.generate(engine, QUESTIONS[0], **options)
        assert nemodiff.generate(engine, QUESTIONS[0], **options).token_ids == expected
        assert backend.pages.free == 40
    assert backend.followed["arranged"] > 9


def test_rows_have_room_together(real: nemodiff.LoadedEngine, ran: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward that is begun ahead has no more tokens than any, though its passes may be longer than those before."""
    monkeypatch.setattr(PagedToyCache, "most_tokens", 70)
    launch, met = PagedToyCache.launch, collections.Counter[bool]()

    def counted(cache: PagedToyCache, passes: Sequence[Pass], rows: Sequence[int]) -> Any:
        sizes = [p.ids.size for p in passes if p.kind != "prefill"]  # which come on top
        met[len(sizes) > 1 and sum(sizes) > 70] += 1
        return launch(cache, passes, rows)

    monkeypatch.setattr(PagedToyCache, "launch", counted)
    asked: list[Asked] = [(TEXT[n : n + 9], {**QUADRATIC, "block_length": 8, "max_new_tokens": 60}) for n in range(6)]
    run(toy(real), asked, ran, rows=3)
    assert met[False] > 9
    assert not met[True]


def test_a_row_may_leave_in_mid_flight(real: nemodiff.LoadedEngine) -> None:
    """Its pages go to the next one while a pass that was begun for it is under way."""
    for moment in range(1, 9):
        engine = toy(real, late=bool(moment % 2), pages=15)
        asked: list[Asked] = [
            (TEXT[n : n + 50], {**QUADRATIC, "block_length": 8, "max_new_tokens": 60}) for n in range(3)
        ]
        first, second, third = one_leaves(engine, asked, moment)
        expected = ars(real, asked)
        assert [second.tokens, third.tokens] == expected[1:]
        assert first.tokens == expected[0][: len(first.tokens)]
        assert engine.backend.pages.free == 15  # type: ignore[union-attr]

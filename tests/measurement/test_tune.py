"""`nemodiff tune`: the choice by time, the record that it leaves, and engines that take it. Times are stand-ins."""

from __future__ import annotations

import ctypes
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import triton
from click.testing import CliRunner
from conftest import Refused, output_of
from stand_ins.torch_graphs import RecordingDevice
from stand_ins.torch_pair import MODELS

import nemodiff
from nemodiff import whole_file
from nemodiff.builder.build import Builder
from nemodiff.cli import main
from nemodiff.engine_folder import TUNED_FILE
from nemodiff.engine_info import read_engine
from nemodiff.errors import EngineError
from nemodiff.measurement import tune as tuning
from nemodiff.measurement.tune import Outcome, tune
from nemodiff.runtime.engines.torch.device import TorchDevice
from nemodiff.runtime.engines.torch.engine import TorchEngine
from nemodiff.runtime.engines.torch.projections import OWN
from nemodiff.runtime.engines.torch.step import Step
from nemodiff.runtime.engines.torch.trial import Probes, Trial
from nemodiff.tuned import Choice, Tuned, read_tuned, write_tuned

pytestmark = pytest.mark.torch
FLIPS = ("pdl", *OWN)
EVERY = Choice(True, frozenset(OWN))
HERE = {"card": "NVIDIA H200", "driver": "CUDA 13.0", "torch": "2.13.0", "triton": "3.7.0", "nemodiff": "0"}


class StandIn:
    """A choice whose passes take what a rule says; `noise` is added in every second turn."""

    def __init__(self, seconds: float, tokens: list[list[int]], noise: float, confidence: float = 0.9) -> None:
        self.tokens = tokens
        self.confidences = [[confidence for _ in some] for some in tokens]
        self._seconds, self._noise, self._turn = seconds, noise, 0

    def seconds(self) -> list[float]:
        self._turn += 1
        return [self._seconds + self._noise * (self._turn % 2), 1.0]


def found(
    rule: Callable[[Choice], float],
    tokens: Callable[[Choice], list[list[int]]] = lambda choice: [[1]],
    noise: float = 0.0,
    flips: tuple[str, ...] = FLIPS,
    exact: bool = True,
) -> Outcome:
    return tune(lambda c: StandIn(rule(c), tokens(c), noise), flips, exact, lambda text: None, turns=6)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tune")
    checkpoint = MODELS["plain rotation"](folder / "checkpoint")
    return Builder(checkpoint, folder / "engine", backend="torch", dtype="f32", max_seq_len=256).run()


@pytest.fixture
def engine(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "engine"))


@pytest.fixture
def on_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU passes for a card that begins kernels early."""
    monkeypatch.setattr(TorchDevice, "overlaps_launches", True)
    monkeypatch.setattr(TorchDevice, "identity", HERE)


def test_the_fastest_way_is_chosen() -> None:
    """Each product may win or lose by itself, and early launches with it."""
    cost = {"qkv": -2.0, "o": -1.0, "gate_up": 3.0, "down": -1.5}
    outcome = found(lambda c: 10 - c.pdl + sum(cost[name] for name in c.own_products))
    assert outcome.choice == Choice(True, frozenset({"qkv", "o", "down"}))
    assert [one.taken for one in outcome.tried].count(True) > 2
    assert outcome.tried[0].seconds == [10.0, 1.0]
    assert len({one.choice for one in outcome.tried}) == len(outcome.tried)


def test_products_that_gain_only_together_are_found() -> None:
    assert found(lambda c: 5.0 if c == EVERY else 10.0 + len(c.own_products) + c.pdl).choice == EVERY


def test_what_is_no_faster_or_only_by_chance_leaves_the_default() -> None:
    assert found(lambda c: 10.0).choice == Choice()
    late = iter(range(10**6))

    class Chance(StandIn):
        def seconds(self) -> list[float]:
            return [10.0 + 3.0 * (next(late) * 7919 % 13)]

    noisy = tune(lambda c: Chance(0, [[1]], 0), FLIPS, True, lambda text: None, turns=6)
    assert noisy.choice == Choice()
    assert found(lambda c: 10.0 - 0.1 * c.pdl, flips=()).choice == Choice()  # there is nothing to choose


def test_what_a_card_refuses_is_left_out() -> None:
    def trial(choice: Choice) -> StandIn:
        if choice.own_products & refused:
            raise EngineError("GatedLinear16 in bf16 needs 9 bytes")
        return StandIn(10.0 - choice.pdl - len(choice.own_products), [[1]], 0.0)

    said = list[str]()
    refused = {"gate_up"}
    outcome = tune(trial, FLIPS, False, said.append, turns=2)
    assert outcome.choice == Choice(True, frozenset({"qkv", "o", "down"}))
    assert "goes on without that: GatedLinear16 in bf16 needs 9 bytes" in said
    refused = set(OWN)
    assert len(tune(trial, OWN, False, said.append, turns=2).tried) == 1
    with pytest.raises(EngineError, match="needs 9 bytes"):
        tune(lambda choice: trial(EVERY), FLIPS, False, said.append, turns=2)  # the default must run


def test_what_falls_on_all_alike_hides_no_gain() -> None:
    assert found(lambda c: 10.0 - 0.1 * c.pdl, noise=5.0).choice == Choice(pdl=True)


def test_other_tokens_are_a_fault() -> None:
    """In f32 of any two choices; in 16 bits own products round otherwise, and early launches do not."""
    with pytest.raises(EngineError, match=r"own products o\) and .*none\) give different tokens, which is a fault"):
        found(lambda c: 1.0, lambda c: [[len(c.own_products & {"o"})]])
    assert found(lambda c: 1.0, lambda c: [[len(c.own_products)]], exact=False).choice == Choice()
    with pytest.raises(EngineError, match=r"kernels begin early, own products none.*different tokens"):
        found(lambda c: 1.0, lambda c: [[c.pdl]], exact=False)


def test_a_near_tie_is_no_fault() -> None:
    """In f32 own products may sum in another order; early launches change no number, so they decide no tie."""

    def chosen(alone: tuple[int, float], own: tuple[int, float], early: int | None = None) -> Choice:
        def trial(choice: Choice) -> StandIn:
            token, confidence = own if choice.own_products else alone
            return StandIn(1.0, [[7, early if choice.pdl and early is not None else token]], 0.0, confidence)

        return tune(trial, FLIPS, True, lambda text: None, turns=2).choice

    assert chosen((1, 0.31), (2, 0.3101)) == Choice()
    assert chosen((1, 0.5001), (2, 0.5)) == Choice()
    for alone, own in (((1, 0.31), (2, 0.36)), ((1, 0.9), (2, 0.9)), ((1, 0.31), (2, float("nan")))):
        with pytest.raises(EngineError, match="give different tokens, which is a fault"):
            chosen(alone, own)
    with pytest.raises(EngineError, match=r"kernels begin early, own products none\) and .*different tokens"):
        chosen((1, 0.31), (1, 0.31), early=2)


def test_an_engine_takes_what_was_tuned_for_its_card(engine: Path, on_card: None, monkeypatch: Any) -> None:
    """An argument comes first, then the environment, then the record, then the default; each for itself."""

    def loaded(**options: Any) -> Choice:
        made = TorchEngine(engine, read_engine(engine), "cpu", pages=8, **{"kernels": True, **options})
        assert (made.model.project.own, made.model.kernels and made.model._launch.pdl) == (  # type: ignore[union-attr]
            made.choice.own_products,
            made.model.kernels and made.choice.pdl,
        )
        return made.choice

    assert loaded() == Choice()
    write_tuned(engine, Tuned(EVERY, HERE, "2026-11-29"), {})
    assert loaded() == EVERY
    assert loaded(kernels=False) == Choice()
    assert loaded(pdl=False) == Choice(False, EVERY.own_products)
    assert loaded(own_products=["o"]) == Choice(True, frozenset({"o"}))
    monkeypatch.setenv("NEMODIFF_PDL", "0")
    assert loaded() == Choice(False, EVERY.own_products)
    assert loaded(pdl=True) == EVERY
    monkeypatch.setenv("NEMODIFF_OWN_PRODUCTS", "")
    assert loaded() == Choice()
    monkeypatch.setenv("NEMODIFF_OWN_PRODUCTS", "qkv")
    assert loaded() == Choice(False, frozenset({"qkv"}))
    assert loaded(own_products=[]) == Choice()
    monkeypatch.delenv("NEMODIFF_PDL")
    monkeypatch.setattr(TorchDevice, "overlaps_launches", False)
    assert loaded(own_products=[]) == Choice()  # a card that cannot


def test_a_card_is_known_by_its_name_and_versions(not_installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(out: Any) -> None:
        out._obj.value = 13020

    here = TorchDevice(Path("engine"), "cpu")
    assert here.identity == {}
    here.is_gpu = True
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda name: "NVIDIA H200")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: mock.Mock(cuDriverGetVersion=version))
    assert here.identity == {
        "card": "NVIDIA H200",
        "driver": "CUDA 13.2",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "nemodiff": nemodiff.__version__,
    }


@pytest.mark.parametrize("name", HERE)
def test_another_card_or_version_is_not_used(engine: Path, on_card: None, name: str) -> None:
    write_tuned(engine, Tuned(EVERY, {**HERE, name: "other"}, "2026-11-29"), {})
    assert TorchEngine(engine, read_engine(engine), "cpu", kernels=True, pages=8).choice == Choice()
    shown = output_of("inspect", str(engine))
    assert f"{name} other" in shown
    assert "; not used with another card or version, or with --tp-size" in shown


def test_a_card_has_one_entry_and_leaves_those_of_others(engine: Path) -> None:
    other = Tuned(Choice(), {**HERE, "card": "NVIDIA H100"}, "2026-11-28")
    for one in (other, Tuned(EVERY, {**HERE, "torch": "2.12"}, "2026-11-28"), Tuned(EVERY, HERE, "2026-11-29")):
        write_tuned(engine, one, {"us": [1.0]})
    assert read_tuned(engine) == [other, Tuned(EVERY, HERE, "2026-11-29")]


def test_a_record_of_another_build_is_not_used(engine: Path) -> None:
    write_tuned(engine, Tuned(EVERY, HERE, "2026-11-29"), {})
    (engine / "manifest.json").write_text((engine / "manifest.json").read_text() + "\n")
    assert read_tuned(engine) == []


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"choices": 1}', '{"choices": [{}]}', '{"choices": [{"pdl": 1}]}', '{"choices": []}']
)
def test_a_broken_record_is_one_line(engine: Path, on_card: None, refused: Refused, text: str) -> None:
    (engine / TUNED_FILE).write_text(text)
    with pytest.raises(EngineError, match=r"tuned\.json: not a record of nemodiff tune; remove it, or"):
        TorchEngine(engine, read_engine(engine), "cpu", kernels=True, pages=8)
    refused(["inspect", str(engine)], "tuned.json: not a record of nemodiff tune")
    write_tuned(engine, Tuned(EVERY, HERE, "2026-11-29"), {})
    assert len(read_tuned(engine)) == 1


def test_every_field_of_an_entry_has_its_type(engine: Path) -> None:
    write_tuned(engine, Tuned(EVERY, HERE, "2026-11-29"), {})
    record = json.loads((engine / TUNED_FILE).read_text())
    wrong = {"pdl": 1, "own_products": "qkv", "date": 20261129, "here": {"card": 1}}
    for change in (*({name: value} for name, value in wrong.items()), {"own_products": [1]}):
        choices = [record["choices"][0] | change]
        (engine / TUNED_FILE).write_text(json.dumps({**record, "choices": choices}))
        with pytest.raises(EngineError, match="not a record of nemodiff tune"):
            read_tuned(engine)


def test_products_that_are_none_break_a_record(engine: Path, on_card: None) -> None:
    write_tuned(engine, Tuned(Choice(False, frozenset({"up"})), HERE, "2026-11-29"), {})
    with pytest.raises(EngineError, match="not a record of nemodiff tune"):
        TorchEngine(engine, read_engine(engine), "cpu", kernels=True, pages=8)


def probes(folder: Path) -> Probes:
    return Probes(TorchEngine(folder, read_engine(folder), "cpu", pages=16, pdl=False, own_products=()))


def test_passes_are_timed_over_one_prompt(engine: Path, on_card: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU without kernels, where all choices are the same network."""
    probed = probes(engine)
    filled: list[Any] = []
    fill = Step.fill

    def noted(step: Step, *given: Any) -> None:
        filled.append(given)
        fill(step, *given)

    monkeypatch.setattr(Step, "fill", noted)
    assert probed.names == ["1 at 256", "32 at 256"]
    assert probed.flips == FLIPS
    assert probed.exact
    weights = [layer.qkv for layer in probed.engine.model.layers]
    trials = [probed.trial(choice) for choice in (Choice(), EVERY, Choice())]
    assert trials[0].tokens == trials[1].tokens == trials[2].tokens
    assert [len(tokens) for tokens in trials[0].tokens] == [1, 32]
    assert [len(confidences) for confidences in trials[0].confidences] == [1, 32]
    assert all(0 < confidence <= 1 for some in trials[0].confidences for confidence in some)
    filled.clear()
    for trial, own in zip(trials, (set(), set(OWN), set()), strict=True):
        assert all(seconds > 0 for seconds in trial.seconds())
        assert probed.engine.model.project.own == own  # nothing is captured here
    assert filled == [([one], [row]) for one, row in zip(probed.passes, probed.cache.rows[1:], strict=True)] * 3
    assert {one.write_at + len(one.ids) for one in probed.passes} == {256}
    assert all(a is b.qkv for a, b in zip(weights, probed.engine.model.layers, strict=True))


def test_every_way_keeps_its_graphs(engine: Path) -> None:
    """So that ways are timed in turns, whichever was captured last."""
    device = RecordingDevice()
    backend = TorchEngine(engine, read_engine(engine), device, graphs=True, pages=16, pdl=False, own_products=())
    probed = Probes(backend)
    device.graphs.clear()
    trials = [probed.trial(choice) for choice in (Choice(), EVERY)]
    graphs = [device.graphs[:2], device.graphs[2:]]  # of 1 token and of 32
    assert len(graphs[1]) == 2
    for trial, own, other in zip(trials, graphs, reversed(graphs), strict=True):
        before = [graph.replays for graph in (*own, *other)]
        trial.seconds()
        more = [graph.replays - count for graph, count in zip((*own, *other), before, strict=True)]
        assert more == [9, 9, 0, 0]


def test_a_rebuild_replaces_the_record_too(engine: Path, tmp_path: Path) -> None:
    write_tuned(engine, Tuned(EVERY, HERE, "2026-11-29"), {})
    checkpoint = MODELS["plain rotation"](tmp_path / "checkpoint")
    Builder(checkpoint, engine, backend="torch", dtype="f32").run()
    assert not (engine / TUNED_FILE).exists()


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch, on_card: None) -> None:
    """The command on a CPU, with times by rule: early launches gain."""
    monkeypatch.setattr(tuning, "open_probes", lambda folder, device: probes(folder))
    monkeypatch.setattr(Trial, "seconds", lambda self: [2.0 - self._choice.pdl, 1.0])


def test_the_command_keeps_what_it_chose(engine: Path, timed: None) -> None:
    write_tuned(engine, Tuned(Choice(), {**HERE, "card": "NVIDIA H100"}, "2026-11-28"), {})
    result = CliRunner().invoke(main, ["tune", str(engine), "-r", "2"])
    assert result.exit_code == 0
    assert "chosen: kernels begin early, own products none\n" in result.stdout
    assert "measuring no kernel begins early, own products none\n" in result.stderr
    assert "kept beside it and not used here: " in result.stderr
    assert read_tuned(engine)[-1][:2] == (Choice(True), HERE)
    assert "tuned        kernels begin early, own products none: on 20" in output_of("inspect", str(engine))
    described = json.loads(output_of("tune", str(engine), "-r", "2", "--json"))
    assert (described["pdl"], described["own_products"], described["here"]) == (True, [], HERE)
    assert described["tried"][1]["gain_us"] == pytest.approx(1e6)


def test_an_interrupted_tune_leaves_the_old_record(engine: Path, timed: None, monkeypatch: Any) -> None:
    write_tuned(engine, Tuned(Choice(), HERE, "2026-11-28"), {})
    before = (engine / TUNED_FILE).read_bytes()

    def interrupt(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Trial, "seconds", interrupt)
        assert CliRunner().invoke(main, ["tune", str(engine)]).exit_code == 130
    monkeypatch.setattr(whole_file.os, "fsync", interrupt)  # while it is written
    assert CliRunner().invoke(main, ["tune", str(engine), "-r", "2"]).exit_code == 130
    assert (engine / TUNED_FILE).read_bytes() == before
    assert [file.name for file in engine.iterdir() if "partial" in file.name] == []


def test_what_cannot_be_tuned_is_refused(engine: Path, tiny_engine: Path, refused: Refused) -> None:
    refused(["tune", str(tiny_engine)], "is built for onnxruntime, allowed: torch", "build one with --backend torch")
    refused(["tune", str(engine), "--device", "cpu"], "device is cpu, allowed: cuda or cuda:N", "run it on the GPU")

"""What a step of the torch engine launches on a GPU: which kernels, how many, and which of them begin early."""

from __future__ import annotations

from pathlib import Path
from subprocess import CalledProcessError
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from stand_ins.kernel_launch import SCALES_ROWS
from stand_ins.launches import launches, specialisations
from stand_ins.torch_pair import MODELS
from triton.runtime.errors import OutOfResources, PTXASError

from nemodiff.builder.build import Builder
from nemodiff.engine_info import EngineInfo, read_engine
from nemodiff.errors import EngineError, RequestError
from nemodiff.plugins import FUSED
from nemodiff.plugins.failure import refusal
from nemodiff.plugins.op import Stage
from nemodiff.plugins.ops import linear, paged_attention
from nemodiff.runtime.engines.passes import causal
from nemodiff.runtime.engines.torch import launcher
from nemodiff.runtime.engines.torch.device import TorchDevice
from nemodiff.runtime.engines.torch.engine import TorchEngine
from nemodiff.runtime.engines.torch.flat import FlatShape, rounded_shape

pytestmark = pytest.mark.torch
FIRST = ["Rotation", "AttentionPlan", "EmbeddingNorm"]
HEADS = ["linear", "PagedRopeWrite", "PagedAttention", "AttentionMerge", "linear"]
REST = ["ResidualNorm", "linear", "SwiGLU", "linear", "ResidualNorm"]
CHOICE = ["FlatHeadScan16", "HeadReduce", "FlatCommitRule"]
AR = FlatShape(1, 1)


def built(folder: Path, model: str, **options: Any) -> tuple[Path, EngineInfo]:
    """An engine folder of two layers, in bf16."""
    checkpoint = MODELS[model](folder / "checkpoint")
    made = Builder(checkpoint, folder / "engine", backend="torch", dtype="bf16", **options).run()
    return made, read_engine(made)


def names(engine: TorchEngine, shape: FlatShape, **options: Any) -> list[str]:
    return [name for name, _ in launches(engine, shape, **options)]


def test_nothing_is_launched_between_products_but_kernels(tmp_path: Path) -> None:
    engine = TorchEngine(*built(tmp_path, "plain rotation"), "cpu", kernels=True, pages=8)
    assert names(engine, AR) == [*FIRST, *2 * (HEADS + REST), *CHOICE]
    drawn = [*CHOICE[:2], "FlatSampledScan", CHOICE[2]]
    assert names(engine, AR._replace(sampled=True))[-4:] == drawn
    many = names(engine, FlatShape(512, 512, sampled=True))  # FREE predictions at a time, over the same memory
    scan, *others, rule = (name.replace("16", "64") for name in drawn)
    assert [name for name in many if name in {scan, *others, rule}] == [*2 * [scan, *others], rule]


@pytest.mark.parametrize("options", [{}, {"quantization": "int8", "kv_cache_dtype": "fp8"}], ids=str)
def test_what_runs_eagerly_launches_what_the_warm_up_has_compiled(tmp_path: Path, options: dict[str, Any]) -> None:
    """Scored prompts, and forwards too large for a graph."""
    engine = TorchEngine(*built(tmp_path, "early YaRN", **options), "cpu", kernels=True, pages=8)
    shapes = engine.steps.shapes
    compiled = set[Any]().union(*(specialisations(engine, shape, fed=True) for shape in shapes))
    eager = [FlatShape(512, 512, logits=True), FlatShape(530, 300, logits=True), FlatShape(1500, 70)]
    eager += [FlatShape(2600, 260, sampled=True), FlatShape(2000, 3, logits=True)]
    for shape in map(rounded_shape, eager):
        assert shape not in shapes
        assert specialisations(engine, shape, fed=True) <= compiled, shape
    assert not specialisations(engine, FlatShape(530, 300)) <= compiled  # unless it is rounded


def test_a_pass_begun_ahead_takes_one_launch_more(tmp_path: Path) -> None:
    engine = TorchEngine(*built(tmp_path, "plain rotation"), "cpu", kernels=True, pages=8, ahead=True)
    for shape in (AR, FlatShape(64, 64, sampled=True)):
        assert names(engine, shape, fed=True) == ["Advance", *names(engine, shape)]
    assert names(engine, shape, fed=True, arranged=3) == ["Advance", "Reach", "Arrange", *names(engine, shape)]


def test_the_warm_up_compiles_what_arranges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over rows of no tokens, as many as there may be."""
    engine = TorchEngine(*built(tmp_path, "plain rotation"), "cpu", kernels=False, pages=8, ahead=True)
    met = list[tuple[int, int, bool]]()

    def arrange(inputs: Any, rows: int, *_: Any) -> None:
        met.append((len(inputs["ids"]), rows, bool(inputs["known"].any())))

    monkeypatch.setattr(engine.model, "arrange", arrange)
    engine.forwards.warm_up([FlatShape(128, 128), FlatShape(64, 64), AR])  # the host's memory is the same
    assert met == [(128, 32, False), (64, 16, False)]


def test_any_number_of_rows_is_arranged_by_the_same_kernels(tmp_path: Path) -> None:
    """Which the warm-up has compiled over as many as there may be."""
    engine = TorchEngine(*built(tmp_path, "plain rotation"), "cpu", kernels=True, pages=8, ahead=True)
    shape = FlatShape(128, 128)
    compiled = specialisations(engine, shape, fed=True, arranged=32)
    for rows in (1, 2, 16, 31):
        assert specialisations(engine, shape, fed=True, arranged=rows) == compiled, rows


def test_an_adapter_takes_three_launches_a_layer(tmp_path: Path) -> None:
    engine = TorchEngine(*built(tmp_path, "early YaRN"), "cpu", kernels=True, pages=8)
    layer = [*HEADS, "linear", "mul", "addmm_", *REST]
    assert names(engine, AR) == ["Rotation", "to", *FIRST[1:], *2 * layer, *CHOICE]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"quantization": "int8", "kv_cache_dtype": "int8"},
        pytest.param({"quantization": "fp8_dynamic"}, marks=SCALES_ROWS),
    ],
    ids=str,
)
def test_every_kernel_but_the_first_begins_early_where_the_card_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    def early(pdl: bool | None = None) -> set[str]:
        engine = TorchEngine(folder, info, "cpu", kernels=True, pages=8, pdl=pdl)
        launched = launches(engine, AR._replace(sampled=True))
        kernels = {stage.name for op in FUSED for stage in op.stages}
        begun = {name for name, begins in launched if begins}
        assert begun in (set(), {name for name, _ in launched if name in kernels} - {"Rotation"})
        return begun

    folder, info = built(tmp_path, "plain rotation", **options)
    assert not early(True)  # a CPU cannot
    monkeypatch.setattr(TorchDevice, "overlaps_launches", True)
    assert early(True)
    assert not early()  # off unless asked for
    monkeypatch.setenv("NEMODIFF_PDL", "1")
    assert early()
    assert not early(False)


def test_own_products_leave_their_shares_to_the_next_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of few tokens; an adapter adds to the residual, and more tokens take another product."""

    def engine(folder: tuple[Path, EngineInfo], own: tuple[str, ...] | None = None) -> TorchEngine:
        return TorchEngine(*folder, "cpu", kernels=True, pages=8, pdl=True, own_products=own)

    monkeypatch.setattr(TorchDevice, "overlaps_launches", True)
    plain = built(tmp_path / "plain", "plain rotation")
    attention = ["PagedAttention", "AttentionMerge"]
    added = ["PagedRopeWriteOfShares", *attention]
    some = ["SplitLinear16", *added, "SplitLinear16", "ResidualNormOfShares", "linear", "SwiGLU", "linear", REST[-1]]
    assert names(engine(plain, ("qkv", "o")), AR) == [*FIRST, *2 * some, *CHOICE]
    every = ["SplitLinear16", *added, "SplitLinear16", "ResidualNormOfShares"]
    every += ["GatedLinear16", "SplitLinear16", "ResidualNormOfShares"]
    monkeypatch.setenv("NEMODIFF_OWN_PRODUCTS", "qkv,o,gate_up,down")
    launched = launches(engine(plain), AR)
    assert [name for name, _ in launched] == [*FIRST, *2 * every, *CHOICE]
    assert all(early for name, early in launched if name != "Rotation")
    of_64 = names(engine(plain), FlatShape(64, 64))
    assert of_64.count("SplitLinear64") == 6
    assert names(engine(plain), FlatShape(128, 128)).count("linear") == 8
    adapted = names(engine(built(tmp_path / "adapted", "early YaRN")), AR)
    assert adapted[4:12] == ["SplitLinear16", *added, "SplitLinear16", "linear", "mul", "addmm_"]


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_products_of_few_bits_leave_their_shares_to_the_next_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Nine launches a layer; of many tokens a program sums all shares, and a gate_up too narrow for a card has some."""
    engine = TorchEngine(*built(tmp_path, "plain rotation", quantization=kind), "cpu", kernels=True, pages=8)
    split, gated, whole = (kind.capitalize() + name for name in ("SplitLinear", "GatedLinear", "Linear64"))
    norm, head = "ResidualNormOfShares", ["FlatHeadScanInt816" if kind != "fp8" else CHOICE[0], *CHOICE[1:]]
    attention = ["PagedRopeWriteOfShares", "PagedAttention", "AttentionMerge"]
    layer = [f"{split}16", *attention, f"{split}16", norm, f"{gated}16", f"{split}16", norm]
    assert names(engine, AR) == [*FIRST, *2 * layer, *head]
    of_64 = [name.replace("16", "64") for name in layer]
    assert names(engine, FlatShape(256, 64))[3 : 3 + len(layer)] == of_64
    many = [whole, "PagedRopeWrite", *attention[1:], whole, "ResidualNorm", f"{gated}64", whole, "ResidualNorm"]
    assert names(engine, FlatShape(512, 64))[3 : 3 + len(layer)] == many
    monkeypatch.setattr(linear, "LEAST_STEPS", 1)
    monkeypatch.setattr(linear, "BLOCK_K", 16)
    assert names(engine, AR)[9:11] == [f"{split}16", "SwiGLUOfShares"]


def test_own_products_must_be_projections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEMODIFF_OWN_PRODUCTS", "qkv,up")
    with pytest.raises(RequestError, match="holds 'up', allowed: qkv, o, gate_up, down; name some"):
        TorchEngine(*built(tmp_path, "plain rotation"), "cpu", pages=8)


def test_attention_fills_the_card_at_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = TorchDevice(Path("engine"), "cpu")
    assert device.programs == paged_attention.PROGRAMS
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda name: SimpleNamespace(multi_processor_count=108))
    device.is_gpu = True
    assert device.programs == 216
    device.is_gpu = False
    monkeypatch.setattr(TorchDevice, "programs", 40)
    engine = TorchEngine(*built(tmp_path, "plain rotation"), "cpu", kernels=True, pages=8)
    shared = [pair for kernel in specialisations(engine, AR) for pair in kernel[1:] if pair[0] == "SHARED"]
    assert shared == [("SHARED", 40 // engine.info.model.num_kv_heads)]


@pytest.mark.parametrize(("capability", "can"), [((8, 0), False), ((8, 9), False), ((9, 0), True), ((12, 0), True)])
def test_cards_that_begin_kernels_early(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], can: bool
) -> None:
    device = TorchDevice(Path("engine"), "cpu")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda name: capability)
    assert not device.overlaps_launches
    device.is_gpu = True
    assert device.overlaps_launches == can


PTXAS = "`ptxas` stderr:\nptxas fatal   : Value 'sm_130' is not defined\n\nRepro command: ptxas x\n"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> TorchEngine:
    return TorchEngine(*built(tmp_path_factory.mktemp("plain"), "plain rotation"), "cpu", kernels=True, pages=8)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            OutOfResources(141312, 101376, "shared memory"),
            "141312 bytes of shared memory, allowed on this card: 101376;",
        ),
        (OutOfResources(1024, 512, "threads"), "needs 1024 of threads, allowed on this card: 512; run with"),
        (PTXASError(PTXAS), "is refused by Triton's assembler (ptxas fatal   : Value 'sm_130' is not defined); update"),
        (RuntimeError("Failed to find C compiler. Please"), "needs a C compiler and Python's headers, with which"),
        (CalledProcessError(1, ["gcc", "main.c"]), "(Command '['gcc', 'main.c']' returned non-zero exit status 1.);"),
    ],
    ids=["memory", "threads", "assembler", "no compiler", "no headers"],
)
def test_a_kernel_that_is_refused_is_told_in_one_line(
    monkeypatch: pytest.MonkeyPatch, plain: TorchEngine, error: Exception, said: str
) -> None:
    class Refused:
        """Stands in for a compiled kernel."""

        def __getitem__(self, grid: Any) -> Any:
            def launch(*arguments: Any, **options: Any) -> None:
                raise error

            return launch

    load = Stage.load
    monkeypatch.setattr(Stage, "load", lambda stage: Refused() if stage.name == "SwiGLU" else load(stage))
    cache = plain.open(1)
    with pytest.raises(EngineError) as caught:
        cache.forward([causal("prefill", [300, 301], 0)])
    line = str(caught.value)
    assert line.startswith(f"SwiGLU in bf16, heads of {plain.info.model.head_dim}, on cpu ")
    assert said in line
    assert line.endswith("run with --device cpu")
    assert len(line.splitlines()) == 1
    monkeypatch.setattr(Stage, "load", load)
    assert cache.forward([causal("prefill", [300, 301], 0)])[0].token.shape == (1,)  # goes on where it can


def test_an_engine_in_f32_may_be_built_smaller() -> None:
    assert "; build again with --dtype bf16, or run" in str(refusal(OutOfResources(9, 8, "shared memory"), "f32"))


def test_any_other_error_of_a_launch_is_a_defect_and_stays(monkeypatch: pytest.MonkeyPatch, plain: TorchEngine) -> None:
    monkeypatch.setattr(launcher, "run", lambda *_, **__: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        plain.open(1).forward([causal("prefill", [300, 301], 0)])

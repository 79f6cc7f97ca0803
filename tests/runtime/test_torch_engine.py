"""The torch engine on the CPU: ONNX Runtime's tokens in every mode, and the GPU's paths as far as a CPU can show them.

The kernels run in Triton's interpreter over the engine's own tensors, graphs are recorded and replayed by
`stand_ins/torch_graphs.py`. What only a GPU can show is in test_gpu_engine.py.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equality_sampled
import numpy as np
import pytest
import torch
from conftest import Refused, output_of
from safetensors.numpy import load_file, save_file
from stand_ins.checkpoints import TINY_CHAT, write_checkpoint
from stand_ins.torch_graphs import RecordingDevice
from stand_ins.torch_pair import (
    CASES,
    MODELS,
    PROMPT,
    QUESTIONS,
    Pair,
    adapted,
    check_steps,
    make_pair,
    torch_backend,
    without_times,
)

import nemodiff
from nemodiff.builder.build import Builder
from nemodiff.contract import MODES
from nemodiff.engine_folder import read_engine
from nemodiff.errors import EngineError
from nemodiff.runtime.editing.methods import METHODS
from nemodiff.runtime.engines.engine import causal
from nemodiff.runtime.engines.torch.engine import FIRST_CAPACITY, TorchEngine
from nemodiff.runtime.engines.torch.model import TorchModel

pytestmark = pytest.mark.torch


@pytest.fixture(scope="module", params=list(MODELS))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("pair")
    return make_pair(folder, MODELS[request.param](folder / "checkpoint"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("tiny")
    return make_pair(folder, MODELS["tiny-chat with adapter"](folder / "checkpoint"))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_mode_equals_onnxruntime(pair: Pair, case: dict[str, Any]) -> None:
    """Tokens, text, passes by kind, acceptance: all but times."""
    for prompt in [*QUESTIONS, PROMPT]:
        expected = nemodiff.generate(pair.theirs, prompt, max_new_tokens=48, **case)
        got = nemodiff.generate(pair.ours, prompt, max_new_tokens=48, **case)
        assert without_times(got) == without_times(expected)


LAWS = {**equality_sampled.PARAMS, **equality_sampled.GUIDES}
WAYS = [*equality_sampled.CAUSAL.values(), {"mode": "ar"}]
CONTROLS = list(equality_sampled.CONTROLS.values())


@pytest.mark.parametrize("params", list(LAWS))
def test_every_law_of_sampling_equals_onnxruntime(tiny: Pair, params: str) -> None:
    """Two of the ways to decode causally and one of diffusion, in turn; logprobs and confidences too."""
    turn = list(LAWS).index(params)
    ways = [WAYS[turn % len(WAYS)], WAYS[(turn + 3) % len(WAYS)]]
    if params in equality_sampled.PARAMS and params not in equality_sampled.LOOKS_BACK:
        ways.append({"mode": "diffusion", **CONTROLS[turn % len(CONTROLS)]})
    for way in ways:
        reported = {"confidences": True} if way["mode"] == "diffusion" else {"logprobs": 2}
        options = {**LAWS[params], **way, **reported, "seed": turn, "max_new_tokens": 32}
        answers = [nemodiff.generate(engine, QUESTIONS[turn % 3], **options) for engine in (tiny.ours, tiny.theirs)]
        assert answers[0].token_ids == answers[1].token_ids
        assert answers[0].finish_reason == answers[1].finish_reason
        if way.get("groups") != "auto" and way["mode"] != "quadratic_spec":  # a budget depends on measured times
            assert answers[0].nfe == answers[1].nfe
        for ours, theirs in zip(*(a.logprobs or [] for a in answers), strict=True):
            assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-3)
        assert answers[0].confidences == pytest.approx(answers[1].confidences, abs=1e-4)


def test_batches_and_the_scheduler_equal_onnxruntime(pair: Pair) -> None:
    prompts: list[Any] = [*QUESTIONS, PROMPT, PROMPT * 8, QUESTIONS[0]]
    for mode in MODES:
        options: dict[str, Any] = {"mode": mode, "max_new_tokens": 24}
        expected = [nemodiff.generate(pair.theirs, prompt, **options).token_ids for prompt in prompts]
        together = nemodiff.generate_many(pair.ours, prompts, rows=4, **options)
        assert [answer.token_ids for answer in together] == expected
        with nemodiff.Scheduler(pair.ours, rows=3) as scheduler:
            handles = [scheduler.submit(prompt, **options) for prompt in prompts]
            assert [handle.result().token_ids for handle in handles] == expected


def test_scores_equal_onnxruntime(pair: Pair) -> None:
    pairs: list[Any] = [(prompt, ids) for prompt in [QUESTIONS[0], PROMPT * 8] for ids in ([11], PROMPT)]
    expected, got = (list(nemodiff.score_many(e, pairs, rows=3)) for e in (pair.theirs, pair.ours))
    assert [(one.greedy, one.token_ids) for one in got] == [(one.greedy, one.token_ids) for one in expected]
    assert [one.logprob for one in got] == pytest.approx([one.logprob for one in expected], abs=1e-3)
    options: dict[str, Any] = {"prompt_logprobs": 1, "max_new_tokens": 2}
    for mode in MODES:
        theirs, ours = (nemodiff.generate(e, PROMPT, mode=mode, **options) for e in (pair.theirs, pair.ours))
        assert theirs.token_ids == ours.token_ids
        for one, other in zip(theirs.prompt_logprobs or [], ours.prompt_logprobs or [], strict=True):
            assert (one is None) == (other is None)
            if one is not None and other is not None:
                assert one.logprob == pytest.approx(other.logprob, abs=1e-3)


def test_filling_in_and_revising_equal_onnxruntime(tiny: Pair) -> None:
    question = "Write a Python function that returns the sum of a and b."
    for method in METHODS:
        infilled = [
            nemodiff.infill(engine, "def add(", "):\n    return", prompt=question, method=method, length=3)
            for engine in (tiny.ours, tiny.theirs)
        ]
        assert infilled[0].text == infilled[1].text
    revised = [nemodiff.revise(e, "3, 4, 9, 6, 7, 8, 9.", prompt=QUESTIONS[0]) for e in (tiny.ours, tiny.theirs)]
    assert revised[0].text == revised[1].text


def test_passes_equal_onnxruntime(pair: Pair) -> None:
    check_steps(torch_backend(pair.ours), pair.theirs)


INTERPRETED = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="there is a GPU: test_gpu_engine.py runs them"
)


@INTERPRETED
def test_the_kernels_take_the_engines_tensors(tmp_path: Path) -> None:
    """One key/value head for four, heads of 48, three rows of different length: arguments and layouts."""
    pair = make_pair(tmp_path, MODELS["early YaRN"](tmp_path / "checkpoint"))
    backend = torch_backend(pair.ours)
    kernels = TorchEngine(backend.folder, backend.info, "cpu", kernels=True)
    check_steps(kernels, pair.theirs, short=True)
    assert (kernels.samples, backend.samples) == (True, False)
    for way in ({"mode": "ar"}, {"mode": "diffusion", "block_length": 4, "threshold": 0.3, "confidences": True}):
        options: dict[str, Any] = {"temperature": 1.2, "seed": 2**63 + 7, "max_new_tokens": 6, **way}
        ours, theirs = (nemodiff.generate(e, PROMPT, **options) for e in (pair.with_backend(kernels), pair.theirs))
        assert (ours.token_ids, ours.nfe) == (theirs.token_ids, theirs.nfe)
        assert ours.confidences == pytest.approx(theirs.confidences, abs=1e-4)


@INTERPRETED
def test_the_kernels_give_the_same_tokens_in_every_mode(tmp_path: Path) -> None:
    """Greedy, and for ar sampled from the logits that the head's kernel keeps."""
    checkpoint = write_checkpoint(
        tmp_path / "checkpoint", seed=5, num_hidden_layers=1, num_key_value_heads=1, dtype="f32"
    )
    pair = make_pair(tmp_path, adapted(checkpoint, 0.1))
    backend = torch_backend(pair.ours)
    fused = pair.with_backend(TorchEngine(backend.folder, backend.info, "cpu", kernels=True))
    spoken = [
        {"mode": "ar", "temperature": 0.9, "seed": 3},
        {"mode": "diffusion", "block_length": 4, "threshold": 0.3},
        {"mode": "linear_spec", "block_length": 3},
        {"mode": "quadratic_spec", "groups": "all", "block_length": 2},
    ]
    for case in spoken:
        expected, got = (nemodiff.generate(e, PROMPT[:3], max_new_tokens=4, **case) for e in (pair.ours, fused))
        assert without_times(got) == without_times(expected)


def test_a_replay_equals_an_eager_run(pair: Pair) -> None:
    """Shapes rounded, caches whole, each shape captured when it comes again: the same tokens."""
    backend, device = torch_backend(pair.ours), RecordingDevice()
    graphed = TorchEngine(backend.folder, backend.info, device, graphs=True)
    for _ in range(3):
        check_steps(graphed, pair.theirs)
    assert graphed.captured == len(device.graphs) > 3
    assert all(graph.replays for graph in device.graphs)
    assert graphed.eager_shapes == {}
    engine = pair.with_backend(graphed)
    for case in ({"mode": "linear_spec"}, {"mode": "diffusion", "block_length": 5}):
        for prompt in QUESTIONS:
            expected = nemodiff.generate(pair.theirs, prompt, max_new_tokens=32, **case)
            got = nemodiff.generate(engine, prompt, max_new_tokens=32, **case)
            assert without_times(got) == without_times(expected)


def test_a_shape_that_cannot_be_captured_runs_eagerly(tiny: Pair) -> None:
    backend = torch_backend(tiny.ours)
    graphed = TorchEngine(backend.folder, backend.info, RecordingDevice(refuses=2), graphs=True)
    for _ in range(2):
        check_steps(graphed, tiny.theirs)
    assert len(graphed.eager_shapes) == 2
    assert graphed.captured > 0


def test_a_cache_that_grows_drops_its_graphs(tiny: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph knows the addresses of the old cache."""
    monkeypatch.setitem(FIRST_CAPACITY, True, 64)
    backend, device = torch_backend(tiny.ours), RecordingDevice()
    cache = TorchEngine(backend.folder, backend.info, device, graphs=True).open(1)
    plain = tiny.theirs.backend.open(1)
    for start in range(0, 300, 16):
        ids = (PROMPT * 8)[start : start + 16]
        got, expected = (c.forward([causal("prefill", ids, start)])[0] for c in (cache, plain))
        np.testing.assert_array_equal(got.token, expected.token)
    assert cache.capacity == 512
    assert len(device.graphs) == 4  # of one shape, at 64, 128, 256 and 512 slots


def test_predictions_are_read_only(tiny: Pair) -> None:
    pass_ = causal("verify", PROMPT, 0, predict_all=True, logits=True)
    (prediction,) = tiny.ours.backend.open(1).forward([pass_])
    assert [array.flags.writeable for array in prediction if array is not None] == [False] * 4


def test_closed_caches_are_used_again_but_for_grown_ones(tiny: Pair) -> None:
    backend = TorchEngine(tiny.ours.folder, tiny.ours.info, "cpu")
    first = backend.open(2)
    first.forward([causal("prefill", PROMPT, 0)])
    first.close()
    assert backend.open(1) is first
    first.forward([causal("prefill", (PROMPT * 8)[:300], 0)])
    first.close()
    assert backend.open(1) is not first


def test_memory_is_flat(tiny: Pair) -> None:
    def ask(number: int) -> list[int]:
        mode = MODES[number % 4]
        return nemodiff.generate(tiny.ours, QUESTIONS[number % 3], mode=mode, max_new_tokens=8).token_ids

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    expected = [ask(n) for n in range(12)]
    before = resident()
    for number in range(96):
        assert ask(number) == expected[number % 12]
    assert resident() - before < 8 * 2**20


@pytest.mark.parametrize(("dtype", "margin"), [("bf16", 1.0), ("f16", 0.125)])
def test_half_precision_agrees_where_it_is_clear(tiny: Pair, tmp_path: Path, dtype: Any, margin: float) -> None:
    folder = Builder(TINY_CHAT, tmp_path / "engine", backend="torch", dtype=dtype).run()
    ours = nemodiff.load(folder, device="cpu").backend.open(1)
    pass_ = causal("verify", PROMPT, 0, predict_all=True, logits=True)
    (got,), (expected,) = ours.forward([pass_]), tiny.theirs.backend.open(1).forward([pass_])
    assert got.logits is not None
    assert expected.logits is not None
    assert got.logits.dtype == np.float32
    ranked = np.sort(np.delete(expected.logits, tiny.theirs.info.model.mask_id, axis=1), axis=1)
    clear = ranked[:, -1] - ranked[:, -2] > margin
    assert clear.sum() > 10
    np.testing.assert_array_equal(got.token[clear], expected.token[clear])


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_build_writes_the_weights_as_they_are(checkpoint: Path, tmp_path: Path, dtype: Any) -> None:
    folder = Builder(checkpoint, tmp_path / "engine", backend="torch", dtype=dtype).run()
    carried = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"}
    names = {path.name for path in folder.iterdir()}
    assert names == carried | {"config.json", "manifest.json", "model.safetensors"}
    info = read_engine(folder)
    weights = load_file(folder / "model.safetensors")
    source = load_file(checkpoint / "model.safetensors")
    assert info.manifest.backend == "torch"
    assert info.build.dtype == dtype
    kind = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}[dtype]
    for name, tensor in source.items():
        short = name.removeprefix("encoder.")
        assert weights[short].dtype == kind
        np.testing.assert_array_equal(weights[short], tensor.astype(weights[short].dtype))
    side = load_file(checkpoint / "linear_spec_lora" / "adapter_model.safetensors")
    b = side["base_model.model.encoder.layers.1.self_attn.o_proj.lora_B.weight"] * np.float32(2)  # alpha / rank
    stored = weights["layers.1.self_attn.o_proj.lora_B.weight"]
    np.testing.assert_array_equal(stored, b.astype(stored.dtype))


def test_commands_work_on_a_torch_engine(checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "engine"
    build = ("build", str(checkpoint), "-o", str(target), "--backend", "torch")
    plan = json.loads(output_of(*build, "--dry-run", "--json"))
    assert not target.exists()
    output_of(*build)
    assert plan["build"]["dtype"] == "bf16"
    assert plan["weight_bytes"] == plan["disk_needed"] == (target / "model.safetensors").stat().st_size
    output_of(*build)  # an engine of its own kind is replaced
    described = json.loads(output_of("inspect", str(target), "--json"))
    assert described["engine"]["backend"] == "torch"
    assert described["graph"] is None
    assert "engine       torch, bf16" in output_of("inspect", str(target))
    answer = json.loads(
        output_of("run", str(target), "-p", "Hello", "--max-new-tokens", "4", "--json", "--device", "cpu")
    )
    assert len(answer["token_ids"]) <= 4


def test_no_torch(tiny: Pair, monkeypatch: pytest.MonkeyPatch, refused: Refused) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    refused(["run", str(tiny.ours.folder), "-p", "x"], "needs torch, which is not installed", "nemodiff[torch]")


def test_an_old_torch(tiny: Pair, monkeypatch: pytest.MonkeyPatch, refused: Refused) -> None:
    monkeypatch.delattr(torch, "OutOfMemoryError")
    refused(["run", str(tiny.ours.folder), "-p", "x"], "needs torch 2.5 or later, here is")


def test_a_gpu_without_memory(tiny: Pair, monkeypatch: pytest.MonkeyPatch, refused: Refused) -> None:
    def fail(*args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of")

    monkeypatch.setattr(TorchModel, "forward", fail)
    refused(["run", str(tiny.ours.folder), "-p", "x"], "too little memory (Tried to allocate 2.00 GiB); end what else")


def test_building_needs_no_torch(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    Builder(checkpoint, tmp_path / "engine", backend="torch").run()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("device", "fragment"),
    [
        ("cuda", "device is cuda:0, allowed: cpu (torch "),
        ("cuda:3", "device is cuda:3, allowed: cpu (torch "),
        ("tpu", "device is 'tpu', allowed on torch: cpu, cuda, cuda:N"),
        ("-1", "device is '-1', allowed on torch"),
    ],
)
def test_devices_that_are_not_there(tiny: Pair, refused: Refused, device: str, fragment: str) -> None:
    refused(["run", str(tiny.ours.folder), "-p", "x", "--device", device], fragment)


def test_a_gpu_for_onnxruntime(tiny: Pair, refused: Refused) -> None:
    refused(["run", str(tiny.theirs.folder), "-p", "x", "--device", "cuda"], "allowed on onnxruntime: cpu")


def test_flags_of_tensorrt(checkpoint: Path, tmp_path: Path, refused: Refused) -> None:
    build = ["build", str(checkpoint), "-o", str(tmp_path / "engine"), "--backend", "torch"]
    for flags in (["--plugins"], ["--no-logits"], ["--max-input-len", "8"], ["--sm", "89"]):
        refused([*build, *flags], f"{flags[0]}: not a choice of --backend torch")


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        (lambda w: w.pop("norm.weight"), "norm"),
        (lambda w: w.update({"norm.weight": w["norm.weight"][:-1]}), "norm is torch.float32 [255], not torch.float32"),
        (lambda w: w.update({"norm.weight": w["norm.weight"].astype(np.float16)}), "norm is torch.float16 [256]"),
    ],
)
def test_weights_of_another_engine(tiny: Pair, tmp_path: Path, change: Callable[[Any], Any], fragment: str) -> None:
    folder = Path(shutil.copytree(tiny.ours.folder, tmp_path / "engine"))
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(EngineError, match="not the weights of this engine") as error:
        TorchEngine(folder, tiny.ours.info, "cpu")
    assert fragment in str(error.value)


def test_weights_that_are_no_safetensors(tiny: Pair, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(EngineError, match="not the weights of this engine"):
        TorchEngine(tmp_path, tiny.ours.info, "cpu")

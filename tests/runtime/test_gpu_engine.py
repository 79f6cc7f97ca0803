"""The TensorRT and torch engines on a GPU: `pytest -m gpu`. Skipped, with the reason, where there is none.

tiny-chat is compiled for the GPU at hand, in both dtypes and both lowerings, or loaded into torch with the project's
kernels and graphs, and compared with the ONNX Runtime engine (f32) on the same checkpoint. Rounding to 16 bits may flip
a near-tie, so a token must be equal only where f32's own margin between its best and second logit is larger than the
tolerance; between modes of one engine tokens must be equal in any case. In f32 the torch engine must give every token,
of every model and mode that it is tested with on the CPU. Where ONNX Runtime is not installed, torch on the CPU is the
reference.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import output_of
from stand_ins import torch_ranks
from stand_ins.checkpoints import TINY_CHAT
from stand_ins.torch_pair import CASES, MODELS, QUESTIONS, Pair, check_steps, torch_backend, without_times

import nemodiff
from nemodiff.builder.build import Builder
from nemodiff.builder.compilers.choices import Choices
from nemodiff.contract import Backend, Dtype, cache_names
from nemodiff.engine_folder import COMPILED_FOLDER
from nemodiff.errors import BuildError
from nemodiff.plugins.tensorrt.api import MODULES, device_sm, load
from nemodiff.runtime.engines.passes import bidirectional, causal
from nemodiff.runtime.engines.tensorrt.device import Device
from nemodiff.runtime.engines.tensorrt.engine import TensorRTEngine
from nemodiff.runtime.engines.torch import projections
from nemodiff.runtime.engines.torch.engine import TorchEngine
from nemodiff.runtime.loading import LoadedEngine
from nemodiff.tuned import Choice

SM = device_sm()
NO_GPU = SM is None and not torch.cuda.is_available()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(NO_GPU, reason="no NVIDIA driver or no GPU here")]
PROMPT = [130 + (i * 7) % 200 for i in range(40)]
# In logits and in probability: bf16 keeps 8 bits of mantissa and f16 11, tiny-chat's logits reach 30 over 6 layers. The
# prompts are no text, so single positions stray far, on the CPU too: a share of the clear tokens may differ, and of the
# confidences the nearest 98 % count.
MARGIN = {"bf16": 1.0, "f16": 0.125, "f32": 1e-3}
STRAY = {"bf16": 0.01, "f16": 0.005, "f32": 0.0}
CONFIDENCE = {"bf16": 0.15, "f16": 0.03, "f32": 1e-3}
KINDS = [
    *((b, d, p) for b in MODULES for d in ("bf16", "f16") for p in (False, True)),
    *(("torch", d, True) for d in ("f32", "bf16", "f16")),
]


@pytest.fixture(scope="module", params=KINDS, ids=lambda k: f"{k[0]}-{k[1]}-{'plugins' if k[2] else 'native'}")
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedEngine:
    backend, dtype, plugins = request.param
    if backend == "torch":
        if not torch.cuda.is_available():
            pytest.skip(f"torch {torch.__version__} finds no GPU")
        folder = tmp_path_factory.mktemp("gpu") / "engine"
        return nemodiff.load(Builder(TINY_CHAT, folder, backend="torch", dtype=dtype).run(), device="cuda")
    backend_name: Backend = backend
    if importlib.util.find_spec(MODULES[backend_name]) is None:
        pytest.skip(f"the package {MODULES[backend_name]} is not installed")
    if backend == "tensorrt-rtx" and SM not in load("tensorrt-rtx", BuildError).sms():
        pytest.skip(f"TensorRT-RTX does not compile for SM {SM}")
    if SM is None:
        pytest.skip("the package cuda-bindings is not installed")
    choices = Choices(sm=(SM,) if backend == "tensorrt-rtx" else None, plugins=plugins)
    folder = tmp_path_factory.mktemp("gpu") / "engine"
    Builder(TINY_CHAT, folder, backend=backend_name, dtype=dtype, max_seq_len=1024, choices=choices).run()
    return nemodiff.load(folder)


def reference(checkpoint: Path, folder: Path) -> LoadedEngine:
    """A checkpoint on the CPU in f32."""
    if importlib.util.find_spec("onnxruntime") is not None:
        return nemodiff.load(Builder(checkpoint, folder).run())
    return nemodiff.load(Builder(checkpoint, folder, backend="torch", dtype="f32").run(), device="cpu")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> LoadedEngine:
    return reference(TINY_CHAT, tmp_path_factory.mktemp("plain") / "engine")


@pytest.fixture(scope="module", params=list(MODELS))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A checkpoint of the CPU's tests in the torch engine on the GPU and in the reference on the CPU, in f32."""
    if not torch.cuda.is_available():
        pytest.skip(f"torch {torch.__version__} finds no GPU")
    folder = tmp_path_factory.mktemp("pair")
    checkpoint = MODELS[request.param](folder / "checkpoint")
    ours = Builder(checkpoint, folder / "torch", backend="torch", dtype="f32").run()
    return Pair(nemodiff.load(ours, device="cuda"), reference(checkpoint, folder / "plain"))


# Blocks of a length that is stated, since its default differs between a GPU and a CPU.
SAMPLED = {"mode": "linear_spec", "temperature": 0.8, "seed": 3, "block_length": 32}


def test_torch_passes_equal_the_cpu(pair: Pair) -> None:
    """Ragged, causal, bidirectional, two intervals, gated, past the first slots; eager, captured, replayed."""
    for _ in range(3):
        check_steps(torch_backend(pair.ours), pair.theirs)
    assert torch_backend(pair.ours).captured > 3
    assert torch_backend(pair.ours).eager_shapes == {}


@pytest.mark.parametrize("case", [*CASES, SAMPLED], ids=str)
def test_torch_modes_equal_the_cpu(pair: Pair, case: dict[str, Any]) -> None:
    """Tokens, text, passes by kind, acceptance: all but times."""
    for prompt in [*QUESTIONS, PROMPT]:
        expected = nemodiff.generate(pair.theirs, prompt, max_new_tokens=48, **case)
        got = nemodiff.generate(pair.ours, prompt, max_new_tokens=48, **case)
        assert without_times(got) == without_times(expected)


def test_passes_agree_with_onnxruntime(engine: LoadedEngine, plain: LoadedEngine) -> None:
    mask = plain.info.model.mask_id
    dtype = engine.info.build.dtype
    ours = engine.backend.open(2)
    theirs = plain.backend.open(2)
    differs = list[bool]()
    apart = list[float]()
    for repeat in range(3):  # eager, captured, replayed
        for size in (1, 2, 7, 32, 64, 65, 200):
            ids = (PROMPT * 6)[repeat : repeat + size]
            passes = [causal("verify", ids, 0, predict_all=True, logits=True)] * 2
            if size <= 64:
                block = bidirectional("denoise", [300] + [mask] * (size - 1), 0, 0.9)
                passes[1] = block._replace(logits=True)
            got = [(p.token.copy(), p.confidence.copy()) for p in ours.forward(passes)]
            for (token, confidence), expected in zip(got, theirs.forward(passes), strict=True):
                assert expected.logits is not None
                ranked = np.sort(np.delete(expected.logits, mask, axis=1), axis=1)
                clear = ranked[:, -1] - ranked[:, -2] > MARGIN[dtype]
                same = token == expected.token
                differs += (~same[clear]).tolist()
                apart += np.abs(confidence - expected.confidence)[same].tolist()
    assert len(differs) > 500
    assert np.mean(differs) <= STRAY[dtype]
    assert np.quantile(apart, 0.98) <= CONFIDENCE[dtype]


def test_causal_modes_equal_ar_on_the_same_engine(engine: LoadedEngine) -> None:
    """A verify pass of 32 tokens and a decode pass of one may round differently: at most a near-tie may differ."""
    different = 0
    for question in QUESTIONS:
        expected = nemodiff.generate(engine, question, mode="ar", max_new_tokens=64).token_ids
        for mode in ("linear_spec", "quadratic_spec"):
            different += nemodiff.generate(engine, question, mode=mode, max_new_tokens=64).token_ids != expected
        assert nemodiff.generate(engine, question, mode="diffusion", max_new_tokens=64).token_ids
    assert different <= (1 if engine.info.build.dtype == "bf16" else 0)


def test_batches_equal_single_requests(engine: LoadedEngine) -> None:
    prompts: list[Any] = [*QUESTIONS, PROMPT, PROMPT * 8, QUESTIONS[0]]
    together = list(nemodiff.generate_many(engine, prompts, rows=4, max_new_tokens=24))
    alone = [nemodiff.generate(engine, prompt, max_new_tokens=24) for prompt in prompts]
    same = sum(a.token_ids == b.token_ids for a, b in zip(together, alone, strict=True))
    assert same >= len(prompts) - 1  # another row count may pick another kernel


def test_a_replay_equals_an_eager_run(engine: LoadedEngine) -> None:
    captured = engine.backend
    eager: TensorRTEngine | TorchEngine
    if isinstance(captured, TorchEngine):  # the first run of a shape is eager; without graphs it would not be rounded
        eager = TorchEngine(engine.folder, engine.info, captured.device, pages=64)
    else:
        assert isinstance(captured, TensorRTEngine)
        eager = TensorRTEngine(engine.folder, engine.info, 0, graphs=False)
    a = captured.open(2)
    b = eager.open(2)
    for step in range(9):
        if isinstance(eager, TorchEngine):
            eager.steps.forget()
        passes = [
            causal("verify", PROMPT[: 6 + step % 3], 3 * step, predict_all=True),
            causal("decode", [300], step),
        ]
        for x, y in zip(a.forward(passes), b.forward(passes), strict=True):
            np.testing.assert_array_equal(x.token, y.token)
            np.testing.assert_array_equal(x.confidence, y.confidence)
    assert captured.captured > 0
    assert eager.captured == 0
    assert captured.eager_shapes == {}


def torch_only(engine: LoadedEngine) -> TorchEngine:
    if not isinstance(engine.backend, TorchEngine):
        pytest.skip("of the torch engine")
    return engine.backend


def test_a_later_process_compiles_nothing(engine: LoadedEngine) -> None:
    """What a first load has compiled lies in the engine folder; this process has some kernels of others in memory."""
    torch_only(engine)
    program = "import sys, nemodiff; print(nemodiff.load(sys.argv[1], device='cuda').backend.compiled)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", program, engine.folder]
    for _ in range(2):
        child = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert any((engine.folder / COMPILED_FOLDER).iterdir())
    assert child.stdout.split() == ["0"]


def test_a_first_answer_compiles_and_captures_nothing(engine: LoadedEngine) -> None:
    """In every mode, greedy and sampled, after a short and a long prompt."""
    backend = torch_only(engine)
    fresh = TorchEngine(engine.folder, engine.info, backend.device, pages=64)
    fresh.warm_up()
    loaded = dataclasses.replace(engine, backend=fresh)
    before = fresh.captured, fresh.compiled, len(fresh.steps)
    for mode in nemodiff.MODES:
        for prompt in (QUESTIONS[0], PROMPT * 14):
            for temperature in (0.0, 0.8):
                options: dict[str, Any] = {"mode": mode, "temperature": temperature, "max_new_tokens": 24}
                assert nemodiff.generate(loaded, prompt, **options).token_ids
    assert (fresh.captured, fresh.compiled, len(fresh.steps)) == before


@pytest.mark.parametrize(
    "choices",
    [
        *({"quantization": kind} for kind in ("fp8", "int8", "int4")),
        *({"kv_cache_dtype": kind} for kind in ("int8", "fp8")),
        {"quantization": "int4", "kv_cache_dtype": "fp8"},
    ],
    ids=str,
)
def test_few_bits_give_the_tokens_of_the_cpu(tmp_path: Path, choices: dict[str, Any]) -> None:
    """In f32, in every mode, warm; K and V that a last bit has rounded otherwise may turn a near-tie."""
    if not torch.cuda.is_available():
        pytest.skip(f"torch {torch.__version__} finds no GPU")
    folder = Builder(TINY_CHAT, tmp_path / "engine", backend="torch", dtype="f32", **choices).run()
    ours, theirs = (nemodiff.load(folder, device=device) for device in ("cuda", "cpu"))
    different = 0
    for case in CASES:
        for question in QUESTIONS:
            answers = [nemodiff.generate(e, question, max_new_tokens=32, **case).token_ids for e in (ours, theirs)]
            different += answers[0] != answers[1]
    assert different <= (2 if "kv_cache_dtype" in choices else 0)
    assert torch_backend(ours).eager_shapes == {}


def test_kernels_that_begin_early_choose_the_same(engine: LoadedEngine) -> None:
    """Programmatic dependent launch, which changes no arithmetic; eager, captured, replayed, a pass ahead."""
    backend = torch_only(engine)
    if not backend.device.overlaps_launches:
        pytest.skip("before SM 90 no kernel begins early")
    early = dataclasses.replace(
        engine, backend=TorchEngine(engine.folder, engine.info, backend.device, pages=64, pdl=True)
    )
    for mode in nemodiff.MODES:
        for prompt in (QUESTIONS[0], PROMPT * 14):
            for temperature in (0.0, 0.8):
                options: dict[str, Any] = {"mode": mode, "temperature": temperature, "seed": 5, "max_new_tokens": 24}
                expected = nemodiff.generate(engine, prompt, **options)
                for _ in range(3):
                    assert nemodiff.generate(early, prompt, **options).token_ids == expected.token_ids


@pytest.mark.parametrize("pdl", [False, True])
def test_own_products_give_the_tokens_of_the_cpu(tmp_path: Path, pdl: bool) -> None:
    """In f32, in every mode, eager and captured; with kernels that begin early too."""
    if not torch.cuda.is_available():
        pytest.skip(f"torch {torch.__version__} finds no GPU")
    folder = Builder(TINY_CHAT, tmp_path / "engine", backend="torch", dtype="f32").run()
    ours, theirs = (nemodiff.load(folder, device=device) for device in ("cuda", "cpu"))
    device = torch_backend(ours).device
    backend = TorchEngine(folder, ours.info, device, pages=64, pdl=pdl, own_products=projections.OWN)
    ours = dataclasses.replace(ours, backend=backend)
    for case in CASES:
        for question in QUESTIONS:
            expected, got = (nemodiff.generate(e, question, max_new_tokens=32, **case) for e in (theirs, ours))
            assert got.token_ids == expected.token_ids


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_tune_chooses_for_this_card(tmp_path: Path, dtype: Dtype) -> None:
    """What it keeps is what a later load takes; every choice was captured, and gave the tokens that it must."""
    if not torch.cuda.is_available():
        pytest.skip(f"torch {torch.__version__} finds no GPU")
    folder = Builder(TINY_CHAT, tmp_path / "engine", backend="torch", dtype=dtype).run()
    tuned = json.loads(output_of("tune", str(folder), "--json"))
    assert len(tuned["tried"]) > 1
    assert all(0 < us < 1e6 for one in tuned["tried"] for us in one["us"])
    loaded = nemodiff.load(folder, device="cuda")
    assert torch_backend(loaded).choice == Choice(tuned["pdl"], frozenset(tuned["own_products"]))
    assert torch_backend(loaded).eager_shapes == {}
    off = TorchEngine(folder, loaded.info, torch_backend(loaded).device, pages=64, pdl=False, own_products=())
    plain = dataclasses.replace(loaded, backend=off)
    if dtype == "f32":
        answers = [nemodiff.generate(e, QUESTIONS[0], max_new_tokens=32).token_ids for e in (loaded, plain)]
        assert answers[0] == answers[1]


def test_two_ranks_give_the_tokens_of_one(tmp_path: Path) -> None:
    """Over NCCL, in graphs."""
    if torch.cuda.device_count() < 2:
        pytest.skip(f"NCCL needs two GPUs, {torch.cuda.device_count()} here")
    folder = torch_ranks.build(tmp_path)
    alone = torch_ranks.answers(nemodiff.load(folder, device="cuda"))
    shared = torch_ranks.answers_of_ranks(folder, 2, "cuda")
    for name in ("alone", "together", "sampled"):
        assert shared[name] == alone[name], name


@pytest.mark.parametrize("ahead", [False, True])
def test_a_step_waits_for_the_device_once(engine: LoadedEngine, monkeypatch: pytest.MonkeyPatch, ahead: bool) -> None:
    """A replay, copies that were captured, one wait; torch refuses other ways of waiting that it knows of."""
    backend = torch_only(engine)
    cache = backend.open(1)
    waits = list[int]()
    pass_ = causal("decode", [300], 20)
    options: dict[str, Any] = {"mode": "ar", "max_new_tokens": 24}
    for _ in range(3):
        cache.forward([pass_])
        expected = nemodiff.generate(engine, QUESTIONS[0], **options)
    wait = backend.device.wait

    def mode(name: str) -> None:
        with warnings.catch_warnings():  # torch warns once that the mode is a prototype
            warnings.simplefilter("ignore")
            torch.cuda.set_sync_debug_mode(name)

    def counted(mark: object) -> None:
        waits.append(1)
        mode("default")  # the one wait that is wanted is a synchronizing call too
        wait(mark)
        mode("error")

    monkeypatch.setattr(backend.device, "wait", counted)
    try:
        mode("error")
        if ahead:
            assert nemodiff.generate(engine, QUESTIONS[0], **options).token_ids == expected.token_ids
        else:
            cache.forward([pass_])
    finally:
        mode("default")
    passes = sum(expected.nfe.values()) if ahead else 1
    assert passes <= len(waits) <= passes + 1  # one is computed in vain where an answer ends by EOS


def test_caches_share_memory_with_their_outputs(engine: LoadedEngine) -> None:
    if not isinstance(engine.backend, TensorRTEngine):
        pytest.skip("torch writes into the cache that it is given")
    for name in cache_names(engine.info.model.num_layers):
        assert engine.backend.engine.get_aliased_input_tensor(f"{name}_out") == name


def test_memory_is_flat_over_a_thousand_requests(engine: LoadedEngine) -> None:
    def taken() -> int:  # torch's own count, where it has one: other tests may use the card
        return torch.cuda.memory_reserved() if isinstance(engine.backend, TorchEngine) else -Device().memory()[0]

    def ask(number: int) -> list[int]:
        mode = nemodiff.MODES[number % 3]
        return nemodiff.generate(engine, QUESTIONS[number % 3], mode=mode, max_new_tokens=4).token_ids

    expected = [ask(n) for n in range(9)]
    assert [ask(n) for n in range(9)] == expected
    before = taken()
    for number in range(1000):
        assert ask(number) == expected[number % 9]
    assert taken() - before < 2**21  # one page of the driver's allocator

"""Products as convolutions on ONNX Runtime: which engines have them, and that a token's numbers do not depend on what
else is in its pass."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from stand_ins.checkpoints import TINY_CHAT, write_adapter

import nemodiff
from nemodiff.builder.build import Builder
from nemodiff.builder.graph import projection
from nemodiff.contract import on_x86
from nemodiff.errors import EngineError
from nemodiff.runtime.engines.passes import Pass, causal
from nemodiff.runtime.loading import LoadedEngine

IDS = [(7 * i + 200) % 800 for i in range(48)]


def build(folder: Path, **choices: object) -> Path:
    return Builder(TINY_CHAT, folder, **choices).run()  # type: ignore[arg-type]


def ops(folder: Path) -> list[str]:
    return [node.op_type for node in onnx.load(folder / "model.onnx", load_external_data=False).graph.node]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> LoadedEngine:
    if not on_x86():
        pytest.skip("ONNX Runtime has a kernel that sums in one order on x86 alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(projection, "CONVOLVED_BYTES", (0, 2**33))
        patch.setattr("platform.machine", lambda: "x86_64")
        at = tmp_path_factory.mktemp("convolved")
        with_adapter = shutil.copytree(TINY_CHAT, at / "checkpoint")
        write_adapter(with_adapter, rank=8, alpha=32, strength=0.02)
        folder = build(at / "engine", adapter=with_adapter / "linear_spec_lora")
        assert "Conv" in ops(folder)
        return nemodiff.load(folder, threads=1)


def seen(engine: LoadedEngine, rows: int, step: int) -> np.ndarray:
    """The logits of IDS, (rows, 48, V), in passes of so many tokens and rows; each row has the ids reversed."""
    cache = engine.backend.open(rows)
    texts = [IDS[:: -1 if row % 2 else 1] for row in range(rows)]
    parts = []
    for start in range(0, len(IDS), step):
        passes: list[Pass] = [
            causal("verify", text[start : start + step], start, predict_all=True, logits=True) for text in texts
        ]
        parts.append(np.stack([np.array(one.logits) for one in cache.forward(passes)]))
    cache.close()
    return np.concatenate(parts, axis=1)


def test_a_token_has_the_same_bits_in_every_pass(engine: LoadedEngine) -> None:
    whole = seen(engine, 1, 48)[0]
    for rows, step in ((1, 1), (1, 5), (1, 32), (2, 1), (3, 16)):
        np.testing.assert_array_equal(seen(engine, rows, step)[0], whole, f"{rows} rows, {step} tokens")


def test_tokens_stay_flat_from_product_to_product(engine: LoadedEngine) -> None:
    """Around a layer's products nothing is reshaped but the heads, and what attention gives."""
    graph = onnx.load(engine.folder / "model.onnx", load_external_data=False).graph
    reshaped = [node.name for node in graph.node if node.op_type == "Reshape" and node.name.startswith("layers.")]
    expected = {
        f"layers.{n}.self_attn.{x}" for n in range(engine.info.model.num_layers) for x in ("qkv_proj.split", "merged")
    }
    assert sorted(reshaped) == sorted(expected)


def test_it_is_the_same_model(engine: LoadedEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projection, "CONVOLVED_BYTES", (2**32, 2**33))
    plain = nemodiff.load(build(tmp_path / "plain"), threads=1)
    assert "Conv" not in ops(plain.folder)
    assert np.abs(seen(engine, 2, 7) - seen(plain, 2, 7)).max() < 1e-3
    expected = nemodiff.generate(plain, "Count from 3 to 9.", mode="ar", max_new_tokens=40).token_ids
    for mode in ("ar", "linear_spec", "quadratic_spec"):
        answer = nemodiff.generate(engine, "Count from 3 to 9.", mode=mode, max_new_tokens=40)
        assert answer.token_ids == expected
    denoised = [
        nemodiff.generate(one, "Count from 3 to 9.", mode="diffusion", max_new_tokens=40) for one in (engine, plain)
    ]
    assert denoised[0].token_ids == denoised[1].token_ids


@pytest.mark.parametrize(
    ("machine", "choices", "least"),
    [
        ("aarch64", {}, 0),
        ("x86_64", {"dtype": "f16"}, 0),
        ("x86_64", {"quantization": "int8"}, 0),
        ("x86_64", {"backend": "torch", "dtype": "f32"}, 0),
        ("x86_64", {}, 2**25),
    ],
)
def test_the_others_have_none(
    machine: str, choices: dict[str, object], least: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(projection, "CONVOLVED_BYTES", (least, 2**33))
    monkeypatch.setattr("platform.machine", lambda: machine)
    builder = Builder(TINY_CHAT, tmp_path / "engine", **choices)  # type: ignore[arg-type]
    assert "Conv" not in [node.op_type for node in builder.graph.proto.graph.node]


def test_another_processor_refuses_it(engine: LoadedEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernel for convolutions may sum a token's numbers in another order where a pass has one token."""
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    with pytest.raises(EngineError, match="made for processors of x86, this one is of arm64; build") as refusal:
        nemodiff.load(engine.folder)
    assert "\n" not in str(refusal.value)

"""int4 weights in groups of 64 and 128, of all projections or, by default, of MLPs alone.

Products have an even number of tokens there, so a token always has the same bits.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import Refused, output_of
from safetensors.numpy import load_file
from stand_ins.checkpoints import TINY_CHAT, write_adapter, write_checkpoint
from stand_ins.low_bits import assert_rows_are_alone, assert_speculation_is_ar, causal_bits, nibbles, stored
from stand_ins.packed import packed
from stand_ins.quantized_checkpoints import write

import nemodiff
from nemodiff.builder.build import Builder
from nemodiff.engine_info import read_engine
from nemodiff.errors import EngineError
from nemodiff.runtime.loading import LoadedEngine
from nemodiff.verification.arithmetic import Arithmetic

WIDE = {"hidden_size": 64, "intermediate_size": 128}  # multiples of 64
PRODUCT = "layers.0.mlp.gate_up_proj"


@pytest.fixture(scope="module", params=[64, 128, None])
def group(request: pytest.FixtureRequest) -> int | None:
    chosen: int | None = request.param
    return chosen


@pytest.fixture(scope="module")
def engine(group: int | None, tmp_path_factory: pytest.TempPathFactory) -> LoadedEngine:
    folder = tmp_path_factory.mktemp("wide") / "engine"
    Builder(TINY_CHAT, folder, quantization="int4", group_size=group).run()
    return nemodiff.load(folder, threads=1)


def test_a_group_has_one_scale(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", dtype="f32", **WIDE)
    arrays = stored(Builder(checkpoint, tmp_path / "engine", quantization="int4", group_size=64).run())
    for mine, weight in packed(load_file(checkpoint / "model.safetensors")).items():
        if mine.endswith("_proj.weight"):
            step = arrays[f"{mine}_scale"].repeat(64, axis=1)
            over = np.abs((nibbles(arrays[mine]) - 8) * step - weight) / np.abs(step)
            assert over.max() <= 1.25
            assert np.mean(over) < 0.26


def test_by_default_mlps_have_wider_groups_than_attention(tmp_path: Path) -> None:
    folder = Builder(TINY_CHAT, tmp_path / "engine", quantization="int4").run()
    arrays = stored(folder)
    groups = {
        name: 2 * arrays[name][0].size // arrays[f"{name}_scale"].shape[1]
        for name in arrays
        if f"{name}_scale" in arrays and "head" not in name
    }
    assert groups == {name: 128 if ".mlp." in name else 32 for name in groups}
    assert len(groups) == 4 * read_engine(folder).model.num_layers


def test_without_multiples_of_128_mlps_have_the_groups_of_attention(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", hidden_size=128, intermediate_size=192)
    config = Builder(checkpoint, tmp_path / "engine", quantization="int4").config
    assert (config.group_size, config.mlp_group_size) == (32, 32)


def test_an_engine_from_before_mlps_had_groups_of_their_own(tmp_path: Path) -> None:
    folder = Builder(TINY_CHAT, tmp_path / "engine", quantization="int4", group_size=64).run()
    config = json.loads((folder / "config.json").read_text())
    del config["build_config"]["mlp_group_size"]
    (folder / "config.json").write_text(json.dumps(config))
    assert read_engine(folder).build.mlp_group_size == 64


def test_products_have_an_even_number_of_tokens(engine: LoadedEngine, tmp_path: Path) -> None:
    """For that keeps the bits, whatever kernels a processor has."""
    model = onnx.load(engine.folder / "model.onnx")
    assert {n.op_type for n in model.graph.node if n.name == PRODUCT} == {"MatMulNBits"}
    model.graph.output.append(onnx.helper.make_tensor_value_info(PRODUCT, onnx.TensorProto.FLOAT, None))
    onnx.save(model, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    dtypes = {"tensor(int32)": np.int32, "tensor(float)": np.float32}
    for rows, tokens in ((1, 1), (1, 2), (3, 1), (3, 3), (2, 3)):
        lengths = {"B": rows, "S": tokens, "R": 1, "T": 8, "P": 1}
        feeds = {
            item.name: np.zeros([lengths.get(size, size) for size in item.shape], dtypes[item.type])
            for item in session.get_inputs()
        }
        token, product = session.run(["token", PRODUCT], feeds)
        assert token.shape == (rows, 1)
        assert product.shape[:3] == (1, 1, rows * tokens + rows * tokens % 2)


def test_a_token_has_the_same_bits_in_every_pass(engine: LoadedEngine) -> None:
    ids = np.random.default_rng(0).integers(200, 800, 70).tolist()
    one = causal_bits(engine, ids, 1)
    for size in (2, 3, 5, 8, 32, 33, 64, 70):
        np.testing.assert_array_equal(causal_bits(engine, ids, size), one, err_msg=f"passes of {size}")


@pytest.mark.parametrize("sizes", [(20, 3, 11), (1, 1, 1), (3, 5), (2, 9, 4, 1, 7)], ids=str)
def test_a_row_has_the_same_bits_beside_others(engine: LoadedEngine, sizes: tuple[int, ...]) -> None:
    assert_rows_are_alone(engine, sizes)


def test_self_speculation_gives_the_tokens_of_ar(engine: LoadedEngine) -> None:
    assert_speculation_is_ar(engine, questions=3)


def test_an_adapter_acts_on_its_own_tokens(tmp_path: Path) -> None:
    """Its gate has one token more too."""
    checkpoint = write_checkpoint(tmp_path / "checkpoint", dtype="f32", **WIDE)
    write_adapter(checkpoint, rank=4, alpha=8, strength=0.5)
    folder = Builder(checkpoint, tmp_path / "engine", quantization="int4", group_size=64).run()
    engine = nemodiff.load(folder, threads=1)
    for prompt in ("one", "another one"):
        expected = nemodiff.generate(engine, prompt, mode="ar", max_new_tokens=24).token_ids
        answer = nemodiff.generate(engine, prompt, mode="linear_spec", block_length=5, max_new_tokens=24)
        assert answer.token_ids == expected


@pytest.mark.parametrize(
    ("form", "group", "symmetric", "asked", "expected"),
    [
        ("awq", 64, False, None, 64),
        ("gptq", 64, False, 32, 32),
        ("pack", 128, True, None, 128),
        ("pack", 128, True, 64, 64),
        ("pack", 0, True, None, 128),
    ],
)
def test_a_checkpoint_keeps_its_group(
    form: str, group: int, symmetric: bool, asked: int | None, expected: int, tmp_path: Path
) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
    truth = write(tmp_path / "checkpoint", form, group, symmetric, sizes=sizes)
    choices: dict[str, Any] = {} if asked is None else {"group_size": asked}
    builder = Builder(tmp_path / "checkpoint", tmp_path / "engine", **choices)
    assert (builder.config.quantization, builder.config.group_size) == ("int4", expected)
    arrays = stored(builder.run())
    for mine, values in packed(truth).items():
        numbers, scale = nibbles(arrays[mine]), arrays[f"{mine}_scale"]
        assert scale.shape[1] == numbers.shape[1] // expected
        zeros = np.full(scale.shape, np.float32(8))
        if not symmetric:
            zeros = nibbles(arrays[f"{mine}_zero"])[:, : scale.shape[1]]
        np.testing.assert_array_equal((numbers - zeros.repeat(expected, 1)) * scale.repeat(expected, 1), values)
    engine = nemodiff.load(tmp_path / "engine", threads=1)
    ids = np.random.default_rng(0).integers(200, 800, 7).tolist()
    np.testing.assert_array_equal(causal_bits(engine, ids, 7), causal_bits(engine, ids, 1))


def test_plan_and_inspect_name_the_group(tmp_path: Path) -> None:
    target = str(tmp_path / "engine")
    command = ["build", str(TINY_CHAT), "-o", target, "--quantization", "int4", "--group-size", "128"]
    said = "f32 with int4 projections in groups of 128,"
    plan = json.loads(output_of(*command, "--dry-run", "--json"))
    assert said in output_of(*command, "--dry-run")
    output_of(*command)
    assert said in output_of("inspect", target)
    engine = json.loads(output_of("inspect", target, "--json"))["engine"]
    assert (engine["group_size"], engine["mlp_group_size"]) == (128, 128)
    assert (tmp_path / "engine" / "model.onnx.data").stat().st_size == plan["weight_bytes"]
    default, narrow = (
        Builder(TINY_CHAT, tmp_path / "none", quantization="int4", group_size=size).plan() for size in (None, 32)
    )
    assert plan["memory_loaded"] < default.memory_loaded < narrow.memory_loaded
    said = [line for line in default.lines("tiny-chat", tmp_path) if "int4" in line]
    assert ["f32 with int4 projections in groups of 32 (128 in the MLPs)," in line for line in said] == [True]


def test_refusals(tmp_path: Path, refused: Refused) -> None:
    odd = write_checkpoint(tmp_path / "odd", hidden_size=64, intermediate_size=96)
    write(tmp_path / "awq", "awq", 32)

    def build(checkpoint: Path, *flags: str) -> list[str]:
        return ["build", str(checkpoint), "-o", str(tmp_path / "engine"), "--group-size", *flags]

    int4 = ("--quantization", "int4")
    refused(build(odd, "64", *int4), "--group-size 64: a projection has 96 inputs, allowed: multiples of 64")
    refused(build(TINY_CHAT, "48", *int4), "'48' is not one of '32', '64', '128'", code=2)
    refused(build(TINY_CHAT, "64"), "--group-size 64: a choice of --quantization int4")
    refused(build(TINY_CHAT, "64", *int4, "--backend", "tensorrt"), "--quantization int4: ")
    refused(build(tmp_path / "awq", "64"), "--group-size is 64, but a scale of the checkpoint is for 32 inputs")


@pytest.mark.parametrize("name", ["group_size", "mlp_group_size"])
@pytest.mark.parametrize("group", [96, "64", True, None])
def test_an_engine_of_no_such_group(group: object, name: str, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", **WIDE)
    folder = Builder(checkpoint, tmp_path / "engine", quantization="int4").run()
    config = json.loads((folder / "config.json").read_text())
    config["build_config"][name] = group
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(EngineError, match=rf"engine: {name} is .*, allowed: 32, 64, 128; build it again"):
        read_engine(folder)


def test_the_reference_rounds_by_the_group() -> None:
    x = np.zeros((1, 64), np.float32)
    x[0, 0], x[0, 63] = 8, 0.1
    narrow, wide = (Arithmetic(np.float32, np.float32, "int4", group_size=g).weight(x, "projection") for g in (32, 64))
    np.testing.assert_allclose([narrow[0, 63], wide[0, 63]], [0.1, 0])
    both = Arithmetic(np.float32, np.float32, "int4", mlp_group_size=64)
    np.testing.assert_allclose([both.weight(x, part)[0, 63] for part in ("projection", "mlp")], [0.1, 0])


@pytest.mark.parametrize("group", [64, None])
def test_verify_finds_nothing_wrong(group: int | None, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", hidden_size=128, intermediate_size=256)
    engine = Builder(checkpoint, tmp_path / "engine", quantization="int4", group_size=group).run()
    output_of("verify", str(engine), "--against", str(checkpoint), "-p", "one", "--max-new-tokens", "8")

"""The engine contract on the CPU backend, below the loops: batches, visibility, caches in place, long positions."""

import concurrent.futures
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import resident
from oracle import reference, reference_model
from stand_ins.checkpoints import TINY_CHAT, write_checkpoint

import nemodiff
from nemodiff.builder.build import Builder
from nemodiff.builder.graph.graph import build_graph
from nemodiff.config import ModelConfig, parse_config
from nemodiff.contract import MEMORY_PATTERN, PREFILL_CHUNK, inputs, outputs
from nemodiff.runtime.engines.layout import PassShape, fill, layouts
from nemodiff.runtime.engines.onnxruntime import forward
from nemodiff.runtime.engines.passes import Pass, Prediction, bidirectional, causal

PROMPT = [130 + (i * 7) % 200 for i in range(20)]


def published_config(**changes: Any) -> ModelConfig:
    """The 8B model's config.json as published, cut in size but not in rotation."""
    rope = {
        "rope_type": "yarn",
        "factor": 16.0,
        "original_max_position_embeddings": 16384,
        "rope_theta": 1e6,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "llama_4_scaling_beta": 0.1,
    }
    values = {
        "architectures": ["NemotronLabsDiffusionModel"],
        "model_type": "nemotron_labs_diffusion",
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 128,
        "vocab_size": 128,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 262144,
        "mask_token_id": 100,
        "block_size": 32,
        "eos_token_id": 11,
        "rope_parameters": {**rope, **changes},
    }
    return parse_config(values)


def test_graph_declares_the_contract(tmp_path: Path, engine: nemodiff.LoadedEngine) -> None:
    built = Builder(TINY_CHAT, tmp_path / "engine").run()  # of its own: the checker refuses weights with hard links
    model = onnx.load(built / "model.onnx", load_external_data=False)
    onnx.checker.check_model(str(built / "model.onnx"), full_check=True)
    declared = [*inputs(engine.info.model, adapter=False), MEMORY_PATTERN]
    assert [i.name for i in model.graph.input] == [b.name for b in declared]
    assert [o.name for o in model.graph.output] == [b.name for b in outputs(engine.info.model)]
    assert {f.name for f in model.functions} == {"BlockAttention", "ConfidenceCommit"}
    names = {n.name for n in model.graph.node}
    assert {"layers.3.self_attn.qkv_proj", "layers.5.mlp.down_proj", "diffusion_head"} <= names
    external = [t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    assert len(external) == 39  # q, k, v and gate, up are one weight each
    assert all(int(t.external_data[1].value) % 4096 == 0 for t in external)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {0: 1.0, 1: 8.058422e-1, 20: 1.333521e-2, 28: 1.325179e-3, 37: 2.123880e-5, 63: 7.755861e-8}),
        ({"truncate": False}, {28: 1.316902e-3, 32: 3.217599e-4, 63: 7.755861e-8}),  # by transformers
        ({"factor": 0.25}, {28: 5.719195e-3, 37: 1.359283e-3, 63: 4.963751e-6}),
        ({"rope_theta": 1e9}, {13: 1.485508e-2, 19: 1.130899e-3, 25: 1.906580e-5, 63: 8.639826e-11}),
    ],
)
def test_yarn_gives_the_published_values(changes: dict[str, Any], expected: dict[int, float]) -> None:
    frequencies = published_config(**changes).rope.inv_freq(128)
    for pair, value in expected.items():
        assert frequencies[pair] == pytest.approx(value, rel=1e-6)


def test_graph_rotates_and_scales_queries_beyond_position_16384() -> None:
    config = published_config()
    positions = np.array([[0, 16383, 16384, 32768, 262143]], np.int32)
    proto = build_graph(config, "f32").proto
    names = ["query_scale.f32", "rope.cos", "rope.sin"]
    del proto.graph.output[:]
    kept = [n for n in proto.graph.node if n.name.startswith(("rope.", "query_scale"))]
    del proto.graph.node[:]
    proto.graph.node.extend(kept)
    unused = [i for i in proto.graph.input if i.name != "pos"]
    for item in unused:
        proto.graph.input.remove(item)
    small = [t for t in proto.graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(small)
    for name, rank in zip(names, (2, 3, 3), strict=True):
        proto.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [None] * rank))
    scale, cos, sin = onnxruntime.InferenceSession(proto.SerializeToString()).run(names, {"pos": positions})
    np.testing.assert_allclose(scale[0], [1.0, 1.0, 1.0693147, 1.1098612, 1.2772589], rtol=1e-6)
    angle = positions[0, :, None] * reference_model.yarn_inv_freq(_rope(), 128).astype(np.float64)
    # The product is rounded to f32 before cos, as in the released code: 262143 rad +- 2**-7.
    np.testing.assert_allclose(cos[0], np.cos(angle), atol=2e-2)
    np.testing.assert_allclose(sin[0, :3], np.sin(angle)[:3], atol=1e-3)


def _rope() -> dict[str, Any]:
    return {"rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 16384}


def test_one_forward_serves_rows_in_different_modes(
    engine: nemodiff.LoadedEngine, oracle: reference.ReferenceModel
) -> None:
    mask = engine.info.model.mask_id
    block = [300, mask, mask, 301, mask]
    cache = engine.backend.open(3)
    prompts = [PROMPT[:9], PROMPT[:20], PROMPT[3:17]]
    cache.forward([causal("prefill", p, 0) for p in prompts])  # rows of different lengths: padding is at work
    got = cache.forward(
        [
            bidirectional("denoise", block, 9, threshold=0.5),
            causal("verify", [300, 310, 320], 20, predict_all=True),
            causal("decode", [305], 14),
        ]
    )
    token, confidence = oracle.forward(prompts[0], block, bidirectional=True)
    assert got[0].token.tolist() == token.tolist()
    np.testing.assert_allclose(got[0].confidence, confidence, atol=1e-5)
    assert got[0].next_ids.tolist() == reference.commit_rule(mask, block, 0.5, (), token, confidence)
    assert got[1].token.tolist() == oracle.forward(prompts[1], [300, 310, 320], bidirectional=False)[0].tolist()
    assert got[2].token.tolist() == oracle.forward(prompts[2], [305], bidirectional=False)[0].tolist()


def test_denoising_leaves_no_trace_and_rollback_is_free(engine: nemodiff.LoadedEngine) -> None:
    mask = engine.info.model.mask_id
    clean = engine.backend.open(1)
    dirty = engine.backend.open(1)
    for cache in (clean, dirty):
        cache.forward([causal("prefill", PROMPT, 0)])
    for ids in ([300] + [mask] * 31, [301] * 40):  # a draft, then a verify that is wholly refused
        dirty.forward([bidirectional("draft", ids, 20, 0.0)])
        dirty.forward([causal("verify", ids, 20, predict_all=True)])
    expected, got = (cache.forward([causal("decode", [302], 20)])[0] for cache in (clean, dirty))
    assert got.token.tolist() == expected.token.tolist()
    np.testing.assert_array_equal(got.confidence, expected.confidence)


def test_two_intervals_give_the_quadratic_layout(
    engine: nemodiff.LoadedEngine, oracle: reference.ReferenceModel
) -> None:
    """Heads first, then their mask groups: a mask of group j sees the prompt, heads up to j and its own group."""
    mask = engine.info.model.mask_id
    n = len(PROMPT)
    k = 2
    heads = [300, 301]
    cache = engine.backend.open(1)
    cache.forward([causal("prefill", PROMPT, 0)])
    ids = list(heads)
    pos = [n, n + 1]
    visible = [(n + 1, 0, 0), (n + 2, 0, 0)]
    for j in range(1, k + 1):
        begin = n + k + (j - 1) * k
        ids += [mask] * k
        pos += [n + j + i for i in range(k)]
        visible += [(n + j, begin, begin + k)] * k
    size = len(ids)
    pass_ = Pass(
        "verify",
        np.array(ids, np.int32),
        np.array(pos, np.int32),
        n,
        np.array(visible, np.int32),
        np.arange(size, dtype=np.int32),
        threshold=0.0,
    )
    token = cache.forward([pass_])[0].token.tolist()
    assert token[:2] == oracle.forward(PROMPT, heads, bidirectional=False)[0].tolist()
    for j in range(1, k + 1):
        # Heads are causal and the masks see them and each other: a bidirectional pass over the masks alone.
        group = oracle.forward([*PROMPT, *heads[:j]], [mask] * k, bidirectional=True)[0].tolist()
        assert token[k + (j - 1) * k : k + j * k] == group


def test_cache_grows_with_the_text_and_keeps_what_it_holds(engine: nemodiff.LoadedEngine) -> None:
    long = (PROMPT * 40)[:700]
    whole = engine.backend.open(1)
    pieces = engine.backend.open(1)
    expected = _copy(whole.forward([causal("prefill", long, 0)])[0])
    capacities = []
    for start in range(0, 700, 90):
        got = pieces.forward([causal("prefill", long[start : start + 90], start)])[0]
        capacities.append(pieces.capacity)  # type: ignore[attr-defined]
    assert capacities == [96, 192, 288, 384, 480, 544, 640, 704]
    assert got.token.tolist() == expected.token.tolist()
    np.testing.assert_allclose(got.confidence, expected.confidence, atol=1e-5)


def test_a_second_thread_changes_no_token(tiny_engine: Path, engine: nemodiff.LoadedEngine) -> None:
    """The engines of the other tests have one."""
    two = nemodiff.load(tiny_engine, threads=2)
    for mode in nemodiff.MODES:
        answers = [nemodiff.generate(e, PROMPT, mode=mode, max_new_tokens=40).token_ids for e in (two, engine)]
        assert answers[0] == answers[1], mode


# What ONNX Runtime says of an array that is not where the pattern would have it.
NO_PATTERN = "fall back to default allocation"


@pytest.mark.parametrize(("patterns", "least", "most"), [(1024, 0, 0), (1, 100, 10**6)], ids=["own", "shared"])
def test_every_shape_has_a_memory_pattern_of_its_own(
    patterns: int,
    least: int,
    most: int,
    tiny_engine: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(forward, "_PATTERNS", patterns)
    backend: Any = nemodiff.load(tiny_engine).backend
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 0
    options.log_verbosity_level = 1
    backend.session = onnxruntime.InferenceSession(tiny_engine / "model.onnx", options)
    capfd.readouterr()
    for rows in (1, 2):
        cache = backend.open(rows)
        for size in (16, 1, 8, 16, 1, 8):
            for predict_all in (True, False):
                cache.forward([causal("verify", PROMPT[:size], 0, predict_all=predict_all)] * rows)
    assert least <= capfd.readouterr().err.count(NO_PATTERN) <= most


def test_a_closed_cache_is_used_again_unless_it_has_grown(tiny_engine: Path) -> None:
    backend = nemodiff.load(tiny_engine).backend
    first = backend.open(1)
    first.forward([causal("prefill", PROMPT, 0)])
    first.close()
    assert backend.open(2) is not first
    again = backend.open(1)
    assert again is first
    again.forward([causal("prefill", (PROMPT * 40)[:300], 0)])
    again.close()
    assert backend.open(1) is not first  # its memory has grown


def test_requests_leave_nothing_after_them(tiny_engine: Path) -> None:
    """Answers do not depend on what ran before or runs beside, and memory returns to its start."""
    engine = nemodiff.load(tiny_engine, threads=1)
    questions = ["Count from 3 to 9.", "Sort these numbers: 4, 2, 9.", "Show the times table of 3 up to 5."]

    def ask(number: int) -> list[int]:
        mode = nemodiff.MODES[number // 3 % 3]
        return nemodiff.generate(engine, questions[number % 3], mode=mode, max_new_tokens=20).token_ids

    expected = [ask(n) for n in range(9)]
    assert [ask(n) for n in reversed(range(9))] == expected[::-1]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, [*range(9)] * 3)) == expected * 3
    before = resident()
    for n in range(100):
        ask(n)
    assert resident() - before < 8 * 2**20


def test_moved_row_continues_where_it_was(engine: nemodiff.LoadedEngine) -> None:
    cache = engine.backend.open(2)
    cache.forward([causal("prefill", PROMPT[:5], 0), causal("prefill", PROMPT, 0)])
    cache.move(1, 0, len(PROMPT))
    got = _copy(cache.forward([causal("decode", [300], 20)])[0])
    alone = engine.backend.open(1)
    alone.forward([causal("prefill", PROMPT, 0)])
    assert got.token.tolist() == alone.forward([causal("decode", [300], 20)])[0].token.tolist()


def test_a_forward_over_some_rows_leaves_the_others_alone(engine: nemodiff.LoadedEngine) -> None:
    cache = engine.backend.open(4)
    alone = engine.backend.open(1)
    prompts = [PROMPT[i:] for i in range(4)]
    cache.forward([causal("prefill", p, 0) for p in prompts])
    cache.forward([causal("verify", [301] * 9, len(p), predict_all=True) for p in prompts[1:3]], 1)
    expected = []
    for prompt in prompts:
        alone.forward([causal("prefill", prompt, 0)])
        ids = [301] * 9 if prompt in prompts[1:3] else []
        if ids:
            alone.forward([causal("verify", ids, len(prompt), predict_all=True)])
        expected.append(alone.forward([causal("decode", [302], len(prompt) + len(ids))])[0].confidence.item())
    lengths = [len(p) + (9 if 0 < i < 3 else 0) for i, p in enumerate(prompts)]
    got = [cache.forward([causal("decode", [302], n)], row)[0].confidence.item() for row, n in enumerate(lengths)]
    np.testing.assert_allclose(got, expected, atol=1e-6)
    cache.move(3, 0, lengths[3])
    np.testing.assert_allclose(cache.forward([causal("decode", [302], lengths[3])])[0].confidence, got[3], atol=1e-6)


@pytest.mark.parametrize("mask", [0, 5])
def test_padding_stands_behind_its_pass(engine: nemodiff.LoadedEngine, mask: int) -> None:
    """Whatever its buffer held: each token sees its own slot, and none is a mask."""
    small, _ = layouts(engine.info, PassShape(0, rows=1, tokens=4, predicted=4, sampled=True))
    filled = []
    for before in (0, 0x7F):
        arrays = small.views(np.full(small.nbytes, before, np.uint8))
        fill(arrays, 0, causal("verify", [7, mask], 5, predict_all=True), mask)
        filled.append({name: array.tolist() for name, array in arrays.items()})
    assert filled[0] == filled[1]
    padding = int(mask == 0)
    assert filled[0]["ids"] == [[7, mask, padding, padding]]
    assert filled[0]["pos"] == [[5, 6, 7, 8]]
    assert filled[0]["visible"] == [[[6, 0, 0], [7, 0, 0], [0, 7, 8], [0, 8, 9]]]
    assert filled[0]["rows"] == [[0, 1, 3, 3]]
    assert filled[0]["position"] == [[6, 6, 9, 9]]


def test_predictions_are_read_only(engine: nemodiff.LoadedEngine) -> None:
    """Whole and cut short by another row's length, with logits and without."""
    long = causal("verify", PROMPT, 0, predict_all=True, logits=True)
    for prediction in engine.backend.open(2).forward([long, causal("prefill", PROMPT[:3], 0)]):
        arrays = [array for array in prediction if array is not None]
        assert [array.flags.writeable for array in arrays] == [False] * len(arrays)


def test_logits_come_with_a_pass_that_asks_for_them(
    engine: nemodiff.LoadedEngine, oracle: reference.ReferenceModel
) -> None:
    cache = engine.backend.open(1)
    assert cache.forward([causal("prefill", PROMPT, 0)])[0].logits is None
    logits = cache.forward([causal("prefill", PROMPT, 0, logits=True)])[0].logits
    assert logits is not None
    np.testing.assert_allclose(logits[0], oracle.logits(PROMPT[:-1], PROMPT[-1:], False)[0], atol=2e-3)
    together = engine.backend.open(2).forward([causal("prefill", PROMPT, 0, logits=asks) for asks in (True, False)])
    assert [prediction.logits is None for prediction in together] == [False, True]


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
@pytest.mark.parametrize("shards", [1, 3])
def test_every_stored_form_builds_the_same_engine(tmp_path: Path, dtype: str, shards: int) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint", dtype=dtype, shards=shards)
    engine = nemodiff.load(Builder(folder, tmp_path / "engine").run())
    oracle = reference.ReferenceModel.load(folder)
    got = engine.backend.open(1).forward([causal("verify", PROMPT, 0, predict_all=True, logits=True)])[0]
    assert got.logits is not None
    np.testing.assert_allclose(got.logits, oracle.logits([], PROMPT, False), atol=1e-3)


def test_small_periods_agree_with_the_oracle(tmp_path: Path) -> None:
    """YaRN and the query scale act within 64 tokens when the original length is 16; the attention factor is not 1."""
    rope = json.loads((Path(__file__).parents[2] / "examples/tiny-chat/config.json").read_text())["rope_parameters"]
    rope |= {"rope_theta": 100.0, "original_max_position_embeddings": 16, "mscale": 1.0, "mscale_all_dim": 0.5}
    folder = write_checkpoint(tmp_path / "checkpoint", rope_parameters=rope)
    engine = nemodiff.load(Builder(folder, tmp_path / "engine").run())
    ids = (PROMPT * 4)[:64]
    got = engine.backend.open(1).forward([causal("verify", ids, 0, predict_all=True, logits=True)])[0]
    expected = reference.ReferenceModel.load(folder).logits([], ids, False)
    assert got.logits is not None
    np.testing.assert_allclose(got.logits, expected, atol=1e-3)


def test_text_beyond_position_16384_in_chunks_equals_a_direct_computation(tmp_path: Path) -> None:
    """One layer, so that the last row's logits follow from the embeddings alone and need no n x n scores."""
    folder = write_checkpoint(tmp_path / "checkpoint", num_hidden_layers=1, hidden_size=16, num_attention_heads=2)
    engine = nemodiff.load(Builder(folder, tmp_path / "engine").run())
    ids = np.random.default_rng(3).integers(130, 890, 16500).tolist()
    cache = engine.backend.open(1)
    for start in range(0, len(ids), PREFILL_CHUNK):
        prediction = cache.forward([causal("prefill", ids[start : start + PREFILL_CHUNK], start, logits=True)])[0]
    logits = prediction.logits
    assert logits is not None
    np.testing.assert_allclose(logits[0], _last_logits_of_one_layer(folder, ids), atol=2e-3)


def _last_logits_of_one_layer(folder: Path, ids: list[int]) -> np.ndarray:
    """f64 from the formulas of the model, last position only."""
    from safetensors.numpy import load_file

    config = json.loads((folder / "config.json").read_text())
    weights = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        weights[name.removesuffix(".weight")] = tensor.astype(np.float64)
    at = "encoder.layers.0"
    d = config["head_dim"]
    n = len(ids)

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return np.asarray(x / np.sqrt((x**2).mean(-1, keepdims=True) + config["rms_norm_eps"]) * weights[name])

    def rotate(x: np.ndarray, angle: np.ndarray) -> np.ndarray:  # (rows, heads, D)
        a = x[..., : d // 2]
        b = x[..., d // 2 :]
        cos = np.cos(angle)[:, None]
        sin = np.sin(angle)[:, None]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    angle = np.arange(n)[:, None] * reference_model.yarn_inv_freq(config["rope_parameters"], d).astype(np.float64)
    x = weights["encoder.embed_tokens"][ids]
    normed = norm(x, f"{at}.input_layernorm")
    q, k, v = ((normed @ weights[f"{at}.self_attn.{p}_proj"].T).reshape(n, -1, d) for p in "qkv")
    scale = 1 + 0.1 * np.log(1 + (n - 1) // 16384)
    assert scale > 1.06
    q = rotate(q[-1:], angle[-1:])[0] * scale  # (H, D)
    k = rotate(k, angle)
    heads = []
    for head in range(len(q)):
        kv = head * k.shape[1] // len(q)
        scores = k[:, kv] @ q[head] / np.sqrt(d)
        weight = np.exp(scores - scores.max())
        heads.append(weight @ v[:, kv] / weight.sum())
    x = x[-1] + np.concatenate(heads) @ weights[f"{at}.self_attn.o_proj"].T
    normed = norm(x, f"{at}.post_attention_layernorm")
    gate, up = (normed @ weights[f"{at}.mlp.{p}_proj"].T for p in ("gate", "up"))
    x = x + (gate / (1 + np.exp(-gate)) * up) @ weights[f"{at}.mlp.down_proj"].T
    return np.asarray(norm(x, "encoder.norm") @ weights["diffusion_head"].T)


def test_broken_numbers_end_a_request_with_a_sentence(engine: nemodiff.LoadedEngine, monkeypatch: Any) -> None:
    """A pass that commits nothing would loop for ever."""
    cache = type(engine.backend.open(1))

    def stuck(self: Any, passes: list[Pass], first: int) -> list[Prediction]:
        return [Prediction(p.ids, np.zeros(p.ids.size), p.ids, None) for p in passes]

    monkeypatch.setattr(cache, "forward", stuck)
    with pytest.raises(nemodiff.EngineError, match="committed no token"):
        nemodiff.generate(engine, PROMPT, mode="diffusion")


def _copy(prediction: Prediction) -> Prediction:
    return prediction._replace(token=prediction.token.copy(), confidence=prediction.confidence.copy())


@pytest.mark.parametrize("paradigm", ["bidirectional", "block_diff", "autoregressive"])
def test_config_fields_written_as_null_or_by_a_trainer_are_understood(paradigm: str) -> None:
    plain = published_config()
    rope = {"attention_factor": None, "beta_fast": None, "mscale": None, "mscale_all_dim": None}
    assert plain.rope.attention_factor == 1.0
    assert published_config(**rope).rope.attention_factor == pytest.approx(0.1 * np.log(16) + 1)
    values = json.loads((TINY_CHAT / "config.json").read_text())
    assert parse_config(values | {"dlm_paradigm": paradigm}) == parse_config(values)

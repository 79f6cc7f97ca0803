"""Whether the oracle itself can be trusted: the maths against published values and transformers, the loops by hand.

The maths is compared on tiny-chat and on a small random model whose YaRN and llama-4 steps fall inside 64 tokens. The
loops are compared with scripted predictions worked out from docs/semantics.md, and by properties over random models.
"""

import importlib
import random
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from oracle import reference, reference_model
from oracle.reference import (
    Reference,
    ReferenceModel,
    ar,
    ar_margin,
    commit_rule,
    diffusion,
    linear_spec,
)
from oracle.reference_model import llama4_scale, yarn_inv_freq
from stand_ins.checkpoints import TINY_CHAT, load_make_data, random_adapter, random_tensors
from tokenizers import Tokenizer

YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
# Heads are wider than hidden / heads, the ramp of YaRN ends inside the 8 pairs and the query scale steps every 16.
SMALL: dict[str, Any] = {
    "vocab_size": 24,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "mask_token_id": 7,
    "rope_parameters": YARN | {"rope_theta": 100.0, "original_max_position_embeddings": 16},
}
MASK = 7
EOS = frozenset({3, 11})
# Differences between passes of different widths are about 1e-6; hypothesis does find a lead of 2e-7.
NEAR_TIE = 1e-4


@pytest.fixture(scope="module")
def chat() -> ReferenceModel:
    return ReferenceModel.load(TINY_CHAT)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    data = load_make_data()
    tokenizer = Tokenizer.from_file(str(TINY_CHAT / "tokenizer.json"))
    rng = random.Random(2)
    questions = [data.example(rng)[1] for _ in range(10)]
    return [tokenizer.encode(data.prompt(q), add_special_tokens=False).ids for q in questions]


@pytest.fixture(scope="module")
def oracle() -> ModuleType:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    return importlib.import_module("oracle.transformers_oracle")


@pytest.fixture(scope="module")
def peer(oracle: ModuleType) -> Any:
    return oracle.load(TINY_CHAT)


# ---- the maths ----


@pytest.mark.parametrize(
    ("theta", "factor", "expected"),
    [
        (1e6, 16, {0: 1, 1: 8.058422e-1, 20: 1.333521e-2, 28: 1.325179e-3, 37: 2.123880e-5, 63: 7.755861e-8}),
        (1e6, 0.25, {28: 5.719195e-3, 37: 1.359283e-3, 63: 4.963751e-6}),
        (1e9, 16, {13: 1.485508e-2, 19: 1.130899e-3, 25: 1.906580e-5, 63: 8.639826e-11}),
    ],
)
def test_yarn_values(theta: float, factor: float, expected: dict[int, float]) -> None:
    inv = yarn_inv_freq(YARN | {"rope_theta": theta, "factor": factor}, 128)
    assert inv.shape == (64,)
    assert inv.dtype == np.float32
    np.testing.assert_allclose(inv[list(expected)], list(expected.values()), rtol=1e-6)


def test_attention_factor_is_one_unless_the_two_scales_differ() -> None:
    assert reference_model.yarn_attention_factor(YARN) == 1.0
    assert reference_model.yarn_attention_factor(YARN | {"mscale_all_dim": 0.0}) == pytest.approx(1.2772589)


def test_llama4_values() -> None:
    scale = llama4_scale([0, 16383, 16384, 32767, 32768, 262143], YARN)
    np.testing.assert_allclose(scale, [1, 1, 1.0693147, 1.0693147, 1.1098612, 1.2772589], rtol=1e-7)


def test_the_mask_id_is_in_neither_argmax_nor_denominator() -> None:
    tensors = random_tensors(SMALL, 0)
    ids, visible = [5, 6, 9], [i for i in range(SMALL["vocab_size"]) if i != MASK]
    logits = ReferenceModel(SMALL, tensors).logits([], ids, True)
    # Twice the winner's row gives twice its logit, so the mask id would win.
    tensors["diffusion_head.weight"][MASK] = 2 * tensors["diffusion_head.weight"][logits[0].argmax()]
    model = ReferenceModel(SMALL, tensors)
    assert model.logits([], ids, True)[0].argmax() == MASK
    token, confidence = model.forward([], ids, True)
    weights = np.exp(logits[:, visible].astype(np.float64))
    np.testing.assert_array_equal(token, np.array(visible)[weights.argmax(axis=1)])
    np.testing.assert_allclose(confidence, weights.max(axis=1) / weights.sum(axis=1), rtol=1e-5)


def test_no_position_of_the_prefix_sees_the_pass() -> None:
    """Any split of a causal sequence gives the same logits; a bidirectional pass looks back as a causal one does."""
    model = ReferenceModel(SMALL, random_tensors(SMALL, 1))
    ids = list(range(20))
    whole = model.logits([], ids, False)
    for p in (1, 7, 19):
        np.testing.assert_allclose(model.logits(ids[:p], ids[p:], False), whole[p:], atol=1e-4)
    np.testing.assert_allclose(model.logits(ids[:-1], ids[-1:], True), whole[-1:], atol=1e-4)
    assert np.abs(model.logits(ids[:7], ids[7:], True) - whole[7:])[:-1].max(axis=1).min() > 0.1


def test_adapter_does_nothing_where_there_is_none() -> None:
    model = ReferenceModel(SMALL, random_tensors(SMALL, 2))
    np.testing.assert_array_equal(model.logits([1], [2, 3], True, adapter=True), model.logits([1], [2, 3], True))


# ---- against transformers ----


@pytest.mark.torch
def test_transformers_takes_the_files_yarn(peer: Any, chat: ReferenceModel) -> None:
    buffer = peer.model.rotary_emb.inv_freq.numpy()
    np.testing.assert_allclose(buffer, yarn_inv_freq(chat.rope, chat.head_dim), rtol=1e-6)
    assert peer.model.rotary_emb.attention_scaling == 1.0


@pytest.mark.torch
def test_chat_logits_equal_transformers(
    oracle: ModuleType, peer: Any, chat: ReferenceModel, prompts: list[list[int]]
) -> None:
    for ids in prompts[:4]:
        np.testing.assert_allclose(chat.logits([], ids, False), oracle.logits(peer, ids), atol=1e-3)  # of up to 42


@pytest.mark.torch
@pytest.mark.parametrize(
    "rope",
    [
        {},
        {"factor": 0.25},
        {"mscale_all_dim": 0.5},
        {"rope_theta": 10000.0, "original_max_position_embeddings": 40, "llama_4_scaling_beta": 0.5},
    ],
)
def test_small_logits_equal_transformers_past_the_original_length(oracle: ModuleType, rope: dict[str, float]) -> None:
    """64 tokens: four steps of the query scale; every kind of pass, with and without adapter."""
    config = SMALL | {"rope_parameters": SMALL["rope_parameters"] | rope}
    tensors = random_tensors(SMALL, 3)
    adapter = random_adapter(SMALL, 4, 0.3, 4)
    p = 50
    n = 64
    model, theirs = ReferenceModel(config, tensors, adapter, 2.0), oracle.build(config, tensors)
    ids = np.random.default_rng(5).integers(0, SMALL["vocab_size"], n).tolist()
    np.testing.assert_allclose(model.logits([], ids, False), oracle.logits(theirs, ids), atol=1e-4)

    visible = np.array([[key <= query or query >= p for key in range(n)] for query in range(n)])
    plain = oracle.logits(theirs, ids, visible)[p:]
    np.testing.assert_allclose(model.logits(ids[:p], ids[p:], True), plain, atol=1e-4)

    for layer, block in enumerate(theirs.model.layers):
        name = f"base_model.model.encoder.layers.{layer}.self_attn.o_proj"
        delta = np.float32(2) * adapter[f"{name}.lora_B.weight"] @ adapter[f"{name}.lora_A.weight"]
        block.self_attn.o_proj.register_forward_hook(_add_from(p, delta))
    adapted = oracle.logits(theirs, ids, visible)[p:]
    assert np.abs(adapted - plain).max() > 0.1
    np.testing.assert_allclose(model.logits(ids[:p], ids[p:], True, adapter=True), adapted, atol=1e-4)


def _add_from(start: int, delta: NDArray[np.floating]) -> Callable[[Any, tuple[Any], Any], Any]:
    """A torch forward hook that adds `x @ delta.T` from position `start` on."""
    import torch

    def hook(_module: Any, args: tuple[Any], output: Any) -> Any:
        output[:, start:] += args[0][:, start:] @ torch.from_numpy(delta).T
        return output

    return hook


@pytest.mark.torch
def test_chat_ar_equals_transformers_greedy(
    oracle: ModuleType, peer: Any, chat: ReferenceModel, prompts: list[list[int]]
) -> None:
    ended = 0
    for ids in prompts:
        result = ar(chat, ids, 40, chat.eos)
        assert result.tokens == oracle.greedy(peer, ids, 40, chat.eos)
        ended += result.finish_reason == "stop"
    assert 0 < ended < len(prompts)  # both finish reasons are covered


@pytest.mark.torch
def test_transformers_greedy_never_gives_the_mask_id(oracle: ModuleType) -> None:
    tensors, prompt = random_tensors(SMALL, 6), [5, 6, 9]
    winner = ReferenceModel(SMALL, tensors).logits([], prompt, False)[-1].argmax()
    tensors["diffusion_head.weight"][MASK] = 2 * tensors["diffusion_head.weight"][winner]
    theirs = oracle.build(SMALL, tensors)
    assert oracle.logits(theirs, prompt)[-1].argmax() == MASK
    tokens = oracle.greedy(theirs, prompt, 16, EOS)
    assert tokens[0] == winner
    assert tokens == ar(ReferenceModel(SMALL, tensors), prompt, 16, EOS).tokens


# ---- the loops, by hand ----


class Scripted:
    """Stands in for a model: plays prepared predictions and records its calls."""

    mask_id = MASK

    def __init__(self, *passes: Sequence[tuple[int, float]]) -> None:
        self.passes = list(passes)
        self.calls: list[tuple[list[int], list[int], str]] = []

    def forward(self, prefix: Sequence[int], ids: Sequence[int], bidirectional: bool, adapter: bool = False) -> Any:
        self.calls.append((list(prefix), list(ids), ("bidi" if bidirectional else "causal") + "+" * adapter))
        predictions = self.passes.pop(0)
        assert len(predictions) == len(ids)
        return np.array([t for t, _ in predictions]), np.array([c for _, c in predictions], np.float32)


def nfe(**passes: int) -> dict[str, int]:
    return dict.fromkeys(reference.KINDS, 0) | passes


def test_commit_rule_takes_all_that_reach_the_threshold_else_the_leftmost_best() -> None:
    def rule(block: list[int], threshold: float, *predictions: tuple[int, float]) -> list[int]:
        token, confidence = Scripted(predictions).forward([], block, True)
        return commit_rule(MASK, block, threshold, EOS, token, confidence)

    m = MASK
    assert rule([1, m, m, m], 0.9, (20, 1.0), (21, 0.9), (22, 0.89), (23, 1.0)) == [1, 21, m, 23]
    assert rule([1, m, m, m], 0.9, (20, 1.0), (21, 0.3), (22, 0.4), (23, 0.4)) == [1, m, 22, m]
    assert rule([1, m, m, m], 0.0, (20, 1.0), (21, 0.1), (22, 0.1), (23, 0.0)) == [1, 21, 22, 23]
    assert rule([1, m, 5, m], 1.5, (20, 1.0), (21, 1.0), (22, 1.0), (23, 1.0)) == [1, 21, 5, m]
    # An EOS fills the masks after it, not those before; a decided token after it stays.
    assert rule([1, m, m, m, m], 0.9, (0, 0), (21, 0.1), (11, 0.5), (23, 0.2), (24, 0.2)) == [1, m, 11, 11, 11]
    assert rule([1, m, m, 5, m], 0.9, (0, 0), (3, 0.9), (22, 0.1), (23, 0.2), (24, 0.2)) == [1, 3, 3, 5, 3]


def test_ar_by_hand() -> None:
    model = Scripted([(20, 1.0)], [(21, 1.0)], [(3, 1.0)])
    assert ar(model, [1, 2], 3, EOS) == Reference([20, 21, 3], "stop", nfe(prefill=1, decode=2), [])
    assert model.calls == [([1], [2], "causal"), ([1, 2], [20], "causal"), ([1, 2, 20], [21], "causal")]


def test_diffusion_by_hand() -> None:
    m = MASK
    model = Scripted(
        [(20, 1.0)],  # the seed
        [(0, 1.0), (21, 0.2), (22, 0.95)],  # the gap before 22 holds its emission back
        [(0, 1.0), (21, 0.2), (0, 1.0)],
        [(0, 1.0), (0, 1.0), (13, 0.5)],  # commit: only the last position counts
        [(0, 1.0), (14, 0.3), (11, 0.9)],  # an EOS, but the token before it is not decided yet
        [(0, 1.0), (15, 0.1), (0, 1.0)],
    )
    result = diffusion(model, [1, 2], 9, 3, 0.9, EOS)
    assert result == Reference([20, 21, 22, 13, 15, 11], "stop", nfe(prefill=1, denoise=4, commit=1), [])
    assert model.calls == [
        ([1], [2], "causal"),
        ([1, 2], [20, m, m], "bidi"),
        ([1, 2], [20, m, 22], "bidi"),
        ([1, 2], [20, 21, 22], "causal"),
        ([1, 2, 20, 21, 22], [13, m, m], "bidi"),
        ([1, 2, 20, 21, 22], [13, m, 11], "bidi"),
    ]


def test_diffusion_stops_denoising_when_the_limit_is_out() -> None:
    model = Scripted([(20, 1.0)], [(0, 1.0), (21, 0.5), (22, 0.1), (23, 0.1)])
    expected = Reference([20, 21], "length", nfe(prefill=1, denoise=1), [])
    assert diffusion(model, [1, 2], 2, 4, 0.9, EOS) == expected


def test_linear_spec_by_hand() -> None:
    m = MASK
    model = Scripted(
        [(20, 1.0)],
        [(0, 1.0), (21, 0.9), (22, 0.2), (23, 0.1)],  # block of 4, threshold 0
        [(21, 1.0), (9, 1.0), (0, 1.0), (0, 1.0)],  # 21 agreed, 9 instead of 22
        [(0, 1.0), (11, 0.9)],  # two tokens are left to the limit
        [(11, 1.0), (13, 1.0)],  # the EOS is accepted, the bonus after it is cut
    )
    result = linear_spec(model, [1, 2], 5, 4, 0.0, EOS, adapter=True)
    assert result == Reference([20, 21, 9, 11], "stop", nfe(prefill=1, draft=2, verify=2), [2, 1])
    assert model.calls == [
        ([1], [2], "causal"),
        ([1, 2], [20, m, m, m], "bidi+"),
        ([1, 2], [20, 21, 22, 23], "causal"),
        ([1, 2, 20, 21], [9, m], "bidi+"),
        ([1, 2, 20, 21], [9, 11], "causal"),
    ]


def test_a_seed_that_is_an_eos_ends_every_mode() -> None:
    expected = Reference([11], "stop", nfe(prefill=1), [])
    assert ar(Scripted([(11, 1.0)]), [1], 1, EOS) == expected
    assert diffusion(Scripted([(11, 1.0)]), [1], 9, 4, 0.9, EOS) == expected
    assert linear_spec(Scripted([(11, 1.0)]), [1], 9, 4, 0.0, EOS) == expected


# ---- the loops, by property ----


@pytest.mark.parametrize(("block_length", "threshold"), [(2, 0.0), (5, 0.7), (32, 0.0), (32, 0.7)])
def test_chat_linear_spec_equals_ar(
    chat: ReferenceModel, prompts: list[list[int]], block_length: int, threshold: float
) -> None:
    for ids in prompts[:3]:
        expected, result = ar(chat, ids, 40, chat.eos), linear_spec(chat, ids, 40, block_length, threshold, chat.eos)
        assert (result.tokens, result.finish_reason) == (expected.tokens, expected.finish_reason)
        assert sum(result.acceptance) == len(result.tokens) - 1


def test_chat_diffusion_makes_several_tokens_per_pass(chat: ReferenceModel, prompts: list[list[int]]) -> None:
    for ids in prompts[:3]:
        result = diffusion(chat, ids, 40, 32, 0.9, chat.eos)
        assert chat.mask_id not in result.tokens
        assert 2 * (result.nfe["denoise"] + result.nfe["commit"]) < len(result.tokens)


# A random model is the harder test of speculation, since hardly any of its drafts are accepted.
SMALL_MODELS = [
    ReferenceModel(SMALL, random_tensors(SMALL, seed), random_adapter(SMALL, 4, 0.3, seed), 2.0) for seed in range(3)
]
requests = st.tuples(
    st.sampled_from(SMALL_MODELS),
    st.lists(st.integers(0, 23), min_size=1, max_size=12),
    st.integers(1, 24),
    st.sampled_from([1, 2, 3, 5, 8, 32]),
    st.sampled_from([0.0, 0.2, 0.7, 1.5]),
)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(requests)
def test_properties_of_every_mode(request: tuple[ReferenceModel, list[int], int, int, float]) -> None:
    model, prompt, limit, block_length, threshold = request
    sequential = ar(model, prompt, limit, EOS)
    assume(ar_margin(model, prompt, sequential.tokens) > NEAR_TIE)
    speculative = linear_spec(model, prompt, limit, block_length, threshold, EOS, adapter=limit % 2 == 0)
    parallel = diffusion(model, prompt, limit, block_length, threshold, EOS)
    assert speculative.tokens == sequential.tokens
    if block_length == 1:
        assert parallel.tokens == sequential.tokens
    if threshold > 1 and parallel.finish_reason == "length":
        # Every token but the seeds costs a pass, and tokens decided past the limit may cost more.
        seeds = -(-limit // block_length)
        assert limit - seeds <= parallel.nfe["denoise"] <= seeds * (block_length - 1)
    for result in (sequential, speculative, parallel):
        ends = [i for i, token in enumerate(result.tokens) if token in EOS]
        assert ends in ([], [len(result.tokens) - 1])
        assert result.finish_reason == ("stop" if ends else "length")
        assert ends or len(result.tokens) == limit
        assert MASK not in result.tokens


@settings(max_examples=20, deadline=None, derandomize=True)
@given(requests, st.integers(1, 24))
def test_a_smaller_limit_gives_a_prefix(
    request: tuple[ReferenceModel, list[int], int, int, float], smaller: int
) -> None:
    model, prompt, limit, block_length, threshold = request
    smaller = min(smaller, limit)
    assume(ar_margin(model, prompt, ar(model, prompt, limit, EOS).tokens) > NEAR_TIE)

    def every_mode(n: int) -> list[list[int]]:
        speculative = linear_spec(model, prompt, n, block_length, threshold, EOS, adapter=True)
        parallel = diffusion(model, prompt, n, block_length, threshold, EOS)
        return [ar(model, prompt, n, EOS).tokens, speculative.tokens, parallel.tokens]

    assert every_mode(smaller) == [tokens[:smaller] for tokens in every_mode(limit)]


def test_remembered_passes_are_the_computed_ones() -> None:
    model = ReferenceModel(SMALL, random_tensors(SMALL, 8), random_adapter(SMALL, 4, 0.3, 8))
    passes = [([1, 2], [7, 7], bidi, adapter) for bidi in (False, True) for adapter in (False, True)]
    first = [model.forward(*call) for call in passes]
    model.clear()
    again = [model.forward(*call) for call in reversed(passes)][::-1]
    np.testing.assert_array_equal(first, again)
    assert len({confidence.tobytes() for _, confidence in first}) == len(passes)

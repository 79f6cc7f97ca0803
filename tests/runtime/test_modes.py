"""Every mode against the oracles on a sample of the grid, and what must hold whatever the oracle says.

`tests/equality.py` runs the demonstration model over it; its result is benchmarks/results/equality.json.
"""

import json
import random
import subprocess
import sys
from pathlib import Path

import equality
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import reference
from stand_ins.chats import chat_ids
from stand_ins.checkpoints import TINY_CHAT

import nemodiff
from nemodiff.contract import PREFILL_CHUNK
from nemodiff.runtime import generate
from nemodiff.runtime.planning.cost import CostCurve
from nemodiff.runtime.planning.draft_planner import AcceptanceStatistics, DraftPlanner
from nemodiff.runtime.planning.pass_costs import PassCosts
from nemodiff.runtime.requests import prepare as request
from nemodiff.runtime.requests.sequence import Sequence

QUESTIONS = equality.questions(40)


@pytest.mark.parametrize("number", range(6))
def test_sample_of_the_grid_equals_the_oracles(setup: equality.Setup, number: int) -> None:
    cases = random.Random(number).sample(equality.grid(), 14)
    done = list(equality.compare_prompt(setup, QUESTIONS[number], cases))
    assert len(done) == 14
    assert [d for _, d in done if d is not None] == []


def test_grid_is_the_promised_one() -> None:
    cases = equality.grid()
    assert len(cases) == len(set(cases)) == 4 + 3 * 5 * 3 * 4


@pytest.mark.parametrize("name", ["equality", "equality_sampled"])
def test_the_commands_compare_the_demonstration_model(tmp_path: Path, name: str) -> None:
    cases = ["--cases", "2"] if name == "equality" else []
    command = [sys.executable, f"tests/{name}.py", "--prompts", "1", *cases, "--processes", "1", "--output"]
    root = Path(__file__).parents[2]
    subprocess.run([*command, tmp_path / "result.json"], cwd=root, check=True, capture_output=True, timeout=240)
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["checkpoint"], result["prompts"], result["differences"]) == ("tiny-chat-2", 1, [])
    assert result["equal"] == result["requests"]
    assert sum(result["requests"].values()) >= 2


@settings(max_examples=15, deadline=None)
@given(
    question=st.sampled_from(QUESTIONS),
    block=st.sampled_from([1, 2, 5, 8, 16, 22]),
    limit=st.sampled_from([1, 2, 7, 32, 60]),
    adapter=st.booleans(),
    chunk=st.integers(5, 60),
)
def test_quadratic_with_all_groups_equals_the_oracle(
    setup: equality.Setup, question: str, block: int, limit: int, adapter: bool, chunk: int
) -> None:
    engine = setup.adapted if adapter else setup.plain
    prompt = chat_ids(engine.text, [{"role": "user", "content": question}])
    options = {"mode": "quadratic_spec", "groups": "all", "block_length": block, "max_new_tokens": limit}
    answer = nemodiff.generate(engine, prompt, prefill_chunk=chunk, **options)
    oracle = reference.quadratic_spec(setup.model, prompt, limit, block, setup.model.eos, adapter)
    assert answer.token_ids == oracle.tokens == reference.ar(setup.model, prompt, limit, setup.model.eos).tokens
    assert (answer.nfe["verify"], answer.acceptance.lengths) == (oracle.nfe["verify"], oracle.acceptance)


def budgeted(setup: equality.Setup, prompt: list[int], block: int, limit: int, base: float) -> Sequence:
    """A request of quadratic_spec where a pass takes `base`, and 1 for each of its tokens."""
    options = nemodiff.Options(mode="quadratic_spec", block_length=block, max_new_tokens=limit)
    sequence = request.prepare(setup.plain, prompt, options)
    if sequence.planner is not None:
        costs = PassCosts(CostCurve((1, 512), (base + 1.0, base + 512.0)))
        sequence.planner = DraftPlanner(costs, AcceptanceStatistics(), ("quadratic_spec",), (block,))
    return sequence


@settings(max_examples=25, deadline=None)
@given(
    question=st.sampled_from(QUESTIONS),
    block=st.integers(1, 32),
    limit=st.integers(1, 60),
    base=st.sampled_from([0.0, 1.0, 30.0, 1000.0]),
)
def test_budgeted_quadratic_equals_ar_whatever_it_leaves_out(
    setup: equality.Setup, question: str, block: int, limit: int, base: float
) -> None:
    prompt = chat_ids(setup.plain.text, [{"role": "user", "content": question}])
    sequence = budgeted(setup, prompt, block, limit, base)
    sizes = [pass_.ids.size for _, pass_, _ in generate.decode(setup.plain.backend, [sequence], 1)]
    assert sequence.tokens == nemodiff.generate(setup.plain, prompt, mode="ar", max_new_tokens=limit).token_ids
    assert max(sizes[1:], default=0) <= PREFILL_CHUNK


def test_a_good_draft_is_not_thrown_away_for_another() -> None:
    """What a draft is worth comes in a pass that verifies it, which takes longer than one of a single head."""
    each_paid = PassCosts(CostCurve((1, 512), (2.0, 513.0)))
    planner = DraftPlanner(each_paid, AcceptanceStatistics(), ("quadratic_spec",), (4,))
    planner.plan()
    for sure in (0.97, 0.99):
        assert planner.grouping([sure] * 3, 0.0, 100).heads == 4


def test_budget_follows_the_cost_of_a_token(setup: equality.Setup) -> None:
    """With cheap tokens all likely groups are taken, with dear ones hardly any."""
    prompt = chat_ids(setup.plain.text, [{"role": "user", "content": QUESTIONS[0]}])
    means = []
    for base in (0.0, 10_000.0):
        sequence = budgeted(setup, prompt, 16, 40, base)
        sizes = [pass_.ids.size for _, pass_, _ in generate.decode(setup.plain.backend, [sequence], 1)][1:]
        means.append(sum(sizes) / len(sizes))
    assert means[0] * 3 < means[1]


@pytest.mark.torch
def test_ar_equals_transformers(setup: equality.Setup) -> None:
    pytest.importorskip("transformers")
    from oracle import transformers_oracle

    model = transformers_oracle.load(TINY_CHAT)
    eos = sorted(setup.model.eos)
    for question in QUESTIONS[:12]:
        prompt = chat_ids(setup.plain.text, [{"role": "user", "content": question}])
        expected = transformers_oracle.greedy(model, prompt, 64, eos)
        assert nemodiff.generate(setup.plain, prompt, mode="ar", max_new_tokens=64).token_ids == expected


@pytest.mark.parametrize("stop", [False, True])
def test_verify_looks_at_nothing_behind_a_drafted_end(setup: equality.Setup, stop: bool) -> None:
    """An EOS or a stop id of the request; after it nothing can be emitted."""
    engine = setup.plain
    expected = nemodiff.generate(engine, QUESTIONS[0], mode="ar", max_new_tokens=60).token_ids
    stops = expected[len(expected) // 2 :][:1] if stop else []
    options = nemodiff.Options(mode="linear_spec", block_length=32, max_new_tokens=60, stop_token_ids=stops)
    sequence = request.prepare(engine, QUESTIONS[0], options)
    passes = generate.decode(engine.backend, [sequence], 1)
    looked_at = [pass_.ids.tolist() for _, pass_, _ in passes if pass_.kind == "verify"]
    assert sequence.finish == "stop"
    assert sequence.tokens == (expected[: expected.index(stops[0]) + 1] if stop else expected)
    assert not any(token in sequence.stops for block in looked_at for token in block[:-1])
    assert len(looked_at[-1]) < 32


def test_a_block_is_closed_behind_its_first_end(setup: equality.Setup) -> None:
    """Its masks become that end, be it an EOS or a stop id; what has been committed there stays."""
    mask, eos = setup.model.mask_id, max(setup.model.eos)
    sequence = request.prepare(setup.plain, QUESTIONS[0], nemodiff.Options(stop_token_ids=[130]))
    for end, other in ((eos, 130), (130, eos)):
        block = [200, mask, end, 201, mask, other, mask]
        assert sequence.close_after_eos(block) == [200, mask, end, 201, end, other, end]


def test_a_random_adapter_changes_acceptance_only(setup: equality.Setup) -> None:
    means = []
    for question in QUESTIONS[:5]:
        plain, adapted = (nemodiff.generate(e, question, max_new_tokens=64) for e in (setup.plain, setup.adapted))
        assert adapted.token_ids == plain.token_ids
        assert plain.acceptance.mean is not None
        assert adapted.acceptance.mean is not None
        means.append((plain.acceptance.mean, adapted.acceptance.mean))
    # Were the gate stuck at 0 the two would be equal, and stuck at 1 the tokens above would differ.
    assert sum(p for p, _ in means) > 1.5 * sum(a for _, a in means)


def test_other_modes_never_use_the_adapter(setup: equality.Setup) -> None:
    for mode in ("ar", "diffusion"):
        plain, adapted = (nemodiff.generate(e, QUESTIONS[0], mode=mode) for e in (setup.plain, setup.adapted))
        assert (adapted.token_ids, adapted.nfe) == (plain.token_ids, plain.nfe)


@settings(max_examples=12, deadline=None)
@given(question=st.sampled_from(QUESTIONS), chunk=st.integers(1, 40), mode=st.sampled_from(nemodiff.MODES))
def test_prefill_in_chunks_gives_the_same_tokens(setup: equality.Setup, question: str, chunk: int, mode: str) -> None:
    whole = nemodiff.generate(setup.plain, question, mode=mode, max_new_tokens=24)
    split = nemodiff.generate(setup.plain, question, mode=mode, max_new_tokens=24, prefill_chunk=chunk)
    assert split.token_ids == whole.token_ids
    assert split.nfe["prefill"] == -(-split.prompt_tokens // chunk)


@settings(max_examples=15, deadline=None)
@given(
    question=st.sampled_from(QUESTIONS),
    mode=st.sampled_from(nemodiff.MODES),
    block=st.integers(1, 40),
    threshold=st.sampled_from([0.0, 0.5, 0.9, 1.5]),
    limit=st.integers(1, 60),
)
def test_a_smaller_limit_gives_a_prefix(
    setup: equality.Setup, question: str, mode: str, block: int, threshold: float, limit: int
) -> None:
    options = {"mode": mode, "block_length": block, "threshold": threshold}
    long = nemodiff.generate(setup.plain, question, max_new_tokens=60, **options)
    short = nemodiff.generate(setup.plain, question, max_new_tokens=limit, **options)
    assert short.token_ids == long.token_ids[:limit]
    mask, eos = setup.model.mask_id, setup.model.eos
    assert mask not in long.token_ids
    assert not eos & set(long.token_ids[:-1])
    assert long.finish_reason == ("stop" if long.token_ids[-1] in eos else "length")
    passes = sum(short.nfe.values())
    assert short.e2e_tpf == len(short.token_ids) / passes
    if mode == "linear_spec":
        assert sum(short.acceptance.lengths) == len(short.token_ids) - 1  # the seed came from prefill


@settings(max_examples=8, deadline=None)
@given(data=st.data(), mode=st.sampled_from(nemodiff.MODES), rows=st.integers(2, 8))
def test_rows_of_a_batch_do_not_touch_each_other(
    setup: equality.Setup, data: st.DataObject, mode: str, rows: int
) -> None:
    chosen = data.draw(st.lists(st.sampled_from(QUESTIONS), min_size=1, max_size=10))
    # All groups: a budget follows the clock, and the passes with it.
    options = {"mode": mode, "max_new_tokens": 40, "groups": "all"}
    together = list(nemodiff.generate_many(setup.plain, chosen, rows=rows, **options))
    assert len(together) == len(chosen)
    for question, answer in zip(chosen, together, strict=True):
        alone = nemodiff.generate(setup.plain, question, **options)
        assert (answer.text, answer.token_ids, answer.nfe) == (alone.text, alone.token_ids, alone.nfe)


def test_f16_engine_answers(tmp_path: Path) -> None:
    from nemodiff.builder.build import Builder

    engine = nemodiff.load(Builder(TINY_CHAT, tmp_path / "f16", dtype="f16").run())
    model = reference.ReferenceModel.load(TINY_CHAT)
    same = 0
    for question in QUESTIONS[:3]:
        prompt = chat_ids(engine.text, [{"role": "user", "content": question}])
        answer = nemodiff.generate(engine, prompt, mode="linear_spec", max_new_tokens=40)
        same += answer.token_ids == reference.ar(model, prompt, 40, model.eos).tokens
    assert same >= 2  # f16 may flip a near-tie, not more

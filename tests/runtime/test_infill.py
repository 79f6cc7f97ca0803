"""Filling in and revising: token for token against oracles on the numpy model, and what must hold without an oracle.

The oracles know no cache, no slots and no two intervals: each pass is a plain prefix and a plain pass.
"""

import collections
import contextlib
import json
import math
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import Refused
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import reference
from stand_ins.chats import chat_ids
from stand_ins.checkpoints import load_make_data

import nemodiff
from nemodiff.cli import main
from nemodiff.runtime.editing.infill import LONGEST_FREE, parse_template
from nemodiff.runtime.editing.options import METHODS
from nemodiff.runtime.editing.row import Row
from nemodiff.runtime.engines.passes import Pass, Prediction

SCRIPT = Path(__file__).parents[2] / "examples" / "fill-in" / "fill_in.py"
DATA = load_make_data()
CODE = "Write a Python function that returns the sum of a and b."
ANSWER = 'def add(a, b):\n    """Return the sum of a and b."""\n    result = a + b\n    return result'


def log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


def oracle_block(oracle: reference.ReferenceModel, before: list[int], size: int, after: list[int]) -> list[int]:
    block = [oracle.mask_id] * size + after[: max(0, 32 - size)]
    while oracle.mask_id in block:
        block = reference.commit_rule(oracle.mask_id, block, 0.9, (), *oracle.forward(before, block, True))
    return block[:size]


def oracle_search(
    oracle: reference.ReferenceModel, before: list[int], sizes: range, after: list[int], width: int
) -> list[int]:
    """Every beam of every requested size is scored in full, none is left out early."""
    beams, best = [(0.0, [])], (-math.inf, [])  # type: ignore[var-annotated]
    for size in range(1, sizes[-1] + 1):
        grown = []
        for score, tokens in beams:
            last = log_softmax(oracle.logits(before[:-1], [before[-1], *tokens], False)[-1:])[0]
            last[[oracle.mask_id, *oracle.eos]] = -math.inf
            grown += [(score + last[t], [*tokens, int(t)]) for t in np.argsort(-last)[:width]]
        beams = sorted(grown, key=lambda beam: -beam[0])[:width]
        for score, tokens in beams if size in sizes else []:
            whole = log_softmax(oracle.logits(before[:-1], [before[-1], *tokens, *after[:-1]], False))
            total = score + (sum(whole[len(tokens) + i, t] for i, t in enumerate(after)))
            best = max(best, (total, tokens), key=lambda beam: beam[0])
    return best[1]


def oracle_revise(oracle: reference.ReferenceModel, before: list[int], ids: list[int], keep: float) -> list[int]:
    done: list[int] = []
    for start in range(0, len(ids), 32):
        block, context = ids[start : start + 32], before + done
        for _ in range(4):
            own = log_softmax(oracle.logits(context[:-1], [context[-1], *block[:-1]], False))
            sure = [math.exp(own[i, t]) >= keep for i, t in enumerate(block)]
            if all(sure):
                break
            after = [t if s else oracle.mask_id for t, s in zip(block, sure, strict=True)]
            while oracle.mask_id in after:
                after = reference.commit_rule(oracle.mask_id, after, 0.9, (), *oracle.forward(context, after, True))
            if after == block:
                break
            block = after
        done += block
    return done


@pytest.mark.parametrize("seed", range(12))
def test_filling_equals_the_oracle(engine: nemodiff.LoadedEngine, oracle: reference.ReferenceModel, seed: int) -> None:
    """Two holes; the text between them is what the first one sees, and the second one sees what filled the first."""
    rng = random.Random(100 + seed)
    _, question, answer = DATA.example(rng)
    words = answer.split(" ")
    if len(words) < 6:
        words = ANSWER.split(" ")
    cut = sorted(rng.sample(range(1, len(words)), 3))
    texts = [" ".join(words[a:b]) for a, b in zip([0, *cut[:2]], [*cut[:2], len(words)], strict=True)]
    sizes = [rng.randint(1, 7), rng.randint(1, 7)]
    method = "block" if seed % 2 else "search"
    template = [texts[0], sizes[0], " " + texts[1], sizes[1], " " + texts[2]]
    got = nemodiff.fill(engine, template, prompt=question, method=method, width=3)
    before = chat_ids(engine.text, [{"role": "user", "content": question}]) + engine.text.encode_plain(texts[0])
    for i, size in enumerate(sizes):
        after = engine.text.encode_plain(" " + texts[i + 1])
        if method == "block":
            expected = oracle_block(oracle, before, size, after)
        else:
            expected = oracle_search(oracle, before, range(size, size + 1), after, 3)
        assert got.token_ids[i] == expected
        before += expected + after


@pytest.mark.parametrize("seed", range(3))
def test_free_length_equals_the_oracle_that_scores_everything(
    engine: nemodiff.LoadedEngine, oracle: reference.ReferenceModel, seed: int
) -> None:
    _, question, answer = DATA.example(random.Random(40 + seed))
    at = answer.index(" ")
    prefix, suffix = answer[:at], answer[at + 9 :]
    got = nemodiff.infill(engine, prefix, suffix, prompt=question, width=2)
    before = chat_ids(engine.text, [{"role": "user", "content": question}]) + engine.text.encode_plain(prefix)
    expected = oracle_search(oracle, before, range(1, LONGEST_FREE + 1), engine.text.encode_plain(suffix), 2)
    assert got.token_ids == [expected]


def test_a_filling_that_has_lost_is_not_read_to_the_texts_end(
    engine: nemodiff.LoadedEngine, oracle: reference.ReferenceModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does it grow: what comes after can only lower its probability."""
    read = collections.Counter[str]()
    run = Row.run

    def noted(row: Row, pass_: Pass) -> Prediction:
        read[pass_.kind] += len(pass_.ids)
        return run(row, pass_)

    monkeypatch.setattr(Row, "run", noted)
    prefix, suffix = ANSWER[:3], ANSWER[7:]
    got = nemodiff.infill(engine, prefix, suffix, prompt=CODE, longest=6, width=4)
    after = engine.text.encode_plain(suffix)
    before = chat_ids(engine.text, [{"role": "user", "content": CODE}]) + engine.text.encode_plain(prefix)
    assert got.token_ids == [oracle_search(oracle, before, range(1, 7), after, 4)]
    assert len(after) < read["verify"] < 6 * 4 * len(after) / 2
    assert read["decode"] < sum(4 * length for length in range(1, 7)) / 2


@pytest.mark.parametrize("seed", range(6))
def test_revision_equals_the_oracle(engine: nemodiff.LoadedEngine, oracle: reference.ReferenceModel, seed: int) -> None:
    rng = random.Random(seed)
    _, question, answer = DATA.example(rng)
    words = answer.split(" ")
    words[rng.randrange(len(words))] = "stone"
    text = " ".join(words)
    got = nemodiff.revise(engine, text, prompt=question)
    before = chat_ids(engine.text, [{"role": "user", "content": question}])
    ids = engine.text.encode_plain(text)
    assert got.token_ids == oracle_revise(oracle, before, ids, 0.05)
    assert got.changed == sum(a != b for a, b in zip(got.token_ids, ids, strict=True))


TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=12)


@settings(max_examples=40, deadline=None)
@given(
    texts=st.lists(TEXT, min_size=2, max_size=4),
    sizes=st.lists(st.integers(1, 9), min_size=3, max_size=3),
    method=st.sampled_from(METHODS),
    prompt=st.sampled_from([CODE, "", "<SPECIAL_100> Count."]),
    width=st.integers(1, 5),
)
def test_given_text_comes_back_and_holes_have_their_length(
    engine: nemodiff.LoadedEngine, texts: list[str], sizes: list[int], method: str, prompt: str, width: int
) -> None:
    template: list[str | int | None] = [texts[0]]
    for text, size in zip(texts[1:], sizes, strict=False):
        template += [size, text]
    got = nemodiff.fill(engine, template, prompt=prompt, method=method, width=width)
    assert [len(ids) for ids in got.token_ids] == template[1::2]
    assert all(engine.info.model.mask_id not in ids for ids in got.token_ids)
    assert got.text == "".join(t + h for t, h in zip(texts, [*got.holes, ""], strict=True))
    assert got.holes == [engine.text.decode(ids) for ids in got.token_ids]
    again = nemodiff.fill(engine, template, prompt=prompt, method=method, width=width)
    assert (again.token_ids, again.nfe) == (got.token_ids, got.nfe)


@settings(max_examples=20, deadline=None)
@given(text=TEXT.filter(bool), keep=st.sampled_from([0.0, 0.05, 0.5, 1.0]), block=st.integers(1, 40))
def test_revision_keeps_the_number_of_tokens_and_never_gives_a_mask(
    engine: nemodiff.LoadedEngine, text: str, keep: float, block: int
) -> None:
    got = nemodiff.revise(engine, text, prompt=CODE, keep=keep, block_length=block)
    assert len(got.token_ids) == len(engine.text.encode_plain(text))
    assert engine.info.model.mask_id not in got.token_ids
    if keep == 0:
        assert (got.text, got.changed, got.nfe["denoise"]) == (text, 0, 0)


def test_right_code_is_kept_and_wrong_code_repaired(engine: nemodiff.LoadedEngine) -> None:
    assert nemodiff.revise(engine, ANSWER, prompt=CODE).changed == 0
    repaired = nemodiff.revise(engine, ANSWER.replace("+", "*"), prompt=CODE)
    assert (repaired.text, repaired.changed) == (ANSWER, 1)


def test_a_text_that_stands_alone(engine: nemodiff.LoadedEngine) -> None:
    began = time.perf_counter()
    filled = nemodiff.infill(engine, "Sorted: 7, 10", " 84.", length=4)
    assert filled.text.startswith("Sorted: 7, 10")
    assert filled.text.endswith(" 84.")
    revised = nemodiff.revise(engine, "Sorted: 7, 10")
    assert len(revised.token_ids) == len(engine.text.encode_plain("Sorted: 7, 10"))
    whole = (time.perf_counter() - began) * 1e3
    assert min(filled.total_ms, revised.total_ms) > 0
    assert whole / 100 < filled.total_ms + revised.total_ms < whole


def test_template_syntax() -> None:
    assert parse_template("a{hole:12}b{x}{hole}") == ["a", 12, "b{x}", None, ""]
    with pytest.raises(nemodiff.RequestError, match=r"no hole; write \{hole\}"):
        parse_template("a {holes} b")


def test_commands_print_the_text(tiny_engine: Path, tmp_path: Path) -> None:
    def run(*arguments: str, stdin: str = "") -> str:
        done = CliRunner().invoke(main, [*arguments[:1], str(tiny_engine), *arguments[1:], "-p", CODE], input=stdin)
        assert (done.exit_code, done.stderr) == (0, "")
        return done.stdout

    assert run("infill", "--prefix", "def add(", "--suffix", "):", "--length", "3") == "def add(a, b):\n"
    assert run("infill", "--template", "def add({hole:3}):", "--method", "block") == "def add(a, b):\n"
    filled = json.loads(run("infill", "--template", "def {hole}(a, b):", "--json"))
    assert (filled["holes"], filled["method"]) == ([filled["text"][4:-7]], "search")
    (tmp_path / "text").write_text(ANSWER.replace("+", "*") + "\n")
    for source in (["--file", str(tmp_path / "text")], ["--text", ANSWER.replace("+", "*")], []):
        assert run("revise", *source, stdin=ANSWER.replace("+", "*")) == ANSWER + "\n"


@pytest.mark.parametrize(
    ("flags", "unused"),
    [
        (["--threshold", "0.5"], ["--threshold has no effect in method search"]),
        (["--block-length", "8", "--width", "2"], ["--block-length has no effect in method search"]),
        (["--method", "block", "--width", "2"], ["--width has no effect in method block"]),
        (["--method", "block", "--threshold", "0.5", "--block-length", "8"], []),
    ],
)
def test_a_choice_that_the_method_has_not_is_warned_of(tiny_engine: Path, flags: list[str], unused: list[str]) -> None:
    done = CliRunner().invoke(main, ["infill", str(tiny_engine), "--template", "a{hole:2}b", *flags])
    assert (done.exit_code, done.stderr.splitlines()) == (0, [f"Warning: {text}" for text in unused])


@pytest.mark.parametrize(
    ("arguments", "fragment", "code"),
    [
        (["infill"], "give --prefix (with --suffix and --length) or --template", 2),
        (["infill", "--prefix", "a", "--template", "{hole}"], "give --prefix", 2),
        (["infill", "--template", "a{hole}", "--length", "3"], "go with --prefix", 2),
        (["infill", "--template", "a b"], "the template has no hole", 1),
        (["infill", "--prefix", "a", "--length", "65"], "Error: length of a hole is 65, allowed: 1 to 64 tokens", 1),
        (["infill", "--prefix", "a", "--length", "0"], "Error: length of a hole is 0, allowed: 1 to 64 tokens", 1),
        (["infill", "--prefix", "a"], "needs method search and text after it", 1),
        (["infill", "--prefix", "a", "--suffix", "b", "--method", "block"], "needs method search", 1),
        (["infill", "--template", "a{hole}{hole:2}"], "needs method search and text after it", 1),
        (["infill", "--template", f"a{{hole:{'9' * 5000}}}"], "length of a hole is '9999", 1),
        (["infill", "--prefix", "", "--suffix", "b", "--length", "2"], "nothing stands before the first hole", 1),
        (["infill", "--prefix", "a", "--length", "2", "--width", "0"], "width is 0, allowed: 1 to 64", 1),
        (["infill", "--prefix", "a", "--length", "2", "--threshold", "-1"], "threshold is -1.0, allowed", 1),
        (["infill", "--prefix", "a", "--length", "2", "--threshold", "nan"], "threshold is nan, allowed", 1),
        (["infill", "--prefix", "a", "--length", "2", "--block-length", "65"], "block_length is 65, allowed", 1),
        (["infill", "--prefix", "a " * 40_000, "--length", "2"], "max_seq_len is 32768; shorten the text", 1),
        (
            ["infill", "--prefix", "a", "--length", "2", "--device", "cuda"],
            "device is 'cuda', allowed on onnxruntime",
            1,
        ),
        (["revise", "--text", "a", "--device", "gpu"], "device is 'gpu', allowed on onnxruntime: cpu", 1),
        (["revise", "--text", "a", "--file", "b"], "give --text or --file, not both", 2),
        (["revise"], "no text: give --text TEXT, --file FILE", 2),
        (["revise", "--text", ""], "--text is empty", 1),
        (["revise", "--text", "a", "--keep", "1.5"], "keep is 1.5, allowed: 0 to 1", 1),
        (["revise", "--text", "a", "--rounds", "0"], "rounds is 0, allowed: 1 to 64", 1),
        (["revise", "--text", "a " * 40_000], "max_seq_len is 32768; shorten the text", 1),
        (["revise", "--file", "nowhere/not-there"], "nowhere/not-there", 1),
    ],
)
def test_wrong_requests_are_one_line(
    tiny_engine: Path, refused: Refused, arguments: list[str], fragment: str, code: int
) -> None:
    refused([arguments[0], str(tiny_engine), *arguments[1:]], fragment, code=code)


def test_a_text_that_cannot_fit_is_not_encoded(engine: nemodiff.LoadedEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(engine.text), "encode_plain", lambda *_: pytest.fail("encoded"))
    with pytest.raises(
        nemodiff.RequestError, match=r"^the text has at least \d{5,} tokens, the engine's max_seq_len is"
    ):
        nemodiff.infill(engine, "a " * 1_000_000, "b")


def test_prompt_text_and_holes_must_fit_together(engine: nemodiff.LoadedEngine) -> None:
    limit = engine.info.build.max_seq_len
    prompt = [130] * (limit + 1 - len(engine.text.encode_plain(ANSWER)))
    with pytest.raises(nemodiff.RequestError, match=f"^prompt and text have {limit + 1} tokens, .* is {limit}; "):
        nemodiff.revise(engine, ANSWER, prompt=prompt)
    with pytest.raises(nemodiff.RequestError, match=f"^prompt, text and holes have up to {limit + 11} tokens, "):
        nemodiff.fill(
            engine, [3, ANSWER, None, ANSWER], prompt=prompt[len(engine.text.encode_plain(ANSWER)) :], longest=7
        )


@pytest.mark.parametrize("template", [[1.5], ["a", True], ["a", "b"], []])
def test_wrong_templates_in_python(engine: nemodiff.LoadedEngine, template: Any) -> None:
    with pytest.raises(nemodiff.RequestError, match=r"allowed: 1 to 64|no hole"):
        nemodiff.fill(engine, template, prompt=CODE)


def test_a_template_may_be_a_generator(engine: nemodiff.LoadedEngine) -> None:
    template: list[str | int] = ["def add(", 3, "):"]
    again = nemodiff.fill(engine, (part for part in template), prompt=CODE)
    assert again.text == nemodiff.fill(engine, template, prompt=CODE).text
    assert again.text.startswith("def add(")


@pytest.mark.parametrize("value", [None, True, 1.5, math.nan, "8", [8]])
@pytest.mark.parametrize("name", ["width", "longest", "block_length", "rounds", "keep", "threshold"])
def test_wrong_numbers_in_python(engine: nemodiff.LoadedEngine, name: str, value: Any) -> None:
    right = (name, value) in (("block_length", None), ("threshold", 1.5))
    wrong = contextlib.nullcontext() if right else pytest.raises(nemodiff.RequestError, match=f"^{name} is .*allowed: ")
    if name not in ("rounds", "keep"):
        with wrong:
            nemodiff.fill(engine, ["def add(", 2, "):"], prompt=CODE, **{name: value})
    if name not in ("width", "longest"):
        with wrong:
            nemodiff.revise(engine, ANSWER, prompt=CODE, **{name: value})


def test_what_is_no_text_in_python(engine: nemodiff.LoadedEngine) -> None:
    for text in (None, 5, b"def", ["def"]):
        with pytest.raises(nemodiff.RequestError, match=r"^text is .*, allowed: text$"):
            nemodiff.revise(engine, text)  # type: ignore[arg-type]
    for template in (None, 5, "def {hole}"):
        with pytest.raises(nemodiff.RequestError, match=r"^template is .*, allowed: a list of texts and holes"):
            nemodiff.fill(engine, template)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["prefix", "suffix"])
@pytest.mark.parametrize("text", [None, 5, b"def"])
def test_what_is_no_text_around_a_hole_is_no_hole_of_its_own(
    engine: nemodiff.LoadedEngine, name: str, text: Any
) -> None:
    with pytest.raises(nemodiff.RequestError, match=rf"^{name} is .*, allowed: text$"):
        nemodiff.infill(engine, **{"prefix": "def add(", "suffix": "):", "length": 2, name: text})


@pytest.mark.parametrize("length", ["2", 0, True])
def test_what_is_no_length_in_python(engine: nemodiff.LoadedEngine, length: Any) -> None:
    with pytest.raises(nemodiff.RequestError, match=r"length of a hole is .*, allowed: 1 to 64 tokens"):
        nemodiff.infill(engine, "def add(", "):", length=length)


def test_example_runs(tiny_engine: Path) -> None:
    command = [sys.executable, "-W", "error", str(SCRIPT), str(tiny_engine)]
    shown = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
    assert shown.count("def add(a, b):") == 3
    assert ANSWER in shown
    assert "1 of 26 tokens changed" in shown
    alone = subprocess.run(command[:-1], capture_output=True, text=True, timeout=120)
    assert (alone.returncode, alone.stderr) == (1, "Usage: python examples/fill-in/fill_in.py ENGINE\n")

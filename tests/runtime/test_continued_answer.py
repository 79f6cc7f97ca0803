"""A conversation whose last message is the beginning of the answer, which goes on from there."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from stand_ins.chats import chat_ids
from stand_ins.checkpoints import TINY_CHAT
from stand_ins.tool_templates import tool_engine

import nemodiff
from nemodiff.contract import MODES
from nemodiff.runtime.text.codec import TextCodec

QUESTION = {"role": "user", "content": "Count from 3 to 9."}
BEGUN = "3, 4, 5,"


def asked(text: str, **fields: Any) -> list[dict[str, Any]]:
    return [QUESTION, {"role": "assistant", "content": text, **fields}]


def templated(folder: Path, source: str) -> TextCodec:
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY_CHAT / name, folder)
    (folder / "chat_template.jinja").write_text(source)
    return TextCodec(folder)


@pytest.mark.parametrize("mode", MODES)
def test_an_answer_goes_on_where_its_beginning_ends(engine: nemodiff.LoadedEngine, mode: str) -> None:
    options: dict[str, Any] = {"mode": mode, "block_length": 4, "max_new_tokens": 30}
    prompt = chat_ids(engine.text, [QUESTION]) + engine.text.encode_plain(BEGUN)
    meant = nemodiff.generate(engine, prompt, **options)
    got = nemodiff.generate(engine, asked(BEGUN), continue_final_message=True, **options)
    assert got.token_ids == meant.token_ids
    assert got.text.startswith(" 6, 7, 8, 9")
    assert nemodiff.generate(engine, asked(BEGUN), **options).token_ids != meant.token_ids


def test_parts_of_text_are_one_beginning(engine: nemodiff.LoadedEngine) -> None:
    parts = [{"type": "text", "text": "3, 4,"}, {"type": "text", "text": " 5,"}]
    talks = [asked(BEGUN), [QUESTION, {"role": "assistant", "content": parts}]]
    whole, joined = (nemodiff.generate(engine, t, continue_final_message=True, max_new_tokens=5) for t in talks)
    assert joined.token_ids == whole.token_ids


def test_the_beginning_stands_as_it_is() -> None:
    codec = TextCodec(TINY_CHAT)
    before = codec.render_chat([QUESTION])
    for text in ("", " ", "3, ", "3,\n\n", "é漢"):
        assert codec.render_chat(asked(text), continued=True) == before + text
    ids = chat_ids(codec, asked("3<|im_end|>"), continued=True)
    assert ids == chat_ids(codec, [QUESTION]) + codec.encode_plain("3<|im_end|>")


def test_a_template_decides_what_stands_before_the_beginning(tmp_path: Path) -> None:
    source = (
        "{% for m in messages %}{{ m.role }}:{{ ' ' + (m.content | trim) }}{{ '!' if not loop.last }}</s>{% endfor %}"
    )
    codec = templated(tmp_path / "turns", source + "{% if add_generation_prompt %}assistant:{% endif %}")
    assert codec.render_chat(asked(" 3, "), continued=True) == "user: Count from 3 to 9.!</s>assistant: 3, "
    silent = templated(tmp_path / "silent", "{{ messages[0].content }}")
    with pytest.raises(nemodiff.NemodiffError, match="does not show the last message"):
        chat_ids(silent, asked("3"), continued=True)


@pytest.mark.parametrize(
    ("prompt", "options", "fragment"),
    [
        ("Hi", {}, "goes with messages"),
        ("Hi", {"chat": False}, "goes with messages"),
        ([5, 6], {}, "goes with messages"),
        ([QUESTION], {}, "the last message is the user's"),
        (asked("", tool_calls=[{"function": {"name": "f", "arguments": "{}"}}]), {}, "calls tools"),
    ],
)
def test_what_cannot_be_continued_is_refused(
    engine: nemodiff.LoadedEngine, prompt: Any, options: dict[str, Any], fragment: str
) -> None:
    with pytest.raises(nemodiff.NemodiffError, match=fragment) as refusal:
        nemodiff.generate(engine, prompt, continue_final_message=True, **options)
    assert "continue_final_message" in str(refusal.value)
    assert "; " in str(refusal.value)


def test_an_answer_that_has_begun_has_no_thoughts_before_it(engine: nemodiff.LoadedEngine) -> None:
    answer = nemodiff.generate(engine, asked(BEGUN), continue_final_message=True, thinking=True, thinking_budget=3)
    assert answer.content == nemodiff.generate(engine, asked(BEGUN), continue_final_message=True).text
    assert answer.warnings == ["thinking is ignored, since the answer has begun"]


def test_thoughts_go_on_too(tmp_path: Path) -> None:
    engine = nemodiff.load(tool_engine(tmp_path / "engine", "xml"))
    options: dict[str, Any] = {"continue_final_message": True, "max_new_tokens": 8}
    for text, inside in (("<think>\nI count", True), ("<think>\nI count</think>3,", False)):
        answer = nemodiff.generate(engine, asked(text), **options)
        assert (answer.reasoning if inside else answer.content) == answer.text != ""

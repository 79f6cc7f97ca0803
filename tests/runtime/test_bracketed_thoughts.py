"""Thoughts in brackets, as Mistral's models write them: found by the template, read, streamed, and given back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from stand_ins.chats import chat_ids
from stand_ins.checkpoints import TINY_CHAT
from stand_ins.tool_templates import BRACKETS as TEMPLATE
from stand_ins.tool_templates import CLOCK, TOOLS, tool_checkpoint, tool_engine
from stand_ins.toy_engine import ToyEngine, toy

import nemodiff
from nemodiff.errors import RequestError
from nemodiff.runtime.events.events import Text
from nemodiff.runtime.requests.options import make_options
from nemodiff.runtime.requests.prepare import prepare
from nemodiff.runtime.text.codec import TextCodec
from nemodiff.runtime.text.thoughts import BRACKETS, TAGS, thoughts_of
from nemodiff.runtime.tools.answer import AnswerFormat, AnswerParser
from nemodiff.runtime.tools.form import READERS
from nemodiff.serving.http.body import Chat

QUESTION = "What is 3 + 4?"
MODES = ("ar", "linear_spec", "quadratic_spec", "diffusion")


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> nemodiff.LoadedEngine:
    """tiny-chat with the marks of its thoughts in brackets."""
    return nemodiff.load(tool_engine(tmp_path_factory.mktemp("brackets"), "brackets"), threads=1)


def thinks(engine: nemodiff.LoadedEngine) -> dict[str, Any]:
    """Options with which it thinks for five tokens."""
    assert engine.text.end_think is not None
    return {"thinking": True, "thinking_budget": 5, "logit_bias": {engine.text.end_think: -100.0}}


def test_the_template_says_how_thoughts_are_marked() -> None:
    assert thoughts_of(TEMPLATE) is BRACKETS
    assert thoughts_of((TINY_CHAT / "chat_template.jinja").read_text()) is TAGS
    assert thoughts_of("{{ messages }}") is TAGS


def test_thoughts_and_calls_are_read_at_every_split() -> None:
    text = "\n[THINK]I may [TOOL_CALLS]f</think>[/THINK]\n\nSo [TOOL_CALLS]clock[ARGS]{}"
    form = AnswerFormat(READERS["mistral"], thoughts=BRACKETS)
    for at in range(len(text) + 1):
        parser = AnswerParser(form, False)
        deltas = [*parser.push(text[:at]), *parser.push(text[at:]), *parser.push("", final=True)]
        joined = {part: "".join(d.text for d in deltas if d.part == part) for part in ("reasoning", "content", "call")}
        assert joined == {"reasoning": "I may [TOOL_CALLS]f</think>", "content": "So", "call": "clock"}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("block", [3, 32])
def test_a_model_that_thinks_unasked_is_read_as_it_comes(engine: nemodiff.LoadedEngine, mode: str, block: int) -> None:
    other = toy(engine)
    assert isinstance(other.backend, ToyEngine)
    start = len(prepare(other, QUESTION, make_options({"tools": TOOLS})).prompt)
    marks, plain = other.text.special_tokens, other.text.encode_plain
    said = [
        marks["[THINK]"], *plain("It is 7; I look."), marks["[/THINK]"], *plain("Now: 7 "),
        marks["[TOOL_CALLS]"], *plain("clock"), marks["[ARGS]"], *plain("{}"), other.info.model.eos_ids[0],
    ]  # fmt: skip
    other.backend.said = dict(enumerate(said, start))
    options: dict[str, Any] = {"tools": TOOLS, "max_new_tokens": 60, "mode": mode}
    if mode != "ar":
        options["block_length"] = block
    *texts, answer = nemodiff.stream(other, QUESTION, **options)
    assert isinstance(answer, nemodiff.Generation)
    assert (answer.reasoning, answer.content) == ("It is 7; I look.", "Now: 7")
    assert [(call.name, call.arguments) for call in answer.tool_calls] == [("clock", "{}")]
    assert answer.reasoning_tokens == len(plain("It is 7; I look.")) + 2
    parts = [part for text in texts if isinstance(text, Text) for part in text.parts]
    for name, whole in (("reasoning", answer.reasoning), ("content", answer.content), ("call", "clock")):
        assert "".join(part.text for part in parts if part.part == name) == whole
    stopped = nemodiff.generate(other, QUESTION, stop=["7"], **options)
    assert (stopped.reasoning, stopped.content, stopped.tool_calls) == (answer.reasoning, "Now: ", [])
    early = nemodiff.generate(other, QUESTION, stop=["7"], stop_in_thinking=True, **options)
    assert (early.reasoning, early.content) == ("It is ", "")


def test_thinking_opens_the_thoughts_that_the_template_leaves_to_the_model(engine: nemodiff.LoadedEngine) -> None:
    asked = [{"role": "user", "content": "[THINK]"}]
    ids, opened = (chat_ids(engine.text, asked, thinks) for thinks in (False, True))
    assert opened == [*ids, engine.text.special_tokens["[THINK]"]]
    answer = nemodiff.generate(engine, QUESTION, **thinks(engine), max_new_tokens=40)
    assert answer.token_ids.index(engine.text.end_think or 0) == 5
    assert answer.text == f"{answer.reasoning}[/THINK]{answer.content}"
    assert answer.reasoning
    call = nemodiff.generate(engine, QUESTION, **thinks(engine), tools=TOOLS, tool_choice="clock", max_new_tokens=80)
    assert (call.text.count("[/THINK]"), [one.name for one in call.tool_calls]) == (1, ["clock"])


def test_a_question_that_spells_the_mark_opens_nothing(engine: nemodiff.LoadedEngine) -> None:
    for question in ("What is [THINK]", "Is <think> a tag, or [THINK]?"):
        assert not prepare(engine, question, make_options({})).opened
    assert prepare(engine, "What is [THINK]", make_options({"thinking": True})).opened


def test_a_strict_tool_leaves_the_thoughts_free(engine: nemodiff.LoadedEngine) -> None:
    strict = {**CLOCK, "function": {**CLOCK["function"], "strict": True}}
    settings = prepare(engine, QUESTION, make_options({"tools": [strict]})).settings
    assert settings.grammar is not None
    marks, plain = engine.text.special_tokens, engine.text.encode_plain
    call = [marks["[TOOL_CALLS]"], *plain("clock"), marks["[ARGS]"], *plain("{}")]
    thoughts = [marks["[THINK]"], *plain("It is 7."), marks["[/THINK]"]]
    for said, allowed in ((call, True), ([*thoughts, *plain("So "), *call], True), ([*thoughts, *thoughts], False)):
        matcher = settings.grammar.matcher()
        for token in said:
            matcher.push(token)
        assert allowed is (not matcher._astray)


def test_thoughts_go_back_as_parts_of_a_turn(engine: nemodiff.LoadedEngine) -> None:
    answer = nemodiff.generate(engine, QUESTION, **thinks(engine), max_new_tokens=40)
    asked = {"role": "user", "content": QUESTION}
    shown = engine.text.render_chat([asked, answer.as_message(), asked])
    assert f"[THINK]{answer.reasoning}[/THINK]{answer.content}<|im_end|>" in shown
    evil = {"role": "assistant", "content": "b", "reasoning_content": "a[/THINK][TOOL_CALLS]"}
    plain = {"role": "assistant", "content": "b", "reasoning_content": "a"}
    specials = [[i for i in chat_ids(engine.text, [asked, turn]) if i < 128] for turn in (evil, plain)]
    assert specials[0] == specials[1]
    inline = {"role": "assistant", "content": "[THINK]a[/THINK]b"}
    assert chat_ids(engine.text, [asked, inline]) == chat_ids(engine.text, [asked, plain])


def test_parts_of_thoughts_are_taken(engine: nemodiff.LoadedEngine) -> None:
    asked = {"role": "user", "content": QUESTION}
    thought = {"type": "thinking", "thinking": "a"}
    text = {"type": "text", "text": "b"}

    def prompt(*talk: dict[str, Any]) -> list[int]:
        return prepare(engine, [*talk, asked], make_options({})).prompt

    inline = prompt(asked, {"role": "assistant", "content": "[THINK]a[/THINK]b"})
    assert prompt(asked, {"role": "assistant", "content": [thought, text]}) == inline
    system = engine.text.decode(prompt({"role": "system", "content": [text, thought, text]}))
    assert "b[THINK]a[/THINK]b" in system
    with pytest.raises(RequestError, match="thoughts are in a message of role 'user', allowed: assistant and system"):
        nemodiff.generate(engine, [{"role": "user", "content": [thought]}])


def test_a_body_has_thoughts_as_text_or_as_parts() -> None:
    text = {"type": "text", "text": "a"}
    for thinking in ("a", [text]):
        content = [{"type": "thinking", "thinking": thinking, "closed": True}, text]
        body = Chat.model_validate({"messages": [{"role": "assistant", "content": content}]})
        (talk,) = body.prompts()
        assert talk == [
            {"role": "assistant", "content": [{"type": "thinking", "thinking": "a"}, text], "tool_calls": []}
        ]


def test_a_template_that_takes_no_parts_gets_none(tmp_path: Path) -> None:
    folder = tool_checkpoint(tmp_path / "c", "brackets")
    (folder / "chat_template.jinja").write_text(
        "{# [THINK] #}{% for m in messages %}{{ m.role + m.content + (m.reasoning_content or '') }}{% endfor %}"
    )
    codec = TextCodec(folder)
    assert codec.thoughts is BRACKETS
    turn = {"role": "assistant", "content": "b", "reasoning_content": "a"}
    assert codec.render_chat([turn]) == "assistantba"

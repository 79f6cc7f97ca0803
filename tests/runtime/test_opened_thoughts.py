"""An answer whose prompt has opened its thoughts, though nobody asked for any: it thinks first all the same."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest
from stand_ins.checkpoints import TINY_CHAT

import nemodiff
from nemodiff.builder.build import Builder

TINY_CHAT_2 = TINY_CHAT.with_name("tiny-chat-2")
TOOLS = json.loads((TINY_CHAT_2 / "tools.json").read_text())
QUESTION = "Count from 3 to 9."
MODES = ("ar", "linear_spec", "quadratic_spec")


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> nemodiff.LoadedEngine:
    """tiny-chat-2 with a template that always opens thoughts, as that of models which only reason."""
    folder = tmp_path_factory.mktemp("opened")
    checkpoint = shutil.copytree(TINY_CHAT_2, folder / "checkpoint")
    template = checkpoint / "chat_template.jinja"
    template.write_text("{%- set enable_thinking = true -%}" + template.read_text())
    return nemodiff.load(Builder(checkpoint, folder / "engine").run(), threads=1)


@pytest.mark.parametrize("mode", MODES)
def test_a_stop_string_ends_the_answer_and_not_the_thoughts(engine: nemodiff.LoadedEngine, mode: str) -> None:
    whole = nemodiff.generate(engine, QUESTION, mode=mode)
    assert "9" in whole.reasoning
    stopped = nemodiff.generate(engine, QUESTION, mode=mode, stop=["9"])
    assert stopped.reasoning == whole.reasoning
    assert stopped.content == whole.content.partition("9")[0] != ""


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("asked", [{}, {"thinking": True}])
def test_a_grammar_begins_after_the_thoughts(engine: nemodiff.LoadedEngine, mode: str, asked: dict[str, Any]) -> None:
    answer = nemodiff.generate(engine, QUESTION, mode=mode, regex="[0-9]{2}", **asked)
    assert answer.reasoning
    assert answer.content.isdigit()
    called = nemodiff.generate(engine, QUESTION, mode=mode, tools=TOOLS, tool_choice="required", **asked)
    assert called.reasoning
    assert called.tool_calls
    assert called.content == ""


def test_a_budget_ends_them(engine: nemodiff.LoadedEngine) -> None:
    assert nemodiff.generate(engine, QUESTION, thinking_budget=3).reasoning_tokens == 4


def test_a_beginning_may_have_opened_them(engine: nemodiff.LoadedEngine) -> None:
    begun = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": "<think>\nFrom 3"}]
    answer = nemodiff.generate(engine, begun, continue_final_message=True, stop=["9"])
    assert "9" in answer.reasoning
    assert answer.content == "3, 4, 5, 6, 7, 8, "


def test_a_grammar_needs_to_know_where_they_end(engine: nemodiff.LoadedEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.text, "end_think", None)
    with pytest.raises(nemodiff.RequestError, match="</think>, is no token of this tokenizer; leave thinking out"):
        nemodiff.generate(engine, QUESTION, regex="[0-9]{2}")

"""A stop string ends the answer, and the thoughts before it only if that is requested."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from stand_ins.transcripts import streamed

import nemodiff
from nemodiff.runtime.text.codec import TextCodec
from nemodiff.runtime.text.thoughts import TAGS
from nemodiff.runtime.text.transcript import Transcript

QUESTION = "Write JSON for Emil, age 31, from Oslo, who owns a yak."


@pytest.mark.parametrize("mode", nemodiff.MODES)
def test_a_stop_string_in_the_thoughts_does_not_end_the_answer(engine: nemodiff.LoadedEngine, mode: str) -> None:
    options = {"mode": mode, "thinking": True, "thinking_budget": 12, "max_new_tokens": 60}
    whole = nemodiff.generate(engine, QUESTION, **options)
    thoughts, marker, answer = whole.text.partition("</think>")
    assert marker
    assert answer.strip("\n")
    stop = next(c for c in thoughts if c in answer.strip("\n"))
    stopped = nemodiff.generate(engine, QUESTION, stop=[stop], **options)
    begin = len(thoughts + marker) + len(answer) - len(answer.lstrip("\n"))
    assert stopped.text == whole.text[: whole.text.index(stop, begin)]
    assert stopped.finish_reason == "stop"
    events = nemodiff.stream(engine, QUESTION, stop=[stop], **options)
    assert "".join(e.text for e in events if isinstance(e, nemodiff.Text)) == stopped.text
    early = nemodiff.generate(engine, QUESTION, stop=[stop], stop_in_thinking=True, **options)
    assert early.text == thoughts[: thoughts.index(stop)]
    assert early.finish_reason == "stop"


@given(st.data())
def test_streamed_thoughts_and_answer_are_never_taken_back(codec: TextCodec, data: st.DataObject) -> None:
    opened = data.draw(st.booleans())
    words = st.sampled_from(["a", "b", "7", "\n", "é", "😀", "<", "<th", "</th", "ink>"])
    thoughts = "".join(data.draw(st.lists(words, max_size=6)))
    answer = "".join(data.draw(st.lists(words, min_size=1, max_size=8)))
    stop = data.draw(st.lists(st.sampled_from(["a", "ab", "7b", "\n", "\n\n", "<", "</", "é7"]), min_size=1))
    begins = ("" if opened else "<think>") + thoughts + "</think>"
    text = begins + answer
    start = text.index("</think>") + len("</think>")
    start += len(text[start:]) - len(text[start:].lstrip("\n"))
    found = [at for s in stop if (at := text.find(s, start)) >= 0]
    ids = codec.encode(text)
    transcript = Transcript(codec, stop, thoughts=TAGS, opened=opened)
    shown, used = streamed(transcript, ids)
    assert text.startswith(shown)
    assert len(shown) <= min(found, default=len(text))
    shown += transcript.push(used, final=True)
    assert shown == transcript.text(used) == text[: min(found, default=len(text))]


def test_thoughts_are_shown_as_they_come(codec: TextCodec) -> None:
    transcript = Transcript(codec, ["7"], thoughts=TAGS, opened=True)
    ids = codec.encode("7 + 7")
    assert not transcript.reaches_stop(ids)
    assert transcript.push(ids, final=False) == "7 + 7"


@pytest.mark.parametrize("text", ["so 7", "\nso 7", "<th 7", "<think 7"])
def test_an_answer_without_thoughts_ends_at_the_stop_string(codec: TextCodec, text: str) -> None:
    """The template may open no think block, and the model may leave it out."""
    ids = codec.encode(text)
    transcript = Transcript(codec, ["7"], thoughts=TAGS)
    assert transcript.reaches_stop(ids)
    assert transcript.push(ids, final=True) == text[:-1]


def test_a_text_that_ends_where_thoughts_might_begin_is_an_answer(codec: TextCodec) -> None:
    ids = codec.encode("<th")
    transcript = Transcript(codec, ["h"], thoughts=TAGS)
    assert transcript.push(ids, final=False) + transcript.push(ids, final=True) == "<t"


def test_a_prompt_opens_thoughts_at_its_end_alone() -> None:
    assert TAGS.opened_by("<think>hm</think>so<think>\n")
    assert not TAGS.opened_by("<think>hm</think>so")
    assert not TAGS.opened_by("so")

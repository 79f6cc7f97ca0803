"""JSON is refused by its number of lists, objects and names before it is read, and by nothing else that it holds."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import nemodiff
from nemodiff.runtime.text import checks

JSON = st.recursive(
    st.none() | st.integers() | st.text('[{"\\}],: \u5b22\u227b\n'),
    lambda inner: st.lists(inner) | st.dictionaries(st.text('[{"\\x'), inner),
)


def parts(value: Any) -> int:
    """How many lists and objects a value has, itself among them."""
    if not isinstance(value, list | dict):
        return 0
    return 1 + sum(map(parts, value.values() if isinstance(value, dict) else value))


def names(value: Any) -> int:
    """How many names the objects of a value have."""
    if isinstance(value, dict):
        return len(value) + sum(map(names, value.values()))
    return sum(map(names, value)) if isinstance(value, list) else 0


@given(value=JSON, ascii=st.booleans(), encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32-le"]))
def test_parts_are_counted_as_they_are_read(value: Any, ascii: bool, encoding: str) -> None:
    text = json.dumps(value, ensure_ascii=ascii)
    most = max(parts(value), names(value))
    what = "lists and objects" if parts(value) == most else "names in objects"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checks, "MOST_PARTS", most)
        for given_text in (text, text.encode(encoding)):
            checks.check_parts(given_text, "the body")
        patch.setattr(checks, "MOST_PARTS", most - 1)
        for given_text in (text, text.encode(encoding)):
            with pytest.raises(nemodiff.RequestError, match=f"^the body holds {most} {what}, allowed: at most"):
                checks.check_parts(given_text, "the body")


@pytest.mark.parametrize(
    "text",
    [
        *("[" * 1_000_000, "[],[" * 300_000, '{"a":{},' * 200_000 + "\\", '"[[[[', '"\\', ""),
        *("[\0" + "[" * 300_001, "\0[" + "[" * 300_001),  # which begin as UTF-16 does
    ],
)
def test_what_is_no_json_is_counted_too(text: str) -> None:
    if text.count("[") + text.count("{") > checks.MOST_PARTS:
        with pytest.raises(nemodiff.RequestError, match=r"lists and objects, allowed: at most 262144; send fewer$"):
            checks.check_parts(text, "the body")
    else:
        checks.check_parts(text, "the body")


@pytest.mark.parametrize(
    "options",
    [
        {"tools": "[" * 300_000},
        {"chat_template_kwargs": '{"a": [' + "[]," * 300_000},
    ],
)
def test_options_that_are_json_are_counted_before_they_are_read(
    engine: nemodiff.LoadedEngine, options: dict[str, Any]
) -> None:
    (name,) = options
    with pytest.raises(nemodiff.RequestError, match=rf"^{name} holds 30000\d lists and objects, allowed: at most"):
        nemodiff.generate(engine, "x", **options)


def test_a_call_s_arguments_are_counted_before_they_are_read(engine: nemodiff.LoadedEngine) -> None:
    call = {"function": {"name": "a", "arguments": '{"a": [' + "[]," * 300_000}}
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    with pytest.raises(nemodiff.RequestError, match=r"^tool_calls holds 300002 lists and objects"):
        nemodiff.generate(engine, messages)

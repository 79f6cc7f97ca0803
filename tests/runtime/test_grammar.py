"""Schemas and patterns: what is refused, what fails on the way, and what is kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nemodiff
from nemodiff.runtime.sampling.endless_schema import is_endless
from nemodiff.runtime.sampling.grammar import MAX_SOURCE, Grammar, Matcher
from nemodiff.runtime.sampling.grammar_cache import GrammarCache

QUESTION = "Count from 3 to 9."
ENDLESS: dict[str, Any] = {
    "$defs": {
        "N": {
            "type": "object",
            "properties": {"next": {"$ref": "#/$defs/N"}, "value": {"type": "integer"}},
            "required": ["next", "value"],
        }
    },
    "$ref": "#/$defs/N",
}
LONG: dict[str, Any] = {"type": "array", "items": {"const": 0}, "minItems": 10716}
# The library gives up here once the answer has its second property.
LATER: dict[str, Any] = {
    "type": "object",
    "properties": {"first": {"enum": [7, 8]}, "second": LONG},
    "required": ["first", "second"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def engine(tiny_engine: Path) -> nemodiff.LoadedEngine:
    return nemodiff.load(tiny_engine, threads=1)


def compiled(engine: nemodiff.LoadedEngine, source: Any, kind: str = "json_schema") -> Grammar:
    text = source if isinstance(source, str) else json.dumps(source)
    model = engine.info.model
    return Grammar(engine.text.source, model.vocab_size, model.eos_ids, kind, text)


def allowed(matcher: Matcher, vocab: int) -> set[int]:
    """The ids that may come next."""
    scores = np.zeros(vocab)
    matcher.restrict(scores)
    return set(np.flatnonzero(scores == 0).tolist())


# --- errors of the library ---


@pytest.mark.parametrize("mode", nemodiff.MODES)
@pytest.mark.parametrize("schema", [LONG, LATER], ids=["at once", "later"])
def test_a_grammar_that_the_library_gives_up_on_ends_the_request(
    engine: nemodiff.LoadedEngine, mode: str, schema: dict[str, Any]
) -> None:
    options = {"policy": "left_to_right"} if mode == "diffusion" else {}
    with pytest.raises(nemodiff.RequestError, match=r"^json_schema is too complex \(.*Too many items.*\); change it$"):
        nemodiff.generate(engine, QUESTION, json_schema=schema, mode=mode, max_new_tokens=100, **options)


def test_only_the_request_with_such_a_grammar_fails(engine: nemodiff.LoadedEngine) -> None:
    alone = nemodiff.generate(engine, QUESTION, max_new_tokens=60, mode="ar").token_ids
    with nemodiff.Scheduler(engine, rows=3) as scheduler:
        before = scheduler.submit(QUESTION, max_new_tokens=60, mode="ar")
        failing = scheduler.submit(QUESTION, json_schema=LATER)
        after = scheduler.submit(QUESTION, max_new_tokens=60, mode="ar")
        with pytest.raises(nemodiff.RequestError, match="too complex"):
            failing.result(60)
        assert before.result(60).token_ids == alone
        assert after.result(60).token_ids == alone
        assert scheduler.statistics.failed == 1


def test_a_refused_token_of_a_draft_is_no_error(engine: nemodiff.LoadedEngine) -> None:
    grammar = compiled(engine, "ab|ac", "regex")
    a, b, z = (engine.text.encode_plain(letter)[0] for letter in "abz")
    matcher, vocab = grammar.matcher(), engine.info.model.vocab_size
    begin = allowed(matcher, vocab)
    matcher.push(z)
    matcher.push(a)
    assert len(allowed(matcher, vocab)) == vocab  # a draft that has left its grammar
    matcher.pop()
    matcher.pop()
    assert allowed(matcher, vocab) == begin
    matcher.push(a)
    matcher.push(b)
    assert allowed(matcher, vocab) == set(engine.info.model.eos_ids)


# --- what is refused before a request begins ---


@pytest.mark.parametrize(
    ("kind", "source", "message"),
    [
        ("json_schema", ENDLESS, "json_schema allows no answer (every value would hold another, without end); change"),
        ("json_schema", {"$ref": "#"}, "json_schema allows no answer (every value would hold"),
        ("json_schema", {"type": "string", "pattern": r"[^\s\S]"}, "json_schema allows no answer (Regex is empty);"),
        ("json_schema", {"type": "integer", "minimum": 5, "maximum": 3}, "no answer (minimum (5) is greater than"),
        ("json_schema", {"enum": []}, "json_schema allows no answer ("),
        ("json_schema", {"not": {}}, 'json_schema is not understood (Unimplemented keys: ["not"])'),
        ("json_schema", {"type": "string", "pattern": "(?=a)b"}, "is not understood (look-around, including"),
        ("json_schema", {"type": "object", "properties": {f"p{i}": {} for i in range(2000)}}, "is too complex (Parser"),
        ("json_schema", "[" * 100_000, "json_schema is nested too deeply;"),
        ("json_schema", '{"items":' * 200 + "{}" + "}" * 200, "is not understood (recursion limit"),
        ("json_schema", {"x-guidance": {"a": 1}}, "is not understood (unknown field `a`"),
        ("json_schema", {"enum": ["x" * MAX_SOURCE]}, f"bytes, allowed: at most {MAX_SOURCE}; use a shorter"),
        ("regex", r"[^\s\S]", "regex allows no answer; change it"),
        ("regex", r"a[^\s\S]", "regex allows no answer; change it"),
        ("regex", "x" * 3000 + "(", "regex is not understood (unclosed group); change it"),
        ("regex", "x" * (MAX_SOURCE + 1), f"regex has {MAX_SOURCE + 1} bytes, allowed: at most {MAX_SOURCE}; use"),
    ],
)
def test_a_refusal_is_one_short_line_without_a_dump(
    engine: nemodiff.LoadedEngine, kind: str, source: Any, message: str
) -> None:
    with pytest.raises(nemodiff.RequestError) as refusal:
        compiled(engine, source, kind)
    line = str(refusal.value)
    assert message in line
    assert len(line) < 250
    assert line.isprintable()
    assert "<" not in line


@pytest.mark.parametrize(
    ("schema", "endless"),
    [
        (ENDLESS, True),
        ({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}, True),
        ({"type": "object", "properties": {"v": {}, "n": {"$ref": "#"}}, "required": ["v", "n"]}, True),
        ({"type": "object", "properties": {"v": {}, "n": {"$ref": "#"}}, "required": ["v"]}, False),
        ({"type": ["object", "null"], "properties": {"n": {"$ref": "#"}}, "required": ["n"]}, False),
        ({"type": "array", "items": {"$ref": "#"}, "minItems": 1}, True),
        ({"type": "array", "items": {"$ref": "#"}}, False),
        ({"type": "array", "prefixItems": [{}, {"$ref": "#"}], "minItems": 2}, True),
        ({"type": "array", "prefixItems": [{}, {"$ref": "#"}], "minItems": 1}, False),
        ({"anyOf": [{"$ref": "#"}, {"type": "null"}]}, False),
        ({"anyOf": [{"$ref": "#"}, {"$ref": "#/anyOf/0"}]}, True),
        ({"allOf": [{"type": "object"}, {"$ref": "#"}]}, True),
        ({"properties": {"a/b": {"$ref": "#/properties/a~1b"}}, "required": ["a/b"], "type": "object"}, True),
        ({"$defs": {"a": {"const": {"$ref": "#"}}}, "$ref": "#/$defs/a"}, False),
        ({"type": "object", "properties": {"a": {"$ref": "other.json"}}, "required": ["a", 5]}, False),
    ],
)
def test_a_schema_that_only_an_endless_value_follows_is_found(schema: dict[str, Any], endless: bool) -> None:
    assert is_endless(schema) is endless


def test_a_long_chain_of_references_is_not_endless() -> None:
    chain: dict[str, Any] = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(3000)}
    assert not is_endless({"$defs": chain | {"d3000": {}}, "$ref": "#/$defs/d0"})


# --- the cache ---


def test_compiled_grammars_are_kept_up_to_a_number_of_bytes(engine: nemodiff.LoadedEngine) -> None:
    model = engine.info.model
    cache = GrammarCache(8 << 20)

    def get(source: str) -> Grammar:
        return cache.get(engine.text.source, model.vocab_size, model.eos_ids, "regex", source)

    small = get("[ab]")
    for number in range(5):
        get("|".join(f"{number}x{i}" for i in range(1000)))
        assert get("[ab]") is small  # used last, so it stays
        assert cache.memory <= 8 << 20
    first = get("|".join(f"0x{i}" for i in range(1000)))
    assert get("|".join(f"0x{i}" for i in range(1000))) is first
    huge = get("x" * 100_000)  # more than fits is made all the same
    assert get("x" * 100_000) is not huge
    assert cache.memory <= 8 << 20

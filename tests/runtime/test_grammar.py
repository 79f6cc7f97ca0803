"""Schemas and patterns: what is refused, what fails on the way, what real models' schemas allow, and what is kept."""

from __future__ import annotations

import datetime
import decimal
import enum
import json
import pathlib
import re
import uuid
from typing import Any

import numpy as np
import pydantic
import pytest

import nemodiff
from nemodiff.runtime.sampling import grammar_trial
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


def compiled(engine: nemodiff.LoadedEngine, source: Any, kind: str = "json_schema", **options: Any) -> Grammar:
    text = source if isinstance(source, str) else json.dumps(source)
    model = engine.info.model
    return Grammar(engine.text.source, model.vocab_size, model.eos_ids, kind, text, **options)


def allowed(matcher: Matcher, vocab: int) -> set[int]:
    """The ids that may come next."""
    scores = np.zeros(vocab)
    matcher.restrict(scores)
    return set(np.flatnonzero(scores == 0).tolist())


def follows(engine: nemodiff.LoadedEngine, grammar: Grammar, text: str) -> bool:
    """Whether a text is a whole answer."""
    matcher, model = grammar.matcher(), engine.info.model
    for token in engine.text.encode_plain(text):
        if token not in allowed(matcher, model.vocab_size):
            return False
        matcher.push(token)
    return model.eos_ids[0] in allowed(matcher, model.vocab_size)


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
        ("json_schema", {"type": "array", "uniqueItems": True, "contains": {}}, '["contains", "uniqueItems"]'),
        ("json_schema", {"format": "x", "type": "string", "not": {}}, '(Unimplemented keys: ["not"])'),
        ("json_schema", {"type": "string", "format": "x", "pattern": "("}, "is not understood (unclosed group)"),
        ("json_schema", {"type": "string", "pattern": "(?=a)b"}, "is not understood (look-around, including"),
        (
            "json_schema",
            {"type": "string", "pattern": "a\\"},
            "is not understood (the last backslash of 'a\\\\' has nothing",
        ),
        ("json_schema", {"items": [{"patternProperties": {"b\\": {}}}]}, "(the last backslash of 'b\\\\' has nothing"),
        ("json_schema", {"type": "object", "properties": {f"p{i}": {} for i in range(2000)}}, "is too complex (Parser"),
        ("json_schema", "[" * 100_000, "json_schema is nested too deeply;"),
        ("json_schema", '{"items":' * 200 + "{}" + "}" * 200, "is not understood (recursion limit"),
        ("json_schema", {"x-guidance": {"a": 1}}, "is not understood (unknown field `a`"),
        ("json_schema", {"enum": ["x" * MAX_SOURCE]}, f"bytes, allowed: at most {MAX_SOURCE}; use a shorter"),
        ("regex", r"[^\s\S]", "regex allows no answer; change it"),
        ("regex", r"a[^\s\S]", "regex allows no answer; change it"),
        ("regex", "x" * 3000 + "(", "regex is not understood (unclosed group); change it"),
        ("regex", "a\\", "regex is not understood (its last backslash has nothing after it); change it"),
        ("regex", "\\\\\\", "regex is not understood (its last backslash has nothing after it); change it"),
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


def test_a_pattern_may_end_with_the_backslash_that_it_is_to_match(engine: nemodiff.LoadedEngine) -> None:
    assert nemodiff.generate(engine, "Hello", regex=r"a\\").text == "a\\"
    schema = {"type": "string", "pattern": r"^a\\$"}
    assert nemodiff.generate(engine, "Hello", json_schema=json.dumps(schema)).text == r'"a\\"'
    value = {"const": {"pattern": "a\\"}}  # no schema, but what the answer is
    assert json.loads(nemodiff.generate(engine, "Hello", json_schema=json.dumps(value)).text) == value["const"]


@pytest.mark.parametrize("wrapped", [False, True], ids=["schema", "tool"])
@pytest.mark.parametrize(
    "schema",
    [
        {"type": "integer", "multipleOf": 99999999},
        {"type": "string", "allOf": [{"pattern": f"(a|b)*a(a|b){{{10 + i}}}"} for i in range(20)]},
    ],
    ids=["remainders", "patterns"],
)
def test_what_would_compile_for_hours_is_refused(
    engine: nemodiff.LoadedEngine, schema: dict[str, Any], wrapped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar_trial, "SECONDS", 1)
    source = f"%llguidance {{}}\nstart: <[3]> %json {json.dumps(schema)}\n" if wrapped else schema
    with pytest.raises(nemodiff.RequestError, match=r"is too complex \(compiling it takes over"):
        compiled(engine, source, "tools" if wrapped else "json_schema")


@pytest.mark.parametrize(
    ("schema", "value", "wrong"),
    [
        ({"type": "integer", "multipleOf": 97}, 194, 195),
        ({"type": "number", "multipleOf": 0.01}, 1.25, 1.255),
        ({"type": "string", "pattern": "^[a-c]{2}$"}, "ab", "ad"),
    ],
)
def test_what_compiles_in_time_is_followed(
    engine: nemodiff.LoadedEngine, schema: dict[str, Any], value: Any, wrong: Any
) -> None:
    grammar = compiled(engine, schema)
    assert follows(engine, grammar, json.dumps(value))
    assert not follows(engine, grammar, json.dumps(wrong))


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


# --- schemas of real models ---


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Inner(pydantic.BaseModel):
    password: pydantic.SecretStr
    tags: frozenset[str]


class Node(pydantic.BaseModel):
    value: int
    next: Node | None = None


CASES: list[tuple[Any, Any, Any, list[str]]] = [
    (pydantic.SecretStr, "a b", 5, ["format 'password' is unknown"]),
    (bytes, "abc", 5, ["format 'binary' is unknown"]),
    (pathlib.Path, "/a/b", 5, ["format 'path' is unknown"]),
    (set[int], [1, 2], ["a"], ["uniqueItems is ignored"]),
    (Inner, {"password": "x", "tags": ["a", "b"]}, {"password": "x"}, ["'password' is", "uniqueItems"]),
    (uuid.UUID, "12345678-1234-5678-1234-567812345678", "1234", []),
    (datetime.datetime, "2026-01-31T12:00:00Z", "today", []),
    (int | None, None, "a", []),
    (Colour, "blue", "green", []),
    (Node, {"value": 1, "next": {"value": 2, "next": None}}, {"value": 1, "next": {}}, []),
    (list[Node], [{"value": 1}], [{}], []),
    (dict[str, tuple[int, bool]], {"a": [1, True]}, {"a": [1, 2]}, []),
    (decimal.Decimal, 1.5, True, []),
]


@pytest.mark.parametrize(("type_", "value", "wrong", "warnings"), CASES, ids=lambda case: getattr(case, "__name__", ""))
def test_schemas_of_pydantic_models_are_followed(
    engine: nemodiff.LoadedEngine, type_: Any, value: Any, wrong: Any, warnings: list[str]
) -> None:
    model = pydantic.create_model("Model", field=(type_, ...))
    schema = model.model_json_schema()
    grammar = compiled(engine, schema)
    assert len(grammar.warnings) == len(warnings)
    for warning, part in zip(sorted(grammar.warnings), sorted(warnings), strict=True):
        assert part in warning
    model.model_validate_json(json.dumps({"field": value}))
    assert follows(engine, grammar, json.dumps({"field": value}))
    assert not follows(engine, grammar, json.dumps({"field": wrong}))
    if warnings:
        with pytest.raises(nemodiff.RequestError, match="json_schema is not understood"):
            compiled(engine, schema, strict=True)
    else:
        assert not compiled(engine, schema, strict=True).warnings


def test_names_that_look_like_ignored_keywords_stay(engine: nemodiff.LoadedEngine) -> None:
    properties = {"format": {"type": "string", "format": "odd"}, "uniqueItems": {"enum": [{"uniqueItems": True}]}}
    schema = {"type": "object", "properties": properties, "required": ["format", "uniqueItems"]}
    grammar = compiled(engine, schema)
    assert follows(engine, grammar, '{"format": "x", "uniqueItems": {"uniqueItems": true}}')
    assert not follows(engine, grammar, '{"format": "x", "uniqueItems": {}}')


def test_an_answer_says_what_was_ignored(engine: nemodiff.LoadedEngine) -> None:
    schema = {"type": "array", "items": {"enum": [1, 2]}, "uniqueItems": True, "minItems": 2, "maxItems": 2}
    answer = nemodiff.generate(engine, QUESTION, json_schema=schema)
    assert answer.warnings == ["json_schema: uniqueItems is ignored, so items may repeat"]
    assert answer.as_dict()["warnings"] == answer.warnings
    assert len(json.loads(answer.text)) == 2
    with pytest.raises(nemodiff.RequestError, match="leave strict_schema out"):
        nemodiff.generate(engine, QUESTION, json_schema=schema, strict_schema=True)
    plain = nemodiff.generate(engine, QUESTION, json_schema={"enum": [1]}, strict_schema=True)
    assert plain.warnings == []
    assert "warnings" not in plain.as_dict()


def test_many_warnings_are_counted(engine: nemodiff.LoadedEngine) -> None:
    formats = [{"type": "string", "format": f"odd\x1b{number}"} for number in range(30)]
    warnings = compiled(engine, {"anyOf": formats}).warnings
    assert len(warnings) == 11
    assert warnings[-1] == "json_schema: 20 more formats are unknown and ignored"
    assert all(warning.isprintable() for warning in warnings)


def test_simplifications_that_a_schema_asks_for_are_warnings_too(engine: nemodiff.LoadedEngine) -> None:
    one_of = [{"type": "string", "minLength": 1}, {"type": "string", "maxLength": 3}]
    with pytest.raises(nemodiff.RequestError, match="oneOf constraints are not supported"):
        compiled(engine, {"oneOf": one_of})
    coerced = {"oneOf": one_of, "x-guidance": {"coerce_one_of": True}}
    assert "oneOf not fully supported" in compiled(engine, coerced).warnings[0]
    with pytest.raises(nemodiff.RequestError, match=r"falling back.*leave strict_schema out"):
        compiled(engine, coerced, strict=True)


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


# --- ends of an answer that follows a grammar ---

WAYS: list[dict[str, Any]] = [
    *({"mode": mode} for mode in ("ar", "linear_spec", "quadratic_spec", "auto")),
    {"mode": "diffusion", "policy": "left_to_right"},
    {"temperature": 5.0, "seed": 3},
]


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_stop_text_ends_such_an_answer_as_any_other(engine: nemodiff.LoadedEngine, way: dict[str, Any]) -> None:
    options: dict[str, Any] = {"regex": "(ab, ){6}ab", "max_new_tokens": 60, **way}
    whole = nemodiff.generate(engine, QUESTION, **options)
    assert (whole.text, whole.stop_text) == ("ab, " * 6 + "ab", None)
    cut = nemodiff.generate(engine, QUESTION, stop=["b, ab,", "\n"], **options)
    assert (cut.text, cut.finish_reason, cut.stop_text) == ("a", "stop", "b, ab,")
    assert nemodiff.generate(engine, QUESTION, stop=["c", "\n"], **options).token_ids == whole.token_ids


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_stop_id_ends_such_an_answer_where_the_grammar_allows_it(
    engine: nemodiff.LoadedEngine, way: dict[str, Any]
) -> None:
    options: dict[str, Any] = {"regex": "(ab, ){6}ab", "max_new_tokens": 60, **way}
    whole = nemodiff.generate(engine, QUESTION, **options)
    (stop,) = {*whole.token_ids} & {*engine.text.encode_plain(",")}
    cut = nemodiff.generate(engine, QUESTION, stop_token_ids=[stop], **options)
    assert (cut.text, cut.token_ids[-1], cut.finish_reason) == ("ab", stop, "stop")
    never = [token for token in engine.text.encode_plain("Zq") if token not in whole.token_ids]
    assert never
    assert nemodiff.generate(engine, QUESTION, stop_token_ids=never, **options).token_ids == whole.token_ids


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_such_an_answer_goes_on_to_min_tokens_while_the_grammar_has_more(
    engine: nemodiff.LoadedEngine, way: dict[str, Any]
) -> None:
    """Beyond the end of a grammar there is nothing to go on with, so there it ends."""
    eos = engine.info.model.eos_ids[0]
    ends = {"logit_bias": {eos: 100.0}, "max_new_tokens": 40, **way}  # as soon as it may
    short = nemodiff.generate(engine, QUESTION, regex="a(b)*", **ends)
    assert short.text == "a"
    longer = nemodiff.generate(engine, QUESTION, regex="a(b)*", min_tokens=9, **ends)
    assert set(longer.text[1:]) == {"b"}
    assert longer.token_ids.index(eos) == 9
    full = nemodiff.generate(engine, QUESTION, regex="abab", min_tokens=30, **ends)
    assert (full.text, full.token_ids[-1], full.finish_reason) == ("abab", eos, "stop")


# --- grammars in Lark's or llama.cpp's notation ---

LARK = 'start: item (", " item){2} "."?\nitem: WORD\nWORD: /[ab]{2}/\n'
GBNF = 'root ::= item (", " item){2} "."?\nitem ::= [ab] [ab]\n'
HOURS = 'start: %json {"type": "integer", "multipleOf": 99999999}\n'


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("grammar", [LARK, GBNF], ids=["lark", "gbnf"])
def test_an_answer_follows_a_grammar(engine: nemodiff.LoadedEngine, way: dict[str, Any], grammar: str) -> None:
    answer = nemodiff.generate(engine, QUESTION, grammar=grammar, max_new_tokens=40, **way)
    assert re.fullmatch(r"[ab]{2}(, [ab]{2}){2}\.?", answer.text)
    assert answer.finish_reason == "stop"


def test_grammars_that_nest_are_followed(engine: nemodiff.LoadedEngine) -> None:
    nested = compiled(engine, 'start: "(" start ")" | "x"', "grammar")
    assert follows(engine, nested, "((x))")
    assert not follows(engine, nested, "((x)")


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("", "grammar is not understood"),
        ("nonsense", "grammar is not understood"),
        ("start: other", "grammar is not understood"),
        ("start: /(/", "grammar is not understood"),
        ('root ::= "a', "grammar is not understood"),
        ("root ::= " + "(" * 5000, "grammar is not understood"),
        ("start: " + "(" * 5000, "grammar is not understood"),
        ("start: <|im_end|>", "grammar is not understood"),
        *((f"start: <[{ids}]> /x/", "grammar is not understood (tokens by their ids") for ids in ("7", "1-4, 9", "*")),
        ('{"grammars": [{"json_schema": {}}]}', "grammar is not understood"),
        (HOURS, "grammar is too complex"),
        (HOURS.replace("start: ", "start: <|im_end|> "), "grammar is"),
        ("start: /[^\\s\\S]/", "grammar allows no answer"),
        ("x" * (MAX_SOURCE + 1), f"grammar has {MAX_SOURCE + 1} bytes"),
    ],
)
def test_a_wrong_grammar_is_refused_in_one_line(
    engine: nemodiff.LoadedEngine, source: str, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar_trial, "SECONDS", 1)
    with pytest.raises(nemodiff.RequestError, match=f"^{re.escape(problem)}") as refused:
        compiled(engine, source, "grammar")
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 300


def test_one_guide_is_allowed(engine: nemodiff.LoadedEngine) -> None:
    guides: dict[str, Any] = {"json_schema": {}, "regex": "a", "grammar": 'start: "a"'}
    for left in guides:
        two = {name: value for name, value in guides.items() if name != left}
        first, second = two
        with pytest.raises(nemodiff.RequestError, match=f"^{first} and {second} are both given; use one of them$"):
            nemodiff.generate(engine, QUESTION, **two)
    with pytest.raises(nemodiff.RequestError, match=r"^grammar depends on the tokens before, which policy"):
        nemodiff.generate(engine, QUESTION, grammar=guides["grammar"], mode="diffusion")

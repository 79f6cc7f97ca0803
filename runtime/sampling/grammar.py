"""Structured output: which tokens a JSON schema, a regular expression or calls of tools allow next, by llguidance."""

from __future__ import annotations

import functools
import json
import re
from typing import Any

import numpy as np

from ...errors import RequestError
from .grammar_trial import SECONDS, compiles_in_time, error_of
from .json_schema import is_unfinished, read_schema

GUIDES = ("json_schema", "regex", "grammar")  # options that say what an answer follows
MAX_SOURCE = 256 << 10  # bytes of a schema, pattern or grammar
# What a compiled grammar is taken to need in memory. Measured: up to 1 MiB, and for a byte of source 14 to 260 bytes.
_BASE = 1 << 20
_PER_BYTE = 128

# A model that finds no end fills JSON up with space, so there is one way to set it, that of Python's json.
_JSON: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_TOKENS = re.compile(r"<\[[\d\s,^*-]*\]>")  # in the library's dialect of Lark
_LONGEST_REASON = 150  # characters of a message of the library
_MOST_WARNINGS = 10
# How the library begins to refuse what it does not implement.
_UNKNOWN_FORMAT = "Unknown format: "
_UNIMPLEMENTED = "Unimplemented keys: "


class Grammar:
    """A compiled schema, pattern or grammar.

    `warnings` are sentences about what in a schema the answers are not held to; `memory` is an estimate in bytes.

    Args:
        tokenizer: tokenizer.json as text.
        vocab: entries of the vocabulary.
        eos: ids that end an answer.
        kind: one of `GUIDES`, or tools.
        source: the schema as JSON text, the pattern, or a grammar: of tools in llguidance's dialect of Lark, else in
            that without special tokens or in llama.cpp's GBNF.
        strict: refuse what would be a warning.

    Raises:
        RequestError: the source is not understood, too large or too complex, or no answer follows it.
    """

    def __init__(
        self, tokenizer: str, vocab: int, eos: tuple[int, ...], kind: str, source: str, strict: bool = False
    ) -> None:
        import llguidance

        size = len(source.encode())
        if size > MAX_SOURCE:
            raise RequestError(f"{kind} has {size} bytes, allowed: at most {MAX_SOURCE}; use a shorter one")
        self.memory = _BASE + _PER_BYTE * size
        self.warnings: list[str] = []
        self._vocab = vocab
        self._kind = kind
        library = _tokenizer(tokenizer, vocab, eos)
        if kind == "json_schema":
            schema = read_schema(source)
            self._first = _compile_schema(library, schema)
            self.warnings = [f"json_schema: {_reason(warning)}" for warning in self._first.get_grammar_warnings()]
            if not strict and self._first.get_error().startswith((_UNKNOWN_FORMAT, _UNIMPLEMENTED)):
                self._ignore_annotations(library, schema)
        elif kind == "grammar":
            self._first = _compile_grammar(library, source)
        elif kind == "tools":
            self._first = _compile(library, source, kind)
            if not self._first.is_error():
                self.warnings = self._ignored(self._first)
        else:
            if is_unfinished(source):
                raise _refusal(kind, "its last backslash has nothing after it")
            self._first = _compile(library, llguidance.LLMatcher.grammar_from_regex(source), kind)
        if self._first.is_error():
            remedy = "change it or leave strict_schema out" if strict else "change it"
            raise _refusal(kind, self._first.get_error(), remedy=remedy)
        if strict and self.warnings:  # simplifications that the schema's x-guidance asks for
            raise RequestError(f"{self.warnings[0]}; change it or leave strict_schema out")
        self._try_out()

    def matcher(self) -> Matcher:
        """A matcher at the start of an answer."""
        return Matcher(self._first.deep_copy(), self._vocab, self._kind)

    def _ignore_annotations(self, library: Any, schema: dict[str, Any]) -> None:
        """Compile a schema without its unknown formats and its uniqueItems. Raises RequestError."""
        lenient = _compile_schema(library, schema, {"lenient": True})
        if lenient.is_error():
            raise _refusal(self._kind, lenient.get_error())
        self.warnings = self._ignored(lenient)
        self._first = lenient

    def _ignored(self, lenient: Any) -> list[str]:
        """What a lenient compilation has left out, in sentences. Raises RequestError."""
        warnings = []
        for message in dict.fromkeys(lenient.get_grammar_warnings()):
            if message.startswith(_UNKNOWN_FORMAT):
                name = _reason(message.removeprefix(_UNKNOWN_FORMAT))
                warnings.append(f"{self._kind}: format {name!r:.60} is unknown and ignored")
            elif message == f'{_UNIMPLEMENTED}["uniqueItems"]':
                warnings.append(f"{self._kind}: uniqueItems is ignored, so items may repeat")
            else:
                raise _refusal(self._kind, message)
        more = len(warnings) - _MOST_WARNINGS
        rest = [f"{self._kind}: {more} more formats are unknown and ignored"] if more > 0 else []
        return warnings[:_MOST_WARNINGS] + rest

    def _try_out(self) -> None:
        """Take a first token, which shows most of what no answer follows or the library cannot do."""
        matcher = self.matcher()
        scores = np.zeros(self._vocab)
        matcher.restrict(scores)
        matcher.push(int(scores.argmax()))
        matcher.restrict(scores)


class Matcher:
    """Where one answer stands in its grammar. Every method raises RequestError once the library gives up."""

    def __init__(self, matcher: Any, vocab: int, kind: str) -> None:
        self._matcher = matcher
        self._vocab = vocab
        self._kind = kind
        self._bits = np.zeros(-(-vocab // 32), np.int32)
        self._astray = 0  # tokens taken since the first that the grammar does not allow; the EOS of a full text is one

    def push(self, token: int) -> None:
        """Take one token."""
        if self._astray:
            self._astray += 1
        elif not self._matcher.try_consume_tokens([token]):
            self._check()  # the library also refuses a token that it fails at
            self._astray = 1

    def pop(self) -> None:
        """Take the last token back."""
        if self._astray:
            self._astray -= 1
        elif not self._matcher.rollback(1):
            self._check()

    def restrict(self, scores: np.ndarray) -> None:
        """Set what is not allowed next to -inf; scores (V,) f64."""
        if self._astray:
            return
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        self._check()
        if not self._bits.any():
            raise _refusal(self._kind, "NoExtension")
        allowed = np.unpackbits(self._bits.view(np.uint8), bitorder="little")[: self._vocab]
        scores[allowed == 0] = -np.inf

    def _check(self) -> None:
        if self._matcher.is_error():
            raise _refusal(self._kind, self._matcher.get_error(), "too complex")


@functools.lru_cache(maxsize=4)
def _tokenizer(source: str, vocab: int, eos: tuple[int, ...]) -> Any:
    """The library's view of a tokenizer, which takes a second to make of a large one."""
    import llguidance

    return llguidance.LLTokenizer(source, n_vocab=vocab, eos_token=list(eos))


def _compile_schema(library: Any, schema: dict[str, Any], options: Any = None) -> Any:
    import llguidance

    try:
        text = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema), defaults=_JSON, overrides=options)
    except (ValueError, RecursionError) as error:
        raise _refusal("json_schema", str(error)) from None
    return _compile(library, text, "json_schema")


def _compile_grammar(library: Any, source: str) -> Any:
    """A grammar that somebody wrote, of which nothing is known: it must have compiled elsewhere first."""
    import llguidance
    from llguidance.gbnf_to_lark import any_to_lark

    if _TOKENS.search(source):  # of which one may be the mask
        raise _refusal("grammar", "tokens by their ids are not supported")
    try:
        text = llguidance.LLMatcher.grammar_from_lark(any_to_lark(source))
    except Exception as error:  # the converter's own, which it does not name, and RecursionError
        raise _refusal("grammar", str(error)) from None
    problem = error_of(text)
    if problem:
        raise _refusal("grammar", problem)
    return _compile(library, text, "grammar", tried=problem is not None)


def _compile(library: Any, text: str, kind: str, tried: bool | None = None) -> Any:
    """The library's matcher, whose limits bound the work of one token; it may be in error. Raises RequestError."""
    import llguidance

    if not (compiles_in_time(text) if tried is None else tried):
        raise RequestError(
            f"{kind} is too complex (compiling it takes over {SECONDS} s); use fewer patterns at once and a smaller "
            "multipleOf"
        )
    limits = llguidance.LLParserLimits(verbose_errors=False)
    return llguidance.LLMatcher(library, text, log_level=0, limits=limits)


def _refusal(kind: str, message: str, otherwise: str = "not understood", remedy: str = "change it") -> RequestError:
    """An error of the library in one line, without what it dumps of its state."""
    reason = _reason(message)
    if message.startswith("NoExtension"):
        return RequestError(f"{kind} allows no answer; change it")
    if message.startswith("Unsatisfiable schema: "):
        return RequestError(f"{kind} allows no answer ({reason.removeprefix('Unsatisfiable schema: ')}); change it")
    return RequestError(f"{kind} is {otherwise} ({reason}); {remedy}")


def _reason(message: str) -> str:
    """What a message of the library says, without what it quotes of the source and of its own state."""
    lines = [line.strip() for line in message.partition("\n<")[0].splitlines() if line.strip()]
    reason = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), " ".join(lines[:1]))
    reason = "".join(c if c.isprintable() else " " for c in reason.partition(":  (")[0])
    return reason if len(reason) <= _LONGEST_REASON else reason[:_LONGEST_REASON] + "..."

"""Structured output: which tokens a JSON schema or a regular expression allows next, by llguidance."""

from __future__ import annotations

import functools
import json
from typing import Any

import numpy as np

from ...errors import EngineError, RequestError

# A model that finds no end fills JSON up with space, so there is one way to set it, that of Python's json.
_JSON: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Grammar:
    """A compiled schema or pattern.

    Args:
        tokenizer: tokenizer.json as text.
        vocab: entries of the vocabulary.
        eos: ids that end an answer.
        kind: json_schema or regex.
        source: the schema as JSON text, or the pattern.

    Raises:
        RequestError: the source is not understood.
    """

    def __init__(self, tokenizer: str, vocab: int, eos: tuple[int, ...], kind: str, source: str) -> None:
        import llguidance

        self._vocab = vocab
        if kind == "json_schema":
            try:
                schema = json.loads(source)
                if schema is False:
                    raise RequestError("json_schema is false, which no answer follows; give another")
                if not isinstance(schema, dict) and schema is not True:
                    raise RequestError(f"json_schema is {source:.60}, allowed: an object or true; give a JSON schema")
                text = llguidance.LLMatcher.grammar_from_json_schema(
                    json.dumps({} if schema is True else schema), defaults=_JSON
                )
            except (ValueError, RecursionError) as error:
                raise RequestError(f"json_schema is not JSON ({_line(error)}); give a JSON schema") from None
        else:
            text = llguidance.LLMatcher.grammar_from_regex(source)
        library = _tokenizer(tokenizer, vocab, eos)
        wrong, messages = llguidance.LLMatcher.validate_grammar_with_warnings(text, library)
        if wrong:
            raise RequestError(f"{kind} is not understood ({_line(messages[0])}); change it")
        self._first = llguidance.LLMatcher(library, text, log_level=0)
        if self._first.is_error():
            raise RequestError(f"{kind} is not understood ({_line(self._first.get_error())}); change it")

    def matcher(self) -> Matcher:
        """A matcher at the start of an answer."""
        return Matcher(self._first.deep_copy(), self._vocab)


class Matcher:
    """Where one answer stands in its grammar."""

    def __init__(self, matcher: Any, vocab: int) -> None:
        self._matcher = matcher
        self._vocab = vocab
        self._bits = np.zeros(-(-vocab // 32), np.int32)
        self._astray = 0  # tokens taken since the first that the grammar does not allow; the EOS of a full text is one

    def push(self, token: int) -> None:
        """Take one token."""
        if self._astray or not self._matcher.try_consume_tokens([token]):
            self._astray += 1

    def pop(self) -> None:
        """Take the last token back."""
        if self._astray:
            self._astray -= 1
        else:
            self._matcher.rollback(1)

    def restrict(self, scores: np.ndarray) -> None:
        """Set what is not allowed next to -inf; scores (V,) f64."""
        if self._astray:
            return
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        if self._matcher.is_error() or not self._bits.any():
            raise EngineError(
                f"the grammar gave up ({_line(self._matcher.get_error())}); use a simpler schema or pattern"
            )
        allowed = np.unpackbits(self._bits.view(np.uint8), bitorder="little")[: self._vocab]
        scores[allowed == 0] = -np.inf


@functools.lru_cache(maxsize=4)
def _tokenizer(source: str, vocab: int, eos: tuple[int, ...]) -> Any:
    """The library's view of a tokenizer, which takes a second to make of a large one."""
    import llguidance

    return llguidance.LLTokenizer(source, n_vocab=vocab, eos_token=list(eos))


def _line(error: object) -> str:
    """A message of the library in one line."""
    return " ".join(str(error).split())

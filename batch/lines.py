"""The lines of a file of prompts: reading them, and what can be checked of all before the first is answered."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import RequestError
from ..runtime.requests.options import FLAGS, OPTIONS, Options, make_options
from ..runtime.requests.spellings import resolve
from ..runtime.text.checks import check_json, check_text
from ..runtime.text.files import called, read_text

if TYPE_CHECKING:
    from ..runtime.loading import LoadedEngine
    from ..runtime.text.messages import Message

_SPELLINGS = dict.fromkeys(("max_tokens", "max_completion_tokens"), "max_new_tokens")  # as in HTTP bodies
_LABELS = ("id", "custom_id")
_IGNORE_EOS = "ignore_eos"
_KEYS = ("prompt", "messages", *_LABELS, *OPTIONS, *_SPELLINGS, _IGNORE_EOS)
_REPORTS = ("logprobs", "confidences", "prompt_logprobs")  # what belongs to tokens
_COUNTS = frozenset(name for name, option in OPTIONS.items() if option.type is int)
_SETS = 256  # of options, checked against the engine beforehand: a schema among them takes a millisecond or more


@dataclasses.dataclass(frozen=True)
class Line:
    """A prompt of a file.

    number: of the line, from 1. options: those that the line sets. labels: what comes back with its answer.
    """

    path: Path
    number: int
    prompt: str | list[Message]
    options: Mapping[str, Any]
    labels: Mapping[str, Any]

    def chosen(self, flags: Mapping[str, Any]) -> Options:
        """The options of the command with the line's own on top. Raises RequestError."""
        return make_options({**flags, **self.options})

    def refusal(self, error: Exception) -> RequestError:
        """An error with the line's place before it."""
        return RequestError(f"{self.path}, line {self.number}: {error}")


def read_lines(path: Path, *, as_json: bool) -> list[Line]:
    """The prompts of JSON lines in a file, or standard input for `-`, with their keys and values of options checked.

    as_json: whether answers have a place for what belongs to tokens. Raises RequestError.
    """
    try:
        texts = read_text(path).split("\n")
    except OSError as error:
        raise RequestError(f"{path}: {error.strerror}; give a file of JSON lines") from None
    path = Path(called(path))
    lines = []
    for number, text in enumerate(texts, 1):
        if text.strip():
            fields = read_object(text, f"{path}, line {number}")
            line = make_line(fields, path, number)
            if not as_json and (name := report_of(line.options)):
                raise line.refusal(RequestError(f"{name} goes with --json; give the flag or leave {name} out"))
            lines.append(line)
    if not lines:
        raise RequestError(f"{path}: no prompts; give a file of JSON lines")
    return lines


def make_line(fields: Mapping[str, Any], path: Path, number: int) -> Line:
    """The line with some fields, its keys and the values of its options checked. Raises RequestError."""
    try:
        prompt, options = _prompt(fields), _options(fields)
        for name, value in labels(fields).items():
            check_json(value, name)
    except RequestError as error:
        raise RequestError(f"{path}, line {number}: {error}") from None
    return Line(path, number, prompt, options, labels(fields))


def given(cells: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that a row of a table gives, where None, NaN and pandas' NA fill gaps.

    A column of integers with gaps is one of floats. One of objects gives each the fields of all.
    """
    return {
        name: int(value) if name in _COUNTS and isinstance(value, float) and value.is_integer() else _dense(value)
        for name, value in cells.items()
        if value is not None and (value == value) is True
    }


def _dense(value: Any) -> Any:
    """A value without the fields of its objects that are None."""
    if isinstance(value, dict):
        return {name: _dense(inner) for name, inner in value.items() if inner is not None}
    return [_dense(inner) for inner in value] if isinstance(value, list) else value


def report_of(options: Mapping[str, Any]) -> str | None:
    """The first option, if there is one, that asks for what belongs to tokens."""
    return next((name for name in _REPORTS if options.get(name) is not None and options[name] is not False), None)


def labels(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What comes back with the answer to some fields."""
    return {name: fields[name] for name in _LABELS if name in fields}


def read_object(text: str, place: str) -> dict[str, Any]:
    """The fields that a line gives: null means not given, as in HTTP bodies. Raises RequestError."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{place}: not JSON ({error}); one object per line is allowed") from None
    if "\\u" in text:  # the only way to spell half a character
        check_text(json.dumps(value, ensure_ascii=False), place)
    return {n: v for n, v in value.items() if v is not None} if isinstance(value, dict) else {}


def check_lines(engine: LoadedEngine, lines: list[Line], flags: Mapping[str, Any], rows: int) -> None:
    """Refuse malformed conversations, and options that do not suit the engine or one another. Raises RequestError.

    What the length of a prompt decides is left for later, and so are options of which there are very many.
    """
    from ..runtime.loading import check_rows
    from ..runtime.requests.image_parts import plain_messages
    from ..runtime.requests.prepare import conversation, prepare
    from ..runtime.requests.settings import settle
    from ..runtime.text.messages import checked_messages, with_open_end

    check_rows(engine.info, rows)
    known = set[str]()
    for line in lines:
        try:
            if not isinstance(line.prompt, str):
                system = line.options.get("system", flags.get("system"))
                turns = checked_messages(plain_messages(conversation(line.prompt, system))[0])
                if line.options.get("continue_final_message"):
                    with_open_end(turns)
            kind = json.dumps({n: v for n, v in line.options.items() if n != "seed"}, sort_keys=True)
            if kind in known or len(known) == _SETS:
                continue
            known.add(kind)
            options = line.chosen(flags)
            try:
                settle(engine.info, engine.text, 0, options)
            except RequestError:
                prepare(engine, line.prompt, options)  # refuses it with the real length
                raise
        except RequestError as error:
            raise line.refusal(error) from None


def _prompt(fields: Mapping[str, Any]) -> str | list[Message]:
    prompt, messages = fields.get("prompt"), fields.get("messages")
    if prompt is not None and messages is not None:
        raise RequestError("prompt and messages are both given, allowed: one of them; leave one out")
    if isinstance(prompt, str):
        return prompt
    if isinstance(messages, list) and messages and all(isinstance(message, dict) for message in messages):
        return messages
    raise RequestError(
        'allowed: an object with "prompt" (text) or "messages" (a list of role and content); fix the line'
    )


def _options(fields: Mapping[str, Any]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    spelled: dict[str, str] = {}
    for key, value in fields.items():
        name = _SPELLINGS.get(key, key)
        if name in OPTIONS:
            if name in options and options[name] != value:
                raise RequestError(f"{spelled[name]} and {key} differ; give one of them")
            options[name], spelled[name] = value, key
        elif key not in _KEYS:
            raise RequestError(f"{key!r:.60} is no key of a line; {_remedy(key)}")
    ignore_eos = fields.get(_IGNORE_EOS, False)
    if not isinstance(ignore_eos, bool):
        raise RequestError(f"{_IGNORE_EOS} is {ignore_eos!r:.60}, allowed: true or false")
    options = resolve(options, ignore_eos=ignore_eos)
    if options:
        make_options(options)
    return options


def _remedy(key: str) -> str:
    flags = {flag.removeprefix("--"): name for name, flag in FLAGS.items()}
    near = [flags[key]] if key in flags else difflib.get_close_matches(key, _KEYS, 1)
    return f"is {near[0]} meant?" if near else f"allowed: prompt or messages, {', '.join(_LABELS)}, and request options"

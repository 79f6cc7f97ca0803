"""How an option is declared: its type, with a range and a help text, and what is read from the declaration."""

from __future__ import annotations

import dataclasses
import json
import numbers
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import ValidationError, ValidatorFunctionWrapHandler

from ...errors import RequestError
from ..text.checks import check_text


@dataclasses.dataclass(frozen=True)
class Help:
    """One sentence, verb first, that says what an option does.

    default: what leaving it open means. allowed: its values in words, where its type does not say them.
    """

    text: str
    default: str | None = None
    allowed: str | None = None


@dataclasses.dataclass(frozen=True)
class Range:
    """The numbers from `low` to `high` (any, if None); `text` says it in other words.

    over: `low` itself is left out. or_zero: 0 is allowed too.
    """

    low: float
    high: float | None = None
    over: bool = False
    or_zero: bool = False
    text: str | None = None

    def __contains__(self, value: float) -> bool:
        if self.or_zero and value == 0:
            return True
        above = value > self.low if self.over else value >= self.low
        return above and (self.high is None or value <= self.high)

    def __str__(self) -> str:
        if self.text is not None:
            return self.text
        low = f"over {self.low}" if self.over else f"{self.low}"
        return f"{low} or more" if self.high is None else f"{low} to {self.high}"

    def check(self, name: str, value: Any, kind: type = numbers.Real) -> None:
        """Refuse what is no number of a kind, or is out of range, NaN included. Raises RequestError."""
        number = isinstance(value, kind) and not isinstance(value, bool)
        if not number or value not in self:
            raise RequestError(f"{name} is {value!r:.60}, allowed: {self}")


@dataclasses.dataclass(frozen=True)
class NotEmpty:
    """Refuses the empty text; `noun` is what the refusal calls it."""

    noun: str


@dataclasses.dataclass(frozen=True)
class Most:
    """The most values that may be given, and the most characters that all of them may have together."""

    values: int
    characters: int | None = None

    def __str__(self) -> str:
        text = f"at most {self.values}"
        return text if self.characters is None else f"{text} with {self.characters} characters in all"

    def check(self, name: str, value: object) -> None:
        """Refuse too many values, whatever they are. Raises RequestError."""
        if not isinstance(value, (list, tuple, Mapping)):
            value = (value,)
        if len(value) > self.values:
            raise RequestError(f"{name} has {len(value)} values, allowed: {self}; leave some out")
        if self.characters is not None:
            length = sum(len(text) for text in value if isinstance(text, str))
            if length > self.characters:
                raise RequestError(f"{name} has {length} characters, allowed: {self}; leave some out")


@dataclasses.dataclass(frozen=True)
class Option:
    """What a field of `Options` declares.

    type: int, float, bool, str, a tuple of texts or ids, or a mapping. choices: the words that are allowed, for an
    integer beside its numbers.
    """

    name: str
    type: Any
    choices: tuple[str, ...]
    help: Help
    range: Range | None
    not_empty: NotEmpty | None
    most: Most | None
    default: Any

    @property
    def many(self) -> bool:
        """Whether it takes any number of values."""
        return get_origin(self.type) is tuple

    @property
    def one_type(self) -> Any:
        """The type of each value."""
        return get_args(self.type)[0] if self.many else self.type

    @property
    def allowed(self) -> str:
        """The values of the right type, in words."""
        if self.help.allowed is not None:
            text = self.help.allowed
        elif self.choices and self.type is str:
            text = ", ".join(self.choices)
        else:
            text = " or ".join((_ALLOWED[self.type], *self.choices))
        return text if self.most is None else f"{text}, {self.most}"

    def check(self, value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
        """The value as its plain type. Raises RequestError."""
        if self.most is not None:
            self.most.check(self.name, value)
        try:
            checked = validate(_plain(value, self.many))
        except ValidationError:
            raise RequestError(f"{self.name} is {value!r:.60}, allowed: {self.allowed}") from None
        if self.range is not None and isinstance(checked, (int, float)):
            self.range.check(self.name, checked)
        for one in checked if self.many else (checked,):
            if isinstance(one, int) and not -(2**63) <= one < 2**64:
                raise RequestError(f"{self.name} is {value!r:.60}, allowed: numbers of 64 bits")
            if isinstance(one, str):
                check_text(one, self.name)
            if one == "" and self.not_empty is not None:
                raise RequestError(f"{self.not_empty.noun} is empty; give at least one character")
        return checked


_ALLOWED: dict[Any, str] = {
    int: "an integer",
    float: "a number",
    bool: "True or False",
    str: "text",
    tuple[str, ...]: "text or a list of texts",
    tuple[int, ...]: "a list of token ids",
}


def describe(options: type) -> dict[str, Option]:
    """The declared options of a dataclass, by name."""
    hints = get_type_hints(options, include_extras=True)
    described = {}
    for field in dataclasses.fields(options):
        hint, *extras = get_args(hints[field.name])
        kinds = list(alternatives(hint))
        described[field.name] = Option(
            name=field.name,
            type=next((kind for kind in kinds if not isinstance(kind, str)), str),
            choices=tuple(kind for kind in kinds if isinstance(kind, str)),
            help=next(extra for extra in extras if isinstance(extra, Help)),
            range=next((extra for extra in extras if isinstance(extra, Range)), None),
            not_empty=next((extra for extra in extras if isinstance(extra, NotEmpty)), None),
            most=next((extra for extra in extras if isinstance(extra, Most)), None),
            default=field.default,
        )
    return described


def alternatives(hint: Any) -> Iterator[Any]:
    """Types and words of a union, None left out."""
    if get_origin(hint) in (Union, types.UnionType):
        for one in get_args(hint):
            yield from alternatives(one)
    elif get_origin(hint) is Literal:
        yield from get_args(hint)
    elif hint is not types.NoneType:
        yield hint


def _plain(value: Any, many: bool) -> Any:
    """Numbers of other libraries, such as NumPy's, as Python's, and a list as a tuple."""
    if isinstance(value, bool):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    if many and isinstance(value, str):
        return (value,)
    if many and isinstance(value, (list, tuple)):
        return tuple(_plain(item, False) for item in value)
    return value


BIAS = Range(-100, 100)  # of a logit


def plain_biases(value: object) -> object:
    """Biases by token id, which JSON can only spell as text where it is a key. Raises RequestError."""
    if not isinstance(value, Mapping):
        return value
    biases = {}
    for key, bias in value.items():
        spelled = isinstance(key, str) and key.isascii() and key.isdigit()
        if not spelled and (isinstance(key, bool) or not isinstance(key, numbers.Integral)):
            raise RequestError(f"logit_bias holds {key!r:.60}, allowed: token ids")
        token = int(key)
        where = f"logit_bias of token id {token!r:.60}"
        if isinstance(bias, bool) or not isinstance(bias, numbers.Real):
            raise RequestError(f"{where} is {bias!r:.60}, allowed: a number")
        BIAS.check(where, bias)  # before it is made a float, which not every integer fits
        biases[token] = float(bias)
    return biases


def json_text(name: str) -> Callable[[object], object]:
    """Turns values of JSON, which an option of this name may be given as, into text; it raises RequestError."""

    def spelled(value: object) -> object:
        if not isinstance(value, (Mapping, bool, list, tuple)):
            return value
        try:
            return json.dumps(value)
        except (TypeError, ValueError, RecursionError) as error:
            raise RequestError(
                f"{name} is not JSON ({error}); give text or {_WHAT.get(name, 'an object')} of plain values"
            ) from None

    return spelled


_WHAT = {"tools": "a list"}

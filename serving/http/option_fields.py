"""Fields of HTTP bodies, made from the options of a request."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, Field, create_model

from ...runtime.requests.option_types import Option
from ...runtime.requests.options import OPTIONS
from .body_parts import Body, Many, TextOr

Model = TypeVar("Model", bound=Body)
_Texts = TextOr[str]
# What a body means besides, by option; see runtime/requests/spellings.py.
_NOTES = {
    "max_new_tokens": "-1 leaves it open too.",
    "seed": "A sampled request without it, or with -1, draws one; other negative ones are seeds too, from -2**63 on.",
    "top_k": "-1 is all of them too.",
    "top_p": "0 takes the likeliest.",
}


def with_options(*names: str) -> Callable[[type[Model]], type[Model]]:
    """Decorates a body: it gets a field for each of the options, by its own name; None means not given."""
    fields: dict[str, Any] = {name: (_type(OPTIONS[name]), option_field(name)) for name in names}

    def extend(body: type[Model]) -> type[Model]:
        extended = create_model(
            body.__name__, __base__=body, __module__=body.__module__, __doc__=body.__doc__, **fields
        )
        extended.own_options = (*body.own_options, *names)
        return extended

    return extend


def option_field(name: str) -> Any:
    """A field of any name and type that means this option."""
    option = OPTIONS[name]
    sentences = [option.help.text]
    if option.range is not None:
        sentences.append(f"Allowed: {option.range}.")
    if option.most is not None:
        sentences.append(f"Allowed: {option.most}.")
    if option.help.default is not None:
        sentences.append(f"Default: {option.help.default}.")
    if name in _NOTES:
        sentences.append(_NOTES[name])
    return Field(None, description=" ".join(sentences))


def _type(option: Option) -> Any:
    most = option.most
    if most is None:
        return _unbounded(option)

    def counted(value: Any) -> Any:
        """The values, if there are not too many: each of a million may be a mistake of its own."""
        most.check(option.name, value)
        return value

    return Annotated[_unbounded(option), BeforeValidator(counted)]


def _unbounded(option: Option) -> Any:
    if option.many:
        return _Texts | None if option.one_type is str else Many[int] | None
    if option.type == Mapping[int, float]:
        return dict[str, float] | None
    if option.choices:
        words: Any = Literal.__getitem__(option.choices)
        return words | None if option.type is str else option.type | words | None
    return option.type | None

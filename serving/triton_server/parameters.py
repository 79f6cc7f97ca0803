"""The names that clients of a Triton server use, and what they mean here.

In: a request's tensors and parameters as plain values. Out: `Asked`, with options of the runtime. One table declares
the inputs, for the exported configuration as for reading requests; the same names are the keys of
`sampling_parameters` and, as model-level defaults, parameters of the configuration. The surprising fact: clients of
other backends always send some fields, empty or at their neutral value, so these must be accepted and mean nothing.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Literal

from ...contract import PREFILL_CHUNK
from ...errors import RequestError
from ...runtime.requests.options import Options
from ...runtime.text.checks import check_text
from ..spellings import resolve

Type = Literal["STRING", "BOOL", "INT32", "UINT32", "UINT64", "FP32"]


@dataclasses.dataclass(frozen=True)
class Input:
    """One input tensor.

    option: the runtime's, None where `read` looks at the name or the value means nothing here. many: any number of
    elements. only: the one value that is supported.
    """

    name: str
    type: Type
    option: str | None = None
    many: bool = False
    only: object = None


INPUTS = (
    Input("text_input", "STRING"),
    Input("stream", "BOOL"),
    Input("exclude_input_in_output", "BOOL"),
    Input("sampling_parameters", "STRING"),
    Input("mode", "STRING", "mode"),
    Input("block_length", "INT32", "block_length"),
    Input("threshold", "FP32", "threshold"),
    Input("max_tokens", "INT32", "max_new_tokens"),
    Input("min_length", "INT32", "min_tokens"),
    Input("min_tokens", "INT32", "min_tokens"),
    Input("temperature", "FP32", "temperature"),
    Input("top_k", "INT32", "top_k"),
    Input("top_p", "FP32", "top_p"),
    Input("min_p", "FP32", "min_p"),
    Input("seed", "UINT64", "seed"),
    Input("random_seed", "UINT64", "seed"),
    Input("repetition_penalty", "FP32", "repetition_penalty"),
    Input("presence_penalty", "FP32", "presence_penalty"),
    Input("frequency_penalty", "FP32", "frequency_penalty"),
    Input("stop_words", "STRING", "stop", many=True),
    Input("bad_words", "STRING", "bad_words", many=True),
    Input("end_id", "INT32", "stop_token_ids", many=True),
    Input("guided_decoding_guide_type", "STRING"),
    Input("guided_decoding_guide", "STRING"),
    Input("return_log_probs", "BOOL"),
    # Supported at one value.
    Input("beam_width", "INT32", only=1),
    Input("num_return_sequences", "INT32", only=1),
    Input("return_context_logits", "BOOL", only=False),
    Input("return_generation_logits", "BOOL", only=False),
    Input("use_draft_logits", "BOOL", only=False),
    Input("embedding_bias_words", "STRING", only=""),
    Input("prompt_vocab_size", "INT32", only=0),
    # What these ask for is always given, or is about padding, beams and another's drafts.
    Input("return_finish_reason", "BOOL"),
    Input("return_num_input_tokens", "BOOL"),
    Input("return_num_output_tokens", "BOOL"),
    Input("pad_id", "INT32"),
    Input("length_penalty", "FP32"),
    Input("embedding_bias_weights", "FP32", many=True),
    Input("num_draft_tokens", "INT32"),
)
# Keys of `sampling_parameters` alone, with the one supported value; every field of `Options` is a key too.
_ONLY = {"n": 1, "best_of": 1, "use_beam_search": False, "include_stop_str_in_output": False, "detokenize": True}
_MEANINGLESS = ("skip_special_tokens", "spaces_between_special_tokens")
_GUIDED = {"guided_json": "json_schema", "guided_regex": "regex"}
_GUIDES = {"json": "json_schema", "json_schema": "json_schema", "regex": "regex"}

_BY_NAME = {i.name: i for i in INPUTS}
_TYPES = {f.name: str(f.type).removesuffix(" | None") for f in dataclasses.fields(Options)}
_FLAGS = ("stream", "exclude_input_in_output", "return_log_probs", "ignore_eos")
_READ = (*_FLAGS, *_GUIDED)


@dataclasses.dataclass(frozen=True)
class ModelParameters:
    """What the model's configuration chooses: the scheduler's numbers, and the defaults of requests.

    rows, waiting, prefix_reuse, prefill_tokens: of `Scheduler`. threads, device: of `load`. stream_interval_ms: least
    time between two responses of a stream; 0 sends text as it comes. engine: its folder, beside the model's file or
    absolute. values: defaults of requests, by their names.
    """

    rows: int | None = None
    waiting: int = 256
    threads: int | None = None
    device: str | None = None
    prefix_reuse: bool = True
    prefill_tokens: int = PREFILL_CHUNK
    stream_interval_ms: float = 10.0
    engine: str = "engine"
    values: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Asked:
    """A request: its prompt, whether text comes piece by piece and after the prompt, and the runtime's options."""

    prompt: str
    stream: bool
    echo: bool
    options: dict[str, Any]


def model_parameters(given: Mapping[str, str]) -> ModelParameters:
    """The configuration's parameters, which are all text. Raises RequestError."""
    own = {f.name: str(f.type).removesuffix(" | None") for f in dataclasses.fields(ModelParameters)}
    own.pop("values")
    chosen = {name: _typed(name, own[name], given[name]) for name in own if name in given}
    values = {name: value for name, value in given.items() if name not in own}
    _read(values)
    return ModelParameters(**chosen, values=values)


def read(tensors: Mapping[str, list[Any]], parameters: Mapping[str, Any], defaults: Mapping[str, Any]) -> Asked:
    """One request; a tensor wins over `sampling_parameters`, which win over request parameters, then the defaults.

    Args:
        tensors: elements by input name; text is decoded already.
        parameters: the request's, by name.
        defaults: of the model.

    Raises:
        RequestError: a name is unknown, or a value is no value of its option.
    """
    plain = {name: _element(_BY_NAME[name], values) for name, values in tensors.items() if values}
    prompt = plain.pop("text_input", None)
    if prompt is None:
        raise RequestError("text_input is missing; give one text")
    sampling = _sampling_parameters(plain.pop("sampling_parameters", None))
    chosen: dict[str, Any] = {}
    for level in (defaults, _without_passing(parameters), sampling, plain):
        chosen |= _read(level)
    stream, exclude = chosen.pop("stream", False), chosen.pop("exclude_input_in_output", True)
    if chosen.pop("return_log_probs", False):
        chosen.setdefault("logprobs", 0)
    ignore_eos = chosen.pop("ignore_eos", False)
    return Asked(prompt, stream, not exclude, resolve(chosen, ignore_eos=ignore_eos))


def _element(declared: Input, values: list[Any]) -> Any:
    if not declared.many and len(values) != 1:
        raise RequestError(f"{declared.name} has {len(values)} elements, allowed: 1")
    return values if declared.many else values[0]


def _sampling_parameters(text: str | None) -> Mapping[str, Any]:
    if not text:
        return {}
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"sampling_parameters: not JSON ({error}); give one object") from None
    if not isinstance(values, dict):
        raise RequestError(f"sampling_parameters is {text!r:.60}, allowed: a JSON object")
    return values


def _without_passing(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Request parameters without those of the server itself and forwarded headers, whose names have a hyphen."""
    return {
        name: value
        for name, value in parameters.items()
        if "-" not in name and not name.startswith(("triton_", "sequence_")) and name not in ("priority", "timeout")
    }


def _read(given: Mapping[str, Any]) -> dict[str, Any]:
    """Options, and the flags of `_READ`, from values by any of their names. Raises RequestError."""
    chosen: dict[str, Any] = {}
    said: dict[str, str] = {}
    for name, value in given.items():
        if value is None or name in _MEANINGLESS or name.startswith("guided_decoding_"):
            continue
        declared = _BY_NAME.get(name)
        option = declared.option if declared else _GUIDED.get(name, name)
        only = declared.only if declared else _ONLY.get(name)
        if only is not None:
            if _typed(name, type(only).__name__, value) != only:
                raise RequestError(f"{name} is {value!r:.60}, allowed: {only!r}")
            continue
        if name in _FLAGS:
            chosen[name] = _typed(name, "bool", value)
            continue
        if option is None and name not in ("text_input", "sampling_parameters"):
            continue
        if option not in _TYPES:
            allowed = sorted({*_BY_NAME, *_TYPES, *_READ, *_ONLY} - {"text_input", "sampling_parameters"})
            raise RequestError(f"unknown parameter {name!r:.60}; allowed: {', '.join(allowed)}")
        typed = _typed(name, _TYPES[option], value)
        if option in chosen and chosen[option] != typed:
            raise RequestError(
                f"{said[option]} is {chosen[option]!r:.60} and {name} is {typed!r:.60}; give one of them"
            )
        chosen[option], said[option] = typed, name
    return chosen | _guide(given)


def _guide(given: Mapping[str, Any]) -> dict[str, str]:
    kind, guide = given.get("guided_decoding_guide_type"), given.get("guided_decoding_guide")
    if not kind and not guide:
        return {}
    if kind not in _GUIDES or not isinstance(guide, str):
        raise RequestError(
            f"guided_decoding_guide_type is {kind!r:.60} with {'no' if guide is None else 'a'} guide, allowed: "
            f"{', '.join(_GUIDES)}, with the guide in guided_decoding_guide"
        )
    check_text(guide, "guided_decoding_guide")
    return {_GUIDES[kind]: guide}


def _typed(name: str, kind: str, value: Any) -> Any:
    """The value as its option's type; numbers may be spelled as text. What else is wrong the runtime says itself."""

    def wrong(allowed: str) -> RequestError:
        return RequestError(f"{name} is {value!r:.60}, allowed: {allowed}")

    if kind == "bool":
        words = {"true": True, "false": False, "1": True, "0": False}
        key = str(value).lower() if isinstance(value, (str, bool, int)) else ""
        if key not in words:
            raise wrong("true or false")
        return words[key]
    if kind == "tuple[str, ...]":
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
            raise wrong("text or a list of texts")
        return tuple(text for text in texts if text)  # an empty one is how some clients say none
    if kind == "tuple[int, ...]":
        return [_typed(name, "int", item) for item in (value if isinstance(value, (list, tuple)) else [value])]
    if kind in ("int", "float") and isinstance(value, str):
        try:
            return int(value) if kind == "int" else float(value)
        except ValueError:
            raise wrong("an integer" if kind == "int" else "a number") from None
    if kind == "int | str" and isinstance(value, str) and value.isdecimal():  # a number, or a word of the runtime's
        return int(value)
    if kind == "int" and isinstance(value, float) and value.is_integer():
        return int(value)
    return value

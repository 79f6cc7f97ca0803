"""The names that clients of Triton Inference Server use, and what they mean here.

One table declares the inputs, for the exported configuration as for reading requests; the same names are the keys of
`sampling_parameters` and, as model-level defaults, parameters of the configuration.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_type_hints

from ...contract import DEFAULT_GPU_MEMORY_UTILIZATION, DEFAULT_MAX_LOGPROBS, PREFILL_CHUNK
from ...errors import RequestError
from ...runtime.requests.generation_config import sampling_defaults
from ...runtime.requests.option_types import alternatives
from ...runtime.requests.options import OPTIONS
from ...runtime.requests.prepare import Prompt
from ...runtime.requests.spellings import (
    ANY_OBJECT,
    GUIDED,
    STRUCTURES,
    STRUCTURES_WITHOUT_EFFECT,
    check_best_of,
    left_open,
    resolve,
    structure_value,
    with_seed,
)
from ...runtime.text.checks import check_parts, check_text
from .values import convert

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


def _option(name: str, option: str | None = None) -> Input:
    """The input that sets an option, of the option's type."""
    declared = OPTIONS[option or name]
    kind = declared.one_type
    if kind is int:
        large = declared.range is not None and (declared.range.high or 0) >= 2**32
        return Input(name, "UINT64" if large else "INT32", declared.name, declared.many)
    return Input(name, "FP32" if kind is float else "STRING", declared.name, declared.many)


INPUTS = (
    Input("text_input", "STRING"),
    Input("image", "STRING", many=True),  # files in base64, as vLLM's backend takes them
    Input("stream", "BOOL"),
    Input("exclude_input_in_output", "BOOL"),
    Input("sampling_parameters", "STRING"),
    _option("mode"),
    _option("block_length"),
    _option("threshold"),
    _option("max_tokens", "max_new_tokens"),
    _option("min_length", "min_tokens"),
    _option("min_tokens"),
    _option("temperature"),
    _option("top_k"),
    _option("top_p"),
    _option("min_p"),
    _option("seed"),
    _option("random_seed", "seed"),
    _option("repetition_penalty"),
    _option("presence_penalty"),
    _option("frequency_penalty"),
    _option("stop_words", "stop"),
    _option("bad_words"),
    _option("end_id", "stop_token_ids"),
    Input("guided_decoding_guide_type", "STRING"),
    Input("guided_decoding_guide", "STRING"),
    Input("return_log_probs", "BOOL"),
    Input("return_logprobs", "BOOL"),
    Input("return_cumulative_logprob", "BOOL"),
    # Supported at one value.
    Input("beam_width", "INT32", only=1),
    Input("num_return_sequences", "INT32", only=1),
    Input("return_context_logits", "BOOL", only=False),
    Input("return_generation_logits", "BOOL", only=False),
    Input("use_draft_logits", "BOOL", only=False),
    Input("embedding_bias_words", "STRING", only=""),
    Input("prompt_vocab_size", "INT32", only=0),
    # Without effect: clients of other backends always send some of them, for what is always given here, or for padding,
    # beams and another model's drafts.
    Input("return_finish_reason", "BOOL"),
    Input("return_num_input_tokens", "BOOL"),
    Input("return_num_output_tokens", "BOOL"),
    Input("pad_id", "INT32"),
    Input("length_penalty", "FP32"),
    Input("embedding_bias_weights", "FP32", many=True),
    Input("num_draft_tokens", "INT32"),
)
# Keys of `sampling_parameters` alone, with the one supported value; every field of `Options` is a key too.
_ONLY = {"n": 1, "use_beam_search": False, "include_stop_str_in_output": False, "detokenize": True}
_MEANINGLESS = ("skip_special_tokens", "spaces_between_special_tokens")
# TensorRT-LLM's types
_GUIDES = {"json": "json_schema", "json_schema": "json_schema", "regex": "regex", "ebnf_grammar": "grammar"}
_STRUCTURED = ("structured_outputs", "guided_decoding")  # vLLM's objects, by words of `STRUCTURES`

_BY_NAME = {i.name: i for i in INPUTS}
_LOGPROBS = ("return_log_probs", "return_logprobs", "return_cumulative_logprob")
_FLAGS = ("stream", "exclude_input_in_output", "ignore_eos", *_LOGPROBS)
_READ = ("best_of", *_FLAGS, *GUIDED, *_STRUCTURED)
_INPUTS_ALONE = ("text_input", "image", "sampling_parameters")  # and no keys or defaults


@dataclasses.dataclass(frozen=True)
class ModelParameters:
    """What the model's configuration chooses: the scheduler's numbers, and the defaults of requests.

    rows, waiting, prefix_reuse, prefill_tokens, max_logprobs: of `Scheduler`. threads, device, gpu_memory_utilization,
    warmup: of `load`. stream_interval_ms: least time between two responses of a stream; 0 sends text as it comes.
    engine: its folder, beside the model's file or absolute. generation_config: auto takes the sampling that the
    engine's generation_config.json proposes as defaults, none does not. values: defaults of requests, by their names.
    """

    rows: int | None = None
    waiting: int = 256
    threads: int | None = None
    device: str | None = None
    gpu_memory_utilization: float = DEFAULT_GPU_MEMORY_UTILIZATION
    warmup: bool = True
    prefix_reuse: bool = True
    prefill_tokens: int = PREFILL_CHUNK
    max_logprobs: int = DEFAULT_MAX_LOGPROBS
    stream_interval_ms: float = 10.0
    engine: str = "engine"
    generation_config: str = "none"
    values: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def limits(self) -> dict[str, Any]:
        """The scheduler's limits, of `check_limits`."""
        return {name: getattr(self, name) for name in ("rows", "waiting", "prefill_tokens", "max_logprobs")}

    def defaults(self, folder: Path) -> Mapping[str, Any]:
        """The defaults of requests, for the engine in this folder. Raises RequestError."""
        if self.generation_config == "auto":
            return {**sampling_defaults(folder), **self.values}
        if self.generation_config != "none":
            raise RequestError(f"generation_config is {self.generation_config!r:.60}, allowed: auto or none")
        return self.values


@dataclasses.dataclass(frozen=True)
class TritonRequest:
    """A request: its prompt, whether text comes piece by piece and after the prompt, and the runtime's options."""

    prompt: str
    stream: bool
    echo: bool
    options: dict[str, Any]
    images: tuple[bytes, ...] = ()

    @property
    def content(self) -> Prompt:
        """The prompt as the runtime takes it."""
        if not self.images:
            return self.prompt
        parts: list[Mapping[str, Any]] = [{"type": "image", "image": image} for image in self.images]
        message: Mapping[str, Any] = {"role": "user", "content": [*parts, {"type": "text", "text": self.prompt}]}
        return [message]


def model_parameters(texts: Mapping[str, str]) -> ModelParameters:
    """The configuration's parameters, which are all text. Raises RequestError."""
    own: dict[str, Any] = {}
    values: dict[str, Any] = {}
    hints = get_type_hints(ModelParameters)
    del hints["values"]
    for name, text in texts.items():
        if name in hints:
            own[name] = convert(name, next(alternatives(hints[name])), text)
        else:
            values[name] = text
    _read(values)
    return ModelParameters(**own, values=values)


def read(tensors: Mapping[str, list[Any]], parameters: Mapping[str, Any], defaults: Mapping[str, Any]) -> TritonRequest:
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
    images = tuple(_image(text, n) for n, text in enumerate(plain.pop("image", ()), 1))
    sampling = _object("sampling_parameters", plain.pop("sampling_parameters", None))
    chosen: dict[str, Any] = {}
    for level in (defaults, _without_passing(parameters), sampling, plain):
        chosen |= _read(level)
    stream = chosen.pop("stream", False)
    exclude = chosen.pop("exclude_input_in_output", True)
    asked = [chosen.pop(name, False) for name in _LOGPROBS]
    if any(asked):
        chosen.setdefault("logprobs", 0)
    ignore_eos = chosen.pop("ignore_eos", False)
    return TritonRequest(prompt, stream, not exclude, with_seed(resolve(chosen, ignore_eos=ignore_eos)), images)


def _image(text: str, number: int) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise RequestError(
            f"image {number} is no base64 ({error}), allowed: an image file in base64; encode it"
        ) from None


def _element(declared: Input, values: list[Any]) -> Any:
    if not declared.many and len(values) != 1:
        raise RequestError(f"{declared.name} has {len(values)} elements, allowed: 1")
    return values if declared.many else values[0]


def _object(name: str, value: Any) -> Mapping[str, Any]:
    """A JSON object, which may be text; none is an empty one. Raises RequestError."""
    if not value:
        return {}
    if isinstance(value, str):
        check_parts(value, name)
    try:
        values = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{name}: not JSON ({error}); give one object") from None
    if not isinstance(values, dict):
        raise RequestError(f"{name} is {value!r:.60}, allowed: a JSON object")
    return values


def _without_passing(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Request parameters without those of the server itself and forwarded headers, whose names have a hyphen."""
    return {
        name: value
        for name, value in parameters.items()
        if "-" not in name and not name.startswith(("triton_", "sequence_")) and name not in ("priority", "timeout")
    }


def _read(values: Mapping[str, Any]) -> dict[str, Any]:
    """Options and flags, from values by any of their names. Raises RequestError."""
    chosen: dict[str, Any] = {}
    names: dict[str, str] = {}  # by which an option was given
    for name, option, value in _spread(values):
        if value is None or name in _MEANINGLESS:
            continue
        if name == "best_of":
            check_best_of(convert(name, int, value), _ONLY["n"])
            continue
        declared = _BY_NAME.get(name)
        only = declared.only if declared else _ONLY.get(name)
        if only is not None:
            if convert(name, type(only), value) != only:
                raise RequestError(f"{name} is {value!r:.60}, allowed: {only!r}")
            continue
        if name in _FLAGS:
            chosen[name] = convert(name, bool, value)
            continue
        if option is None and name not in _INPUTS_ALONE:
            continue
        if option not in OPTIONS:
            allowed = sorted({*_BY_NAME, *OPTIONS, *_READ, *_ONLY} - {*_INPUTS_ALONE})
            raise RequestError(f"unknown parameter {name!r:.60}; allowed: {', '.join(allowed)}")
        converted = convert(name, OPTIONS[option].type, value, OPTIONS[option].choices)
        if left_open(option, converted):
            continue
        if option in chosen and chosen[option] != converted:
            raise RequestError(
                f"{names[option]} is {chosen[option]!r:.60} and {name} is {converted!r:.60}; give one of them"
            )
        chosen[option] = converted
        names[option] = name
    return chosen


def _spread(values: Mapping[str, Any]) -> Iterator[tuple[str, str | None, Any]]:
    """Names, the option that each sets, and values, with each guide by itself. Raises RequestError."""
    for name, value in values.items():
        if name in _STRUCTURED:
            yield from _structure(name, value)
        elif name in GUIDED:
            yield _structured(name, GUIDED[name], value)
        elif not name.startswith("guided_decoding_"):
            yield name, _BY_NAME[name].option if name in _BY_NAME else name, value
    yield from _guide(values)


def _structure(name: str, value: Any) -> Iterator[tuple[str, str, Any]]:
    """Of an object of vLLM's, whose clients spell out what they leave open."""
    for word, guide in _object(name, value).items():
        if guide is None or guide is False or word in STRUCTURES_WITHOUT_EFFECT:
            continue
        if word not in STRUCTURES:
            raise RequestError(f"{name} has {word!r:.60}, allowed: {', '.join(STRUCTURES)}; leave it out")
        yield _structured(f"{name}.{word}", word, guide)


def _structured(name: str, word: str, value: Any) -> tuple[str, str, Any]:
    """A guide by its word; the texts of a choice may be JSON. Raises RequestError."""
    given = value
    if word == "choice" and value is not None:
        if isinstance(value, str):
            check_parts(value, name)
            with contextlib.suppress(ValueError, RecursionError):
                given = json.loads(value)
        if not isinstance(given, list) or not given or not all(isinstance(text, str) for text in given):
            allowed = "allowed: a list of one text or more; give the answers to allow"
            raise RequestError(f"{name} is {value!r:.60}, {allowed}")
    return name, STRUCTURES[word], structure_value(word, given)


def _guide(values: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Of TensorRT-LLM's type and guide, which type json does without."""
    kind = values.get("guided_decoding_guide_type")
    guide = values.get("guided_decoding_guide")
    if not kind and not guide:
        return
    if kind == "json" and not guide:
        yield "guided_decoding_guide_type", "json_schema", ANY_OBJECT
        return
    if not isinstance(kind, str) or kind not in _GUIDES or not isinstance(guide, str):
        raise RequestError(
            f"guided_decoding_guide_type is {kind!r:.60} with {'no' if guide is None else 'a'} guide, allowed: "
            f"{', '.join(_GUIDES)}, with the guide in guided_decoding_guide"
        )
    check_text(guide, "guided_decoding_guide")
    yield "guided_decoding_guide", _GUIDES[kind], guide

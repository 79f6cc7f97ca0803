"""Options of the command line that several commands share; those of a request come from its table of options."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..contract import DEFAULT_GPU_MEMORY_UTILIZATION
from ..engine_info import read_engine
from ..errors import RequestError
from ..runtime.text.files import read_text
from .streams import TEXT, typed

if TYPE_CHECKING:
    from ..runtime.requests.option_types import Option

Decorator = Callable[[Any], Any]


class _Path(click.Path[Path]):
    """A path, which an unset variable of a shell is not: empty, it would mean the folder that one stands in.

    Neither is a URL, which as a path would lose a slash.
    """

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """See click.ParamType."""
        if value == "":
            self.fail("it is empty; give a path", param, ctx)
        if "://" in str(value):
            self.fail(f"{value} is a URL; download it and give its path", param, ctx)
        return super().convert(value, param, ctx)


class _OutputFile(_Path):
    """A file to write, in a folder that is there: what is written last would be lost else, after all the work."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """See click.ParamType."""
        path = Path(super().convert(value, param, ctx))
        if not path.parent.is_dir():
            self.fail(f"{path}: {path.parent} is no folder; make it, or give another place", param, ctx)
        return path


class Number(click.FloatRange):
    """A number of a range, which nan is not, though it is neither below nor above."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """See click.ParamType."""
        number = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail(f"{value!r} is not a valid {self.name}.", param, ctx)
        return number


PATH = _Path(path_type=Path)
OUTPUT_FILE = _OutputFile(path_type=Path, dir_okay=False)
# What a help text says besides, where the command line differs from other ways to give the option.
_NOTES = {
    "logit_bias": "may be repeated",
    "json_schema": "give the schema itself or a file that holds it",
    "tools": "give the list itself or a file that holds it",
    "chat_template_kwargs": "give the object itself or a file that holds it",
}
# What an answer's text does not hold: said where a command can print one as JSON, and does not always.
_NEED_JSON = dict.fromkeys(("logprobs", "confidences", "prompt_logprobs"), "needs --json")

_FILES = ("json_schema", "tools", "chat_template_kwargs")  # options of JSON


def _check_threads(_context: click.Context, _option: click.Parameter, threads: int | None) -> int | None:
    if threads is not None:
        from ..runtime.loading import check_threads

        check_threads(threads, os.cpu_count() or 1, "this machine")
    return threads


engine = click.argument("engine", type=PATH)
threads = click.option(
    "--threads",
    type=click.IntRange(1),
    callback=_check_threads,
    help="Use this many CPU threads. [default: one per core]",
)
device = click.option(
    "--device", help="Run on cpu, cuda or cuda:N. [default: the device that the engine was built for]"
)
generation_config = click.option(
    "--generation-config",
    type=click.Choice(["none", "auto"]),
    default="none",
    show_default=True,
    help="Let the model's generation_config.json choose sampling that is left open (auto), or decode greedily (none).",
)
statistics = click.option("--stats", is_flag=True, help="Print passes, tokens per pass and times on standard error.")
host = click.option("--host", default="127.0.0.1", show_default=True, help="Listen on this address.")
editing_prompt = click.option(
    "-p", "--prompt", type=TEXT, help="Treat the text as an answer to this prompt. [default: the text stands alone]"
)


def loading(command: Callable[..., Any]) -> Callable[..., Any]:
    """How an engine is loaded to answer: the command gets it as `loading`, arguments of `load`."""

    @functools.wraps(command)
    def loads(*args: Any, **choices: Any) -> Any:
        _warn_of_memory(click.get_current_context())
        chosen = {name: choices.pop(name) for name in ("threads", "device", "gpu_memory_utilization", "tp_size")}
        return command(*args, loading={**chosen, "warmup": not choices.pop("no_warmup")}, **choices)

    options = (
        threads,
        device,
        click.option(
            "--gpu-memory-utilization",
            type=Number(0, 1, min_open=True),
            default=DEFAULT_GPU_MEMORY_UTILIZATION,
            show_default=True,
            help="Take this share of a GPU's memory for weights, passes and K/V, in a torch engine.",
        ),
        click.option(
            "--no-warmup",
            is_flag=True,
            help="Load sooner, and make passes slower for it: a torch engine captures its passes on a GPU when they "
            "first come, and the weights of an ONNX Runtime engine stay in small pages of memory.",
        ),
        click.option(
            "--tp-size",
            type=click.IntRange(1),
            help="Split a torch engine's weights and K/V over this many GPUs. [default: torchrun's ranks, or 1]",
        ),
    )
    for option in reversed(options):
        option(loads)
    return loads


def json_output(help: str = "Print one JSON object instead of text.") -> Decorator:
    """The flag --json, which is the argument `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help=help)


# What belongs to a conversation or to a server; --raw turns `chat` off.
WITHOUT_FLAG = ("chat", "continue_final_message", "prefill_chunk")


class RequestCommand(click.Command):
    """A command with an option for every option of a request, or for those that are `kept`, before --threads.

    They are made when a command line is read or explained: the table of options takes long to import.
    """

    def __init__(
        self, *args: Any, left_out: tuple[str, ...] = (), kept: tuple[str, ...] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._left_out = left_out
        self._kept = kept

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """See click.Command."""
        params = super().get_params(ctx)
        at = [param.name for param in params].index("threads")
        return [*params[:at], *self._request_options, *params[at:]]

    def invoke(self, ctx: click.Context) -> Any:
        """See click.Command. Options that the user has not given may come from the model."""
        if ctx.params.pop("generation_config", "none") == "auto":
            from ..runtime.requests.generation_config import sampling_defaults

            for name, value in sampling_defaults(ctx.params["engine"]).items():
                if not given(ctx, name):
                    ctx.params[name] = value
        _check_together(ctx)
        return super().invoke(ctx)

    @functools.cached_property
    def _request_options(self) -> list[click.Option]:
        from ..runtime.requests.options import OPTIONS

        names = OPTIONS.keys() - {*WITHOUT_FLAG, *self._left_out} if self._kept is None else set(self._kept)
        shown = [option for option in OPTIONS.values() if option.name in names]
        notes = _NOTES | _NEED_JSON if any(param.name == "as_json" for param in self.params) else _NOTES
        return [click.Option([_declaration(option), option.name], **_attributes(option, notes)) for option in shown]


def given(ctx: click.Context, name: str) -> bool:
    """Whether the user gave this option."""
    return ctx.get_parameter_source(name) not in (None, click.core.ParameterSource.DEFAULT)


def warn_unused(ctx: click.Context, names: Iterable[str], where: str) -> None:
    """Warn of each of these options that the user gave, as it has no effect `where` the command is, say in mode ar."""
    for name in names:
        if given(ctx, name):
            click.echo(f"Warning: {flag(name)} has no effect in {where}", err=True)


def _warn_of_memory(ctx: click.Context) -> None:
    share = "gpu_memory_utilization"
    if given(ctx, share) and (backend := read_engine(ctx.params["engine"]).manifest.backend) != "torch":
        warn_unused(ctx, (share,), f"an engine for {backend}")


UNUSED_IN_AR = ("threshold", "block_length", "groups")


def _check_together(ctx: click.Context) -> None:
    """Refuse flags that could not show; warn of those without effect where no line of a file can choose its mode."""
    if ctx.params.get("raw"):
        for name in ("system", "thinking", "chat_template_kwargs"):
            if given(ctx, name):
                raise click.UsageError(f"{flag(name)} needs the chat template; leave out --raw", ctx)
    if ctx.params.get("mode") == "ar" and not (ctx.params.get("input_file") or ctx.params.get("inputs")):
        warn_unused(ctx, UNUSED_IN_AR, "mode ar")


def flag(name: str) -> str:
    """How the command line spells an option of a request."""
    from ..runtime.requests.options import FLAGS

    return FLAGS.get(name, "--" + name.replace("_", "-"))


def _declaration(option: Option) -> str:
    """The flag, and where it is on by default the one that turns it off."""
    on = flag(option.name)
    return f"{on}/--no-{on.removeprefix('--')}" if option.type is bool and option.default else on


def _attributes(option: Option, notes: Mapping[str, str]) -> dict[str, Any]:
    help = option.help.text
    note = "may be repeated" if option.many else notes.get(option.name)
    if option.most is not None:
        note = f"may be repeated, {option.most}"
    if note is not None:
        help = f"{help.removesuffix('.')}; {note}."
    if option.type is bool:
        return {"is_flag": True, "default": option.default, "help": help}
    if option.many:
        return {"multiple": True, "type": _type(option.one_type), "help": help}
    if option.name == "logit_bias":
        return {"multiple": True, "callback": _biases, "metavar": "ID=NUMBER", "help": help}
    if option.name in _FILES:
        return {"callback": _file_or_text, "metavar": "FILE|TEXT", "help": help}
    if option.default is None and option.help.default not in (None, "none"):
        help += f" [default: {option.help.default}]"
    attributes = {"help": help, "default": option.default, "show_default": option.default is not None}
    if option.choices and option.type is int:
        return attributes | {"callback": _integer_or_word, "metavar": "|".join(("INTEGER", *option.choices))}
    return attributes | {"type": click.Choice(option.choices) if option.choices else _type(option.type)}


def _type(kind: Any) -> Any:
    return TEXT if kind is str else kind


def _biases(_context: click.Context, _option: click.Parameter, words: tuple[str, ...]) -> dict[str, float]:
    """`ID=NUMBER` words as a mapping."""
    biases = {}
    for word in words:
        token, _, number = word.partition("=")
        try:
            biases[token] = float(number)
        except ValueError:
            raise click.BadParameter(f"{word!r} is not ID=NUMBER, such as 11=-5") from None
    return biases


def _file_or_text(_context: click.Context, _option: click.Parameter, value: str | None) -> str | None:
    """The value itself if it is an object, a list or a literal of JSON, else what the file of that name holds."""
    if value is None or value.lstrip().startswith(("{", "[")) or value.strip() in ("true", "false"):
        return value if value is None else typed(value)
    if value == "":
        raise click.BadParameter("it is empty; give a file or the JSON itself")
    try:
        return read_text(Path(value))
    except (OSError, ValueError, RequestError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise click.BadParameter(
            f"{value}: {reason}; give a file or the JSON itself, which begins with {{ or ["
        ) from None


def _integer_or_word(_context: click.Context, option: click.Parameter, value: str | None) -> int | str | None:
    from ..runtime.requests.options import OPTIONS

    declared = OPTIONS[option.name or ""]
    if value is None or value in declared.choices:
        return value
    try:
        return int(value)
    except ValueError:
        raise click.BadParameter(f"{value!r:.60} is not allowed; give {declared.allowed}") from None

"""The chat template of a folder, rendered as transformers renders it."""

from __future__ import annotations

import datetime
import functools
import json
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...engine_folder import DEFAULT_TEMPLATE_FILE, TEMPLATE_FILE, TEMPLATES_FOLDER, TOKENIZER_CONFIG_FILE
from ...errors import RequestError
from .thoughts import BRACKETS

if TYPE_CHECKING:
    import jinja2

_INSTEAD = "use --raw (chat=False)"
_TOOL_USE = "tool_use"
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class ChatTemplate:
    """A folder's chat template, which may be missing or broken: then `render` refuses, and `problem` says why.

    Args:
        folder: an engine or a checkpoint.
        config: its tokenizer_config.json.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self.source = ""
        self.problem: str | None = None
        self._config = config
        self.to_ascii: Callable[[str], str] = str  # spells JSON for which the template wants no other characters
        try:
            where, source = _find(folder, config)
            tool_source = _find_tool_use(folder, config)
        except ValueError as error:
            self.problem = str(error)
            return
        self.source = source
        try:
            self._template = self._environment().from_string(source)
        except Exception as error:  # a SyntaxError or RecursionError of what Jinja makes of it, too
            self.problem = f"{where}: not a chat template ({_short(error)})"
        self._tool_source = tool_source
        self.source += tool_source or ""  # of both, since both stand around quoted text

    @functools.cached_property
    def _tool_template(self) -> jinja2.Template:
        return self._template if self._tool_source is None else self._environment().from_string(self._tool_source)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        thinking: bool,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
        answer: bool = True,
    ) -> str:
        """The conversation, with the start of the assistant's turn if an answer is to follow.

        `variables` are the template's own. Raises RequestError.
        """
        if self.problem is not None:
            raise RequestError(f"{self.problem}; {_INSTEAD} for plain completion")
        try:
            return self._rendered(messages, thinking, tools, variables or {}, answer)
        except Exception as error:  # a template is a program: it can divide by zero
            raise RequestError(
                f"the chat template refuses the conversation ({_short(error)}); change the messages, or {_INSTEAD}"
            ) from None

    @functools.cached_property
    def takes_thoughts(self) -> bool:
        """Whether thoughts of an earlier turn are parts of its content, as in Mistral's templates."""
        if BRACKETS.open not in self.source:
            return False
        content = [{"type": "thinking", "thinking": "probe thought"}, {"type": "text", "text": "probe"}]
        question = {"role": "user", "content": "Hello"}
        try:
            shown = self._rendered([question, {"role": "assistant", "content": content}, question], False)
        except Exception:  # a template is a program
            return False
        return f"{BRACKETS.open}probe thought{BRACKETS.close}" in shown

    def try_out(self) -> str | None:
        """What is wrong with the template, if it cannot even render one plain question."""
        if self.problem is not None:
            return self.problem
        try:
            self._rendered([{"role": "user", "content": "Hello"}], False)
        except Exception as error:
            return f"the chat template refuses a plain question ({_short(error)})"
        return None

    def _rendered(
        self,
        messages: Sequence[Mapping[str, Any]],
        thinking: bool,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] = types.MappingProxyType({}),
        answer: bool = True,
    ) -> str:
        values = {"messages": messages, "tools": tools, "add_generation_prompt": answer, "enable_thinking": thinking}
        template = self._template if tools is None else self._tool_template
        return str(template.render({"documents": None, **token_texts(self._config), **variables, **values}))

    def _environment(self) -> jinja2.Environment:
        import jinja2.ext  # takes time to import, and the command line's help needs none
        import jinja2.nodes
        import jinja2.parser
        import jinja2.sandbox

        class Generation(jinja2.ext.Extension):
            """`{% generation %}` encloses what training counts as said by the assistant; here it is only a scope."""

            tags = {"generation"}  # noqa: RUF012

            def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
                line = parser.stream.current.lineno
                parser.stream.skip()
                body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
                return jinja2.nodes.Scope(body, lineno=line)

        def to_json(
            value: Any,
            ensure_ascii: bool = False,
            indent: int | str | None = None,
            separators: tuple[str, str] | None = None,
            sort_keys: bool = False,
        ) -> str:
            """JSON as it is, where Jinja's own filter escapes it for HTML."""
            text = json.dumps(value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)
            return self.to_ascii(text) if ensure_ascii else text

        def refuse(message: str) -> str:
            raise jinja2.TemplateError(message)

        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = to_json
        environment.globals["raise_exception"] = refuse
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        return environment


def token_texts(config: Mapping[str, Any]) -> dict[str, str]:
    """The tokens that a tokenizer_config.json names, such as `bos_token`, by their text."""
    extra = config.get("extra_special_tokens")
    named = {name: config.get(name) for name in _NAMED_TOKENS} | (extra if isinstance(extra, dict) else {})
    texts = {name: token.get("content") if isinstance(token, dict) else token for name, token in named.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _find(folder: Path, config: Mapping[str, Any]) -> tuple[str, str]:
    """Where the template for a conversation without tools stands, and its text. Raises ValueError with the problem."""
    for path in (folder / DEFAULT_TEMPLATE_FILE, folder / TEMPLATE_FILE):
        if path.is_file():
            try:
                return str(path), path.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}: not UTF-8 at byte {error.start}") from None
    where = f"{folder / TOKENIZER_CONFIG_FILE}: chat_template"
    templates = config.get("chat_template")
    if templates is None:
        raise ValueError("the engine has no chat template")
    if isinstance(templates, list) and all(isinstance(one, dict) and "name" in one for one in templates):
        templates = {one["name"]: one.get("template") for one in templates}
    if isinstance(templates, dict):
        if "default" not in templates:
            names = ", ".join(map(str, templates)) or "no template"
            raise ValueError(f"{where} holds {names:.200}, expected one named default")
        templates = templates["default"]
    if not isinstance(templates, str):
        raise ValueError(f"{where} holds a {type(templates).__name__}, expected text or templates by name")
    return where, templates


def _find_tool_use(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The template for a conversation with tools, where it is another one."""
    path = folder / TEMPLATES_FOLDER / f"{_TOOL_USE}.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    templates = config.get("chat_template")
    if (folder / TEMPLATE_FILE).is_file() or not isinstance(templates, (list, dict)):
        return None
    named = templates if isinstance(templates, dict) else {one["name"]: one.get("template") for one in templates}
    source = named.get(_TOOL_USE)
    return source if isinstance(source, str) else None


def _short(error: Exception) -> str:
    """What an error says, at bearable length."""
    text = str(error) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]}.."

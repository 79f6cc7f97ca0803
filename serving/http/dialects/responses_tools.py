"""The tools that a request of `/v1/responses` offers: functions, functions of a namespace, and those of a server."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, get_args

from pydantic import Discriminator, Field, Tag

from ..body_parts import Body, ConversationPart, Many
from ..template_fields import allowed

_HostedKind = Literal[
    "code_interpreter", "file_search", "image_generation", "mcp", "tool_search", "web_search", "web_search_preview"
]


class Function(ConversationPart):
    """A function of the client's."""

    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Namespace(ConversationPart):
    """Functions under a common name, as Codex sends them."""

    type: Literal["namespace"]
    name: str
    description: str | None = None
    tools: Many[Function]


class Hosted(ConversationPart):
    """A tool that the server would run; Codex sends one unasked."""

    type: _HostedKind


def _kind(tool: Any) -> str:
    kind = tool.get("type") if isinstance(tool, dict) else getattr(tool, "type", None)
    if kind == "namespace":
        return "namespace"
    return "hosted" if kind in get_args(_HostedKind) else "function"


Tool = Annotated[
    Annotated[Function, Tag("function")] | Annotated[Namespace, Tag("namespace")] | Annotated[Hosted, Tag("hosted")],
    Discriminator(_kind),
]
Tools = Annotated[Many[Tool], Field(description="Offer these tools; those that a server would run are left out.")]


class AllowedTool(ConversationPart):
    """A tool that may be called, by its name; those that a server would run have none."""

    type: str
    name: str | None = None
    namespace: str | None = None


class AllowedTools(Body):
    """The tools that may be called, of those that are offered."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Many[AllowedTool]

    def of(self, offered: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Those of the offered functions. Raises RequestError."""
        names = list[str]()
        for tool in self.tools:
            if tool.type == "function" and tool.name is not None:
                names.append(joined(tool.namespace, tool.name))
            elif tool.type == "namespace":
                begin = f"{tool.name}."
                names += [name for one in offered if (name := one["function"]["name"]).startswith(begin)]
        return allowed(offered, names)


def joined(namespace: str | None, name: str) -> str:
    """The name by which the model calls a function."""
    return name if namespace is None else f"{namespace}.{name}"


def plain(tools: Sequence[Function | Namespace | Hosted]) -> list[dict[str, Any]]:
    """The functions in OpenAI's older form."""
    listed = []
    for namespace, tool in _functions(tools):
        values = {"description": tool.description, "parameters": tool.parameters, "strict": tool.strict}
        function = {
            "name": joined(namespace, tool.name),
            **{key: value for key, value in values.items() if value is not None},
        }
        listed.append({"type": "function", "function": function})
    return listed


def places(tools: Sequence[Function | Namespace | Hosted]) -> dict[str, dict[str, str]]:
    """By the model's name of a function in a namespace: the fields that name it in a call."""
    pairs = [(namespace, tool.name) for namespace, tool in _functions(tools) if namespace is not None]
    return {joined(namespace, name): {"name": name, "namespace": namespace} for namespace, name in pairs}


def left_out(tools: Sequence[Function | Namespace | Hosted]) -> list[str]:
    """Sentences about the tools that are not offered to the model."""
    kinds = dict.fromkeys(tool.type for tool in tools if isinstance(tool, Hosted))
    return [f"tool {kind}: left out, since no server runs it here" for kind in kinds]


def _functions(tools: Sequence[Function | Namespace | Hosted]) -> Iterator[tuple[str | None, Function]]:
    for tool in tools:
        if isinstance(tool, Function):
            yield None, tool
        elif isinstance(tool, Namespace):
            for function in tool.tools:
                yield tool.name, function

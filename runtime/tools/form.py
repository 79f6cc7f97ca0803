"""Which form the calls of a model have: what its chat template makes of one."""

from __future__ import annotations

import functools
import json
from typing import Literal

from ...errors import RequestError
from ..text.chat_template import ChatTemplate
from ..text.messages import CALL_OPEN, MISTRAL_ARGUMENTS, MISTRAL_CALL
from .json_form import JsonReader
from .llama_form import LlamaReader
from .mistral_form import MistralListReader, MistralReader
from .reader import CallReader
from .xml_form import FUNCTION, PARAMETER, XmlReader

Form = Literal["xml", "json", "mistral", "mistral_id", "mistral_list", "mistral_list_id", "llama"]
READERS: dict[Form, type[CallReader]] = {
    "xml": XmlReader,
    "json": JsonReader,
    "mistral": MistralReader,
    "mistral_id": MistralReader,
    "mistral_list": MistralListReader,
    "mistral_list_id": MistralListReader,
    "llama": LlamaReader,
}
_NAME = "probe_tool"
_KEY = "probe_key"
_VALUE = "probe value"
_QUESTION = "probe question"
_TOOL = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": "Probe.",
        "parameters": {"type": "object", "properties": {_KEY: {"type": "string"}}, "required": [_KEY]},
    },
}
_CALL = {"id": "call00000", "type": "function", "function": {"name": _NAME, "arguments": {_KEY: _VALUE}}}


@functools.lru_cache(maxsize=16)
def find_form(template: ChatTemplate) -> Form:
    """The form of calls in a template's conversations. Raises RequestError where it shows no tools."""
    question = {"role": "user", "content": _QUESTION}
    call_turn = {"role": "assistant", "content": "", "tool_calls": [_CALL]}
    result = {"role": "tool", "name": _NAME, "tool_call_id": _CALL["id"], "content": "probe result"}
    try:
        shown = template.render([question], False, [_TOOL])
        turns = template.render([question, call_turn, result], False, [_TOOL]).rpartition(_QUESTION)[2]
    except RequestError as error:
        raise RequestError(f"tools are not for this engine: {error}") from None
    if _NAME not in shown:
        raise RequestError("tools are not for this engine: its chat template does not show them; ask without tools")
    call = turns.partition(CALL_OPEN)[2]
    if f"{FUNCTION}{_NAME}>" in call and f"{PARAMETER}{_KEY}>" in call:
        return "xml"
    if _is_json_call(call):
        return "json"
    if opened_list := turns.partition(MISTRAL_CALL)[2]:
        mistral: tuple[tuple[Form, Form], ...] = (("mistral", "mistral_id"), ("mistral_list", "mistral_list_id"))
        for form, with_id in mistral:
            if call := _read(form, opened_list):
                return with_id if str(_CALL["id"]) in call else form
    if (at := turns.find(f'{{"name": "{_NAME}", "parameters"')) >= 0 and _read("llama", turns[at:]):
        return "llama"
    raise RequestError(
        "tools are not for this engine: its chat template writes calls in a form that is unknown here, allowed: "
        f"{CALL_OPEN} with {FUNCTION}NAME> or with a JSON object, {MISTRAL_CALL}NAME{MISTRAL_ARGUMENTS} with one, "
        f"{MISTRAL_CALL} with a JSON list, a JSON object with name and parameters; "
        "ask without tools"
    )


def _is_json_call(text: str) -> bool:
    try:
        call, _ = json.JSONDecoder().raw_decode(text.lstrip())
    except ValueError:
        return False
    return isinstance(call, dict) and call.get("name") == _NAME and _KEY in str(call.get("arguments"))


def _read(form: Form, text: str) -> str:
    """The text of the probe's call, empty where none is read in that form."""
    reader = READERS[form]({})
    arguments = reader.push(text, final=True)
    found = reader.ended and reader.name == _NAME and _KEY in arguments
    return text.removesuffix(reader.unread) if found else ""

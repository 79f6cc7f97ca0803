"""Chat templates that show tools, and engines with them: calls and thoughts as families of models write them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from stand_ins.checkpoints import TINY_CHAT

from nemodiff.builder.build import Builder

_END = """
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' + ('<think>\\n' if enable_thinking else '<think></think>') -}}
{%- endif -%}
"""
XML = (
    """
{%- set truncate = truncate_history_thinking | default(true) -%}
{%- set system = messages[0].content if messages[0].role == 'system' else '' -%}
{{- '<|im_start|>system\\n' + system -}}
{%- if effort is defined -%}{{- ' effort ' + effort -}}{%- endif -%}
{%- if reasoning_effort is defined -%}{{- ' reasoning ' + reasoning_effort -}}{%- endif -%}
{%- if tools -%}
{{- '\\n\\n# Tools\\n<tools>\\n' -}}
{%- for tool in tools -%}
{%- set f = tool.function -%}
{{- '<function>\\n<name>' + f.name + '</name>\\n<description>' + (f.description or '') + '</description>\\n' -}}
{%- for name, p in f.parameters.properties | items -%}
{{- '<parameter>\\n<name>' + name + '</name>\\n<type>' + (p.type | string) + '</type>\\n</parameter>\\n' -}}
{%- endfor -%}
{{- '</function>\\n' -}}
{%- endfor -%}
{{- '</tools>' -}}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- for m in messages if m.role != 'system' -%}
{%- if m.role == 'assistant' -%}
{{- '<|im_start|>assistant\\n' -}}
{{- '<think>' + m.reasoning_content + '</think>' if m.reasoning_content and not truncate else '<think></think>' -}}
{{- m.content.split('</think>')[-1] -}}
{%- for call in m.tool_calls or [] -%}
{{- ('\\n' if not loop.first else '') + '<tool_call>\\n<function=' + call.function.name + '>\\n' -}}
{%- for name, value in call.function.arguments | items -%}
{{- '<parameter=' + name + '>\\n' + (value if value is string else value | tojson) + '\\n</parameter>\\n' -}}
{%- endfor -%}
{{- '</function>\\n</tool_call>' -}}
{%- endfor -%}
{{- '<|im_end|>\\n' -}}
{%- elif m.role == 'tool' -%}
{{- '<|im_start|>user\\n<tool_response>\\n' + m.content + '\\n</tool_response>\\n<|im_end|>\\n' -}}
{%- else -%}
{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
"""
    + _END
)
JSON = (
    """
{%- for m in messages -%}
{{- '<|im_start|>' + m.role + '\\n' + m.content -}}
{%- if loop.first and tools -%}{{- '\\n<tools>\\n' + (tools | tojson) + '\\n</tools>' -}}{%- endif -%}
{%- for call in m.tool_calls or [] -%}
{{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' + (call.function.arguments | tojson) -}}
{{- '}\\n</tool_call>' -}}
{%- endfor -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
"""
    + _END
)
_CALLS = "{%- for call in m.tool_calls or [] -%}"
_ARGUMENTS = "(call.function.arguments | tojson)"
_NAMED = '{{- \'{"name": "\' + call.function.name + \'", "KEY": \' + ' + _ARGUMENTS + " -}}"
_WITH_ID = (
    "{%- if call.id | length != 9 -%}{{- raise_exception('an id has nine characters') -}}{%- endif -%}"
    "{{- ', \"id\": \"' + call.id + '\"' -}}"
)
_COMMA = "{{- ', ' if not loop.last else '' -}}"
# How a template writes the calls of a turn.
_WRITTEN = {
    "mistral": _CALLS + "{{- '[TOOL_CALLS]' + call.function.name + '[ARGS]' + " + _ARGUMENTS + " -}}{%- endfor -%}",
    "mistral_id": _CALLS
    + "{{- '[TOOL_CALLS]' + call.function.name + '[CALL_ID]' + call.id + '[ARGS]' + "
    + _ARGUMENTS
    + " -}}{%- if call.id | length != 9 -%}{{- raise_exception('an id has nine characters') -}}{%- endif -%}"
    + "{%- endfor -%}",
    "mistral_list": "{{- '[TOOL_CALLS][' if m.tool_calls else '' -}}"
    + _CALLS
    + _NAMED.replace("KEY", "arguments")
    + "{{- '}' -}}"
    + _COMMA
    + "{%- endfor -%}{{- ']' if m.tool_calls else '' -}}",
    "mistral_list_id": "{{- '[TOOL_CALLS] [' if m.tool_calls else '' -}}"
    + _CALLS
    + _NAMED.replace("KEY", "arguments")
    + _WITH_ID
    + "{{- '}' -}}"
    + _COMMA
    + "{%- endfor -%}{{- ']' if m.tool_calls else '' -}}",
    "llama": _CALLS
    + _NAMED.replace("KEY", "parameters")
    + "{{- '}' + ('; ' if not loop.last else '') -}}{%- endfor -%}",
}


def _with_calls(written: str) -> str:
    return (
        """
{%- for m in messages -%}
{{- '<|im_start|>' + m.role + '\\n' + m.content -}}
{%- if loop.first and tools -%}{{- '\\n<tools>\\n' + (tools | tojson) + '\\n</tools>' -}}{%- endif -%}
"""
        + written
        + """
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
"""
        + _END
    )


# Thoughts as Mistral's templates write them: parts of a turn's content, and opened by the model itself.
BRACKETS = (
    """
{%- for m in messages -%}
{{- '<|im_start|>' + m.role + '\\n' -}}
{%- if m.content is string -%}{{- m.content -}}
{%- else -%}
{%- for part in m.content -%}
{{- '[THINK]' + part.thinking + '[/THINK]' if part.type == 'thinking' else part.text -}}
{%- endfor -%}
{%- endif -%}
{%- if loop.first and tools -%}{{- '\\n<tools>\\n' + (tools | tojson) + '\\n</tools>' -}}{%- endif -%}
"""
    + _WRITTEN["mistral"]
    + """
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{{- '<|im_start|>assistant\\n' if add_generation_prompt else '' -}}
"""
)
TEMPLATES = {"xml": XML, "json": JSON, **{form: _with_calls(written) for form, written in _WRITTEN.items()}}
# Special tokens of tiny-chat's that have other names in such a checkpoint.
_NAMES = {
    "xml": {"<SPECIAL_14>": "<tool_call>", "<SPECIAL_15>": "</tool_call>"},
    "json": {"<SPECIAL_14>": "<tool_call>", "<SPECIAL_15>": "</tool_call>"},
    "mistral": {"<SPECIAL_14>": "[TOOL_CALLS]", "<SPECIAL_15>": "[ARGS]"},
    "mistral_id": {"<SPECIAL_14>": "[TOOL_CALLS]", "<SPECIAL_15>": "[ARGS]", "<SPECIAL_16>": "[CALL_ID]"},
    "mistral_list": {"<SPECIAL_14>": "[TOOL_CALLS]"},
    "mistral_list_id": {"<SPECIAL_14>": "[TOOL_CALLS]"},
    "llama": {},
    "brackets": {
        "<SPECIAL_14>": "[TOOL_CALLS]",
        "<SPECIAL_15>": "[ARGS]",
        "<think>": "[THINK]",
        "</think>": "[/THINK]",
    },
}
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tell the weather.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 12},
                "days": {"type": "integer", "minimum": 1, "maximum": 9},
                "unit": {"enum": ["C", "F"]},
            },
            "required": ["city", "days"],
        },
    },
}
CLOCK: dict[str, Any] = {"type": "function", "function": {"name": "clock", "description": "Tell the time."}}
TOOLS = [WEATHER, CLOCK]


def tool_checkpoint(folder: Path, form: str, *, special: bool = True) -> Path:
    """A checkpoint with a template that shows tools; `special`: whether the markers of a call are special tokens."""
    shutil.copytree(TINY_CHAT, folder)
    (folder / "chat_template.jinja").write_text(BRACKETS if form == "brackets" else TEMPLATES[form])
    if special:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            text = (folder / name).read_text()
            for name_here, name_there in _NAMES[form].items():
                text = text.replace(name_here, name_there)
            (folder / name).write_text(json.dumps(json.loads(text)))
    return folder


def tool_engine(folder: Path, form: str, *, special: bool = True) -> Path:
    """An engine of such a checkpoint, with tiny-chat's weights."""
    return Builder(tool_checkpoint(folder / "checkpoint", form, special=special), folder / "engine").run()

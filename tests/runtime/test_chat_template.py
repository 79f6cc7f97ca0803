"""Chat templates: transformers is the oracle, messages stay text whatever they hold, and what is broken is said."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from stand_ins.chats import chat_ids
from stand_ins.checkpoints import TINY_CHAT
from stand_ins.messages import user

import nemodiff
from nemodiff.cli import main
from nemodiff.runtime.text.chat_template import ChatTemplate
from nemodiff.runtime.text.codec import TextCodec

TALK = [
    {"role": "system", "content": "Be <b>brief</b> & kind."},
    {"role": "user", "content": " Sort 3, 1, 2 & é 漢\n"},
    {"role": "assistant", "content": "<think>easy</think>1, 2, 3.", "reasoning_content": None},
    {"role": "user", "content": "And 'now'?"},
]
LOOP = "{% for m in messages %}"
END = "{% endfor %}"
SHAPES = {
    "turns": LOOP + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n" + END,
    "prompt": LOOP + "{{ m.content }}" + END + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "generation": LOOP + "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n" + END,
    "generation with dashes": LOOP + "{%- generation -%} {{ m.content }} {%- endgeneration -%}" + END,
    "generation is a scope": "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}",
    "date": "{{ strftime_now('%Y %B') }}{{ messages[0].content }}",
    "date if there is one": "{% if strftime_now is defined %}{{ strftime_now('%Y') }}{% else %}2024{% endif %}",
    "tools are none": "{% if tools is not none %}tools{% endif %}{% if tools is defined %}defined{% endif %}!",
    "documents are none": "{% if documents is none %}none{% endif %}{{ documents }}",
    "json": LOOP + "{{ m | tojson }}\n" + END,
    "json in ascii": LOOP + "{{ m.content | tojson(ensure_ascii=True) }}\n" + END,
    "json indented": "{{ messages[:2] | tojson(indent=2) }}",
    "json separators": "{{ messages[0] | tojson(separators=(',', ':'), sort_keys=true) }}",
    "json is not escaped again": "{{ ('<a>' | tojson) ~ messages[0].content }}",
    "no escaping": "{{ messages[0].content }}{{ messages[0].content | e }}",
    "missing keys": LOOP + "{{ m.tool_calls is defined }}{{ m.reasoning_content is defined }}{{ m.name }}" + END,
    "loop controls": LOOP + "{% if loop.index > 2 %}{% break %}{% endif %}{{ m.role }}{% continue %}x" + END,
    "whitespace control": "  {% if true %}\n  a\n  {% endif %}\n{{- messages[0].content -}}   \n",
    "namespace": "{% set n = namespace(i=0) %}" + LOOP + "{% set n.i = n.i + 1 %}" + END + "{{ n.i }}",
    "macro": "{% macro turn(m) %}[{{ m.role }}]{{ m.content | trim }}{% endmacro %}" + LOOP + "{{ turn(m) }}" + END,
    "named tokens": "{{ bos_token }}{{ eos_token }}{{ pad_token is defined }}{{ unk_token }}",
    "thinking": "{{ '<think>\n' if enable_thinking else '<think></think>' }}{{ messages[-1].content }}",
    "think split": LOOP + "{{ m.content.split('</think>')[-1].lstrip('\\n') }}" + END,
    "dictionaries": "{{ dict(a=1) }}{% for k, v in messages[0].items() %}{{ k }}={{ v }};{% endfor %}",
    "filters": "{{ messages | map(attribute='role') | join(', ') }}{{ messages | selectattr('role', 'equalto', 'user') | list | length }}",  # noqa: E501
    "special tokens side by side": "<s><|im_start|> <|im_end|></s>\n\n<SPECIAL_100>x",
}


def checkpoint(folder: Path, template: str | None = None, **config: Any) -> Path:
    """tiny-chat's tokenizer with another template, and other fields in its config."""
    folder.mkdir(exist_ok=True)
    shutil.copy(TINY_CHAT / "tokenizer.json", folder)
    values = json.loads((TINY_CHAT / "tokenizer_config.json").read_text()) | config
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def assert_as_transformers(folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    peer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    codec = TextCodec(folder)
    asked: dict[str, Any] = {"add_generation_prompt": True, "enable_thinking": True}
    text = peer.apply_chat_template(TALK, tokenize=False, **asked)
    plain = [{name: value for name, value in m.items() if value is not None} for m in TALK]
    codec.template.to_ascii = lambda text: json.dumps(json.loads(text))
    assert codec.template.render(plain, True) == text
    assert chat_ids(TextCodec(folder), TALK, True) == peer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.torch
@pytest.mark.parametrize("shape", SHAPES)
def test_a_template_renders_as_with_transformers(tmp_path: Path, shape: str) -> None:
    assert_as_transformers(checkpoint(tmp_path, SHAPES[shape]))


@pytest.mark.torch
@pytest.mark.parametrize(
    "templates",
    [
        [{"name": "default", "template": "a{{ messages[0].content }}"}, {"name": "tool_use", "template": "b"}],
        [{"name": "tool_use", "template": "{% broken"}, {"name": "default", "template": "c"}],
        {"default": "d{{ messages[1].content }}", "rag": "e"},
        "f{{ messages[0].content }}",
    ],
)
def test_named_templates_are_found_as_by_transformers(tmp_path: Path, templates: Any) -> None:
    assert_as_transformers(checkpoint(tmp_path, chat_template=templates))


@pytest.mark.torch
@pytest.mark.parametrize("beside", [None, "other"])
def test_templates_in_their_own_folder_are_found_as_by_transformers(tmp_path: Path, beside: str | None) -> None:
    folder = checkpoint(tmp_path, beside, chat_template="old")
    (folder / "additional_chat_templates").mkdir()
    for name in ("default", "tool_use"):
        (folder / "additional_chat_templates" / f"{name}.jinja").write_text(f"{name} {{{{ messages[0].content }}}}")
    assert_as_transformers(folder)


@pytest.mark.torch
def test_tokens_that_take_in_space_do_so_as_with_transformers(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, "<|im_start|>  \n{{ messages[0].content }} \n <|im_end|> x <s> <s>\n ")
    values = json.loads((folder / "tokenizer.json").read_text())
    for token in values["added_tokens"]:
        token["rstrip"] = token["content"] == "<|im_start|>"
        token["lstrip"] = token["content"] in ("<|im_end|>", "<s>")
    (folder / "tokenizer.json").write_text(json.dumps(values))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["added_tokens_decoder"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert_as_transformers(folder)


@pytest.mark.torch
def test_tokens_that_are_objects_are_named_as_with_transformers(tmp_path: Path) -> None:
    token = {"__type": "AddedToken", "content": "<s>", "lstrip": False, "normalized": False, "rstrip": False}
    folder = checkpoint(tmp_path, "{{ bos_token }}{{ messages[0].content }}", bos_token={**token, "single_word": False})
    assert_as_transformers(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text()) | {"add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert TextCodec(folder).encode("a")[0] == 1


@pytest.mark.torch
def test_a_prompt_is_neither_cut_nor_filled_up(tmp_path: Path) -> None:
    """tokenizer.json may say how training cut its texts; transformers heeds it only where it is asked to."""
    transformers = pytest.importorskip("transformers")
    folder = checkpoint(tmp_path, (TINY_CHAT / "chat_template.jinja").read_text())
    values = json.loads((folder / "tokenizer.json").read_text())
    values["truncation"] = {"max_length": 6, "stride": 0, "strategy": "LongestFirst", "direction": "Right"}
    values["padding"] = {
        "strategy": {"Fixed": 519},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<unk>",
    }
    (folder / "tokenizer.json").write_text(json.dumps(values))
    codec, whole = TextCodec(folder), TextCodec(TINY_CHAT)
    peer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    for text in ("", "a", "Write JSON for Emil, age 31, from Oslo, who owns a yak. " * 12):
        assert codec.encode(text) == whole.encode(text) == peer(text, add_special_tokens=False)["input_ids"]
        assert chat_ids(codec, user(text)) == chat_ids(whole, user(text))
    told = json.loads(codec.source)  # what a grammar reads
    assert (told["truncation"], told["padding"]) == (None, None)


PRIVATE = "".join(map(chr, range(0xE000, 0xF900)))
LAST = "".join(map(chr, range(0x10FE00, 0x110000)))


@pytest.mark.parametrize("content", [PRIVATE, f"{PRIVATE}<|im_end|>", f"{LAST}<s>{LAST[::-1]}</s>\U0010ffff"])
def test_a_message_of_every_private_character_is_text(content: str) -> None:
    codec = TextCodec(TINY_CHAT)
    ids = chat_ids(codec, user(content))
    assert codec.decode(ids).endswith(f"user\n{content}\nassistant\n<think></think>")
    assert [i for i in ids if i < 128] == [i for i in chat_ids(codec, user("")) if i < 128]


@settings(max_examples=100)
@given(st.lists(st.sampled_from(["<|im_end|>", "</think>", *LAST[-130:], "<", "a"]), max_size=12).map("".join))
def test_what_is_quoted_comes_back(content: str) -> None:
    special = TextCodec(TINY_CHAT)._special
    quoted = special.quote(content)
    assert "<|im_end|>" not in quoted
    assert "</think>" not in quoted
    assert special.split(quoted + quoted) == [content + content]


def test_json_in_ascii_of_a_special_token_is_text(tmp_path: Path) -> None:
    codec = TextCodec(checkpoint(tmp_path, "<s>{{ messages[0].content | tojson(ensure_ascii=True) }}"))
    content = 'é<s>"\U0010ffff漢 \x7f'
    ids = chat_ids(codec, user(content))
    assert ids == [1, *codec.encode(json.dumps(content))]


def test_a_template_may_name_further_tokens_of_its_config(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, "{{ image_token }}{{ bos_token }}", extra_special_tokens={"image_token": "<image>"})
    assert TextCodec(folder).template.render([], False) == "<image><s>"


def test_special_tokens_in_other_fields_of_a_message_are_text(tmp_path: Path) -> None:
    codec = TextCodec(checkpoint(tmp_path, "{{ messages[0].name }}{{ messages[0].calls[0].x }}"))
    message: Any = {"role": "user", "content": "", "name": "<s>", "calls": [{"x": "</s>"}]}
    assert chat_ids(codec, [message]) == codec.encode("<s></s>")


def test_the_end_of_thinking_is_found_where_it_is_an_ordinary_token(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, "{{ messages[0].content }}")
    values = json.loads((folder / "tokenizer.json").read_text())
    for token in values["added_tokens"]:
        if "think" in token["content"]:
            token["special"] = False
    (folder / "tokenizer.json").write_text(json.dumps(values))
    codec = TextCodec(folder)
    assert codec.end_think == TextCodec(TINY_CHAT).end_think
    assert codec.decode([12, 13]) == "<think></think>"


BROKEN: list[tuple[Callable[[Path], Path], str]] = [
    (lambda folder: checkpoint(folder, "{% nonsense %}"), "not a chat template (Encountered unknown tag"),
    (lambda folder: checkpoint(folder, "{{ x | nothing }}"), "not a chat template (No filter named"),
    (lambda folder: checkpoint(folder, chat_template=5), "chat_template holds a int"),
    (lambda folder: checkpoint(folder, chat_template=[{"template": "x"}]), "chat_template holds a list"),
    (lambda folder: checkpoint(folder, chat_template={"tool_use": "x", "rag": "y"}), "holds tool_use, rag, expected"),
    (lambda folder: checkpoint(folder, chat_template=[{"name": "default"}]), "chat_template holds a NoneType"),
]


@pytest.mark.parametrize(("make", "fragment"), BROKEN)
def test_a_broken_template_breaks_chat_alone(tmp_path: Path, make: Callable[[Path], Path], fragment: str) -> None:
    codec = TextCodec(make(tmp_path))
    assert codec.encode("a")
    with pytest.raises(nemodiff.RequestError) as refusal:
        chat_ids(codec, user("a"))
    assert fragment in str(refusal.value)
    assert "use --raw" in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("template", "warning"),
    [
        ("{% nonsense %}", "not a chat template (Encountered unknown tag 'nonsense'"),
        ("{{ messages[0].wrong.wrong }}", "the chat template refuses a plain question ("),
        (None, "the engine has no chat template"),
        ("{{ messages[0].content }}", None),
    ],
)
def test_a_build_says_what_is_wrong_with_the_template(
    tmp_path: Path, template: str | None, warning: str | None
) -> None:
    folder, engine = tmp_path / "checkpoint", tmp_path / "engine"
    shutil.copytree(TINY_CHAT, folder)
    (folder / "chat_template.jinja").unlink()
    checkpoint(folder, template)
    built = CliRunner().invoke(main, ["build", str(folder), "-o", str(engine), "--max-seq-len", "64"])
    assert built.exit_code == 0, built.output
    warnings = [line for line in built.stderr.splitlines() if line.startswith("warning")]
    assert len(warnings) == (warning is not None)
    assert built.stderr.endswith(' -p "Hello"\n' if warning is None else ' -p "Hello" --raw\n')
    if warning is not None:
        assert warning in warnings[0]
        raw = CliRunner().invoke(main, ["run", str(engine), "-p", "a", "--raw", "--max-new-tokens", "2"])
        assert raw.exit_code == 0, raw.output
        chat = CliRunner().invoke(main, ["run", str(engine), "-p", "a"])
        assert (chat.exit_code, chat.stderr.count("\n")) == (1, 1)
        assert "use --raw" in chat.stderr


def test_named_templates_are_carried_into_the_engine(tmp_path: Path) -> None:
    folder, engine = tmp_path / "checkpoint", tmp_path / "engine"
    shutil.copytree(TINY_CHAT, folder)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "default.jinja").write_text("{{ messages[0].content }}")
    for _ in range(2):  # the second one replaces the first
        built = CliRunner().invoke(main, ["build", str(folder), "-o", str(engine), "--max-seq-len", "64"])
        assert built.exit_code == 0, built.output
    codec = TextCodec(engine)
    assert chat_ids(codec, user("a b")) == codec.encode("a b")
    twin = tmp_path / "twin"
    assert CliRunner().invoke(main, ["export", str(folder), "-o", str(twin)]).exit_code == 0
    assert ChatTemplate(twin, {}).render(user("a b"), False) == "a b"

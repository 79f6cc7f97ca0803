"""Broken engine folders: `nemodiff run` refuses each with one line that says how to get a good one.

Every case breaks one thing in a copy of an engine; the tokenizer and the template too, as their files travel with the
engine and may have been edited in place.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from conftest import Refused, assert_one_line
from stand_ins.checkpoints import TINY_CHAT

import nemodiff
from nemodiff.builder.build import Builder
from nemodiff.cli import main
from nemodiff.engine_info import read_engine

NEMODIFF = Path(sys.executable).with_name("nemodiff")
Break = Callable[[Path], object]


@pytest.fixture
def engine(tiny_engine: Path, tmp_path: Path) -> Path:
    """A copy to break; the weights are shared, so replace that file and never write into it."""
    folder = tmp_path / "engine"
    shutil.copytree(tiny_engine, folder, copy_function=lambda a, b: Path(b).hardlink_to(a))
    return folder


def write(name: str, content: str | bytes, honest: bool = True) -> Break:
    """Replace a file, and its size in the manifest if `honest`."""

    def apply(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        manifest = json.loads((folder / "manifest.json").read_text()) if honest else {"files": {}}
        if name in manifest["files"]:
            manifest["files"][name]["bytes"] = (folder / name).stat().st_size
            write("manifest.json", json.dumps(manifest), honest=False)(folder)

    return apply


def edit(name: str, **values: Any) -> Break:
    """Change fields of a JSON file; None removes a field."""

    def apply(folder: Path) -> None:
        config = json.loads((folder / name).read_text()) | values
        kept = {k: v for k, v in config.items() if k not in values or v is not None}
        write(name, json.dumps(kept), honest=False)(folder)

    return apply


def build_config(**values: Any) -> Break:
    """Change the choices that the engine says it was built with."""

    def apply(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        edit("config.json", build_config=config["build_config"] | values)(folder)

    return apply


def gone(name: str) -> Break:
    """Remove a file."""
    return lambda folder: (folder / name).unlink()


def cut(name: str) -> Break:
    """Leave half of a file."""
    return lambda folder: write(name, (folder / name).read_bytes()[: (folder / name).stat().st_size // 2], False)(
        folder
    )


def barred(name: str) -> Break:
    """Something in a file's place that the system does not read as one."""

    def apply(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return apply


def scramble(folder: Path) -> None:
    """Bytes of the right number that are no model."""
    write("model.onnx", b"\xff" * (folder / "model.onnx").stat().st_size, honest=False)(folder)


@pytest.mark.parametrize(
    ("breaks", "fragments"),
    [
        pytest.param(shutil.rmtree, ["engine: no such folder; expected", "nemodiff build"], id="not there"),
        pytest.param(
            gone("manifest.json"), ["not an engine, manifest.json is missing", "nemodiff build"], id="no manifest"
        ),
        pytest.param(
            write("manifest.json", "{", False), ["manifest.json: not readable as JSON"], id="manifest not JSON"
        ),
        pytest.param(
            write("manifest.json", "[" * 100_000, False), ["manifest.json: not readable"], id="manifest too deep"
        ),
        pytest.param(
            write("manifest.json", "[]", False), ["manifest.json: holds a list, expected"], id="manifest a list"
        ),
        pytest.param(
            edit("manifest.json", schema=10), ["engine schema 10, this nemodiff reads up to 9"], id="newer schema"
        ),
        pytest.param(edit("manifest.json", schema=None), ["schema is None, allowed: 1 to 9"], id="no schema"),
        pytest.param(edit("manifest.json", schema=0), ["schema is 0, allowed: 1 to 9"], id="schema 0"),
        pytest.param(edit("manifest.json", schema="1"), ["schema is '1', allowed"], id="schema is text"),
        pytest.param(edit("manifest.json", schema=True), ["schema is True, allowed"], id="schema is a bool"),
        pytest.param(
            edit("manifest.json", files=None), ["config.json and manifest.json are incomplete"], id="no files"
        ),
        pytest.param(edit("manifest.json", files={"model.onnx": {}}), ["incomplete ('bytes')"], id="no sizes"),
        pytest.param(edit("manifest.json", files=[1]), ["are incomplete"], id="files are a list"),
        pytest.param(edit("manifest.json", surplus=1), ["are incomplete", "surplus"], id="unknown field"),
        pytest.param(
            edit("manifest.json", backend="other"),
            ["backend 'other', allowed: onnxruntime, tensorrt-rtx, tensorrt, torch"],
            id="backend",
        ),
        pytest.param(edit("manifest.json", backend=["x"]), ["backend is ['x'], allowed: text"], id="backend a list"),
        pytest.param(
            edit("manifest.json", versions=[1]), ["versions is [1], allowed: an object"], id="versions a list"
        ),
        pytest.param(edit("manifest.json", checkpoint="x"), ["checkpoint is 'x', allowed"], id="checkpoint is text"),
        pytest.param(edit("manifest.json", adapter=1.5), ["adapter is 1.5, allowed: an object"], id="adapter a number"),
        pytest.param(edit("manifest.json", adapter={}), ["rank is None, allowed: an integer"], id="adapter of no rank"),
        pytest.param(
            edit("manifest.json", files={"model.onnx": {"bytes": float("inf")}}), ["are incomplete"], id="endless file"
        ),
        pytest.param(gone("config.json"), ["config.json: missing; build it again"], id="no config"),
        pytest.param(barred("config.json"), ["config.json: cannot be read (", "mend that, or build it"], id="barred"),
        pytest.param(build_config(quantization=["int8"]), ["quantization is ['int8'], allowed"], id="quantized a list"),
        pytest.param(build_config(kv_cache_dtype={}), ["kv_cache_dtype is {}, allowed"], id="cache an object"),
        pytest.param(build_config(gather_generation_logits="no"), ["is 'no', allowed: true or"], id="logits are text"),
        pytest.param(edit("config.json", build_config=None), ["incomplete ('build_config')"], id="no build config"),
        pytest.param(edit("config.json", pretrained_config=None), ["incomplete ('pretrained_config')"], id="no model"),
        pytest.param(edit("config.json", pretrained_config={}), ["architectures is 'missing'"], id="empty model"),
        pytest.param(edit("config.json", pretrained_config=[]), ["engine: "], id="model is a list"),
        pytest.param(build_config(surplus=1), ["are incomplete", "surplus"], id="unknown choice"),
        pytest.param(build_config(max_seq_len="many"), ["max_seq_len is 'many', allowed"], id="limit is text"),
        pytest.param(build_config(max_batch_size=0), ["max_batch_size is 0, allowed"], id="no rows"),
        pytest.param(build_config(max_batch_size=4097), ["is 4097, allowed: 1 to 4096"], id="too many rows"),
        pytest.param(build_config(max_input_len=True), ["max_input_len is True, allowed"], id="limit is a bool"),
        pytest.param(build_config(max_image_size=28), ["is 28, allowed: 0, as the model sees"], id="images unseen"),
        pytest.param(
            build_config(quantization="fp8"), ["'fp8' on onnxruntime, allowed: int8, int4"], id="quantized otherwise"
        ),
        pytest.param(
            build_config(quantization="int4", mlp_group_size=48), ["mlp_group_size is 48, allowed: 32, 64"], id="groups"
        ),
        pytest.param(build_config(kv_cache_dtype="fp8"), ["'fp8' on onnxruntime, allowed: auto, int8"], id="cache fp8"),
        pytest.param(
            build_config(dtype="bf16"), ["dtype is bf16 on onnxruntime, allowed: f32, f16"], id="no such sums"
        ),
        pytest.param(build_config(block_length=65), ["block_length is 65, allowed"], id="block 65"),
        pytest.param(build_config(dtype="f64"), ["dtype is 'f64', allowed: f32, f16"], id="dtype"),
        pytest.param(
            gone("model.onnx"), ["model.onnx: missing, the manifest says", "copy it whole"], id="no model file"
        ),
        pytest.param(gone("model.onnx.data"), ["model.onnx.data: missing, the manifest says"], id="no weights"),
        pytest.param(gone("tokenizer.json"), ["tokenizer.json: missing, the manifest says"], id="no tokenizer"),
        pytest.param(
            cut("model.onnx.data"), ["model.onnx.data: ", " bytes, the manifest says", "whole"], id="half the weights"
        ),
        pytest.param(cut("model.onnx"), ["model.onnx: ", " bytes, the manifest says"], id="half the model"),
        pytest.param(scramble, ["model.onnx: ONNX Runtime ", "cannot load it", "build it again"], id="scrambled model"),
        pytest.param(
            write("tokenizer.json", "{}"), ["tokenizer.json: not a tokenizer", "again"], id="broken tokenizer"
        ),
        pytest.param(
            write("tokenizer_config.json", "{"), ["tokenizer_config.json: not readable"], id="broken tokenizer config"
        ),
        pytest.param(
            write("chat_template.jinja", "{% if %}"),
            ["chat_template.jinja: not a chat template", "use --raw"],
            id="broken template",
        ),
        pytest.param(
            write("chat_template.jinja", b"\xff"), ["chat_template.jinja: not UTF-8 at byte 0"], id="template not UTF-8"
        ),
        pytest.param(
            edit("manifest.json", adapter={"rank": 4}), ["inputs are not those", "one of adapter"], id="no such adapter"
        ),
        pytest.param(
            write("generation_config.json", "{"), ["generation_config.json: not readable"], id="broken generation"
        ),
        pytest.param(
            gone("chat_template.jinja"), ["chat_template.jinja: missing, the manifest says"], id="template lost"
        ),
    ],
)
def test_broken_engine_is_refused(engine: Path, refused: Refused, breaks: Break, fragments: list[str]) -> None:
    breaks(engine)
    refused(["run", str(engine), "-p", "x"], *fragments)


def test_engine_without_template_needs_raw(tmp_path: Path, refused: Refused) -> None:
    checkpoint, engine = tmp_path / "checkpoint", tmp_path / "engine"
    shutil.copytree(TINY_CHAT, checkpoint)
    (checkpoint / "chat_template.jinja").unlink()

    Builder(checkpoint, engine).run()
    refused(["run", str(engine), "-p", "x"], "the engine has no chat template; use --raw")
    assert nemodiff.generate(nemodiff.load(engine), "x", chat=False, max_new_tokens=2).token_ids


def test_refusal_of_a_template_is_one_line(engine: Path) -> None:
    write("chat_template.jinja", "{{ raise_exception('no\\nway') }}")(engine)
    result = CliRunner().invoke(main, ["run", str(engine), "-p", "x"])
    line = (
        "Error: the chat template refuses the conversation (no\\nway); change the messages, or use --raw (chat=False)\n"
    )
    assert result.stderr == line


@pytest.mark.parametrize("template", ["{{ 1 // 0 }}", "{{ 1 + 'a' }}", "{{ range(10**9) | list }}"])
def test_a_template_that_fails_is_one_line(engine: Path, refused: Refused, template: str) -> None:
    write("chat_template.jinja", template)(engine)
    refused(["run", str(engine), "-p", "x"], "the chat template refuses the conversation (", "or use --raw")


def test_inspect_refuses_what_is_no_engine(engine: Path, refused: Refused) -> None:
    scramble(engine)
    refused(["inspect", str(engine)], "model.onnx: not an ONNX file (", "build the engine again")
    (engine / "manifest.json").unlink()
    refused(["inspect", str(engine)], "not an engine, manifest.json is missing")


def test_a_changed_byte_is_found_where_all_files_are_read(engine: Path, refused: Refused) -> None:
    checked = CliRunner().invoke(main, ["inspect", str(engine), "--check"])
    count = len(json.loads((engine / "manifest.json").read_text())["files"])
    assert (checked.exit_code, checked.stderr) == (0, f"checked      {count} files, all as built\n")
    weights = bytearray((engine / "model.onnx.data").read_bytes())
    weights[len(weights) // 2] ^= 1
    write("model.onnx.data", bytes(weights), honest=False)(engine)
    assert CliRunner().invoke(main, ["inspect", str(engine)]).exit_code == 0
    refused(["inspect", str(engine), "--check"], f"{engine}: model.onnx.data not as built, by sha256; copy it whole")


def test_checkpoint_is_not_an_engine(checkpoint: Path, refused: Refused) -> None:
    fragments = [f"{checkpoint}: not an engine, manifest.json is missing", "looks like a checkpoint, so build it first"]
    refused(["run", str(checkpoint), "-p", "x"], *fragments)
    refused(["chat", str(checkpoint)], *fragments)


def test_a_path_that_is_not_utf8(engine: Path, checkpoint: Path, refused: Refused) -> None:
    folder = engine.parent / os.fsdecode(b"caf\xe9")
    shutil.copytree(engine, folder / "engine")
    shutil.copytree(checkpoint, folder / "checkpoint")
    refused(["run", str(folder / "engine"), "-p", "x"], "engine: the path is not UTF-8; rename it, or ")
    build = ["build", str(folder / "checkpoint"), "-o", str(engine.parent / "new")]
    refused(build, "checkpoint: the path is not UTF-8; rename it, or ")


def test_file_is_not_an_engine(engine: Path, refused: Refused) -> None:
    refused(
        ["run", str(engine / "model.onnx"), "-p", "x"], f"model.onnx: a file, expected an engine folder; give {engine}"
    )
    stranger = engine.parent / "letter.txt"
    stranger.touch()
    refused(["run", str(stranger), "-p", "x"], "letter.txt: a file, expected an engine folder; give the one that")


def test_libraries_print_nothing_beside_the_line(engine: Path) -> None:
    scramble(engine)
    done = subprocess.run([NEMODIFF, "run", engine, "-p", "x"], capture_output=True, text=True, check=False)
    assert_one_line(done.stderr, "model.onnx: ONNX Runtime ")
    assert (done.returncode, done.stdout) == (1, "")


def test_the_python_door_raises_the_same_line(engine: Path) -> None:
    (engine / "manifest.json").unlink()
    with pytest.raises(nemodiff.EngineError, match=r"not an engine, manifest\.json is missing"):
        nemodiff.load(engine)


def test_the_description_of_the_first_schema_is_read(engine: Path) -> None:
    later = ("max_input_len", "quantization", "max_image_size", "kv_cache_dtype", "group_size", "mlp_group_size")
    expected = read_engine(engine).build
    config = json.loads((engine / "config.json").read_text())
    edit("config.json", build_config={k: v for k, v in config["build_config"].items() if k not in later})(engine)
    edit("manifest.json", schema=1, tensorrt=None)(engine)
    assert read_engine(engine).build == expected


def test_the_copy_that_all_cases_break_is_good(engine: Path) -> None:
    assert nemodiff.generate(nemodiff.load(engine), "x", max_new_tokens=2).token_ids

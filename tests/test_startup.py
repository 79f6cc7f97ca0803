"""A command imports what it needs and no more: that is most of the time until its first word."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import importlib.metadata
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import output_of
from stand_ins.checkpoints import TINY_CHAT

import nemodiff

ROOT = Path(__file__).parents[1]
HEAVY = {"fastapi", "jinja2", "llguidance", "numpy", "onnx", "onnxruntime", "tokenizers", "torch", "uvicorn"}
COMMAND = """
import sys
from nemodiff.cli import main
main(sys.argv[1:], standalone_mode=False)
print(*sys.modules, file=sys.stderr)
"""
FRESH = """
import os, sys
import nemodiff
assert os.environ["ORT_DISABLE_TELEMETRY"] == "1"
print(*sys.modules, file=sys.stderr)
assert set(nemodiff.__all__) <= set(dir(nemodiff))
from nemodiff import *
assert all(globals()[name] is getattr(nemodiff, name) for name in nemodiff.__all__)
"""


def imported(script: str, *words: str) -> set[str]:
    """The libraries, and the product's own modules, that a script names on standard error."""
    command = [sys.executable, "-W", "error", "-c", script, *words]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    return set(ended.stderr.split())


@pytest.mark.parametrize(
    "words",
    [
        "",
        "bench",
        "build",
        "export",
        "infill",
        "inspect",
        "revise",
        "serve",
        "trace view",
        "triton",
        "tune",
        "verify",
        "doctor",
    ],
)
def test_help_needs_no_library_but_click(words: str) -> None:
    modules = imported(COMMAND, *words.split(), "--help")
    assert "click" in modules
    assert modules & (HEAVY | {"pydantic"}) == set()


@pytest.mark.parametrize("command", ["run", "chat"])
def test_help_with_the_options_of_a_request_needs_their_table_alone(command: str) -> None:
    modules = imported(COMMAND, command, "--help")
    assert "nemodiff.runtime.requests.options" in modules
    assert modules & HEAVY == set()


def test_inspect_reads_a_graph_and_no_more(tiny_engine: Path) -> None:
    modules = imported(COMMAND, "inspect", str(tiny_engine))
    assert modules & (HEAVY | {"pydantic"}) == {"numpy", "onnx"}  # onnx imports numpy
    assert not any(name.startswith("nemodiff.runtime.requests") for name in modules)


def test_an_answer_needs_no_graph_of_the_builder(tiny_engine: Path) -> None:
    modules = imported(COMMAND, "run", str(tiny_engine), "-p", "x", "--max-new-tokens", "1")
    assert "onnxruntime" in modules
    assert modules & {"onnx", "torch"} == set()


def test_the_package_alone_is_quick_and_has_every_public_name() -> None:
    assert imported(FRESH) & (HEAVY | {"pydantic"}) == set()


def test_public_names_come_from_where_type_checkers_see_them() -> None:
    tree = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
    blocks = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    declared = {
        alias.name: node.module for node in blocks[0].body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert declared.keys() == set(nemodiff.__all__)
    for name, module in declared.items():
        assert getattr(nemodiff, name) is getattr(importlib.import_module(f"nemodiff.{module}"), name)
    with pytest.raises(AttributeError, match="has no attribute 'lod'"):
        nemodiff.lod  # type: ignore[attr-defined]  # noqa: B018


def test_the_version_and_what_answers_consist_of_are_public() -> None:
    assert nemodiff.__version__ == importlib.metadata.version("nemodiff")
    fields = {field.name: field.type for field in dataclasses.fields(nemodiff.Generation)}
    for name, kind in {"tool_calls": "ToolCall", "logprobs": "TokenLogprobs", "acceptance": "Acceptance"}.items():
        assert kind in fields[name]
        assert hasattr(nemodiff, kind)


def test_a_checkout_that_is_not_installed_knows_its_version(
    tiny_engine: Path, tmp_path: Path, not_installed: None
) -> None:
    version = nemodiff.__version__
    assert output_of("--version").endswith(f", version {version}\n")
    for command, written in {
        f"build {TINY_CHAT} -o {tmp_path}/engine": "engine/manifest.json",
        f"export {TINY_CHAT} -o {tmp_path}/twin": "twin/nemodiff_export.json",
        f"triton export {tiny_engine} --repo {tmp_path}/triton": "triton/nemodiff/nemodiff_triton.json",
    }.items():
        output_of(*command.split())
        assert f'"nemodiff": "{version}"' in (tmp_path / written).read_text()


def test_public_classes_and_functions_are_pickled_by_name() -> None:
    for name in nemodiff.__all__:
        value = getattr(nemodiff, name)
        assert pickle.loads(pickle.dumps(value)) == value
    options = nemodiff.Options(mode="ar", seed=3)
    assert pickle.loads(pickle.dumps(options)) == options

"""Imports run one way: from the rooms above to those below, and in no circle; files are short."""

from __future__ import annotations

import ast
import functools
import graphlib
import re
import statistics
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Rooms from the lowest up; those of one set never import each other.
PRODUCT: list[set[str]] = [
    {"errors", "main_memory", "version", "whole_file"},
    {"engine_folder", "fields"},
    {"tuned", "vision"},
    {"config"},
    {"contract", "tensorrt_info"},
    {"engine_info"},
    {"plugins"},
    {"builder", "runtime"},
    {"batch", "evaluation", "measurement", "serving", "verification"},
    {"doctor"},
    {"__init__", "commands"},
    {"cli"},
    {"__main__"},
]
ROOMS: dict[str, list[set[str]]] = {
    "": PRODUCT,
    "batch": [{"lines"}, {"answers", "shards"}, {"cluster", "parts"}, {"output", "predictor", "worker"}, {"job"}],
    "plugins": [{"failure", "op", "kernels"}, {"ops"}, {"__init__"}, {"tensorrt"}],
    "builder": [
        {"files", "resources", "swap"},
        {"graph"},
        {"checkpoint"},
        {"compilers"},
        {"checks", "manifest", "plan", "staging", "twin"},
        {"build", "export", "inspect"},
    ],
    "runtime": [
        {"text"},
        {"tools"},
        {"images"},
        {"engines"},
        {"planning"},
        {"loading"},
        {"sampling"},
        {"requests"},
        {"modes"},
        {"batching"},
        {"events"},
        {"generate"},
        {"scheduler", "score"},
        {"editing"},
    ],
    "evaluation": [{"lm"}, {"evaluate", "table"}],
    "doctor": [{"check", "probe"}, {"packages"}, {"diagnose"}],
    "verification": [
        {"arithmetic", "hidden_states", "positions", "prompts", "quantized", "rounding", "script"},
        {"shown_graph", "weights"},
        {"network"},
        {"recorder", "replay"},
        {"verdict"},
        {"report"},
        {"verify"},
        {"layers", "references"},
    ],
    "measurement": [{"machine"}, {"round"}, {"figures"}, {"bench"}, {"plot", "table"}, {"tune"}],
    "serving": [{"logprobs", "metrics"}, {"http", "triton_server"}],
}


def modules() -> dict[str, Path]:
    """The product's files by dotted name below the package; a folder's `__init__` has the folder's name."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"]
    files = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    product = {room for rooms in PRODUCT for room in rooms if (ROOT / room).is_dir()}
    paths = [Path(file) for file in files if "/" not in file or file.split("/")[0] in product]
    return {".".join(path.with_suffix("").parts): path for path in paths if (ROOT / path).is_file()}


MODULES = modules()


def resolve(name: str) -> str | None:
    """The module that a dotted name means, a package by its `__init__`."""
    if name in MODULES:
        return name
    package = f"{name}.__init__" if name else "__init__"
    return package if package in MODULES else None


def imports(module: str) -> set[str]:
    """The product's modules that one imports anywhere in its file, for type checking too."""
    package = module.split(".")[:-1]
    imported = set[str]()
    for node in ast.walk(ast.parse((ROOT / MODULES[module]).read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        above = package[: len(package) - node.level + 1]
        target = ".".join([*above, *(node.module.split(".") if node.module else [])])
        for alias in node.names:
            imported_module = resolve(f"{target}.{alias.name}" if target else alias.name) or resolve(target)
            assert imported_module is not None, f"{module} imports {target or '.'}, which is not in the tree"
            imported.add(imported_module)
    return imported - {module}


@functools.cache
def graph() -> dict[str, set[str]]:
    return {module: imports(module) for module in MODULES}


def test_files_can_be_read_in_one_sitting() -> None:
    lengths = {path: len((ROOT / path).read_text(encoding="utf-8").splitlines()) for path in MODULES.values()}
    assert [str(path) for path, length in lengths.items() if length > 400] == []
    assert statistics.median(lengths.values()) <= 130
    assert lengths[Path("cli.py")] < 120


def test_no_circle_exists() -> None:
    try:
        tuple(graphlib.TopologicalSorter(graph()).static_order())
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize("folder", sorted(ROOMS))
def test_no_import_runs_upwards(folder: str) -> None:
    level = {room: height for height, rooms in enumerate(ROOMS[folder]) for room in rooms}

    def room(module: str) -> str | None:
        inside = (
            module if not folder else module.removeprefix(f"{folder}.") if module.startswith(f"{folder}.") else None
        )
        return None if inside is None else inside.split(".")[0]

    upwards = []
    for module, targets in graph().items():
        here = room(module)
        if here is None or (here == "__init__" and folder not in ("", "plugins")):
            continue
        assert here in level, f"{module} has no place in the order of {folder or 'the package'}"
        for target in targets:
            there = room(target)
            if there is not None and there != here and level[there] >= level[here]:
                upwards.append(f"{module} imports {target}")
    assert upwards == []


@pytest.mark.parametrize(("line", "folder"), [("(errors | ", ""), ("runtime: ", "runtime")])
def test_the_documented_order_is_this_one(line: str, folder: str) -> None:
    page = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    (written,) = (one for one in page.splitlines() if one.startswith(line))
    documented = [set(re.findall(r"\w+", rooms)) for rooms in written.removeprefix("runtime: ").split(" < ")]
    named = [{room for room in rooms if not room.startswith("__")} for rooms in ROOMS[folder]]
    assert documented == [rooms for rooms in named if rooms]


def test_builder_and_runtime_know_nothing_of_each_other() -> None:
    crossing = [
        f"{module} imports {target}"
        for module, targets in graph().items()
        for target in targets
        if {module.split(".")[0], target.split(".")[0]} == {"builder", "runtime"}
    ]
    assert crossing == []

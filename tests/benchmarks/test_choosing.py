"""The tables of docs/choosing.md agree with the results that they are taken from."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
TOKENS = ("1", "8", "32")
Rows = dict[str, list[Any]]


def result(name: str) -> Any:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))


def table(*heads: str) -> dict[str, list[str]]:
    """The cells of the table whose first row has these words, by the first cell."""
    blocks = re.findall(r"(?:^\|.*\n)+", (ROOT / "docs" / "choosing.md").read_text(encoding="utf-8"), re.MULTILINE)
    (block,) = (block for block in blocks if all(head in block.splitlines()[0] for head in heads))
    rows = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in block.splitlines()[2:]]
    named: dict[str, list[str]] = {}
    for name, *cells in rows:
        named[f"{name}, stories" if name in named else name] = cells
    return named


def costs() -> Iterator[tuple[tuple[str, ...], Rows]]:
    sizes = [str(2**n) for n in range(7)]
    rows: Rows = {}
    for run in result("speed")["runs"]:
        name = f"CPU, {run['threads']} thread{'s' * (run['threads'] > 1)}"
        rows[name] = [run["cost_curve"][size]["ms"] for size in sizes]
    cells = result("gpu_h200")["cells"]
    rows["H200"] = [cells[f"forward/8b/rows 1 context 512 tokens {size}"]["device_us"] / 1e3 for size in sizes]
    yield ("tokens of a pass", "64"), rows


def plans() -> Iterator[tuple[tuple[str, ...], Rows]]:
    found = result("auto")["tokens_per_second"]
    blocks = ("4", "8", "12", "16", "24", "32", "64", "auto")
    rows: Rows = {}
    for title, key in (("", "tiny-chat-2"), ("stories", "tiny-chat-2, story and loop")):
        one = {name: values["all"]["cpu"] for name, values in found[key].items()}
        for mode in ("linear_spec", "quadratic_spec", "ar", "auto"):
            name = f"stories:* {mode}" if title and mode == "linear_spec" else f"{mode}{title and ', stories'}"
            own = [one[f"{mode} {block}"] for block in blocks] if "spec" in mode else None
            rows[name] = own or ([one[mode]] + [None] * 7 if mode == "ar" else [None] * 7 + [one[mode]])
    yield ("block", "planned"), rows


def bits() -> Iterator[tuple[tuple[str, ...], Rows]]:
    torch = result("low_bits_torch")["logits"]
    names = {"bf16": "bf16", "int8": "int8, head too", "fp8": "fp8", "int4": "int4, head in int8"}
    names["fp8_dynamic"] = "fp8_dynamic (inputs in 8 bits too)"
    yield (
        ("projections", "bits of a weight"),
        {names[kind]: [None, torch[kind]["error"], torch[kind]["same_best"]] for kind in names},
    )
    tiny, large = result("low_bits"), result("low_bits_133m")
    rows: Rows = {}
    for kind in ("int8", "int4"):
        answers = tiny["answers"][kind]
        speeds = [one["times_f32"][kind][size] for one in (tiny, large) for size in TOKENS]
        unlike = sum(answers["unequal to ar"].values())
        rows[kind] = [*speeds, answers["equal to f32"], unlike]
    yield ("onnxruntime", "133 million"), rows
    rows = {}
    groups = {"32": "int4 by 32", "32, 128 in the MLPs": "int4", "64": "int4 by 64", "128": "int4 by 128"}
    for name, kind in groups.items():
        speeds = [
            one["cpu_ms"]["int4 by 32"][size] / one["cpu_ms"][kind][size] for one in (tiny, large) for size in TOKENS
        ]
        logits, answers = tiny["logits"][kind], tiny["answers"][kind]
        errors = [logits[key] for key in ("error", "kl_divergence", "same_best")]
        rows[name] = [None, *speeds, *errors, answers["right"], sum(answers["unequal to ar"].values())]
    yield ("groups", "KL divergence"), rows


def llama() -> Iterator[tuple[tuple[str, ...], Rows]]:
    both = result("llamacpp"), result("llamacpp_133m")
    names = {
        "f32": "F32",
        "int8, q8_0": "Q8_0",
        "int4, q4_0": "Q4_0",
        "int4 in groups of 32, q4_0": "Q4_0, int4 by 32",
        "int4 in groups of 128, q4_0": "Q4_0, int4 by 128",
        "int4, q4_0 with a head in Q6_K": "Q4_0 with a head in Q6_K",
    }
    speeds = {
        name: [one["passes"][key][size]["speed"] for one in both for size in (*TOKENS, "512")]
        for name, key in names.items()
    }
    yield ("tiny-chat-2: 1", "512"), speeds
    kinds = {"int4": "Q4_0", "int4 in groups of 32": "Q4_0, int4 by 32", "int4 in groups of 128": "Q4_0, int4 by 128"}
    rows: Rows = {}
    for name, key in (*kinds.items(), ("q4_0", "Q4_0")):
        tiny, large = (one["errors"][key]["llama_cpp" if name == "q4_0" else "nemodiff"] for one in both)
        rows[name] = [
            *(tiny[of] for of in ("error", "kl_divergence", "same_best")),
            large["error"],
            large["kl_divergence"],
        ]
    yield ("tiny-chat-2: error", "same best token"), rows


def keys_and_values() -> Iterator[tuple[tuple[str, ...], Rows]]:
    found = result("kv_cache")
    names = {"onnxruntime, int8": "int8", "torch on the CPU, int8": "torch int8", "torch on the CPU, fp8": "torch fp8"}
    rows: Rows = {}
    for name, key in names.items():
        answers = found["answers"][key]
        ratios = list(found["over_f32"][key].values())
        rows[name] = [*ratios, answers["equal to f32"], sum(answers["unequal to ar"].values())]
    yield ("1 token at 512", "same as f32"), rows


@pytest.mark.parametrize("tables", [costs, plans, bits, llama, keys_and_values])
def test_a_table_has_the_figures_of_the_results(tables: Any) -> None:
    for heads, expected in tables():
        written = table(*heads)
        assert set(written) == set(expected)
        for name, values in expected.items():
            for cell, value in zip(written[name], values, strict=True):
                if value is None:
                    continue
                shown = Decimal(cell.split(" ")[0])  # of "99 of 100" the first
                unit = Decimal(1).scaleb(shown.as_tuple().exponent)  # type: ignore[arg-type]
                assert abs(shown - Decimal(value)) <= unit * Decimal("0.51"), (heads, name, cell, value)

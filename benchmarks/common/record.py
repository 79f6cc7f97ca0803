"""Write a result file: where its numbers come from, its goals with their verdicts, and its figures."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
MODEL = ROOT / "examples" / "tiny-chat-2"  # the demonstration model, which the benchmarks measure unless told otherwise
DRAFTER = MODEL.with_name(f"{MODEL.name}-drafter") / "linear_spec_lora"

Sense = Literal["at most", "at least"]


def goal(name: str, got: float, sense: Sense, limit: float, unit: str) -> dict[str, Any]:
    """One goal with its verdict."""
    passed = got <= limit if sense == "at most" else got >= limit
    return {"name": name, "got": got, "sense": sense, "limit": limit, "unit": unit, "passed": passed}


def origin(packages: Sequence[str], threads: int | Sequence[int] | None) -> dict[str, Any]:
    """Date, command, versions, machine and threads; taken at the start of a run, so that `load` is that of others."""
    load = os.getloadavg()[0]
    installed = {name: _version(name) for name in packages}
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "command": " ".join(["python", *(_public(word) for word in sys.argv)]),
        "versions": {"python": platform.python_version(), **installed},
        "machine": {**_machine(), "load_before": round(load, 2)},
        "threads": threads,
    }


def footer(origin: dict[str, Any]) -> str:
    """The line under a table that says where it comes from."""
    return (
        f"{origin['date']}, `{origin['command']}`, nemodiff {origin['versions']['nemodiff']}, ONNX Runtime "
        f"{origin['versions']['onnxruntime']}, {origin['machine']['cpu']}, threads: {origin['threads']}."
    )


def write(name: str, origin: dict[str, Any], goals: list[dict[str, Any]], figures: dict[str, Any]) -> Path:
    """Write the result file and print the verdicts."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({**origin, "goals": goals, **figures}, indent=1) + "\n", encoding="utf-8")
    for g in goals:
        verdict = "PASSED" if g["passed"] else "MISSED"
        print(f"{verdict}  {g['name']}: {g['got']:.4g} {g['unit']}, goal {g['sense']} {g['limit']:g} {g['unit']}")
    busy = origin["machine"]["load_before"]
    if busy >= 0.5:
        print(f"note: the machine was busy before the run (load {busy}), so times are worse than they need to be")
    print(f"wrote {path.relative_to(ROOT)}")
    return path


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "a checkout" if name == "nemodiff" else "not installed"


def _public(word: str) -> str:
    """A path relative to the repository, or its bare name, so that a result can be published as it is."""
    path = Path(word)
    if not path.is_absolute():
        return word
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name


# Own code: trtllm.py runs where nemodiff is not installed.
def _machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    models = [line.split(":", 1)[1].strip() for line in info.splitlines() if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.machine()}",
    }

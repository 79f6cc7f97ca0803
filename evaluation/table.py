"""An evaluation as a table: a line per task and figure, a column per mode."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def table(evaluation: Mapping[str, Any]) -> list[str]:
    """The lines."""
    modes: Mapping[str, Any] = evaluation["modes"]
    first = next(iter(modes.values()))["tasks"]
    rows = [["task", "figure", *modes]]
    for task in first:
        figures = {name: _figure(name) for name in first[task]["metrics"] if "_stderr" not in name}
        if "tokens_per_pass" in first[task]:
            figures["tokens/pass"] = _tokens_per_pass
        for number, (name, read) in enumerate(figures.items()):
            values = [read(modes[mode]["tasks"][task]) for mode in modes]
            rows.append(["" if number else task, name, *values])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _figure(name: str) -> Any:
    """Reads a metric with its standard error, where that is known."""
    metric, _, filtered = name.partition(",")
    error = f"{metric}_stderr,{filtered}" if filtered else f"{metric}_stderr"

    def read(task: Mapping[str, Any]) -> str:
        value = f"{task['metrics'][name]:.4f}"
        return f"{value} ± {task['metrics'][error]:.4f}" if error in task["metrics"] else value

    return read


def _tokens_per_pass(task: Mapping[str, Any]) -> str:
    value = task["tokens_per_pass"]
    return "-" if value is None else f"{value:.2f}"

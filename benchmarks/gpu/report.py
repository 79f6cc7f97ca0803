"""The report of `gpu.py`: the figures of all runs on one card, the goals, and the plot made of them."""

from __future__ import annotations

import json
import traceback
from pathlib import Path
from typing import Any

from common import record

from gpu.goals import goals
from gpu.plan import Cell, Figures, RunConfig
from gpu.tables import table, tables
from nemodiff.whole_file import whole


class Report:
    """All figures of one card.

    Args:
        folder: where the files are; None for none.
        origin: of this run, from `record.origin`.
        about: the card.
        ceilings: of this run.
        config: of this run.
    """

    def __init__(
        self, folder: Path | None, origin: dict[str, Any], about: dict[str, Any], ceilings: Any, config: RunConfig
    ) -> None:
        self._folder = folder
        self._origin = origin
        self._about = about
        self._config = config
        self.cells: dict[str, Figures] = {}
        self.runs: list[dict[str, Any]] = []
        old = folder / "gpu.json" if folder is not None else None
        if old is not None and old.is_file():
            saved = json.loads(old.read_text(encoding="utf-8"))
            if saved["device"]["name"] == about["name"] and saved["dtype"] == config.dtype:
                self.cells = saved["cells"]
                self.runs = saved["runs"]
        self._drawn = False  # the plot
        self.keeps_failures = False  # whether what failed is left alone too
        self.run = {"date": origin["date"], "command": origin["command"], "ceilings": ceilings, "minutes": 0.0}
        self.runs.append(self.run)

    def has(self, cell: Cell) -> bool:
        """Whether a cell has been measured, or need not be tried again."""
        reason = self.cells.get(cell.name, {"skipped": ""}).get("skipped")
        return reason is None or (self.keeps_failures and reason.startswith("failed"))

    def forget(self, cells: list[Cell]) -> None:
        """Drop what is to be measured again."""
        for cell in cells:
            self.cells.pop(cell.name, None)

    def put(self, cell: Cell, figures: Figures) -> None:
        """Take a cell's figures; their ceilings are those of this run."""
        self.put_by_name(cell.name, figures)

    def put_by_name(self, name: str, figures: Figures) -> None:
        """The same, by its place in the report."""
        self.cells[name] = {"run": len(self.runs) - 1, **figures}

    def save(self) -> None:
        """Write the figures and the tables."""
        if self._folder is None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        met, unmeasured = self.goals()
        values = {
            **self._origin,
            "device": self._about,
            "dtype": self._config.dtype,
            "goals": met,
            "goals_not_measured": unmeasured,
            "runs": self.runs,
            "cells": self.cells,
        }
        _write(self._folder / "gpu.json", json.dumps(values, indent=1) + "\n")
        try:
            text = markdown(self, self._drawn)
        except Exception:  # a figure that another version has written, perhaps; no reason to measure no more
            traceback.print_exc()
            return
        _write(self._folder / "gpu.md", text)

    def finish(self) -> None:
        """Draw the plot, and print the verdicts."""
        if self._folder is not None:
            self._drawn = plot(self, self._folder / "gpu.png")
        self.save()
        self._show()

    def goals(self) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
        """The verdicts, and the goals without a figure, which are neither met nor missed."""
        met, unmeasured = [], []
        for name, figure, sense, limit, unit in goals(self, self._config):
            if isinstance(figure, str):
                unmeasured.append({"name": name, "goal": f"{sense} {limit:g} {unit}", "reason": figure})
            else:
                met.append(record.goal(name, figure, sense, limit, unit))
        return met, unmeasured

    def _show(self) -> None:
        met, unmeasured = self.goals()
        for g in met:
            verdict = "MET   " if g["passed"] else "MISSED"
            print(f"{verdict}        {g['name']}: {g['got']:.4g} {g['unit']}, goal {g['sense']} {g['limit']:g}")
        for u in unmeasured:
            print(f"NOT MEASURED  {u['name']}, goal {u['goal']}: {u['reason']}")
        if self._folder is not None:
            print(f"wrote gpu.json, gpu.md and what can be drawn to {record._public(str(self._folder.resolve()))}")

    @property
    def about(self) -> dict[str, Any]:
        """The card."""
        return self._about

    @property
    def config(self) -> RunConfig:
        """What this run measures."""
        return self._config

    def figures(self, section: str, shape: str | None = None) -> list[Figures]:
        """The figures of a section's measured cells, in order, with their shape."""
        measured = []
        for name, figures in self.cells.items():
            at = name.split("/")
            if at[0] == section and shape in (None, at[1]) and "skipped" not in figures:
                measured.append({"shape": at[1], **figures})
        return measured


def headline(figures: Figures) -> str:
    """A cell's main figures in a few words for the terminal."""
    if "variants" in figures:
        times = (f"{name} {us:.4g}" for name, us in figures["variants"].items())
        return f"{figures['winner']} wins; us: {', '.join(times)}"
    if "kernels" in figures and isinstance(figures["kernels"], list):
        longest = (f"{one['us']:.4g} {one['name'][:40]}" for one in figures["kernels"][:6])
        return f"{figures['us']:.4g} us in {figures['launches']:g} launches: {', '.join(longest)}"
    if "winner" in figures:
        times = (f"{name} {sum(way['us'].values()):.4g}" for name, way in figures["ways"].items() if "us" in way)
        return f"{figures['winner']} wins; us: {', '.join(times)}"
    shown = ("device_us", "wall_us", "us", "to_ceiling", "to_copy_ceiling", "tokens_per_second", "host_gap")
    return ", ".join(f"{name} {figures[name]:.4g}" for name in shown if name in figures) or "done"


def markdown(report: Report, drawn: bool) -> str:
    """The report for people."""
    about, run = report.about, report.run
    copy, product = run["ceilings"]["copy_bytes_per_second"], run["ceilings"]["matrix_operations_per_second"]
    met, unmeasured = report.goals()
    lines = [
        f"# {about['name']}, {report.config.dtype}",
        "",
        f"{run['date']}, `{run['command']}`, torch {about['torch']}. In this run a copy moves {copy / 1e9:.0f} GB/s, "
        f"read and written, and a matrix product makes {product / 1e12:.1f} T operations/s; every figure is compared "
        "with the ceilings of the run that it was measured in. Models of released sizes have random weights.",
        *(["", "Tiny sizes on a CPU: they prove the script and mean nothing."] if about["name"] == "cpu" else []),
        "",
        *table(["goal", "verdict", "got", "limit"], [
            *([g["name"], "met" if g["passed"] else "missed", f"{g['got']:.3g} {g['unit']}",
               f"{g['sense']} {g['limit']:g}"] for g in met),
            *([u["name"], f"not measured ({u['reason']})", "", u["goal"]] for u in unmeasured),
        ]),
        *(["![time of a forward by its tokens](gpu.png)", ""] if drawn else []),
    ]  # fmt: skip
    for title, head, cells in tables(report.figures):
        if cells:
            lines += [f"## {title}", "", *table(head, cells)]
    skipped = [[name, row["skipped"]] for name, row in report.cells.items() if "skipped" in row]
    if skipped:
        lines += ["## Not measured", "", *table(["figure", "reason"], skipped)]
    return "\n".join(lines).rstrip() + "\n"


def plot(report: Report, path: Path) -> bool:
    """Time of a forward of one row by its tokens, and what the copy ceiling allows; False where it cannot be drawn."""
    lines: dict[tuple[str, int], list[Figures]] = {}
    for figures in report.figures("forward"):
        if figures["rows"] == 1:
            lines.setdefault((figures["shape"], figures["context"]), []).append(figures)
    try:
        import matplotlib
    except ModuleNotFoundError:
        return False
    if not lines:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for (shape, context), points in lines.items():
        points.sort(key=lambda r: r["tokens"])
        copy = report.runs[points[0]["run"]]["ceilings"]["copy_bytes_per_second"]
        sizes, times = [r["tokens"] for r in points], [r["device_us"] / 1e3 for r in points]
        (line,) = axes.plot(sizes, times, "o-", label=f"{shape}, context {context}")
        axes.plot(sizes, [r["bytes"] / copy * 1e3 for r in points], ":", color=line.get_color())
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens of a forward")
    axes.set_ylabel("ms on the device; dotted: its bytes at the copy ceiling")
    axes.set_title(f"{report.about['name']}, {report.config.dtype}, one row", fontsize=11)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=9)
    with whole(path) as partial:
        figure.savefig(partial, dpi=120, format="png")
    pyplot.close(figure)
    return True


def _write(path: Path, text: str) -> None:
    with whole(path) as partial:
        partial.write_text(text, encoding="utf-8")

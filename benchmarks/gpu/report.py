"""The report of `gpu.py`: the figures of all runs on one card, the goals, and the tables and the plot made of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import record

from gpu.goals import goals
from gpu.plan import Cell, Figures, RunConfig
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
        self.run = {"date": origin["date"], "command": origin["command"], "ceilings": ceilings, "minutes": 0.0}
        self.runs.append(self.run)

    def has(self, cell: Cell) -> bool:
        """Whether a cell has been measured."""
        return "skipped" not in self.cells.get(cell.name, {"skipped": ""})

    def forget(self, cells: list[Cell]) -> None:
        """Drop what is to be measured again."""
        for cell in cells:
            self.cells.pop(cell.name, None)

    def put(self, cell: Cell, figures: Figures) -> None:
        """Take a cell's figures; their ceilings are those of this run."""
        self.cells[cell.name] = {"run": len(self.runs) - 1, **figures}

    def save(self) -> None:
        """Write the figures."""
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

    def finish(self) -> None:
        """Write the tables and the plot, and print the verdicts."""
        self.save()
        if self._folder is not None:
            drawn = plot(self, self._folder / "gpu.png")
            _write(self._folder / "gpu.md", markdown(self, drawn))
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
    for title, head, cells in tables(report):
        if cells:
            lines += [f"## {title}", "", *table(head, cells)]
    skipped = [[name, row["skipped"]] for name, row in report.cells.items() if "skipped" in row]
    if skipped:
        lines += ["## Not measured", "", *table(["figure", "reason"], skipped)]
    return "\n".join(lines).rstrip() + "\n"


def tables(report: Report) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """Title, head and lines of each section."""
    peers = {(r["shape"], r["rows"], r["context"]): r["device_us"] for r in report.figures("peers")}

    def over_ours(forward: Figures) -> str:
        peer_us = peers.get((forward["shape"], forward["rows"], forward["context"]))
        return f"{peer_us / forward['device_us']:.2f}" if peer_us and forward["tokens"] == 1 else ""

    yield "Forward", ["shape", "rows", "context", "tokens", "device us", "wall us", "bound", "to its ceiling",
                      "compiled plain torch over it", "GiB at most"], [
        [r["shape"], str(r["rows"]), str(r["context"]), str(r["tokens"]), f"{r['device_us']:.0f}",
         f"{r['wall_us']:.0f}", r["bound"], f"{r['to_ceiling']:.2f}", over_ours(r),
         f"{r['peak_bytes'] / 2**30:.1f}" if r["peak_bytes"] else ""]
        for r in report.figures("forward")
    ]  # fmt: skip
    yield "Ways to run it, us by tokens", ["shape", "way", "context", "device us", "wall us"], [
        [r["shape"], r["variant"], str(r["context"]),
         *(", ".join(f"{size}: {v[us]:.0f}" for size, v in r.items() if isinstance(v, dict))
           for us in ("device_us", "wall_us"))]
        for r in report.figures("variants")
    ]  # fmt: skip
    yield "Kernels", ["shape", "op", "tokens", "context", "us", "KiB", "over the copy ceiling"], [
        [r["shape"], r["op"] if r["op"].endswith("Attention") else r["stages"][0], str(r["tokens"]),
         str(r["context"] or ""), f"{r['us']:.2f}", f"{r['bytes'] / 1024:.0f}", f"{r['to_copy_ceiling']:.2f}"]
        for r in report.figures("kernels")
    ]  # fmt: skip
    yield (
        "Decoding at the published acceptance",
        ["shape", "way", "tokens/s", "tokens per pass", "card stands still"],
        [
            [
                r["shape"],
                r["way"],
                f"{r['tokens_per_second']:.1f}",
                f"{r['tokens_per_pass']:.2f}",
                f"{r['host_gap']:.1%}",
            ]
            for r in report.figures("decode")
            if "way" in r
        ],
    )
    yield "Cost curve that planning uses, us by tokens", ["shape", "us", "seconds to measure"], [
        [r["shape"], ", ".join(f"{s}: {t:.0f}" for s, t in zip(r["sizes"], r["curve_us"], strict=True)),
         f"{r['seconds_to_measure']:.2f}"]
        for r in report.figures("decode")
        if "sizes" in r
    ]  # fmt: skip
    yield "Answers", ["checkpoint", "type", "mode", "tokens/s", "tokens per pass", "unlike ar", "unlike the CPU"], [
        [r["shape"], r["dtype"], mode, f"{m['tokens_per_second']:.0f}", f"{m['tokens_per_pass']:.2f}",
         str(m["answers_unlike_ar"]), str(m["answers_unlike_cpu"])]
        for r in report.figures("modes")
        for mode, m in r["modes"].items()
    ]  # fmt: skip
    yield "Many requests", ["shape", "way", "requests", "tokens/s", "ms to first", "gap ms", "99th", "tokens a forward",
                            "card idle", "pages", "preempted", "captured meanwhile"], [
        [r["shape"], r["way"], str(r["requests"]), f"{r['tokens_per_second']:.0f}", f"{r['ms_to_first_token']:.0f}",
         f"{r['gap_ms']:.1f}", f"{r['gap_ms_p99']:.1f}", f"{r['tokens_per_forward']:.0f}",
         f"{100 * r['host_gap']:.0f} %", str(r["pages"]), str(r["preempted"]), str(r["captured_meanwhile"])]
        for r in report.figures("serve")
    ]  # fmt: skip
    yield "Plain torch, one token", ["shape", "peer", "rows", "context", "us", "without a graph", "first step s"], [
        [r["shape"], r["peer"], str(r["rows"]), str(r["context"]), f"{r['device_us']:.0f}",
         f"{r['wall_us_without_graph']:.0f}", f"{r['first_seconds']:.1f}"]
        for r in report.figures("peers")
    ]  # fmt: skip
    yield "TensorRT", ["backend", "rows", "context", "tokens", "us", "to ceiling", "eager over graph", "host gap us"], [
        [t["backend"], str(f["rows"]), str(f["context"]), str(f["tokens"]), f"{f['us']:.1f}",
         f"{f['ratio_to_ceiling']:.2f}", f"{f['eager_over_graph']:.2f}", f"{f['host_gap_us']:.1f}"]
        for t in report.figures("tensorrt")
        for f in t["forward"]
    ]  # fmt: skip


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table and an empty line."""
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)] + [""]


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

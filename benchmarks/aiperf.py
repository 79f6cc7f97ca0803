"""Let NVIDIA's AIPerf load `nemodiff serve` over the demonstration model, unmodified. Writes `results/aiperf.md`.

AIPerf pins packages of its own, so it is not part of nemodiff's environment; in one beside it:

    python -m venv aiperf && aiperf/bin/pip install aiperf==0.13.0
    python benchmarks/aiperf.py --aiperf aiperf/bin/aiperf
"""

from __future__ import annotations

import argparse
import csv
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from common import checkout  # noqa: F401  # isort: skip
from common import record

from nemodiff.builder.build import Builder
from serving import server

PACKAGES = ("nemodiff", "onnxruntime", "fastapi", "uvicorn")
SHOWN = ("avg", "min", "max", "p99", "p50")
METRICS = (
    "Time to First Token", "Inter Token Latency", "Inter Chunk Latency", "Request Latency",
    "Output Token Throughput Per User", "Output Token Throughput", "Request Throughput", "Request Count",
    "Error Request Count",
)  # fmt: skip
ROOM = 300  # seconds that a run may take


def command(aiperf: str, url: str, name: str, concurrency: int, requests: int) -> list[str]:
    """The client's words; prompts are random tokens, so drafts are seldom right."""
    return [
        aiperf, "profile", "-m", name, "--url", url, "--endpoint-type", "chat", "--streaming",
        "--tokenizer", str(record.MODEL), "--concurrency", str(concurrency), "--request-count", str(requests),
        "--isl", "40", "--osl", "64", "--extra-inputs", "ignore_eos:true", "--random-seed", "1",
        "--ui", "none", "--no-gpu-telemetry",
    ]  # fmt: skip


def rows(path: Path) -> list[list[str]]:
    """The lines of AIPerf's table of figures that are shown: a name, then `SHOWN`, empty where a figure has none."""
    table: list[list[str]] = []
    columns: list[str] = []
    for line in csv.reader(path.read_text(encoding="utf-8").splitlines()):
        if line and line[0] == "Metric":
            columns = line
        elif line and line[0].partition(" (")[0] in METRICS:
            values = dict(zip(columns, line, strict=False))
            cells = [values.get(name, values.get("Value", "") if name == "avg" else "") for name in SHOWN]
            table.append([line[0], *cells])
    return table


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--aiperf", default="aiperf", help="the command of AIPerf (default aiperf)")
    parser.add_argument("--concurrency", type=int, default=4, help="requests at a time (default 4)")
    parser.add_argument("--requests", type=int, default=60, help="requests in all (default 60)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of the server (default 1)")
    arguments = parser.parse_args()
    aiperf = shutil.which(arguments.aiperf)
    if aiperf is None:
        sys.exit(f"{arguments.aiperf} is missing; install AIPerf into an environment of its own, see --help")
    version = subprocess.run([aiperf, "--version"], check=True, capture_output=True, text=True).stdout.strip()
    origin = record.origin(PACKAGES, arguments.threads)
    with tempfile.TemporaryDirectory() as work:
        engine = Builder(record.MODEL, Path(work) / record.MODEL.name).run()
        with server(engine, arguments.threads) as (host, port, _):
            url = f"http://{host}:{port}"
            words = command(aiperf, url, record.MODEL.name, arguments.concurrency, arguments.requests)
            subprocess.run([*words, "--artifact-dir", work], check=True, timeout=ROOM)
        (figures,) = Path(work).rglob("profile_export_aiperf.csv")
        table = rows(figures)
    shown = " ".join(["aiperf", *words[1:]]).replace(url, "http://127.0.0.1:8000")
    lines = [
        "# AIPerf against `nemodiff serve`",
        "",
        f"AIPerf {version}, {record.MODEL.name}, on the cores that the server has too; random prompts, so drafts are",
        "seldom right. Its warning that prompt tokens differ is the chat template, which the server counts and it does",
        "not.",
        "",
        "```",
        f"nemodiff serve engines/{record.MODEL.name} --threads {arguments.threads} --no-prefix-reuse",
        shown.replace(f"{record.ROOT}/", ""),
        "```",
        "",
        f"| | {' | '.join(SHOWN)} |",
        "|---|" + "---|" * len(SHOWN),
        *(f"| {' | '.join(cells)} |" for cells in table),
        "",
        record.footer(origin),
    ]
    (record.RESULTS / "aiperf.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines[11:]))


if __name__ == "__main__":
    main()

"""Compare one stream through `nemodiff serve` with the bare runtime: tokens per second and time to the first token.

Both take turns with every question, so noise falls on both alike, and must give the same text. A served stream also
pays for the client that reads it, on the same cores. Writes `results/serving.json` and `.md`. With `--soak N` it sends
N requests instead, of which most leave in the middle, checks that memory stays as it is after the first fifth, and
writes `results/serving_soak.json`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import http.client
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from common import questions, record

import nemodiff
from nemodiff import main_memory
from nemodiff.builder.build import Builder
from nemodiff.contract import counted

BASE = "runtime"
PACKAGES = ("nemodiff", "onnxruntime", "numpy", "fastapi", "uvicorn")
MODES = ("ar", "diffusion", "linear_spec")


@dataclasses.dataclass(frozen=True)
class Stream:
    """One answer as its reader saw it; times in seconds from the start of its request."""

    text: str
    tokens: int
    first: float
    whole: float


Client = Callable[[str, str, int], Stream]  # question, mode, tokens


def bare(engine: nemodiff.LoadedEngine) -> Client:
    """The runtime in this process."""

    def ask(question: str, mode: str, tokens: int) -> Stream:
        began = time.perf_counter()
        first = 0.0
        text = ""
        events = nemodiff.stream(engine, question, mode=mode, max_new_tokens=tokens, min_tokens=tokens)
        for event in events:
            if isinstance(event, nemodiff.Text):
                first = first or time.perf_counter() - began
                text += event.text
            elif isinstance(event, nemodiff.Generation):
                return Stream(text, len(event.token_ids), first, time.perf_counter() - began)
        raise AssertionError("the runtime did not finish")

    return ask


def served(host: str, port: int) -> Client:
    """OpenAI's streaming chat over one kept connection."""
    connection = http.client.HTTPConnection(host, port)

    def ask(question: str, mode: str, tokens: int) -> Stream:
        body = {"messages": [{"role": "user", "content": question}], "mode": mode, "max_tokens": tokens}
        body |= {"min_tokens": tokens, "stream": True, "stream_options": {"include_usage": True}}
        data = json.dumps(body)
        began = time.perf_counter()
        first = 0.0
        text = ""
        count = 0
        connection.request("POST", "/v1/chat/completions", data, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        assert answer.status == 200, answer.read()
        while line := answer.readline():
            if not line.startswith(b"data: {"):
                continue
            chunk = json.loads(line[6:])
            if chunk["usage"]:  # null but for the last chunk
                count = chunk["usage"]["completion_tokens"]
            elif new := chunk["choices"][0]["delta"].get("content"):
                first = first or time.perf_counter() - began
                text += new
        return Stream(text, count, first, time.perf_counter() - began)

    return ask


@contextlib.contextmanager
def server(folder: Path, threads: int, *options: str) -> Iterator[tuple[str, int, int]]:
    """`nemodiff serve` on a free port: host, port and process id."""
    command = [sys.executable, "-m", "nemodiff", "serve", str(folder), "--port", "0", "--threads", str(threads)]
    process = subprocess.Popen([*command, "--no-prefix-reuse", *options], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        line = process.stderr.readline()
        match = re.search(r"http://([\d.]+):(\d+)", line)
        assert match is not None, line + process.stderr.read()
        yield match[1], int(match[2]), process.pid
    finally:
        process.terminate()
        process.wait()
        process.stderr.close()


def compare(clients: dict[str, Client], prompts: list[str], tokens: int, modes: tuple[str, ...]) -> dict[str, Any]:
    """Figures by mode and client; the first question is a warm-up and not counted."""
    figures: dict[str, Any] = {}
    for mode in modes:
        seen: dict[str, list[Stream]] = {name: [] for name in clients}
        for question in prompts:
            for name, ask in clients.items():
                seen[name].append(ask(question, mode, tokens))
        figures[mode] = {name: _figures(streams[1:], seen[BASE][1:]) for name, streams in seen.items()}
    return figures


def _figures(streams: list[Stream], base: list[Stream]) -> dict[str, Any]:
    pairs = list(zip(streams, base, strict=True))
    return {
        "tokens_per_second": round(statistics.median(s.tokens / s.whole for s in streams), 1),
        "ratio": round(statistics.median(b.whole / s.whole for s, b in pairs), 3),
        "first_ms": round(statistics.median(s.first for s in streams) * 1e3, 2),
        "first_later_ms": round(statistics.median(s.first - b.first for s, b in pairs) * 1e3, 2),
        "other_texts": sum(s.text != b.text for s, b in pairs),
    }


def table(figures: dict[str, Any], title: str) -> str:
    """The figures in Markdown."""
    lines = [
        f"# Serving one stream\n\n{title}\n",
        "| mode | way | of the runtime | tokens/s | first token | later by |",
        "|" + "---|" * 6,
    ]
    for mode, by_client in figures.items():
        for name, f in by_client.items():
            speed = f"{f['ratio']:.2f} | {f['tokens_per_second']:.0f}"
            lines.append(f"| {mode} | {name} | {speed} | {f['first_ms']:.1f} ms | {f['first_later_ms']:.1f} ms |")
    return "\n".join(lines) + "\n"


def soak(host: str, port: int, process: int, count: int) -> dict[str, Any]:
    """Requests of which three in four leave at a random moment; what is left of them."""
    rng = random.Random(1)

    def one(leaves: int | None, mode: str) -> None:
        connection = http.client.HTTPConnection(host, port)
        body = {"prompt": "Once upon a time", "mode": mode, "max_tokens": 200, "min_tokens": 200, "stream": True}
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        if leaves != 0:
            connection.getresponse().read(leaves)
        connection.close()

    def memory() -> int:
        return main_memory.of_process(process, ["VmRSS"])["VmRSS"]

    def settled() -> dict[str, float]:
        while True:
            connection = http.client.HTTPConnection(host, port)
            connection.request("GET", "/metrics")
            lines = connection.getresponse().read().decode().splitlines()
            connection.close()
            metrics = {}
            for line in lines:
                if line[0] != "#":
                    name, _, value = line.rpartition(" ")
                    metrics[name] = float(value)
            if not metrics["nemodiff_requests_running"] + metrics["nemodiff_requests_waiting"]:
                return metrics
            time.sleep(0.1)

    parts: list[dict[str, Any]] = []
    for part in range(5):
        jobs = [(rng.choice([0, 1, 2000, None]), rng.choice(nemodiff.MODES)) for _ in range(count // 5)]
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(lambda job: one(*job), jobs))
        ends = {n.split('"')[1]: v for n, v in settled().items() if n.startswith("nemodiff_requests_total")}
        parts.append({"requests": (part + 1) * (count // 5), "memory_bytes": memory(), **ends})
        print(parts[-1])
    return {"parts": parts}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure one stream through the server against the bare runtime.")
    parser.add_argument("--questions", type=int, default=40, help="per mode, after a warm-up; default 40")
    parser.add_argument("--tokens", type=int, default=128, help="of each answer, default 128")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of a forward, default 1")
    parser.add_argument("--soak", type=int, metavar="N", help="instead: N requests that mostly leave in the middle")
    arguments = parser.parse_args()
    origin = record.origin(PACKAGES, arguments.threads)
    with tempfile.TemporaryDirectory(prefix="nemodiff-serving-") as work:
        folder = Builder(record.MODEL, Path(work) / "engine").run()
        if arguments.soak:
            with server(folder, arguments.threads, "--max-queue", "64") as (host, port, process):
                figures = soak(host, port, process, arguments.soak)
            grown = figures["parts"][-1]["memory_bytes"] - figures["parts"][0]["memory_bytes"]
            failed = figures["parts"][-1]["failed"]
            goals = [record.goal("memory after the first fifth", round(grown / 1e6, 1), "at most", 50, "MB")]
            goals.append(record.goal("failed", failed, "at most", 0, "requests"))
            record.write("serving_soak", origin, goals, figures)
            return
        engine = nemodiff.load(folder, threads=arguments.threads)
        with server(folder, arguments.threads) as (host, port, _):
            clients: dict[str, Client] = {BASE: bare(engine), "serve": served(host, port)}
            prompts = [q.text for q in questions.first(arguments.questions + 1)]
            figures = compare(clients, prompts, arguments.tokens, MODES)
    title = (
        f"`{origin['command']}`, {origin['date'][:10]}: {arguments.questions} questions per mode one after the other, "
        f"{arguments.tokens} tokens each, {counted(arguments.threads, 'thread')}, load before the run "
        f"{origin['machine']['load_before']}; medians, and medians of each question's ratio and difference."
    )
    page = table(figures, title)
    print(page)
    goals = []
    for mode, by_client in figures.items():
        for name, f in by_client.items():
            if name != BASE:
                goals.append(
                    record.goal(f"{name}, {mode}, throughput", f["ratio"], "at least", 0.9, "of the runtime's")
                )
                goals.append(
                    record.goal(f"{name}, {mode}, first token later", f["first_later_ms"], "at most", 20, "ms")
                )
                goals.append(record.goal(f"{name}, {mode}, other texts", f["other_texts"], "at most", 0, "answers"))
    record.write(
        "serving", origin, goals, {"checkpoint": record.MODEL.name, "tokens": arguments.tokens, "modes": figures}
    )
    (record.RESULTS / "serving.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()

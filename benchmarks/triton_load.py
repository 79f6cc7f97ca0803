"""Measure Triton Inference Server: one stream against the bare runtime, and load by perf_analyzer.

The one stream takes turns with the bare runtime, question by question. perf_analyzer, NVIDIA's load generator, runs
per mode and concurrency. Writes `results/triton_load.json`.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import questions, record

from nemodiff.builder.build import Builder
from nemodiff.runtime.events.events import Text
from nemodiff.runtime.generate import stream
from nemodiff.runtime.loading import LoadedEngine, load
from nemodiff.serving.triton_server.export import export
from nemodiff.serving.triton_server.install import FOLDER, WHEEL, install
from nemodiff.serving.triton_server.server import TritonServer

MODES = ("ar", "diffusion", "linear_spec")
CONCURRENCY = (1, 4, 8)
# Of the server's own release; newer wheels need a newer C library. It measures responses, so tokens are counted by the
# server's own figures.
CLIENT = "tritonclient==2.51.0"
LIBRARIES = {"libb64.so.0d": "libb64-*.so.0d", "libcudart.so.12": "libcudart-*.so.12*"}


def against_bare(server: TritonServer, engine: LoadedEngine, mode: str, rounds: int) -> dict[str, Any]:
    """One stream at a time, over HTTP and in this process, the same questions in turns."""
    prompts = [q.text for q in questions.draw(2)]
    clients = {
        "bare": lambda text: bare(engine, text, mode),
        "triton": lambda text: through_triton(server, text, mode),
    }
    seconds, first = {name: list[float]() for name in clients}, {name: list[float]() for name in clients}
    tokens: list[int] = []
    for number, text in [*enumerate(prompts[:2], -2), *enumerate(prompts * rounds)]:  # the first two warm up
        texts = {}
        for name in sorted(clients, reverse=number % 2 == 1):
            began = time.perf_counter()
            pieces = clients[name](text)
            piece = next(pieces)
            waited = time.perf_counter() - began
            texts[name] = "".join([piece, *pieces])
            if number >= 0:
                seconds[name].append(time.perf_counter() - began)
                first[name].append(waited * 1e3)
        assert texts["bare"] == texts["triton"]
        if number >= 0:
            tokens.append(len(engine.text.encode_plain(texts["bare"])))
    ttft = {name: statistics.median(values) for name, values in first.items()}
    pairs = zip(seconds["bare"], seconds["triton"], strict=True)
    return {
        "mode": mode,
        "requests": len(tokens),
        "tokens": sum(tokens),
        "tokens_per_second": {
            name: statistics.median(n / s for n, s in zip(tokens, times, strict=True))
            for name, times in seconds.items()
        },
        "first_text_ms": ttft,
        "throughput_ratio": statistics.median(b / t for b, t in pairs),
        "later_by_ms": ttft["triton"] - ttft["bare"],
    }


def bare(engine: LoadedEngine, text: str, mode: str) -> Iterator[str]:
    """The pieces of text of the runtime in this process."""
    return (event.text for event in stream(engine, text, mode=mode, max_new_tokens=64) if isinstance(event, Text))


def through_triton(server: TritonServer, text: str, mode: str) -> Iterator[str]:
    """The same through the server, over a new connection.

    On a kept one Triton Inference Server 2.51 holds small pieces back until those before are acknowledged.
    """
    body = {"text_input": text, "mode": mode, "max_tokens": 64, "stream": True}
    connection = http.client.HTTPConnection(server.http, timeout=60)
    connection.request("POST", "/v2/models/single/generate_stream", json.dumps(body))
    for line in connection.getresponse():
        if line.startswith(b"data: "):
            yield json.loads(line[6:])["text_output"]
    connection.close()


def analyzer() -> tuple[Path, dict[str, str]]:
    """perf_analyzer and its environment; downloaded beside the server at the first use."""
    folder = FOLDER / "perf_analyzer"
    program = folder / "perf_analyzer"
    if not program.exists():
        folder.mkdir(parents=True, exist_ok=True)
        for link, pattern in LIBRARIES.items():
            (folder / link).unlink(missing_ok=True)
            (folder / link).symlink_to(next((WHEEL / "nvidia_pytriton.libs").glob(pattern)))
        with tempfile.TemporaryDirectory() as temporary:
            command = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps", "--only-binary=:all:"]
            subprocess.run([*command, "--platform=manylinux1_x86_64", f"--dest={temporary}", CLIENT], check=True)
            with zipfile.ZipFile(next(Path(temporary).glob("*.whl"))) as wheel:
                name = next(n for n in wheel.namelist() if n.endswith("/bin/perf_analyzer"))
                program.write_bytes(wheel.read(name))
        program.chmod(0o755)
    return program, {**os.environ, "LD_LIBRARY_PATH": str(folder)}


def run(server: TritonServer, mode: str, concurrency: int, requests: int, folder: Path) -> dict[str, Any]:
    """One run of the generator: its own summary, and what its export says of each response."""
    prompts = [q.text for q in questions.draw(4)]
    data, profile = folder / "data.json", folder / "profile.json"
    entries = [{"text_input": [text], "stream": [True], "mode": [mode], "max_tokens": [64]} for text in prompts]
    data.write_text(json.dumps({"data": entries}))
    program, environment = analyzer()
    command = [str(program), "-m", "nemodiff", "-i", "grpc", "-u", server.grpc, "--async", "--streaming"]
    command += [f"--input-data={data}", f"--concurrency-range={concurrency}", f"--request-count={requests}"]
    for _ in range(5):  # now and then it ends before its export is written out
        profile.unlink(missing_ok=True)  # it is not overwritten
        before = counted(server)
        done = subprocess.run(
            [*command, f"--profile-export-file={profile}"], env=environment, capture_output=True, text=True, timeout=600
        )
        if done.returncode != 0:
            raise SystemExit((done.stdout + done.stderr)[:2000])
        with contextlib.suppress(json.JSONDecodeError):
            sent = json.loads(profile.read_text())["experiments"][0]["requests"]
            break
    else:
        raise SystemExit("perf_analyzer has not written its export")
    time.sleep(1.0)  # figures are brought up to date five times a second
    ended, emitted = (after - then for then, after in zip(before, counted(server), strict=True))
    first = [(r["response_timestamps"][0] - r["timestamp"]) / 1e6 for r in sent]
    gaps = [gap for r in sent for gap in (b - a for a, b in itertools.pairwise(r["response_timestamps"]))]
    seconds = (max(r["response_timestamps"][-1] for r in sent) - min(r["timestamp"] for r in sent)) / 1e9
    latency = re.search(r"Avg latency: (\d+) usec", done.stdout)
    assert latency is not None, done.stdout
    return {
        "mode": mode,
        "concurrency": concurrency,
        "requests": len(sent),
        "requests_per_second": len(sent) / seconds,
        "responses_per_second": sum(len(r["response_timestamps"]) for r in sent) / seconds,
        "tokens_per_second": len(sent) / seconds * emitted / ended,
        "tokens_per_request": emitted / ended,
        "latency_ms": int(latency[1]) / 1e3,
        "first_response_ms": {"median": statistics.median(first), "p90": statistics.quantiles(first, n=10)[-1]},
        "between_responses_ms": statistics.mean(gaps) / 1e6,
    }


def counted(server: TritonServer) -> tuple[float, float]:
    """Requests that have finished and tokens emitted, by the server's metrics port."""
    text = urllib.request.urlopen(f"http://{server.metrics}/metrics").read().decode()
    prefixes = ('nemodiff_requests_total{end="finished"', "nemodiff_generation_tokens_total{")
    ours = [line for line in text.splitlines() if 'model="nemodiff"' in line]
    lines = [line for start in prefixes for line in ours if line.startswith(start)]
    finished, tokens = (float(line.rpartition(" ")[2]) for line in lines)
    return finished, tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=100, help="requests per run, default 100")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of questions against the runtime, default 5")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of the engine, default 1")
    arguments = parser.parse_args()
    origin = record.origin(("nemodiff", "onnxruntime", "numpy"), arguments.threads)
    install()
    runs = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        engine = Builder(record.MODEL, folder / "engine").run()
        export(engine, folder / "models", parameters={"threads": str(arguments.threads)}, link=True)
        alone = {"threads": str(arguments.threads), "rows": "1", "prefix_reuse": "false"}
        export(engine, folder / "models", name="single", parameters=alone, link=True)
        loaded = load(engine, threads=arguments.threads)
        with TritonServer(folder / "models", log=folder / "log") as server:
            single = [against_bare(server, loaded, mode, arguments.rounds) for mode in MODES]
            for mode in MODES:
                run(server, mode, 1, 10, folder)  # warm
                for concurrency in CONCURRENCY:
                    runs.append(run(server, mode, concurrency, arguments.requests, folder))
                    r = runs[-1]
                    print(
                        f"{mode:12} {concurrency} at a time: {r['tokens_per_second']:.0f} tokens/s, "
                        f"{r['latency_ms']:.1f} ms, {r['first_response_ms']['median']:.1f} ms to the first response"
                    )
    versions = {"tritonserver": "2.51.0", "perf_analyzer": "2.51.0"}
    goals = []
    for s in single:
        name = f"one stream, {s['mode']}"
        goals.append(record.goal(f"{name}, throughput", s["throughput_ratio"], "at least", 0.9, "of bare"))
        goals.append(record.goal(f"{name}, first text later", s["later_by_ms"], "at most", 20, "ms"))
    about = {**origin, "versions": {**origin["versions"], **versions}}
    record.write(
        "triton_load", about, goals, {"checkpoint": record.MODEL.name, "one_stream": single, "perf_analyzer": runs}
    )


if __name__ == "__main__":
    main()

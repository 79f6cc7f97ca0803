"""Measure where the time of an engine goes: the host's share, the cost of a forward, the start of a process."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nemodiff.contract import MODES
from nemodiff.runtime.engines.passes import bidirectional, causal
from nemodiff.runtime.generate import decode
from nemodiff.runtime.loading import LoadedEngine
from nemodiff.runtime.requests.options import make_options
from nemodiff.runtime.requests.prepare import prepare

SIZES = (1, 2, 4, 8, 16, 32, 64)
CONTEXT = 128  # tokens before the block of the cost curve
FIRST_TOKEN = """
import json, sys, time
marks = [time.perf_counter()]
import onnxruntime
marks.append(time.perf_counter())
from nemodiff.runtime.generate import generate
from nemodiff.runtime.loading import load
marks.append(time.perf_counter())
engine = load(sys.argv[1], threads=int(sys.argv[2]))
marks.append(time.perf_counter())
generate(engine, sys.argv[3], max_new_tokens=1)
marks.append(time.perf_counter())
names = ("import onnxruntime", "import nemodiff", "load", "first token")
print(json.dumps({name: end - start for name, start, end in zip(names, marks, marks[1:])}))
"""


class TimedSession:
    """ONNX Runtime's session of an engine, in its place, with the seconds that its runs have taken."""

    def __init__(self, engine: LoadedEngine) -> None:
        backend: Any = engine.backend
        self.seconds = 0.0
        self._session = backend.session
        backend.session = self

    def run_with_iobinding(self, binding: Any) -> None:
        """See onnxruntime.InferenceSession."""
        started = time.perf_counter()
        self._session.run_with_iobinding(binding)
        self.seconds += time.perf_counter() - started

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)


def host_share(
    engine: LoadedEngine, session: TimedSession, prompts: list[list[int]], new_tokens: int, rounds: int, warmup: int
) -> dict[str, Any]:
    """By mode, the share of the decode loop's wall time outside ONNX Runtime's call, after the prefill."""
    results: dict[str, Any] = {}
    for mode in MODES:
        options = make_options({"mode": mode, "max_new_tokens": new_tokens})
        shares, host_us = [], []
        for turn in range(warmup + rounds):
            wall = inside = 0.0
            passes = 0
            for ids in prompts:
                for _, pass_, _ in decode(engine.backend, [prepare(engine, ids, options)], 1):
                    if pass_.kind == "prefill":
                        started, before = time.perf_counter(), session.seconds
                    else:
                        passes += 1
                wall += time.perf_counter() - started
                inside += session.seconds - before  # filling inputs and binding a new shape are the host's
            if turn >= warmup:
                shares.append(1 - inside / wall)
                host_us.append((wall - inside) / passes * 1e6)
        results[mode] = {
            "share": round(statistics.median(shares), 4),
            "host_us_per_pass": round(statistics.median(host_us), 1),
        }
    return results


def cost_curve(engine: LoadedEngine, session: TimedSession, rounds: int, warmup: int) -> dict[int, dict[str, float]]:
    """Median milliseconds of a bidirectional pass that predicts all of its S tokens, after CONTEXT cached ones."""
    cache = engine.backend.open(1)
    vocab, mask = engine.info.model.vocab_size, engine.info.model.mask_id
    cache.forward([causal("prefill", [(7 * i + 200) % vocab for i in range(CONTEXT)], 0)])
    times: dict[int, list[float]] = {size: [] for size in SIZES}
    for turn in range(warmup + rounds):
        for size in SIZES:
            pass_ = bidirectional("denoise", [mask] * size, CONTEXT, 0.9)
            for repeat in range(3):  # the first after a change of shape finds cold caches and is dropped
                before = session.seconds
                cache.forward([pass_])
                if repeat and turn >= warmup:
                    times[size].append((session.seconds - before) * 1e3)
    one = statistics.median(times[1])
    return {
        size: {"ms": round(statistics.median(t), 4), "over_one_token": round(statistics.median(t) / one, 2)}
        for size, t in times.items()
    }


def first_token(folder: Path, threads: int, rounds: int) -> dict[str, Any]:
    """Seconds from starting `nemodiff run` to its end after one token, median and worst, and the parts of it."""
    ask = "Count from 3 to 9."
    command = [sys.executable, "-m", "nemodiff", "run", str(folder), "-p", ask, "--max-new-tokens", "1"]
    parts_command = [sys.executable, "-c", FIRST_TOKEN, str(folder), str(threads), ask]
    whole = []
    parts = []
    rest = []
    for _ in range(rounds):
        whole.append(_timed([*command, "--threads", str(threads)])[0])
        seconds, output = _timed(parts_command)
        parts.append(json.loads(output))
        rest.append(seconds - sum(parts[-1].values()))
    return {
        "seconds": round(statistics.median(whole), 3),
        "seconds_max": round(max(whole), 3),
        "parts": {
            **{name: round(statistics.median(p[name] for p in parts), 3) for name in parts[0]},
            "python start and exit": round(statistics.median(rest), 3),
        },
    }


def _timed(command: Iterable[str]) -> tuple[float, str]:
    started = time.perf_counter()
    output = subprocess.run(list(command), check=True, stdout=subprocess.PIPE, text=True).stdout
    return time.perf_counter() - started, output

"""Measure the memory and time that a checkpoint of billions of parameters takes to build, to load and for a pass.

The checkpoint has random weights. The build runs in its own process, whose memory is sampled from /proc. Writes
`results/build_memory_SIZE.json`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import make_checkpoint
from common import record

from nemodiff.main_memory import of_process

# Bytes of anonymous memory. The pages of the mapped checkpoint (RssFile) do not count: they are the page cache.
GOAL = 2 * 2**30
PERIOD = 0.02  # seconds between samples
FIELDS = ("RssAnon", "RssFile", "VmHWM")  # bytes after sampling

# A loaded f16 engine takes as much memory as f32, because ONNX Runtime computes in f32 on the CPU.
RUN = """
import json, sys, time
from pathlib import Path
from nemodiff.runtime.engines.passes import causal
from nemodiff.runtime.loading import load

def status():
    pairs = (line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {k: int(v.split()[0]) * 1024 for k, v in pairs if k in ("RssAnon", "VmHWM")}

started = time.perf_counter()
engine = load(sys.argv[1])
loaded = time.perf_counter() - started
cache, seconds = engine.backend.open(1), {}
for size in (1, 8, 32):
    times = []
    for _ in range(4):
        began = time.perf_counter()
        cache.forward([causal("verify", [300] * size, 10, predict_all=True)])
        times.append(time.perf_counter() - began)
    seconds[size] = round(min(times), 3)
memory = status()
print(json.dumps({
    "load_seconds": round(loaded, 1), "anonymous_bytes": memory["RssAnon"], "peak_resident_bytes": memory["VmHWM"],
    "seconds_of_a_pass_by_tokens": seconds,
}))
"""


def run(engine: Path) -> dict[str, Any]:
    """Load an engine in its own process and time passes."""
    command = [sys.executable, "-c", RUN, str(engine)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    figures: dict[str, Any] = json.loads(output)
    return figures


def build(checkpoint: Path, engine: Path, dtype: str) -> dict[str, Any]:
    """Build once as a subprocess; peaks in bytes, time in seconds."""
    command = [sys.executable, "-m", "nemodiff", "build", str(checkpoint), "-o", str(engine), "--dtype", dtype]
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    peaks, samples = dict.fromkeys(FIELDS, 0), 0
    while process.poll() is None:
        status = of_process(process.pid, FIELDS)
        samples += bool(status)
        for name, value in status.items():
            peaks[name] = max(peaks[name], value)
        time.sleep(PERIOD)
    seconds = time.perf_counter() - started
    assert process.stderr is not None
    if process.returncode:
        raise SystemExit(f"nemodiff build failed:\n{process.stderr.read()}")
    return {
        "dtype": dtype,
        "seconds": round(seconds, 1),
        "peak_anonymous_bytes": peaks["RssAnon"],
        "peak_file_bytes": peaks["RssFile"],
        "peak_resident_bytes": peaks["VmHWM"],
        "samples": samples,
        "checkpoint_bytes": _size(checkpoint),
        "engine_bytes": _size(engine),
    }


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the memory of nemodiff build.")
    parser.add_argument("--size", choices=list(make_checkpoint.SIZES), default="3b", help="default 3b")
    parser.add_argument("--layers", type=int, help="cut the network; for a quick try, writes no result")
    parser.add_argument("--dtype", choices=("f16", "f32"), nargs="+", default=["f16", "f32"], help="default both")
    parser.add_argument("--adapter", action="store_true", help="with a drafter adapter")
    parser.add_argument("--build-only", action="store_true", help="do not load what was built, for want of memory")
    parser.add_argument("--workdir", type=Path, help="folder for checkpoint and engine; default a temporary one")
    arguments = parser.parse_args()
    origin = record.origin(("nemodiff", "numpy", "onnx", "onnxruntime", "ml_dtypes", "safetensors"), None)
    work = Path(tempfile.mkdtemp(prefix="nemodiff-build-memory-", dir=arguments.workdir))
    try:
        checkpoint = work / "checkpoint"
        changes = {"num_hidden_layers": arguments.layers} if arguments.layers else {}
        started = time.perf_counter()
        make_checkpoint.write_checkpoint(checkpoint, arguments.size, changes, adapter=arguments.adapter)
        print(
            f"checkpoint of {_size(checkpoint) / 1e9:.2f} GB made in {time.perf_counter() - started:.0f} s", flush=True
        )
        runs = []
        for dtype in arguments.dtype:
            built = build(checkpoint, work / "engine", dtype)
            loaded = None if arguments.build_only else run(work / "engine")
            shutil.rmtree(work / "engine")
            runs.append(built | ({} if loaded is None else {"loaded": loaded}))
            print(
                f"{dtype}: built with {built['peak_anonymous_bytes'] / 2**20:.0f} MiB anonymous and "
                f"{built['peak_file_bytes'] / 2**20:.0f} MiB of mapped files in {built['seconds']:.0f} s, engine "
                f"{built['engine_bytes'] / 1e9:.2f} GB",
                flush=True,
            )
            if loaded is not None:
                print(
                    f"loaded in {loaded['load_seconds']:.0f} s into {loaded['anonymous_bytes'] / 1e9:.1f} GB (peak "
                    f"{loaded['peak_resident_bytes'] / 1e9:.1f}), seconds of a pass by tokens "
                    f"{loaded['seconds_of_a_pass_by_tokens']}",
                    flush=True,
                )
    finally:
        shutil.rmtree(work)
    if arguments.layers:
        return
    goals = [
        record.goal(
            f"peak anonymous memory, {arguments.size} {built['dtype']}",
            round(built["peak_anonymous_bytes"] / 2**30, 3),
            "at most",
            GOAL / 2**30,
            "GiB",
        )
        for built in runs
    ]
    figures = {"size": arguments.size, "adapter": arguments.adapter, "sample_seconds": PERIOD, "runs": runs}
    record.write(f"build_memory_{arguments.size}", origin, goals, figures)


if __name__ == "__main__":
    main()

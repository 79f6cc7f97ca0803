"""Compare `nemodiff build --backend tensorrt-rtx` with TensorRT-RTX's own parser and builder alone.

Both take turns on a checkpoint of a released size with random weights and use the same profiles and targets. Memory is
sampled from /proc for the process and its children. Writes `results/build_tensorrt_SIZE.json`.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import make_checkpoint
import onnx
from common import record

from nemodiff.builder.build import Builder
from nemodiff.builder.checkpoint.weights import write_weights
from nemodiff.builder.compilers.choices import targets
from nemodiff.builder.compilers.compile import declared_shapes
from nemodiff.builder.compilers.profiles import corners, shape
from nemodiff.main_memory import of_process

GOAL_MEMORY = 12 * 2**30  # anonymous bytes
GOAL_TIME = 1.3  # times the bare build
PERIOD = 0.1  # seconds between samples
FIELDS = ("RssAnon", "RssFile")

BARE = """
import json, sys
import tensorrt_rtx as trt
model, engine, job = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
logger = trt.Logger(trt.Logger.ERROR)
builder = trt.Builder(logger)
network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
parser = trt.OnnxParser(network, logger)
assert parser.parse_from_file(model)
config = builder.create_builder_config()
for shapes in job["profiles"]:
    profile = builder.create_optimization_profile()
    for name, corners in shapes.items():
        profile.set_shape(name, *corners)
    config.add_optimization_profile(profile)
config.num_compute_capabilities = len(job["sms"])
for index, sm in enumerate(job["sms"]):
    config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{sm}"), index)
class Writer(trt.IStreamWriter):
    def __init__(self):
        trt.IStreamWriter.__init__(self)
        self.out = open(engine, "wb")
    def write(self, data):
        return self.out.write(data)
writer = Writer()
assert builder.build_serialized_network_to_stream(network, config, writer)
writer.out.close()
"""


def watch(command: list[str]) -> dict[str, Any]:
    """Run a command; seconds, and peaks in bytes over it and its children together."""
    started, before = time.perf_counter(), _cpu()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    peaks, samples = dict.fromkeys(FIELDS, 0), 0
    while process.poll() is None:
        statuses = [of_process(pid, FIELDS) for pid in _family(process.pid)]
        samples += 1
        for name in FIELDS:
            peaks[name] = max(peaks[name], sum(status.get(name, 0) for status in statuses))
        time.sleep(PERIOD)
    seconds = time.perf_counter() - started
    assert process.stderr is not None
    if process.returncode:
        raise SystemExit(f"{command[:4]} failed:\n{process.stderr.read()[-2000:]}")
    return {
        "seconds": round(seconds, 1),
        "cpu_seconds": round(_cpu() - before, 1),
        "peak_anonymous_bytes": peaks["RssAnon"],
        "peak_file_bytes": peaks["RssFile"],
        "samples": samples,
    }


def _cpu() -> float:
    """Processor seconds of finished children; less moved by other processes than time on the clock."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _family(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
    except OSError:
        return []
    return [pid, *(descendant for child in children for descendant in _family(int(child)))]


def bare(builder: Builder, folder: Path) -> dict[str, Any]:
    """Write the graph and its weights, then parse and build them in a process that does nothing else.

    The time of this build leaves out the writing, which `nemodiff build` includes.
    """
    folder.mkdir()
    started = time.perf_counter()
    write_weights(
        builder.graph, builder.tensors, folder / "model.onnx.data", lambda nbytes: None, hashed=False, once=True
    )
    onnx.save(builder.graph.proto, folder / "model.onnx")
    written = time.perf_counter() - started
    dims = declared_shapes(builder.graph.proto)
    job = {
        "sms": targets(builder.backend, builder.choices),
        "profiles": [
            {name: [shape(declared, corner) for corner in corners(profile)] for name, declared in dims.items()}
            for profile in builder.profiles
        ],
    }
    command = [sys.executable, "-c", BARE, str(folder / "model.onnx"), str(folder / "engine"), json.dumps(job)]
    measurement = watch(command)
    return {
        **measurement,
        "engine_bytes": (folder / "engine").stat().st_size,
        "seconds_of_writing_weights": round(written, 1),
    }


def nemodiff(checkpoint: Path, engine: Path, flags: list[str]) -> dict[str, Any]:
    """`nemodiff build` from start to end."""
    command = [sys.executable, "-m", "nemodiff", "build", str(checkpoint), "-o", str(engine)]
    measurement = watch([*command, "--backend", "tensorrt-rtx", *flags])
    return {**measurement, "engine_bytes": (engine / "rank0.engine").stat().st_size}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure nemodiff build --backend tensorrt-rtx.")
    parser.add_argument("--size", choices=list(make_checkpoint.SIZES), default="3b", help="default 3b")
    parser.add_argument("--rounds", type=int, default=3, help="turns of both; default 3")
    parser.add_argument("--layers", type=int, help="cut the network; for a quick try, writes no result")
    parser.add_argument("--hidden", type=int, help="cut the width; for a quick try, writes no result")
    parser.add_argument("--workdir", type=Path, help="folder for checkpoint and engines; default a temporary one")
    arguments = parser.parse_args()
    packages = ("nemodiff", "numpy", "onnx", "ml_dtypes", "safetensors", "tensorrt_rtx_cu13")
    origin = record.origin(packages, None)
    work = Path(tempfile.mkdtemp(prefix="nemodiff-build-tensorrt-", dir=arguments.workdir))
    cuts = {"num_hidden_layers": arguments.layers, "hidden_size": arguments.hidden}
    changes = {name: value for name, value in cuts.items() if value}
    if arguments.hidden:
        changes |= {"vocab_size": 1024, "intermediate_size": arguments.hidden}
    try:
        checkpoint = work / "checkpoint"
        make_checkpoint.write_checkpoint(checkpoint, arguments.size, changes)
        builder = Builder(checkpoint, work / "engine", backend="tensorrt-rtx")
        print(f"checkpoint of {builder.graph.weight_bytes / 2**30:.2f} GiB made", flush=True)
        alone, whole = list[dict[str, Any]](), list[dict[str, Any]]()
        # Neither build starts with the checkpoint in the page cache: the bare builder would take that memory and be
        # faster by a sixth on a virtual machine (docs/log.md).
        for _ in range(arguments.rounds):
            alone.append(bare(builder, work / "bare"))
            shutil.rmtree(work / "bare")
            _show("parser and builder alone", alone[-1])
            whole.append(nemodiff(checkpoint, work / "engine", []))
            shutil.rmtree(work / "engine")
            _show("nemodiff build", whole[-1])
    finally:
        shutil.rmtree(work)
    if changes:
        return
    goals = [
        record.goal(
            f"peak anonymous memory, {arguments.size} bf16",
            round(max(run["peak_anonymous_bytes"] for run in whole) / 2**30, 3),
            "at most",
            GOAL_MEMORY / 2**30,
            "GiB",
        ),
        record.goal(
            "time of nemodiff build against parser and builder alone, medians",
            round(_median(whole) / _median(alone), 3),
            "at most",
            GOAL_TIME,
            "times",
        ),
    ]
    figures = {
        "size": arguments.size,
        "weight_bytes": builder.graph.weight_bytes,
        "sms": targets(builder.backend, builder.choices),
        "sample_seconds": PERIOD,
        "parser_and_builder_alone": alone,
        "nemodiff_build": whole,
    }
    record.write(f"build_tensorrt_{arguments.size}", origin, goals, figures)


def _median(runs: list[dict[str, Any]]) -> float:
    return float(statistics.median(run["seconds"] for run in runs))


def _show(name: str, measurement: dict[str, Any]) -> None:
    fields = ("peak_anonymous_bytes", "peak_file_bytes", "engine_bytes")
    anonymous, mapped, engine = (measurement[field] / 2**30 for field in fields)
    print(
        f"{name}: {measurement['seconds']:.1f} s, {anonymous:.2f} GiB anonymous and {mapped:.2f} GiB of mapped files, "
        f"engine {engine:.2f} GiB",
        flush=True,
    )


if __name__ == "__main__":
    main()

"""Measure what BlockAttention's `slots` input is worth on ONNX Runtime.

Compares one mask for all layers (`slots` made once) with a mask per layer (`slots` made from each layer's own cache
shape). The two sessions take turns, so noise of the machine falls on both. Writes `results/mask_lowering.json`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import onnx
import onnx.parser
from common import record

from nemodiff.builder.build import Builder
from nemodiff.engine_folder import MANIFEST_FILE, MODEL_FILE
from nemodiff.plugins.ops import block_attention
from nemodiff.runtime.engines.passes import bidirectional
from nemodiff.runtime.loading import load

SIZES, WARMUP = (1, 32), 50
PER_LAYER = """
    zero = Constant <value = int32 {0}> ()
    one = Constant <value = int32 {1}> ()
    shape = Shape <start = 2, end = 3> (k)
    capacity = Squeeze (shape)
    count = Cast <to = 6> (capacity)
    slots = Range (zero, count, one)
"""


def per_layer(folder: Path) -> None:
    """Change an engine's BlockAttention so that each layer makes its own slots."""
    model = onnx.load(folder / MODEL_FILE, load_external_data=False)
    body = block_attention.BODY.replace("visible, slots)", "visible, unused)").replace("{", "{" + PER_LAYER, 1)
    for function in model.functions:
        if function.name == "BlockAttention":
            function.CopyFrom(onnx.parser.parse_function(body))
    (folder / MODEL_FILE).write_bytes(model.SerializeToString())
    manifest = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
    manifest["files"][MODEL_FILE]["bytes"] = (folder / MODEL_FILE).stat().st_size
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest), encoding="utf-8")


def optimised_nodes(folder: Path) -> int:
    """Nodes of the graph that ONNX Runtime really runs."""
    import onnxruntime  # after nemodiff, which turns its telemetry off

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    onnxruntime.InferenceSession(folder / MODEL_FILE, options)
    return len(onnx.load(folder / "optimised.onnx", load_external_data=False).graph.node)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure one attention mask for all layers against one per layer.")
    parser.add_argument("--rounds", type=int, default=400, help="forwards per variant and size, default 400")
    rounds = parser.parse_args().rounds
    origin = record.origin(("nemodiff", "onnx", "onnxruntime"), 1)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as work:
        caches = {}
        for name in ("one mask", "a mask per layer"):
            folder = Builder(record.MODEL, Path(work) / name).run()
            if name != "one mask":
                per_layer(folder)
            results[name] = {"nodes": optimised_nodes(folder), "ms": {}}
            caches[name] = load(folder, threads=1).backend.open(1)
        times: dict[tuple[str, int], list[float]] = {(name, size): [] for name in caches for size in SIZES}
        for turn in range(WARMUP + rounds):
            for (name, size), values in times.items():
                started = time.perf_counter()
                caches[name].forward([bidirectional("denoise", [100] * size, 128, 0.9)])
                if turn >= WARMUP:
                    values.append((time.perf_counter() - started) * 1e3)
    for (name, size), values in times.items():
        results[name]["ms"][size] = round(statistics.median(values), 4)
    print(results)
    record.write("mask_lowering", origin, [], {"checkpoint": record.MODEL.name, "rounds": rounds, "variants": results})


if __name__ == "__main__":
    main()

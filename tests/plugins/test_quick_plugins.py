"""The quick plugins of the full TensorRT, on the real registry of TensorRT 11.4's lean runtime, without a GPU.

`quick_plugins.py` drives them in a child process and prints what they say.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from stand_ins.checkpoints import TINY_CHAT

from nemodiff.builder.checkpoint.checkpoint import open_checkpoint
from nemodiff.builder.compilers.kernels import compile_kernels
from nemodiff.plugins import OPS

pytestmark = [
    pytest.mark.trt,
    pytest.mark.skipif(importlib.util.find_spec("tensorrt_lean") is None, reason="needs the trt extra"),
]

DRIVER = Path(__file__).parents[1] / "stand_ins" / "quick_plugins.py"


@pytest.fixture(scope="module")
def driven(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, int], Path]:
    """What each stage's plugin says, the letters it was asked about, and the folder of the kernels."""
    folder = tmp_path_factory.mktemp("quick")
    model = open_checkpoint(TINY_CHAT).model
    kernels = compile_kernels(model, "bf16", (90,), folder, OPS)
    dims = {"B": 2, "S": 7, "R": 5, "T": 600, "H": model.num_heads, "G": model.num_kv_heads, "D": model.head_dim}
    dims["V"] = model.vocab_size
    values = {"scale": model.head_dim**-0.5, "mask_id": model.mask_id}
    job = {"folder": str(folder), "kernels": [dataclasses.asdict(k) for k in kernels], "sm": 90, "compute": "BF16"}
    job |= {"dims": dims, "values": values}
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-W", "ignore", str(DRIVER)]
    done = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]), dims, folder


def test_every_stage_is_a_plugin_with_its_own_kernel(driven: tuple[dict[str, Any], dict[str, int], Path]) -> None:
    found, _, folder = driven
    assert list(found) == [stage.name for op in OPS for stage in op.stages]
    for stage, said in found.items():
        assert said["ptx"] == (folder / "kernels" / f"{stage}.sm90.ptx").read_text()
        assert f".entry {said['entry']}(" in said["ptx"]


def test_shapes_and_types_are_the_ops(driven: tuple[dict[str, Any], dict[str, int], Path]) -> None:
    found, d, _ = driven
    tiles = -(-7 * (d["H"] // d["G"]) // 64) * 2 * d["G"]
    split, merge, scan, rule = found.values()
    assert split["shapes"] == [[tiles + 256, 64, d["D"]], [tiles + 256, 64, 2]]
    assert split["types"] == ["FLOAT", "FLOAT"]
    assert (merge["shapes"], merge["types"]) == ([[2, d["H"], 7, d["D"]]], ["BF16"])
    assert (scan["shapes"], scan["types"]) == ([[2, 5, 16, 4], [2, 5, 16]], ["FLOAT", "INT32"])
    assert rule["shapes"] == [[2, 5], [2, 5], [2, 5], [2]]
    assert rule["types"] == ["INT32", "FLOAT", "INT32", "INT32"]
    assert split["formats"] == ["BF16", "BF16", "BF16", "INT32", "FLOAT", "FLOAT"]


def test_launches_are_the_kernels(driven: tuple[dict[str, Any], dict[str, int], Path]) -> None:
    """The grid by the shapes, the block and shared memory by the compiled kernel, the scalars the kernel's."""
    found, d, _ = driven
    grids = {name: tuple(said["launch"][f"grid_{axis}"] for axis in "xyz") for name, said in found.items()}
    assert grids == {
        "BlockAttentionSplit": (1, 2 * d["G"], 16),
        "BlockAttentionMerge": (2 * d["H"], 7, 1),
        "ConfidenceCommitScan": (10, 16, 1),
        "ConfidenceCommitRule": (2, 1, 1),
    }
    assert [said["scalars"] for said in found.values()] == [[7, 600], [7], [], [5]]
    for op in OPS:
        for stage in op.stages:
            launch = found[stage.name]["launch"]
            assert (launch["block_x"], launch["block_y"], launch["block_z"]) == (32 * stage.num_warps, 1, 1)
            assert f".reqntid {launch['block_x']}" in found[stage.name]["ptx"]
    assert found["BlockAttentionSplit"]["launch"]["shared_mem"] > 0

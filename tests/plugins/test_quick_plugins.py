"""The quick plugins of the full TensorRT, on the real registry of TensorRT 11.4's lean runtime, without a GPU.

`stand_ins/quick_plugins.py` drives them in a child process and prints what they answer.
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
from nemodiff.plugins.ops.confidence_commit import SHARE

pytestmark = [
    pytest.mark.trt,
    pytest.mark.skipif(importlib.util.find_spec("tensorrt_lean") is None, reason="needs the trt extra"),
]

DRIVER = Path(__file__).parents[1] / "stand_ins" / "quick_plugins.py"


@pytest.fixture(scope="module")
def driven(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, int], Path]:
    """What each stage's plugin answers, the sizes of letters it was asked for, and the folder of the kernels."""
    folder = tmp_path_factory.mktemp("quick")
    model = open_checkpoint(TINY_CHAT).model
    kernels = compile_kernels(model, "bf16", (90,), folder, OPS)
    sizes = {"B": 2, "S": 7, "R": 5, "T": 600}
    dims = {**sizes, "H": model.num_heads, "G": model.num_kv_heads, "D": model.head_dim, "V": model.vocab_size}
    job = {
        "folder": str(folder),
        "kernels": [dataclasses.asdict(kernel) for kernel in kernels],
        "sm": 90,
        "compute": "BF16",
        "dims": dims,
        "values": {"scale": model.head_dim**-0.5, "mask_id": model.mask_id},
    }
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-W", "ignore", str(DRIVER)]
    done = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]), dims, folder


def test_every_stage_is_a_plugin_with_its_own_kernel(driven: tuple[dict[str, Any], dict[str, int], Path]) -> None:
    answers, _, folder = driven
    assert list(answers) == [stage.name for op in OPS for stage in op.stages]
    for stage, answer in answers.items():
        assert answer["ptx"] == (folder / "kernels" / f"{stage}.sm90.ptx").read_text()
        assert f".entry {answer['entry']}(" in answer["ptx"]


def test_shapes_and_types_are_the_ops(driven: tuple[dict[str, Any], dict[str, int], Path]) -> None:
    answers, d, _ = driven
    tiles = -(-7 * (d["H"] // d["G"]) // 64) * 2 * d["G"]
    shares = -(-d["V"] // SHARE)
    split, merge, scan, rule = answers.values()
    assert split["shapes"] == [[tiles + 256, 64, d["D"]], [tiles + 256, 64, 2]]
    assert split["types"] == ["FLOAT", "FLOAT"]
    assert (merge["shapes"], merge["types"]) == ([[2, d["H"], 7, d["D"]]], ["BF16"])
    assert (scan["shapes"], scan["types"]) == ([[2, 5, shares, 4], [2, 5, shares]], ["FLOAT", "INT32"])
    assert rule["shapes"] == [[2, 5], [2, 5], [2, 5], [2]]
    assert rule["types"] == ["INT32", "FLOAT", "INT32", "INT32"]
    assert split["formats"] == ["BF16", "BF16", "BF16", "INT32", "FLOAT", "FLOAT"]


def test_launches_are_the_kernels(driven: tuple[dict[str, Any], dict[str, int], Path]) -> None:
    """The grid by the shapes, the block and shared memory by the compiled kernel, the scalars the kernel's."""
    answers, d, _ = driven
    shares = -(-d["V"] // SHARE)
    grids = {name: tuple(answer["launch"][f"grid_{axis}"] for axis in "xyz") for name, answer in answers.items()}
    assert grids == {
        "BlockAttentionSplit": (1, 2 * d["G"], 16),
        "BlockAttentionMerge": (2 * d["H"], 7, 1),
        "ConfidenceCommitScan": (10, shares, 1),
        "ConfidenceCommitRule": (2, 1, 1),
    }
    assert [answer["scalars"] for answer in answers.values()] == [[7, 600], [7], [], [5]]
    for op in OPS:
        for stage in op.stages:
            launch = answers[stage.name]["launch"]
            assert (launch["block_x"], launch["block_y"], launch["block_z"]) == (32 * stage.num_warps, 1, 1)
            assert f".reqntid {launch['block_x']}" in answers[stage.name]["ptx"]
    assert answers["BlockAttentionSplit"]["launch"]["shared_mem"] > 0

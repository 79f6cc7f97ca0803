"""`nemodiff verify` of torch engines on a GPU, with nemodiff's kernels and graphs: `pytest -m gpu`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stand_ins.torch_pair import MODELS

import nemodiff
from nemodiff.builder.build import Builder
from nemodiff.verification.arithmetic import STORED, Arithmetic
from nemodiff.verification.layers import blame, compare_layers
from nemodiff.verification.network import Network
from nemodiff.verification.prompts import token_ids
from nemodiff.verification.recorder import columns
from nemodiff.verification.verify import verify
from nemodiff.verification.weights import Weights

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")]


@pytest.mark.parametrize(
    ("dtype", "choices"),
    [
        ("f32", {}),
        ("bf16", {}),
        ("f16", {}),
        ("bf16", {"quantization": "fp8"}),
        ("f32", {"kv_cache_dtype": "int8"}),
        ("f16", {"kv_cache_dtype": "int8"}),
        ("bf16", {"kv_cache_dtype": "fp8"}),
    ],
    ids=str,
)
def test_a_gpu_engine_is_right_in_every_pass(tmp_path: Path, dtype: Any, choices: dict[str, Any]) -> None:
    checkpoint = MODELS["tiny-chat with adapter"](tmp_path / "checkpoint")
    builder = Builder(checkpoint, tmp_path / "engine", backend="torch", dtype=dtype, **choices)
    engine = nemodiff.load(builder.run(), device="cuda")
    build = engine.info.build
    weights = Weights(checkpoint, checkpoint / "linear_spec_lora")
    judged = Arithmetic(np.float32, STORED[dtype], build.quantization, kv_bits=build.kv_bits)
    reference = Network(weights, judged)
    report, scripts = verify(engine, token_ids(engine, (), 32, raw=False), reference, max_new_tokens=32)
    assert report.ok, report.lines()
    sample = columns(engine.info.model.vocab_size)
    pytest.importorskip("polygraphy")
    layers, _ = compare_layers(engine.backend, engine.folder, reference, [scripts[0].shortened(6)], sample)
    assert blame(layers) is None, dataclasses.asdict(report)

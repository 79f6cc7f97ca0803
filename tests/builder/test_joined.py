"""A packed projection is made from several tensors, band by band, whatever the bands' borders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file, save_file
from stand_ins.checkpoints import write_checkpoint
from stand_ins.packed import packed

from nemodiff.builder.build import Builder
from nemodiff.builder.checkpoint import weights as weights_module
from nemodiff.builder.checkpoint.joined import JoinedTensor
from nemodiff.builder.checkpoint.safetensors_file import read_tensors
from nemodiff.contract import Dtype
from nemodiff.errors import CheckpointError


@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_a_packed_weight_is_its_parts_one_after_the_other(
    dtype: Dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", dtype="f32")
    monkeypatch.setattr(weights_module, "PIECE", 3000)  # bytes: bands of a few rows
    folder = Builder(checkpoint, tmp_path / "engine", dtype=dtype).run()
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(folder / "model.onnx").graph.initializer}
    for name, weight in packed(load_file(checkpoint / "model.safetensors")).items():
        expected = weight.T if weight.ndim == 2 and name != "embed_tokens.weight" else weight
        np.testing.assert_array_equal(arrays[name], expected.astype(arrays[name].dtype))


def test_spans(tmp_path: Path) -> None:
    save_file(
        {name: np.zeros((size, 2), np.float32) for name, size in zip("abc", (3, 1, 4), strict=True)}, tmp_path / "f"
    )
    joined = JoinedTensor(tuple(read_tensors(tmp_path / "f").values()))
    assert joined.shape == (8, 2)
    assert not joined.exact
    assert list(joined.spans(0, 8)) == [(0, (0, 3)), (1, (0, 1)), (2, (0, 4))]
    assert list(joined.spans(2, 5)) == [(0, (2, 3)), (1, (0, 1)), (2, (0, 1))]
    assert list(joined.spans(3, 4)) == [(1, (0, 1))]


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_a_part_that_is_not_finite_is_named(quantization: str | None, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", dtype="f32")
    weights = load_file(checkpoint / "model.safetensors")
    weights["encoder.layers.1.self_attn.k_proj.weight"][3, 7] = np.nan
    save_file(weights, checkpoint / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.k_proj\.weight holds nan"):
        Builder(checkpoint, tmp_path / "engine", quantization=quantization).run()  # type: ignore[arg-type]

"""Checkpoints as the quantizers of others write them: GPTQ, AWQ and compressed-tensors, from numbers of one's own.

The packing is written out bit by bit, apart from how the builder reads it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file
from stand_ins.checkpoints import write_checkpoint

WIDE = {"hidden_size": 64, "intermediate_size": 96}
MODELOPT = {"modelopt": "FP8", "modelopt-rows": "FP8_PER_CHANNEL_PER_TOKEN", "nvfp4": "NVFP4"}
AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)  # which of eight outputs each nibble of a word holds, the lowest first


def pack_last(values: np.ndarray, bits: int, order: tuple[int, ...] | None = None) -> np.ndarray:
    """Numbers from 0 on, (n, m), as (n, m * bits / 32) i32."""
    per = 32 // bits
    words = np.zeros((len(values), values.shape[1] // per), np.uint64)
    for word in range(words.shape[1]):
        for place in range(per):
            column = word * per + (order[place] if order else place)
            words[:, word] |= values[:, column].astype(np.uint64) << np.uint64(place * bits)
    return words.astype(np.uint32).view(np.int32)


def write(
    folder: Path,
    form: str,
    group: int = 32,
    symmetric: bool = False,
    seed: int = 0,
    sizes: dict[str, int] = WIDE,
) -> dict[str, np.ndarray]:
    """Write a checkpoint and return what each projection is, (out, in) f32 by name.

    `form`: gptq, gptq8, awq, pack, pack8, int8, fp8, or of ModelOpt modelopt (FP8), modelopt-rows (a scale per output)
    or nvfp4; `group` 0 is a scale per output.
    """
    write_checkpoint(folder, dtype="f32", **sizes)
    plain = load_file(folder / "model.safetensors")
    rng = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray] = {}
    truth: dict[str, np.ndarray] = {}
    for name, weight in plain.items():
        if not name.endswith("_proj.weight"):
            tensors[name] = weight
            continue
        bits = 4 if form in ("gptq", "awq", "pack") else 8
        out, inputs = weight.shape
        groups = inputs // (group or inputs)
        base = name.removesuffix(".weight")
        if form == "fp8":
            numbers = rng.standard_normal((out, inputs)).astype(ml_dtypes.float8_e4m3fn)
            scale = rng.uniform(0.05, 0.2, (out, 1)).astype(np.float32)
            tensors |= {name: numbers, f"{base}.weight_scale": scale}
            truth[name] = numbers.astype(np.float32) * scale
            continue
        if form.startswith("modelopt"):
            numbers = rng.standard_normal((out, inputs)).astype(ml_dtypes.float8_e4m3fn)
            one = rng.uniform(0.05, 0.2, out if form == "modelopt-rows" else ()).astype(np.float32)
            tensors |= {name: numbers, f"{base}.weight_scale": np.asarray(one)}
            if form == "modelopt":
                tensors[f"{base}.input_scale"] = np.array(0.02, np.float32)
            truth[name] = numbers.astype(np.float32) * np.broadcast_to(one, out)[:, None]
            continue
        if form == "nvfp4":
            fields = rng.integers(0, 16, (out, inputs)).astype(np.uint8)
            scale = rng.uniform(20, 400, (out, inputs // 16)).astype(ml_dtypes.float8_e4m3fn)
            whole = np.float32(2.0**-11)  # exact, so that products may be taken in any order
            tensors |= {name: fields[:, 0::2] | fields[:, 1::2] << 4, f"{base}.weight_scale": scale}
            tensors |= {f"{base}.weight_scale_2": np.array(whole), f"{base}.input_scale": np.array(0.02, np.float32)}
            values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)[fields & 7] * np.where(fields & 8, -1, 1)
            truth[name] = (values * scale.astype(np.float32).repeat(16, 1) * whole).astype(np.float32)
            continue
        zero_free = symmetric or form == "int8"
        middle = 2 ** (bits - 1)
        numbers = rng.integers(0, 2**bits, (out, inputs))
        zeros = np.full((out, groups), middle) if zero_free else rng.integers(1, 2**bits, (out, groups))
        scales = rng.uniform(0.01, 0.04, (out, groups)).astype(np.float16) / np.float16(2 ** (bits - 4))
        spread = zeros.repeat(inputs // groups, 1), scales.astype(np.float32).repeat(inputs // groups, 1)
        truth[name] = (numbers - spread[0]).astype(np.float32) * spread[1]
        if form in ("gptq", "gptq8"):
            tensors[f"{base}.qweight"] = np.ascontiguousarray(pack_last(numbers, bits).T)
            tensors[f"{base}.qzeros"] = pack_last(np.ascontiguousarray((zeros - 1).T), bits)
            tensors[f"{base}.scales"] = np.ascontiguousarray(scales.T)
            tensors[f"{base}.g_idx"] = (np.arange(inputs) // (group or inputs)).astype(np.int32)
        elif form == "awq":
            tensors[f"{base}.qweight"] = pack_last(np.ascontiguousarray(numbers.T), 4, AWQ_COLUMNS)
            tensors[f"{base}.qzeros"] = pack_last(np.ascontiguousarray(zeros.T), 4, AWQ_COLUMNS)
            tensors[f"{base}.scales"] = np.ascontiguousarray(scales.T)
        elif form == "int8":
            tensors |= {name: (numbers - middle).astype(np.int8), f"{base}.weight_scale": scales}
        else:
            tensors[f"{base}.weight_packed"] = pack_last(numbers, bits)
            tensors[f"{base}.weight_scale"] = scales
            tensors[f"{base}.weight_shape"] = np.array([out, inputs], np.int64)
            if not zero_free:
                words = pack_last(np.ascontiguousarray(zeros.T), bits)
                tensors[f"{base}.weight_zero_point"] = np.ascontiguousarray(words.T)
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = described(form, group, symmetric)
    (folder / "config.json").write_text(json.dumps(config))
    return truth


def described(form: str, group: int, symmetric: bool) -> dict[str, Any]:
    """The `quantization_config` of a form."""
    bits = 4 if form in ("gptq", "awq", "pack") else 8
    if form in MODELOPT:
        return {"quant_method": "modelopt", "quant_algo": MODELOPT[form], "ignore": ["diffusion_head"]}
    if form in ("gptq", "gptq8"):
        return {"quant_method": "gptq", "bits": bits, "group_size": group or -1, "desc_act": False, "sym": symmetric}
    if form == "awq":
        return {"quant_method": "awq", "bits": 4, "group_size": group or -1, "zero_point": True, "version": "gemm"}
    kind = {"pack": "pack-quantized", "pack8": "pack-quantized", "int8": "int-quantized", "fp8": "float-quantized"}
    weights = {
        "num_bits": bits,
        "type": "float" if form == "fp8" else "int",
        "strategy": "group" if group else "channel",
        "group_size": group or None,
        "symmetric": symmetric or form in ("int8", "fp8"),
    }
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}}
    return {
        "quant_method": "compressed-tensors",
        "format": kind[form],
        "config_groups": groups,
        "ignore": ["diffusion_head"],
    }

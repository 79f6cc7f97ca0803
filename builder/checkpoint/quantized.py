"""Checkpoints whose projections are already quantized: GPTQ, AWQ, compressed-tensors and ModelOpt, read strictly.

`config.json` says which (`quantization_config`), and each projection `NAME.weight` is then several tensors. Here they
become one `QuantizedTensor` of the usual name and shape (out, in): numbers as they were stored, with scales and zero
points, and rows in f32 for an engine that keeps them otherwise.

Sources: AutoGPTQ's qlinear modules (qweight, qzeros, scales, g_idx), AutoAWQ's WQLinear_GEMM (the same names, packed
along the outputs), compressed-tensors' formats pack-quantized, int-quantized and float-quantized, and ModelOpt's FP8
and NVFP4: e2m1 by two in a byte, a scale in e4m3 for 16 inputs, and one in f32 for all. Its scales of activations are
passed over, since no engine has fixed ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ...contract import Quantization
from ...errors import CheckpointError
from .safetensors_file import Tensor
from .scheme import Scheme

_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where each output of eight lies in its word
_E2M1 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8)  # twice the values
_FLOATS = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))
_E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
_WORD = np.dtype(np.int32)
_BAND = 1024  # outputs at once where a band of inputs is wanted


@dataclasses.dataclass(frozen=True)
class QuantizedTensor:
    """A projection (out, in) = (numbers - zeros) * scales, with `parts` by the last part of their names."""

    name: str
    shape: tuple[int, int]
    scheme: Scheme
    parts: Mapping[str, Tensor]

    @property
    def kind(self) -> Quantization | None:
        return self.scheme.kind

    @property
    def group(self) -> int:
        """Inputs that share a scale."""
        return self.scheme.group or self.shape[1]

    @property
    def file(self) -> Path:
        return next(iter(self.parts.values())).file

    @property
    def exact(self) -> bool:
        """Whether an engine of its kind can hold it as it is: int8 and fp8 with one scale per output, around 0."""
        if self.kind is None:
            return False
        return self.kind == "int4" or (self.scheme.symmetric and self.group == self.shape[1])

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts.values())

    def numbers(self, start: int, stop: int) -> np.ndarray:
        """Rows (out, in): int8 as signed numbers, of 4 bits -8..7; fp8 as e4m3; NVFP4 as i8, twice the values."""
        method, parts = self.scheme.method, self.parts
        per_word = 32 // self.scheme.bits
        if method == "gptq":
            words = parts["qweight"].array()[:, start:stop]  # (in / 8, rows)
            return _signed(_unpacked(words.T, self.scheme.bits), self.scheme.bits)
        if method == "awq":
            first, last = start // per_word, -(-stop // per_word)
            words = parts["qweight"].array()[:, first:last]  # (in, out / 8)
            rows = _awq(words)[:, start - first * per_word :][:, : stop - start]
            return _signed(np.ascontiguousarray(rows.T), self.scheme.bits)
        if method == "pack-quantized":
            return _signed(_unpacked(parts["weight_packed"].array()[start:stop], self.scheme.bits), self.scheme.bits)
        if method == "nvfp4":
            fields = parts["weight"].array()[start:stop]
            return _E2M1[np.stack((fields & 15, fields >> 4), -1).reshape(stop - start, -1)]
        return np.array(parts["weight"].array()[start:stop])

    def scales(self, start: int, stop: int) -> np.ndarray:
        """Scales of rows (out, groups) f32."""
        method = self.scheme.method
        if method in ("gptq", "awq"):
            return np.ascontiguousarray(self.parts["scales"].array()[:, start:stop].T).astype(np.float32)
        scale = self.parts["weight_scale"].array()
        if method == "nvfp4":
            whole = self.parts["weight_scale_2"].array().reshape(-1)[0] / np.float32(2)  # the numbers are doubled
            return np.asarray(scale[start:stop].astype(np.float32) * whole)
        if scale.size == 1:
            return np.full((stop - start, 1), np.float32(scale.reshape(-1)[0]))
        return np.asarray(scale.reshape(self.shape[0], -1)[start:stop].astype(np.float32))

    def zeros(self, start: int, stop: int) -> np.ndarray | None:
        """The numbers that stand for 0, (out, groups) i8 in the range of `numbers`; None where all are 0."""
        bits, method = self.scheme.bits, self.scheme.method
        per_word = 32 // bits
        if self.scheme.symmetric:
            return None
        first, last = start // per_word, -(-stop // per_word)
        if method == "pack-quantized":
            words = self.parts["weight_zero_point"].array()[first:last]  # (out / 8, groups)
            rows = _unpacked(np.ascontiguousarray(words.T), bits).T[start - first * per_word :]
            return _signed(rows[: stop - start], bits)
        words = self.parts["qzeros"].array()[:, first:last]  # (groups, out / 8)
        rows = (_awq(words) if method == "awq" else _unpacked(words, bits)).T[start - first * per_word :]
        rows = rows[: stop - start]
        if method == "gptq":  # the format stores each zero point less one
            rows = (rows + 1) & (2**bits - 1)
        return _signed(rows, bits)

    def check(self) -> None:
        """Refuse what only the data shows: groups that are no runs of inputs. Raises CheckpointError."""
        if "g_idx" in self.parts and (self.parts["g_idx"].array() != np.arange(self.shape[1]) // self.group).any():
            raise CheckpointError(
                f"{self.file}: {self.name.removesuffix('weight')}g_idx reorders the inputs, allowed: groups of "
                f"{self.group} in a row; use a checkpoint made without desc_act"
            )

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows (out, in) in f32."""
        numbers = self.numbers(start, stop).astype(np.float32)
        grouped = numbers.reshape(stop - start, -1, self.group)
        zeros = self.zeros(start, stop)
        if zeros is not None:
            grouped = grouped - zeros.astype(np.float32)[..., None]
        values: np.ndarray = (grouped * self.scales(start, stop)[..., None]).reshape(numbers.shape)
        return values

    def columns(self, start: int, stop: int) -> np.ndarray:
        """Inputs `start` to `stop` of all rows, (in, out) in f32."""
        values = np.empty((stop - start, self.shape[0]), np.float32)
        for first in range(0, self.shape[0], _BAND):
            last = min(first + _BAND, self.shape[0])
            values[:, first:last] = self.rows(first, last)[:, start:stop].T
        return values

    def forget(self) -> None:
        """See `Tensor.forget`."""
        for part in self.parts.values():
            part.forget()


def _unpacked(words: np.ndarray, bits: int) -> np.ndarray:
    """(n, words) i32 as (n, words * 32 / bits) u8, the lowest bits first."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    fields = np.ascontiguousarray(words).view(np.uint32)[..., None] >> shifts & np.uint32(2**bits - 1)
    return fields.astype(np.uint8).reshape(len(words), -1)


def _awq(words: np.ndarray) -> np.ndarray:
    """(n, words) i32 as (n, words * 8) u8 in the order of the outputs."""
    fields = _unpacked(words, 4).reshape(len(words), -1, 8)
    ordered: np.ndarray = fields[..., _AWQ_ORDER].reshape(len(words), -1)
    return ordered


def _signed(numbers: np.ndarray, bits: int) -> np.ndarray:
    """Numbers from 0 on as numbers around 0, i8."""
    signed: np.ndarray = (numbers.astype(np.int16) - 2 ** (bits - 1)).astype(np.int8)
    return signed


def assemble(tensors: dict[str, Tensor], scheme: Scheme) -> dict[str, Tensor | QuantizedTensor]:
    """A checkpoint's tensors with the parts of each projection as one, `NAME.weight`. Raises CheckpointError."""
    names = {name.rpartition(".")[0] for name in tensors if name.endswith(f".{_PARTS[scheme.method][0]}")}
    whole: dict[str, Tensor | QuantizedTensor] = {}
    parts: dict[str, dict[str, Tensor]] = {name: {} for name in names}
    for name, tensor in tensors.items():
        base, _, part = name.rpartition(".")
        if base in names:
            parts[base][part] = tensor
        else:
            if tensor.dtype not in _FLOATS:
                raise CheckpointError(
                    f"{tensor.file}: tensor {name} is {tensor.dtype} and belongs to no quantized projection, allowed: "
                    "F32, F16, BF16; download the checkpoint again"
                )
            whole[name] = tensor
    for name, held in parts.items():
        whole[f"{name}.weight"] = _joined(f"{name}.weight", held, scheme)
    return whole


# Of each method: the part by which a projection is known, and the part that holds its numbers, with their dtype.
_PARTS = {
    "gptq": ("scales", "qweight", _WORD),
    "awq": ("scales", "qweight", _WORD),
    "pack-quantized": ("weight_scale", "weight_packed", _WORD),
    "int-quantized": ("weight_scale", "weight", np.dtype(np.int8)),
    "float-quantized": ("weight_scale", "weight", _E4M3),
    "modelopt": ("weight_scale", "weight", _E4M3),
    "nvfp4": ("weight_scale_2", "weight", np.dtype(np.uint8)),
}


def _joined(name: str, parts: dict[str, Tensor], scheme: Scheme) -> QuantizedTensor:
    """One projection out of its parts, each of the shape and dtype that the format gives it. Raises CheckpointError."""
    method, bits = scheme.method, scheme.bits
    somewhere = next(iter(parts.values())).file

    def refusal(part: str, got: str, allowed: str) -> CheckpointError:
        return CheckpointError(
            f"{somewhere}: {name.removesuffix('weight')}{part} is {got}, allowed: {allowed} as {method} has it; "
            "download the checkpoint again"
        )

    _, main, dtype = _PARTS[method]
    if main not in parts:
        raise refusal(main, "missing", "a tensor")
    if parts[main].dtype != dtype or len(parts[main].shape) != 2:
        raise refusal(main, f"{parts[main].dtype} {list(parts[main].shape)}", f"{dtype} of two axes")
    first, second = parts[main].shape
    per_word = 32 // bits
    outputs, inputs = {
        "gptq": (second, first * per_word),
        "awq": (second * per_word, first),
        "pack-quantized": (first, second * per_word),
        "nvfp4": (first, second * 2),
    }.get(method, (first, second))
    group = scheme.group or inputs
    if inputs % group:
        raise refusal(main, f"of {inputs} inputs", f"multiples of the group of {group}")
    groups = inputs // group
    allowed: dict[str, tuple[tuple[np.dtype[Any], ...], list[tuple[int, ...]]]] = {main: ((dtype,), [(first, second)])}
    if method in ("gptq", "awq"):
        allowed["scales"] = (_FLOATS, [(groups, outputs)])
        allowed["qzeros"] = ((_WORD,), [(groups, outputs // per_word)])
        if method == "gptq":
            allowed["g_idx"] = ((_WORD,), [(inputs,)])
    elif method == "nvfp4":
        allowed["weight_scale"] = ((_E4M3,), [(outputs, groups)])
        allowed["weight_scale_2"] = (_FLOATS[:1], [(), (1,)])
        allowed["input_scale"] = (_FLOATS[:1], [(), (1,)])
    else:
        single: list[tuple[int, ...]] = [] if scheme.group else [(1,), (), (1, 1), (outputs,)]
        allowed["weight_scale"] = (_FLOATS, [(outputs, groups), *single])
        if method == "modelopt":
            allowed["input_scale"] = (_FLOATS[:1], [(), (1,)])
        if method == "pack-quantized":
            allowed["weight_shape"] = ((np.dtype(np.int64), _WORD), [(2,)])
            if not scheme.symmetric:
                allowed["weight_zero_point"] = ((_WORD,), [(outputs // per_word, groups)])
    for part, tensor in parts.items():
        if part not in allowed:
            raise refusal(part, "there", ", ".join(allowed))
        dtypes, shapes = allowed[part]
        if tensor.dtype not in dtypes or tensor.shape not in shapes:
            raise refusal(part, f"{tensor.dtype} {list(tensor.shape)}", f"{dtypes[0]} {list(shapes[0])}")
    missing = allowed.keys() - parts.keys() - {"g_idx", "weight_shape", "input_scale"}
    if missing:
        raise refusal(min(missing), "missing", "a tensor")
    return QuantizedTensor(name, (outputs, inputs), scheme, parts)

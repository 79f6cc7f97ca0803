"""What a checkpoint says of its quantization: GPTQ, AWQ, compressed-tensors or ModelOpt, read strictly."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ...contract import Quantization
from ...errors import CheckpointError
from .folder import MODELOPT_FILE, read_json

_ONLY_8_BITS = ("int-quantized", "float-quantized")


@dataclasses.dataclass(frozen=True)
class Scheme:
    """What a checkpoint's `quantization_config` says. `group` inputs share a scale, 0: all of an output."""

    method: str  # gptq, awq, a format of compressed-tensors, modelopt or nvfp4
    kind: Quantization | None  # of an engine that keeps the numbers, None where no engine has such
    bits: int
    group: int
    symmetric: bool

    def note(self) -> str:
        """A line of the plan."""
        grouped = f"groups of {self.group}" if self.group else "a scale per output"
        keeps = f"an engine with {self.kind} projections keeps their numbers, any other" if self.kind else "an engine"
        return (
            f"projections are quantized already ({self.method}, {self.bits} bits, {grouped}): {keeps} computes with "
            "the same values in its dtype"
        )


def parse_scheme(config: Mapping[str, Any], where: Path) -> Scheme | None:
    """What config.json says of quantization, None if nothing. Raises CheckpointError for what cannot be read."""
    values = config.get("quantization_config")
    if values is None and (where.parent / MODELOPT_FILE).is_file():
        where = where.parent / MODELOPT_FILE
        described = read_json(where).get("quantization")
        values = {**described, "quant_method": "modelopt"} if isinstance(described, dict) else described
    if values is None:
        return None

    def refusal(key: str, value: object, allowed: str) -> CheckpointError:
        return CheckpointError(
            f"{where}: quantization_config.{key} is {value!r:.100}, allowed: {allowed}; use another checkpoint"
        )

    if not isinstance(values, dict):
        raise CheckpointError(f"{where}: quantization_config is no object; use another checkpoint")
    method = values.get("quant_method")
    readers: dict[str, Callable[[dict[str, Any], Callable[..., CheckpointError]], Scheme]] = {
        "gptq": _gptq,
        "awq": _awq_scheme,
        "compressed-tensors": _compressed,
        "modelopt": _modelopt,
    }
    if not isinstance(method, str) or method not in readers:
        raise refusal("quant_method", method, ", ".join(readers))
    scheme = readers[method](values, refusal)
    if scheme.kind is None:
        return scheme
    if type(scheme.bits) is not int or scheme.bits != (4 if scheme.kind == "int4" else 8):
        raise refusal("bits", scheme.bits, "8" if scheme.method in _ONLY_8_BITS else "4 or 8")
    if isinstance(scheme.group, bool) or not isinstance(scheme.group, int) or scheme.group < 0 or scheme.group % 32:
        raise refusal("group_size", scheme.group, "a multiple of 32, or -1")
    return scheme


def _gptq(values: dict[str, Any], refusal: Callable[..., CheckpointError]) -> Scheme:
    if values.get("desc_act"):
        # Its groups are no runs of inputs, so no kernel reads them without reordering the activations.
        raise refusal("desc_act", values["desc_act"], "false")
    if values.get("checkpoint_format", "gptq") != "gptq":
        raise refusal("checkpoint_format", values["checkpoint_format"], "gptq")
    bits = values.get("bits", 0)
    return Scheme("gptq", "int4" if bits == 4 else "int8", bits, _group(values), symmetric=False)


def _awq_scheme(values: dict[str, Any], refusal: Callable[..., CheckpointError]) -> Scheme:
    if str(values.get("version", "gemm")).lower() != "gemm":
        raise refusal("version", values["version"], "gemm")
    if values.get("bits") != 4:
        raise refusal("bits", values.get("bits"), "4")
    if values.get("zero_point") is not True:
        raise refusal("zero_point", values.get("zero_point"), "true")
    return Scheme("awq", "int4", 4, _group(values), symmetric=False)


def _compressed(values: dict[str, Any], refusal: Callable[..., CheckpointError]) -> Scheme:
    groups = values.get("config_groups")
    if not isinstance(groups, dict) or len(groups) != 1:
        raise refusal("config_groups", groups, "one group")
    (described,) = groups.values()
    weights = described.get("weights") if isinstance(described, dict) else None
    if not isinstance(weights, dict):
        raise refusal("config_groups.weights", weights, "an object")
    if described.get("targets") != ["Linear"]:
        raise refusal("config_groups.targets", described.get("targets"), "['Linear']")
    activations = described.get("input_activations")
    if isinstance(activations, dict) and not activations.get("dynamic"):
        raise refusal("config_groups.input_activations.dynamic", activations.get("dynamic"), "true")
    if weights.get("actorder") not in (None, "static", "weight"):
        raise refusal("config_groups.weights.actorder", weights["actorder"], "null, static or weight")
    if values.get("kv_cache_scheme") is not None:
        raise refusal("kv_cache_scheme", values["kv_cache_scheme"], "null")
    form = values.get("format")
    kind = weights.get("type")
    bits = weights.get("num_bits", 0)
    symmetric = weights.get("symmetric", True) is True
    strategy = weights.get("strategy")
    group = _group(weights) if strategy == "group" else 0
    if strategy not in ("tensor", "channel", "group"):
        raise refusal("config_groups.weights.strategy", strategy, "tensor, channel or group")
    if form == "pack-quantized" and kind == "int":
        return Scheme(form, "int4" if bits == 4 else "int8", bits, group, symmetric)
    if form == "int-quantized" and kind == "int" and symmetric:
        return Scheme(form, "int8", bits, group, True)
    if form == "float-quantized" and kind == "float" and symmetric:
        return Scheme(form, "fp8", bits, group, True)
    allowed = "pack-quantized or symmetric int-quantized of type int, float-quantized of type float"
    raise refusal("format", f"{form} of type {kind}", allowed)


def _modelopt(values: dict[str, Any], refusal: Callable[..., CheckpointError]) -> Scheme:
    for key in ("kv_cache_scheme", "kv_cache_quant_algo"):
        if values.get(key) is not None:
            raise refusal(key, values[key], "null")
    algorithm = values.get("quant_algo")
    if algorithm in ("FP8", "FP8_PER_CHANNEL_PER_TOKEN"):
        return Scheme("modelopt", "fp8", 8, 0, True)
    if algorithm == "NVFP4":
        return Scheme("nvfp4", None, 4, 16, True)
    raise refusal("quant_algo", algorithm, "FP8, FP8_PER_CHANNEL_PER_TOKEN or NVFP4")


def _group(values: dict[str, Any]) -> Any:
    group = values.get("group_size")
    return 0 if group in (-1, None) else group

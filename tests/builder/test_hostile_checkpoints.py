"""Broken and unsupported checkpoints: `nemodiff build` refuses each with one line and leaves nothing behind.

Every case breaks one thing in a fresh small checkpoint and lists what the line must say. A few of these files are valid
as JSON or safetensors and only contradict each other.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from conftest import Refused
from safetensors.numpy import load_file, save_file

from nemodiff.builder.build import Builder
from nemodiff.errors import CheckpointError

Break = Callable[[Path], object]

Q_PROJ = "encoder.layers.1.self_attn.q_proj.weight"
NORM = "encoder.norm.weight"
LORA = "base_model.model.encoder.layers.0.self_attn.o_proj.lora_A.weight"
INDEX = "model.safetensors.index.json"
SHARD = "model-00001-of-00001.safetensors"
ADAPTER = "linear_spec_lora/adapter_model.safetensors"
ADAPTER_CONFIG = "linear_spec_lora/adapter_config.json"
DEEP = "[" * 100_000


def change(name: str, **values: Any) -> Break:
    """Change fields of a JSON file; None removes a field."""

    def apply(folder: Path) -> None:
        config = json.loads((folder / name).read_text()) | values
        (folder / name).write_text(json.dumps({k: v for k, v in config.items() if k not in values or v is not None}))

    return apply


def config(**values: Any) -> Break:
    """Change fields of config.json."""
    return change("config.json", **values)


def rope(**values: Any) -> Break:
    """Change fields of the rope parameters."""

    def apply(folder: Path) -> None:
        parameters = json.loads((folder / "config.json").read_text())["rope_parameters"] | values
        config(rope_parameters={k: v for k, v in parameters.items() if v is not None})(folder)

    return apply


def text(name: str, content: str | bytes) -> Break:
    """Replace a file's content."""
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def gone(*names: str) -> Break:
    """Remove files."""

    def apply(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return apply


def both(*steps: Break) -> Break:
    """Several changes in order."""

    def apply(folder: Path) -> None:
        for step in steps:
            step(folder)

    return apply


def tensors(edit: Callable[[dict[str, Any]], object], name: str = "model.safetensors") -> Break:
    """Change the tensors of a safetensors file."""

    def apply(folder: Path) -> None:
        values = dict(load_file(folder / name))
        edit(values)
        save_file(values, folder / name)

    return apply


def element(value: float, dtype: Any = np.float32) -> Break:
    """Put one number into a tensor of the given dtype."""

    def edit(values: dict[str, Any]) -> None:
        values[Q_PROJ] = values[Q_PROJ].astype(dtype)
        values[Q_PROJ].flat[-1] = value

    return tensors(edit)


def raw(edit: Callable[[bytearray], bytes]) -> Break:
    """Change the bytes of model.safetensors."""

    def apply(folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(edit(bytearray(path.read_bytes())))

    return apply


def header(edit: Callable[[dict[str, Any]], object]) -> Break:
    """Change the JSON header of model.safetensors and leave the data alone."""

    def apply(content: bytearray) -> bytes:
        (length,) = struct.unpack_from("<Q", content)
        values = json.loads(content[8 : 8 + length])
        edit(values)
        new = json.dumps(values).encode()
        return struct.pack("<Q", len(new)) + new + content[8 + length :]

    return raw(apply)


def sharded(**weight_map: Any) -> Break:
    """Make the weights one shard of an index, with `weight_map` entries changed."""

    def apply(folder: Path) -> None:
        names = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").rename(folder / SHARD)
        index = {"weight_map": dict.fromkeys(names, SHARD) | weight_map}
        (folder / INDEX).write_text(json.dumps(index))

    return apply


def wide(dtype: Any) -> Callable[[dict[str, Any]], object]:
    """Turn a tensor into another dtype."""
    return lambda values: values.update({NORM: values[NORM].astype(dtype)})


CONFIGS = [
    pytest.param(gone("config.json"), ["config.json: missing; give a complete"], id="no config"),
    pytest.param(text("config.json", "{"), ["config.json: not readable as JSON", "download"], id="config is not JSON"),
    pytest.param(text("config.json", b"\xff\xfe{}"), ["not readable as JSON"], id="config is not UTF-8"),
    pytest.param(text("config.json", DEEP), ["config.json: not readable as JSON"], id="config is nested too deeply"),
    pytest.param(text("config.json", "[]"), ["holds a list, allowed: a JSON object"], id="config is a list"),
    pytest.param(
        text("generation_config.json", "7"), ["generation_config.json", "holds a int"], id="generation is a number"
    ),
    pytest.param(
        config(architectures=["LlamaForCausalLM"]),
        ["config.json: architectures is ['Llama", "allowed: ['Nemo"],
        id="architecture",
    ),
    pytest.param(config(architectures=None), ["architectures is 'missing'"], id="no architecture"),
    pytest.param(config(model_type="llama"), ["model_type is 'llama', allowed: 'nemotron_labs"], id="model type"),
    pytest.param(config(hidden_act="gelu"), ["hidden_act is 'gelu', allowed: 'silu'"], id="activation"),
    pytest.param(config(attention_bias=True), ["attention_bias is True, allowed: False"], id="attention bias"),
    pytest.param(config(mlp_bias=True), ["mlp_bias is True, allowed: False"], id="mlp bias"),
    pytest.param(config(sliding_window=4096), ["sliding_window is 4096, allowed: None"], id="sliding window"),
    pytest.param(config(tie_word_embeddings=True), ["tie_word_embeddings is True"], id="tied embeddings"),
    pytest.param(
        config(dlm_paradigm="causal"), ["dlm_paradigm", "allowed: 'bidirectional' or 'block_diff'"], id="paradigm"
    ),
    pytest.param(config(num_key_value_heads=3), ["num_key_value_heads is 3, allowed: a divisor of 4"], id="kv heads"),
    pytest.param(config(head_dim=15), ["head_dim is 15, allowed: an even number"], id="odd head"),
    pytest.param(
        config(hidden_size=True), ["hidden_size is True, allowed: an integer from 1"], id="bool for an integer"
    ),
    pytest.param(config(hidden_size=32.0), ["hidden_size is 32.0, allowed: an integer"], id="float for an integer"),
    pytest.param(config(hidden_size="32"), ["hidden_size is '32'"], id="text for an integer"),
    pytest.param(
        config(num_hidden_layers=0), ["num_hidden_layers is 0, allowed: an integer from 1 to 1000"], id="no layers"
    ),
    pytest.param(config(num_hidden_layers=10**9), ["num_hidden_layers is 1000000000, allowed"], id="a billion layers"),
    pytest.param(config(vocab_size=10**30), ["vocab_size is 1000", "allowed"], id="vocabulary beyond 64 bits"),
    pytest.param(config(hidden_size=None), ["hidden_size is 'missing'"], id="no hidden size"),
    pytest.param(config(rms_norm_eps=0), ["rms_norm_eps is 0.0, allowed: 1e-30 or more"], id="eps 0"),
    pytest.param(config(rms_norm_eps=10**400), ["rms_norm_eps is 1000", "a finite f32 number"], id="eps beyond float"),
    pytest.param(
        config(mask_token_id=891), ["mask_token_id is [891], allowed: ids below vocab_size 891"], id="mask beyond"
    ),
    pytest.param(config(mask_token_id=-1), ["mask_token_id is -1"], id="negative mask"),
    pytest.param(
        config(mask_token_id=11), ["mask_token_id is 11, allowed: an id that is not an EOS"], id="mask is eos"
    ),
    pytest.param(
        change("generation_config.json", eos_token_id=[11, 891]), ["eos_token_id is [11, 891]"], id="eos beyond"
    ),
    pytest.param(
        change("generation_config.json", eos_token_id=[True]),
        ["generation_config.json: eos_token_id is [True]"],
        id="eos bool",
    ),
    pytest.param(
        both(config(eos_token_id=None), gone("generation_config.json")),
        ["config.json: eos_token_id is None, allowed: an id or a list"],
        id="no eos",
    ),
    pytest.param(config(rope_parameters=None), ["rope_parameters is None, allowed: an object"], id="no rope"),
    pytest.param(rope(rope_type="longrope"), ["rope_type is 'longrope', allowed: 'yarn' or 'default'"], id="rope type"),
    pytest.param(rope(rope_type=None), ["rope_type is 'missing'"], id="no rope type"),
    pytest.param(rope(short_factor=[1]), ["short_factor is [1], allowed: no such field"], id="rope field"),
    pytest.param(rope(rope_theta=None), ["rope_theta is 'missing', allowed: a finite f32 number"], id="no theta"),
    pytest.param(rope(rope_theta=1), ["rope_theta is 1.0, allowed: a number over 1"], id="theta 1"),
    pytest.param(rope(factor=math.nan), ["factor is nan, allowed: a finite f32 number"], id="factor nan"),
    pytest.param(rope(factor=-16), ["factor is -16.0, allowed: 1e-30 or more"], id="factor negative"),
    pytest.param(rope(factor=1e-320), ["factor is 1e-320, allowed"], id="factor that overflows"),
    pytest.param(rope(beta_fast="32"), ["beta_fast is '32'"], id="beta is text"),
    pytest.param(
        rope(original_max_position_embeddings=None), ["original_max_position_embeddings is 'missing'"], id="no L0"
    ),
    pytest.param(
        config(head_dim=2**31 - 2), ["head_dim is 2147483646, allowed: an integer from 2 to 4096"], id="huge head"
    ),
    pytest.param(gone("tokenizer.json"), ["tokenizer.json: missing", "download"], id="no tokenizer"),
    pytest.param(
        text("tokenizer.json", '{"model": 1}'), ["tokenizer.json: not a tokenizer", "download"], id="broken tokenizer"
    ),
    pytest.param(
        text("tokenizer_config.json", "{"),
        ["tokenizer_config.json: not readable as JSON"],
        id="broken tokenizer config",
    ),
    pytest.param(
        config(vocab_size=890, mask_token_id=100),
        ["tokenizer.json: holds token id 890", "vocab_size 890"],
        id="tokenizer with too many ids",
    ),
]


def _merge_base_tensor(folder: Path) -> None:
    tensors(lambda v: v.update({NORM: np.zeros(32, np.float32)}), ADAPTER)(folder)


WEIGHTS = [
    pytest.param(gone("model.safetensors"), ["neither model.safetensors nor", "give a complete"], id="no weights"),
    pytest.param(
        both(gone("model.safetensors"), text("pytorch_model.bin", b"\x80\x04")),
        ["pytorch_model.bin: a pickle file can run code", "allowed: safetensors"],
        id="pickle only",
    ),
    pytest.param(raw(lambda b: bytes(b[:-100])), ["model.safetensors: not a whole", "download"], id="truncated"),
    pytest.param(raw(lambda b: bytes(b) + b"more"), ["not a whole safetensors file"], id="too long"),
    pytest.param(text("model.safetensors", b""), ["not a whole safetensors file"], id="empty file"),
    pytest.param(text("model.safetensors", b"\x07\0\0\0\0\0\0\0garbage"), ["not a whole"], id="garbage header"),
    pytest.param(
        raw(lambda b: struct.pack("<Q", 1 << 62) + bytes(b[8:])), ["not a whole"], id="header beyond the file"
    ),
    pytest.param(
        header(lambda h: h[NORM].update(data_offsets=[1 << 40, (1 << 40) + 128])),
        ["not a whole"],
        id="offsets beyond the file",
    ),
    pytest.param(header(lambda h: h[NORM].update(dtype="I3")), ["not a whole"], id="dtype that does not exist"),
    pytest.param(
        tensors(lambda v: v.pop(Q_PROJ)), [f"tensor {Q_PROJ} of shape [64, 32] is missing"], id="missing tensor"
    ),
    pytest.param(tensors(lambda v: v.update(extra=v[NORM])), ["tensor extra is not part of this"], id="extra tensor"),
    pytest.param(
        tensors(lambda v: v.update({"a\nb\x1b[2J": v[NORM]})),
        [r"tensor a\nb\x1b[2J is not part"],
        id="name with control characters",
    ),
    pytest.param(
        tensors(lambda v: v.update({Q_PROJ: v[Q_PROJ].T.copy()})),
        ["has shape [32, 64], allowed: [64, 32]"],
        id="transposed tensor",
    ),
    pytest.param(tensors(wide(np.int8)), ["has dtype I8, allowed: BF16, F16, F32"], id="I8"),
    pytest.param(tensors(wide(np.float64)), ["has dtype F64, allowed"], id="F64"),
    pytest.param(header(lambda h: h[Q_PROJ].update(dtype="F8_E4M3", shape=[256, 32])), ["has dtype F8_E4M3"], id="F8"),
    pytest.param(element(math.nan), [f"tensor {Q_PROJ} holds nan near [31, 63]", "finite"], id="NaN"),
    pytest.param(element(math.inf), ["holds inf near", "allowed: finite numbers"], id="Inf"),
    pytest.param(element(-math.inf, np.float16), ["holds -inf near"], id="Inf in f16"),
    pytest.param(element(math.nan, ml_dtypes.bfloat16), ["holds nan near"], id="NaN in bf16"),
]

SHARDS = [
    *(
        pytest.param(
            sharded(**{Q_PROJ: place}),
            [f"{INDEX}: tensor {Q_PROJ} is said to lie in", "allowed: "],
            id=f"shard {place!r}",
        )
        for place in (
            "../x.safetensors",
            "/etc/x.safetensors",
            "sub/x.safetensors",
            "a\\x.safetensors",
            "..",
            "",
            7,
            None,
            ["x"],
        )
    ),
    pytest.param(
        sharded(**{Q_PROJ: "pytorch_model.bin"}),
        ["'pytorch_model.bin', allowed: a .safetensors"],
        id="shard is a pickle",
    ),
    pytest.param(
        sharded(other="model-2.safetensors"), ["model-2.safetensors: missing", "download"], id="missing shard"
    ),
    pytest.param(sharded(other=SHARD), ["tensor other is missing although", "download"], id="index says more"),
    pytest.param(
        both(sharded(), lambda f: (f / INDEX).write_text(json.dumps({"weight_map": {NORM: SHARD}}))),
        [f"{SHARD}: holds tensor", "places in no file"],
        id="shard says more",
    ),
    pytest.param(both(sharded(), text(INDEX, "{}")), [f"{INDEX}: weight_map is missing"], id="no weight_map"),
    pytest.param(
        both(sharded(), text(INDEX, '{"weight_map": []}')), ["weight_map is missing"], id="weight_map is a list"
    ),
    pytest.param(
        both(sharded(), text(INDEX, DEEP)), [f"{INDEX}: not readable as JSON"], id="index is nested too deeply"
    ),
]

ADAPTERS = [
    pytest.param(gone(ADAPTER_CONFIG), ["adapter_config.json is missing"], id="no adapter config"),
    pytest.param(
        change(ADAPTER_CONFIG, target_modules=["q_proj"]),
        ["target_modules is ['q_proj'], allowed: ['o_proj']"],
        id="target",
    ),
    pytest.param(change(ADAPTER_CONFIG, r=0), ["r is 0, allowed: a positive integer", "remove"], id="rank 0"),
    pytest.param(change(ADAPTER_CONFIG, r=True), ["r is True"], id="rank is a bool"),
    pytest.param(
        change(ADAPTER_CONFIG, r=5), ["lora_A.weight has shape [4, 64], allowed: [5, 64]"], id="rank is another"
    ),
    pytest.param(change(ADAPTER_CONFIG, lora_alpha=math.inf), ["lora_alpha is inf, allowed"], id="alpha inf"),
    pytest.param(change(ADAPTER_CONFIG, lora_alpha=10**400), ["lora_alpha is 1000"], id="alpha beyond float"),
    pytest.param(change(ADAPTER_CONFIG, lora_alpha=1e300), ["lora_alpha", "allowed"], id="alpha beyond f32"),
    pytest.param(change(ADAPTER_CONFIG, bias="all"), ["bias is 'all', allowed: 'none'"], id="adapter bias"),
    pytest.param(change(ADAPTER_CONFIG, use_dora=True), ["use_dora is True, allowed: unset"], id="dora"),
    pytest.param(
        both(gone(ADAPTER), text("linear_spec_lora/adapter_model.bin", b"\x80\x04")),
        ["linear_spec_lora: holds a pickle file, allowed: linear_spec_lora/adapter_model.safetensors"],
        id="adapter is a pickle",
    ),
    pytest.param(gone(ADAPTER), ["adapter_model.safetensors is missing"], id="no adapter weights"),
    pytest.param(
        tensors(lambda v: v.pop(LORA), ADAPTER),
        [f"tensor {LORA} of shape [4, 64] is missing"],
        id="adapter tensor missing",
    ),
    pytest.param(
        tensors(lambda v: v.update({LORA: v[LORA].T.copy()}), ADAPTER),
        ["has shape [64, 4], allowed: [4, 64]"],
        id="adapter tensor shape",
    ),
    pytest.param(
        _merge_base_tensor,
        ["adapter_model.safetensors", f"tensor {NORM}", "allowed: "],
        id="adapter replaces a base weight",
    ),
]


@pytest.mark.parametrize(("breaks", "fragments"), CONFIGS + WEIGHTS + SHARDS + ADAPTERS)
def test_broken_checkpoint_is_refused(checkpoint: Path, refused: Refused, breaks: Break, fragments: list[str]) -> None:
    breaks(checkpoint)
    refused(["build", str(checkpoint), "-o", str(checkpoint.parent / "engine")], *fragments)


def test_adapter_that_overflows_is_refused(checkpoint: Path, refused: Refused) -> None:
    change(ADAPTER_CONFIG, lora_alpha=9e29)(checkpoint)
    tensors(lambda v: v.update({LORA.replace("lora_A", "lora_B"): np.full((32, 4), 1e30, np.float32)}), ADAPTER)(
        checkpoint
    )
    refused(
        ["build", str(checkpoint), "-o", str(checkpoint.parent / "engine")], "holds inf, f32 allowed: up to", "adapter"
    )


@pytest.mark.parametrize("value", [70000.0, -1e30])
def test_numbers_beyond_f16_are_refused_with_the_dtype_that_fits(
    checkpoint: Path, refused: Refused, value: float
) -> None:
    element(value)(checkpoint)
    arguments = ["build", str(checkpoint), "-o", str(checkpoint.parent / "engine"), "--dtype"]
    refused(
        [*arguments, "f16"],
        f"tensor {Q_PROJ} holds {abs(value):.6g}, f16 allowed: up to 65504",
        "build with --dtype f32",
    )


def test_python_raises_the_same_line(checkpoint: Path) -> None:
    (checkpoint / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json: missing; give a complete checkpoint folder"):
        Builder(checkpoint, checkpoint.parent / "engine")


def test_unknown_fields_are_listed_and_do_not_stop_a_build(checkpoint: Path) -> None:
    config(flux_capacitor=1.21)(checkpoint)
    builder = Builder(checkpoint, checkpoint.parent / "engine")
    assert builder.plan().unknown_fields == ("flux_capacitor",)
    assert (builder.run() / "manifest.json").is_file()

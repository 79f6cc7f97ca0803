"""Write a checkpoint of a released size with random weights, or of one that a CPU runs, in the released file layout.

Weights go into shards of at most 5 GB with an index where one file would be larger. The tokenizer files are those of
tiny-chat, whose ids all lie below the vocabulary's end.
"""

from __future__ import annotations

import argparse
import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

TINY_CHAT = Path(__file__).resolve().parents[1] / "examples" / "tiny-chat"
CARRIED = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
SHARD = 5 * 10**9  # bytes; what save_pretrained writes by default
# Numbers that all tensors are slices of, so that memory stays flat and writing runs at the speed of the disk; prime to
# every width of the family, so that rows of a matrix do not repeat.
POOL = 2**24 - 3
STD = 0.02
RANK, ALPHA = 128, 512  # of the released drafter adapters

COMMON: dict[str, int] = {"vocab_size": 131072, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
SIZES: dict[str, dict[str, int]] = {
    "3b": {**COMMON, "hidden_size": 3072, "num_hidden_layers": 26, "intermediate_size": 9216},
    "8b": {**COMMON, "hidden_size": 4096, "num_hidden_layers": 34, "intermediate_size": 14336},
    "14b": {**COMMON, "hidden_size": 5120, "num_hidden_layers": 40, "intermediate_size": 16384},
}
SIZES["vlm-8b"] = SIZES["8b"]
# No released size: the model of the CPU benchmarks whose weights a processor's cache does not hold.
SIZES["133m"] = {
    "vocab_size": 32768,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "intermediate_size": 2304,
}
ROPE_THETA = {"3b": 1e6, "8b": 1e6, "14b": 1e9, "vlm-8b": 1e6, "133m": 1e6}
# What the model that sees has beside the fields of its decoder; tiny-chat's reserved tokens take the images' names.
SEEING: dict[str, Any] = {
    "architectures": ["NemotronLabsDiffusionVLMModel"],
    "model_type": "nemotron_labs_diffusion_vlm",
    "spatial_merge_size": 2,
    "projector_hidden_act": "gelu",
    "multimodal_projector_bias": False,
    "vision_feature_layer": -1,
    "vision_config": {
        "model_type": "pixtral",
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "head_dim": 64,
        "intermediate_size": 4096,
        "patch_size": 14,
        "image_size": 1540,
        "hidden_act": "silu",
        "rope_theta": 10000.0,
    },
}
IMAGE_TOKENS = {18: "<|image_start|>", 19: "<|image_pad|>", 20: "<|image_break|>", 21: "<|image_end|>"}

Shapes = dict[str, tuple[int, ...]]


def config(size: str, changes: Mapping[str, int] | None = None) -> dict[str, Any]:
    """config.json of a size; `changes` replace fields, for cuts. All other fields are tiny-chat's, as released."""
    values: dict[str, Any] = json.loads((TINY_CHAT / "config.json").read_text(encoding="utf-8"))
    values["rope_parameters"]["rope_theta"] = ROPE_THETA[size]
    return {**values, **SIZES[size], **(SEEING if size.startswith("vlm") else {}), **(changes or {})}


def shapes(values: Mapping[str, Any]) -> Shapes:
    """All tensors of a config, (out, in) for matrices."""
    hidden = values["hidden_size"]
    ffn = values["intermediate_size"]
    vocab = values["vocab_size"]
    queries = values["num_attention_heads"] * values["head_dim"]
    keys = values["num_key_value_heads"] * values["head_dim"]
    tensors: Shapes = {"encoder.embed_tokens.weight": (vocab, hidden)}
    for layer in range(values["num_hidden_layers"]):
        parts: Shapes = {
            "input_layernorm": (hidden,),
            "self_attn.q_proj": (queries, hidden),
            "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, queries),
            "post_attention_layernorm": (hidden,),
            "mlp.gate_proj": (ffn, hidden),
            "mlp.up_proj": (ffn, hidden),
            "mlp.down_proj": (hidden, ffn),
        }
        tensors |= {f"encoder.layers.{layer}.{name}.weight": shape for name, shape in parts.items()}
    if "vision_config" in values:
        tensors |= vision_shapes(values)
    return {**tensors, "encoder.norm.weight": (hidden,), "diffusion_head.weight": (vocab, hidden)}


def vision_shapes(values: Mapping[str, Any]) -> Shapes:
    """The tower and the projector after it."""
    vision = values["vision_config"]
    width, ffn, side, hidden = (
        vision["hidden_size"],
        vision["intermediate_size"],
        vision["patch_size"],
        values["hidden_size"],
    )
    tower, projector = "encoder.vision_tower", "encoder.multi_modal_projector"
    tensors: Shapes = {f"{tower}.patch_conv": (width, 3, side, side), f"{tower}.ln_pre": (width,)}
    for layer in range(vision["num_hidden_layers"]):
        at = f"{tower}.transformer.layers.{layer}"
        tensors |= {f"{at}.{name}": (width,) for name in ("attention_norm", "ffn_norm")}
        tensors |= {f"{at}.attention.{part}_proj": (width, width) for part in "qkvo"}
        tensors |= {f"{at}.feed_forward.{part}_proj": (ffn, width) for part in ("gate", "up")}
        tensors[f"{at}.feed_forward.down_proj"] = (width, ffn)
    tensors |= {
        f"{projector}.norm": (width,),
        f"{projector}.patch_merger.merging_layer": (width, width * values["spatial_merge_size"] ** 2),
        f"{projector}.linear_1": (hidden, width),
        f"{projector}.linear_2": (hidden, hidden),
    }
    return {f"{name}.weight": shape for name, shape in tensors.items()}


def adapter_shapes(values: Mapping[str, Any]) -> Shapes:
    """The drafter LoRA on every o_proj."""
    tensors: Shapes = {}
    for layer in range(values["num_hidden_layers"]):
        name = f"base_model.model.encoder.layers.{layer}.self_attn.o_proj.lora"
        tensors[f"{name}_A.weight"] = (RANK, values["num_attention_heads"] * values["head_dim"])
        tensors[f"{name}_B.weight"] = (values["hidden_size"], RANK)
    return tensors


class Pool:
    """Random numbers that are handed out over and over, from where the last tensor stopped."""

    def __init__(self, seed: int, dtype: Any) -> None:
        values = np.random.default_rng(seed).standard_normal(POOL, np.float32) * np.float32(STD)
        self._values = values.astype(dtype)
        self._ones = np.ones(1, dtype)
        self._at = 0

    @property
    def itemsize(self) -> int:
        """Bytes per number."""
        return int(self._values.itemsize)

    def write(self, stream: BinaryIO, shape: tuple[int, ...]) -> None:
        """Write one tensor; a vector is a norm's weight and stays 1, as random gains would blow activations up."""
        left = math.prod(shape)
        if len(shape) == 1:
            stream.write(np.repeat(self._ones, left).view(np.uint8).data)
            return
        while left:
            part = self._values[self._at : self._at + left]
            stream.write(part.view(np.uint8).data)
            left -= part.size
            self._at = (self._at + part.size) % POOL


def write_safetensors(path: Path, tensors: Shapes, dtype: str, pool: Pool) -> None:
    """Write one safetensors file, header first, then tensor after tensor."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensors.items():
        start, end = end, end + math.prod(shape) * pool.itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for shape in tensors.values():
            pool.write(stream, shape)


def write_weights(folder: Path, tensors: Shapes, pool: Pool) -> None:
    """Write model.safetensors, or shards and their index."""
    groups: list[Shapes] = [{}]
    filled = total = 0
    for name, shape in tensors.items():
        nbytes = math.prod(shape) * pool.itemsize
        if filled and filled + nbytes > SHARD:
            groups.append({})
            filled = 0
        groups[-1][name] = shape
        filled, total = filled + nbytes, total + nbytes
    if len(groups) == 1:
        write_safetensors(folder / "model.safetensors", tensors, "BF16", pool)
        return
    placed: dict[str, str] = {}
    for number, group in enumerate(groups, 1):
        shard = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        write_safetensors(folder / shard, group, "BF16", pool)
        placed |= dict.fromkeys(group, shard)
    index = {"metadata": {"total_size": total}, "weight_map": placed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_checkpoint(
    folder: Path, size: str, changes: Mapping[str, int] | None = None, *, adapter: bool = False, seed: int = 0
) -> None:
    """Write the whole folder; `changes` replace fields of config.json."""
    values = config(size, changes)
    folder.mkdir(parents=True)  # an existing folder is an error: stray shards in it would be taken for weights
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    for name in CARRIED:
        text = (TINY_CHAT / name).read_text(encoding="utf-8")
        if size.startswith("vlm"):
            for number, token in IMAGE_TOKENS.items():
                text = text.replace(f'"<SPECIAL_{number}>"', json.dumps(token))
        (folder / name).write_text(text, encoding="utf-8")
    write_weights(folder, shapes(values), Pool(seed, ml_dtypes.bfloat16))
    if adapter:
        lora = folder / "linear_spec_lora"
        lora.mkdir()
        about = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "bias": "none", "target_modules": ["o_proj"]}
        (lora / "adapter_config.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        write_safetensors(lora / "adapter_model.safetensors", adapter_shapes(values), "F32", Pool(seed + 1, np.float32))


def _change(text: str) -> tuple[str, int]:
    key, _, value = text.partition("=")
    if key not in SIZES["3b"] or not value.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: FIELD=NUMBER with FIELD of {', '.join(SIZES['3b'])}")
    return key, int(value)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a checkpoint of one of these sizes with random weights.")
    parser.add_argument("folder", type=Path, help="folder to write; must not exist")
    parser.add_argument("--size", choices=list(SIZES), default="3b", help="default 3b")
    parser.add_argument("--layers", type=int, help="cut the network to this many layers")
    parser.add_argument(
        "--set", type=_change, action="append", default=[], metavar="FIELD=NUMBER", help="replace a config field"
    )
    parser.add_argument("--adapter", action="store_true", help="add a random drafter adapter, linear_spec_lora/")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random weights, default 0")
    arguments = parser.parse_args()
    if arguments.folder.exists():
        parser.error(f"{arguments.folder} exists; choose another folder or remove it")
    changes = dict(arguments.set) | ({"num_hidden_layers": arguments.layers} if arguments.layers else {})
    write_checkpoint(arguments.folder, arguments.size, changes, adapter=arguments.adapter, seed=arguments.seed)
    count = sum(math.prod(shape) for shape in shapes(config(arguments.size, changes)).values())
    print(f"wrote {arguments.folder}: {count:,} parameters")


if __name__ == "__main__":
    main()

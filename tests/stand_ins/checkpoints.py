"""Checkpoints for tests: the path of tiny-chat, its data generator, and small random folders in the released layout."""

import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from stand_ins.scripts import load_script

TINY_CHAT = Path(__file__).parents[2] / "examples" / "tiny-chat"
TINY_CHAT_2 = TINY_CHAT.with_name("tiny-chat-2")
DTYPES: dict[str, Any] = {"bf16": ml_dtypes.bfloat16, "f16": np.float16, "f32": np.float32}
SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


def load_make_data() -> ModuleType:
    """The example's data generator, which is not part of any package."""
    return load_script(TINY_CHAT / "make_data.py")


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint, as spelled in the released files."""
    e = config["hidden_size"]
    f = config["intermediate_size"]
    v = config["vocab_size"]
    q, kv = (config[f"num_{kind}_heads"] * config["head_dim"] for kind in ("attention", "key_value"))
    named: dict[str, tuple[int, ...]] = {
        "encoder.embed_tokens": (v, e),
        "encoder.norm": (e,),
        "diffusion_head": (v, e),
    }
    for n in range(config["num_hidden_layers"]):
        at = f"encoder.layers.{n}"
        named |= {f"{at}.input_layernorm": (e,), f"{at}.post_attention_layernorm": (e,)}
        named |= {f"{at}.self_attn.{p}_proj": s for p, s in (("q", (q, e)), ("k", (kv, e)), ("v", (kv, e)))}
        named |= {f"{at}.self_attn.o_proj": (e, q), f"{at}.mlp.down_proj": (e, f)}
        named |= {f"{at}.mlp.gate_proj": (f, e), f"{at}.mlp.up_proj": (f, e)}
    return {f"{name}.weight": shape for name, shape in named.items()}


def random_tensors(config: dict[str, Any], seed: int) -> dict[str, np.ndarray]:
    """Weights in f32, large enough that the layers, and not the embedding alone, decide the predictions."""
    rng = np.random.default_rng(seed)
    return {
        name: rng.normal(1 if len(shape) == 1 else 0, 0.3, shape).astype(np.float32)
        for name, shape in shapes(config).items()
    }


def random_adapter(config: dict[str, Any], rank: int, strength: float, seed: int) -> dict[str, np.ndarray]:
    """A drafter adapter on every o_proj, in f32."""
    rng = np.random.default_rng(seed)
    sides = (("A", (rank, config["num_attention_heads"] * config["head_dim"])), ("B", (config["hidden_size"], rank)))
    tensors = {}
    for n in range(config["num_hidden_layers"]):
        for side, shape in sides:
            name = f"base_model.model.encoder.layers.{n}.self_attn.o_proj.lora_{side}.weight"
            tensors[name] = rng.normal(0, strength, shape).astype(np.float32)
    return tensors


def write_adapter(checkpoint: Path, *, rank: int, alpha: float, strength: float) -> None:
    """Add a random drafter adapter to a checkpoint folder."""
    config = json.loads((checkpoint / "config.json").read_text())
    folder = checkpoint / "linear_spec_lora"
    folder.mkdir()
    values = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "bias": "none", "target_modules": ["o_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(values))
    save_file(random_adapter(config, rank, strength, seed=5), folder / "adapter_model.safetensors")


def write_checkpoint(folder: Path, *, seed: int = 0, dtype: str = "bf16", shards: int = 1, **changes: Any) -> Path:
    """Write a checkpoint with random weights and tiny-chat's tokenizer; `changes` go into config.json."""
    folder.mkdir(parents=True)
    for path in TINY_CHAT.glob("*.json*"):
        shutil.copy(path, folder)
    shutil.copy(TINY_CHAT / "chat_template.jinja", folder)
    config = json.loads((TINY_CHAT / "config.json").read_text()) | SMALL | changes
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {name: t.astype(DTYPES[dtype]) for name, t in random_tensors(config, seed).items()}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    names = sorted(tensors)
    files = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({n: tensors[n] for n in names if files[n] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return folder

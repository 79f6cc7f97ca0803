"""Small random checkpoint folders in the released layout, for tests that need another shape than tiny-chat's."""

import json
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from conftest import TINY_CHAT
from safetensors.numpy import save_file

DTYPES: dict[str, Any] = {"bf16": ml_dtypes.bfloat16, "f16": np.float16, "f32": np.float32}
SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint, as spelled in the released files."""
    e, f, v = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
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


def write_checkpoint(folder: Path, *, seed: int = 0, dtype: str = "bf16", shards: int = 1, **changes: Any) -> Path:
    """Write a checkpoint with random weights and tiny-chat's tokenizer; `changes` go into config.json.

    The weights are large enough that the layers, and not the embedding alone, decide the predictions.
    """
    folder.mkdir(parents=True)
    for path in TINY_CHAT.glob("*.json*"):
        shutil.copy(path, folder)
    shutil.copy(TINY_CHAT / "chat_template.jinja", folder)
    config = json.loads((TINY_CHAT / "config.json").read_text()) | SMALL | changes
    (folder / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(seed)
    tensors = {
        name: rng.normal(1 if len(shape) == 1 else 0, 0.3, shape).astype(DTYPES[dtype])
        for name, shape in shapes(config).items()
    }
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    names = sorted(tensors)
    files = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({n: tensors[n] for n in names if files[n] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return folder

"""A small random checkpoint that sees images, in the layout of the released one, and pictures to show it."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.numpy import load_file, save_file

from .checkpoints import DTYPES, write_checkpoint

IMAGE_TOKENS = {18: "<|image_start|>", 19: "<|image_pad|>", 20: "<|image_break|>", 21: "<|image_end|>"}
VISION: dict[str, Any] = {
    "model_type": "pixtral",
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "head_dim": 12,
    "intermediate_size": 40,
    "patch_size": 4,
    "image_size": 64,
    "num_channels": 3,
    "hidden_act": "silu",
    "rope_theta": 10000.0,
}
FLAT: dict[str, Any] = {
    "architectures": ["NemotronLabsDiffusionVLMModel"],
    "model_type": "nemotron_labs_diffusion_vlm",
    "vision_config": VISION,
    "spatial_merge_size": 2,
    "projector_hidden_act": "gelu",
    "multimodal_projector_bias": False,
    "vision_feature_layer": -1,
    "dlm_type": "llada",
}
# As the released template does, it writes one start for an image.
TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{{- part['text'] if part['type'] == 'text' else '<|image_start|>' -}}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' + ('<think>\\n' if enable_thinking else '<think></think>') -}}
{%- endif -%}
"""


def vision_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of tower and projector, as spelled in the released files."""
    vision = config["vision_config"]
    h, f, e = vision["hidden_size"], vision["intermediate_size"], config["hidden_size"]
    tower = "encoder.vision_tower"
    named: dict[str, tuple[int, ...]] = {
        f"{tower}.patch_conv": (h, 3, vision["patch_size"], vision["patch_size"]),
        f"{tower}.ln_pre": (h,),
    }
    for n in range(vision["num_hidden_layers"]):
        at = f"{tower}.transformer.layers.{n}"
        named |= {f"{at}.attention_norm": (h,), f"{at}.ffn_norm": (h,)}
        named |= {f"{at}.attention.{p}_proj": (h, h) for p in "qkvo"}
        named |= {f"{at}.feed_forward.{p}_proj": (f, h) for p in ("gate", "up")}
        named[f"{at}.feed_forward.down_proj"] = (h, f)
    at = "encoder.multi_modal_projector"
    named |= {f"{at}.norm": (h,), f"{at}.linear_1": (e, h), f"{at}.linear_2": (e, e)}
    named[f"{at}.patch_merger.merging_layer"] = (h, h * config["spatial_merge_size"] ** 2)
    return {f"{name}.weight": shape for name, shape in named.items()}


def write_vision_checkpoint(folder: Path, *, dtype: str = "f32", **changes: Any) -> Path:
    """Write a text checkpoint and make it one that sees; `changes` go into config.json."""
    write_checkpoint(folder, dtype=dtype)
    config = json.loads((folder / "config.json").read_text()) | FLAT | changes
    (folder / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(1)
    tensors = {
        name: rng.normal(1 if len(shape) == 1 else 0, 0.3, shape).astype(DTYPES[dtype])
        for name, shape in vision_shapes(config).items()
    }
    save_file(load_file(folder / "model.safetensors") | tensors, folder / "model.safetensors")
    tokenizer = (folder / "tokenizer.json").read_text("utf-8")
    for number, text in IMAGE_TOKENS.items():
        tokenizer = tokenizer.replace(f'"<SPECIAL_{number}>"', json.dumps(text))
    (folder / "tokenizer.json").write_text(tokenizer, "utf-8")
    (folder / "chat_template.jinja").write_text(TEMPLATE, "utf-8")
    return folder


def picture(width: int, height: int, seed: int = 0, mode: str = "RGB") -> Image.Image:
    """A picture of noise."""
    channels = len(Image.new(mode, (1, 1)).getbands())
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)
    return Image.fromarray(noise.squeeze(2) if channels == 1 else noise, mode if mode == "CMYK" else None)


def as_bytes(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    """A picture as a file."""
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()

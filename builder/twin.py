"""The autoregressive twin of a checkpoint: its tensors' names and its configs, as Ministral-3 has them."""

from __future__ import annotations

from typing import Any

from ..config import ModelConfig
from .checkpoint.checkpoint import Checkpoint
from .checkpoint.safetensors_file import Tensor

# Fields that mean the same in both configs, with what is written where the checkpoint is silent: `Ministral3Config`
# has defaults of its own, so a field left out would get another model's value.
_FIELDS: dict[str, Any] = {
    "vocab_size": None,
    "hidden_size": None,
    "intermediate_size": None,
    "num_hidden_layers": None,
    "num_attention_heads": None,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": None,
    "rms_norm_eps": None,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "pad_token_id": None,
}


def twin_name(name: str) -> str:
    """A tensor's name in Ministral-3."""
    return "lm_head.weight" if name == "diffusion_head.weight" else name.replace("encoder.", "model.", 1)


def twin_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The twin's config.json. `rope_parameters` keeps every field of the checkpoint as it was."""
    values = checkpoint.config
    model = checkpoint.model
    rope = {
        "rope_type": model.rope.rope_type,
        "rope_theta": model.rope.theta,
        # transformers computes the query scale also where there is none: 1 + 0 * ln(...)
        "original_max_position_embeddings": model.rope.original_max_position or model.max_position,
        "llama_4_scaling_beta": model.rope.llama_4_scaling_beta,
    }
    parameters = values.get("rope_parameters") or values["rope_scaling"]
    rope |= {key: value for key, value in parameters.items() if value is not None}
    config = {name: values.get(name, default) for name, default in _FIELDS.items()}
    config |= {
        "architectures": ["Ministral3ForCausalLM"],
        "model_type": "ministral3",
        "dtype": twin_dtype(checkpoint),
        "eos_token_id": _eos(model),
        "rope_parameters": rope,
        "use_cache": True,  # the checkpoint's is false, for its diffusion loop
    }
    if model.rope.llama_4_scaling_beta:  # where vLLM's Mistral looks for the query scale
        config["llama_4_scaling"] = {
            "original_max_position_embeddings": model.rope.original_max_position,
            "beta": model.rope.llama_4_scaling_beta,
        }
    return dict(sorted(config.items()))


def twin_generation(model: ModelConfig, values: dict[str, Any]) -> dict[str, Any]:
    """The twin's generation_config.json: the checkpoint's, and the mask id is never chosen, as in mode ar."""
    suppressed = values.get("suppress_tokens")
    suppressed = suppressed if isinstance(suppressed, list) else []
    if model.mask_id not in suppressed:
        suppressed = [*suppressed, model.mask_id]
    return values | {"eos_token_id": _eos(model), "suppress_tokens": suppressed}


def twin_dtype(checkpoint: Checkpoint) -> str:
    """The dtype to load the twin in: the one of all tensors, or f32, which holds any mixture."""
    names = {t.dtype.name for t in checkpoint.tensors.values() if isinstance(t, Tensor)}
    return names.pop() if len(names) == 1 else "float32"


def _eos(model: ModelConfig) -> int | list[int]:
    return model.eos_ids[0] if len(model.eos_ids) == 1 else list(model.eos_ids)

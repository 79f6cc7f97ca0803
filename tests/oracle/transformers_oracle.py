"""The outside oracle: the same checkpoint in transformers' Ministral3, for tests marked `torch` only.

Importing this module needs torch, so a test imports it through `pytest.importorskip`.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  # registers the name bfloat16 with numpy
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file
from transformers import GenerationConfig, Ministral3Config, Ministral3ForCausalLM

# The fields a Ministral3Config has too; the rest of the file (mask id, block size, training) has no meaning to it.
SHARED_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "sliding_window",
    "tie_word_embeddings",
    "rope_parameters",
)


def load(folder: str | Path) -> Ministral3ForCausalLM:
    """The checkpoint of a folder, f32 on the CPU with eager attention."""
    config = json.loads((Path(folder) / "config.json").read_text("utf-8"))
    return build(config, load_file(Path(folder) / "model.safetensors"))


def build(config: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]) -> Ministral3ForCausalLM:
    """A model from a config dict and tensors under the family's names."""
    fields: dict[str, Any] = {name: config[name] for name in SHARED_FIELDS if name in config}
    fields["rope_parameters"] = dict(fields["rope_parameters"])  # transformers adds fields to it
    # The defaults of the class are not this vocabulary's; generate() gets its ids as arguments instead.
    fields |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "attn_implementation": "eager"}
    model: Any = Ministral3ForCausalLM(Ministral3Config(**fields))
    state = {_rename(name): torch.from_numpy(np.array(value, np.float32)) for name, value in tensors.items()}
    model.load_state_dict(state, strict=True)
    # What a caller must be able to suppress; kept on the model so that greedy() needs no second source for it.
    mask_id = config["mask_token_id"]
    model.generation_config = GenerationConfig.from_dict(
        {"do_sample": False, "suppress_tokens": [mask_id], "pad_token_id": mask_id}
    )
    # For a tiny model a second thread buys nothing, and on a busy machine its spinning costs ten times the work.
    torch.set_num_threads(1)
    oracle: Ministral3ForCausalLM = model.float().eval()
    return oracle


def logits(
    model: Ministral3ForCausalLM, ids: Sequence[int], visible: NDArray[np.bool_] | None = None
) -> NDArray[np.float32]:
    """Raw logits (N, V) of one sequence; `visible` (N, N) bool replaces the causal mask."""
    mask = None
    if visible is not None:
        mask = torch.zeros(1, 1, *visible.shape).masked_fill(torch.from_numpy(~visible), float("-inf"))
    with torch.inference_mode():
        result: torch.Tensor = model(torch.tensor([list(ids)]), attention_mask=mask, use_cache=False).logits
    return result[0].numpy()


def greedy(model: Any, prompt_ids: Sequence[int], max_new_tokens: int, eos: Collection[int]) -> list[int]:
    """New tokens of `model.generate`, the EOS included, the mask id never a candidate."""
    ids = torch.tensor([list(prompt_ids)])
    result = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, eos_token_id=sorted(eos)
    )
    return [int(token) for token in result[0, len(prompt_ids) :]]


def _rename(name: str) -> str:
    if name == "diffusion_head.weight":
        return "lm_head.weight"
    return name.replace("encoder.", "model.", 1)

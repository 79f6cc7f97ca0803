"""What a checkpoint's config.json says, parsed strictly into frozen dataclasses.

Every number that changes the maths is read from the file and none is assumed; a field that would change the maths in a
way the graph does not have (biases, sliding windows, other activations) is an error.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .fields import Fields
from .vision import VisionConfig, parse_vision

if TYPE_CHECKING:
    import numpy as np

_TEXT, _VLM = "NemotronLabsDiffusionModel", "NemotronLabsDiffusionVLMModel"
_MODEL_TYPES = {_TEXT: "nemotron_labs_diffusion", _VLM: "nemotron_labs_diffusion_vlm"}
# Fields with one supported value: any other would need another graph.
_FIXED: dict[str, object] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "sliding_window": None,
}
# Fields without influence on what the engine computes.
_IGNORED = """
    quantization_config
    attention_dropout initializer_range torch_dtype dtype use_cache attn_implementation _attn_implementation
    ar_loss_weight dlm_loss_weight dp_varying_mask_ratio bos_token_id pad_token_id transformers_version auto_map
    rope_scaling rope_theta _name_or_path
"""
# Of the vision-language model's training.
_IGNORED_VLM = """
    dlm_type dlm_arch complementary_mask global_loss_avg prefix_ratio adaptive_mask_rate tok_mask_half_life_ratio
    diff_loss_weight
"""


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding: `default` or `yarn`, and the llama-4 query scale (beta 0 means none)."""

    rope_type: str
    theta: float
    factor: float = 1.0  # 0.25 in 3B-Base, so it cannot be derived from the position limits
    original_max_position: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True
    llama_4_scaling_beta: float = 0.0

    def inv_freq(self, head_dim: int) -> np.ndarray:
        """Radians per position of each rotated pair, (head_dim / 2,) f32.

        Source: YaRN, arXiv 2309.00071, with the correction range rounded outwards unless `truncate` is false.
        """
        import numpy as np  # not above: most that reads a config needs no arrays

        period = self.theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
        if self.rope_type == "default":
            return np.asarray(1.0 / period, np.float32)

        def pair_turning(turns: float) -> float:
            return head_dim * math.log(self.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(self.theta))

        low, high = pair_turning(self.beta_fast), pair_turning(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        ramp = np.clip((np.arange(head_dim // 2) - low) / max(high - low, 1e-3), 0, 1)
        return np.asarray((1 - ramp) / period + ramp / (self.factor * period), np.float32)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Everything about the model that the graph and the loops need."""

    hidden_size: int
    num_layers: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    max_position: int
    mask_id: int
    block_length: int
    eos_ids: tuple[int, ...]
    rope: RopeConfig
    vision: VisionConfig | None = None  # of a model that sees images
    unknown_fields: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        """Number of the decoder's weights, the drafter adapter not counted."""
        attention = 2 * self.hidden_size * self.head_dim * (self.num_heads + self.num_kv_heads)
        layer = attention + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size
        return self.num_layers * layer + 2 * self.vocab_size * self.hidden_size + self.hidden_size

    @property
    def splits(self) -> tuple[int, ...]:
        """Numbers of GPUs over which the model can be split: they divide its key/value heads and its inner size."""
        heads, inner = self.num_kv_heads, self.intermediate_size
        return tuple(n for n in range(1, heads + 1) if heads % n == 0 and inner % n == 0)

    def kv_bytes_per_token(self, itemsize: int) -> int:
        """Bytes of K and V that one token occupies over all layers, for elements of `itemsize` bytes."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * itemsize


def parse_config(values: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> ModelConfig:
    """Read `config.json`, and `generation_config.json` for more EOS ids. Raises CheckpointError."""
    fields = Fields("config.json", values)
    architecture = fields.one_of("architectures", ([_TEXT], [_VLM]), "missing")
    fields.one_of("model_type", (_MODEL_TYPES[architecture[0]],), "missing")
    for key, allowed in _FIXED.items():
        fields.one_of(key, (allowed,), allowed)
    # How it was trained; the mask is chosen per request, so an engine is the same for each.
    fields.one_of("dlm_paradigm", ("bidirectional", "block_diff", "autoregressive"), "bidirectional")
    rope = _parse_rope(fields)
    config = ModelConfig(
        hidden_size=fields.integer("hidden_size"),
        num_layers=fields.integer("num_hidden_layers", high=1000),
        intermediate_size=fields.integer("intermediate_size"),
        num_heads=fields.integer("num_attention_heads"),
        num_kv_heads=fields.integer("num_key_value_heads"),
        head_dim=fields.integer("head_dim", 2, 4096),
        vocab_size=fields.integer("vocab_size", 2),
        rms_norm_eps=fields.positive("rms_norm_eps"),
        max_position=fields.integer("max_position_embeddings"),
        mask_id=fields.integer("mask_token_id", 0),
        block_length=fields.integer("block_size"),
        eos_ids=_eos_ids(fields, generation or {}),
        rope=rope,
        vision=parse_vision(fields) if architecture == [_VLM] else None,
    )
    if config.num_heads % config.num_kv_heads:
        raise fields.fail("num_key_value_heads", config.num_kv_heads, f"a divisor of {config.num_heads}")
    if config.head_dim % 2:
        raise fields.fail("head_dim", config.head_dim, "an even number")
    for name, ids in (("mask_token_id", [config.mask_id]), ("eos_token_id", list(config.eos_ids))):
        if max(ids) >= config.vocab_size:
            raise fields.fail(name, ids, f"ids below vocab_size {config.vocab_size}")
    if config.mask_id in config.eos_ids:
        raise fields.fail("mask_token_id", config.mask_id, "an id that is not an EOS")
    unknown = (
        set(values)
        - fields.read
        - set(_IGNORED.split())
        - (set(_IGNORED_VLM.split()) if architecture == [_VLM] else set())
    )
    return dataclasses.replace(config, unknown_fields=tuple(sorted(unknown)))


def _eos_ids(fields: Fields, generation: Mapping[str, Any]) -> tuple[int, ...]:
    """The ids that end a text: those of generation_config.json and then those of config.json."""
    own = fields.get("eos_token_id")
    if generation.get("eos_token_id") is None:
        return _ids(fields)
    named = _ids(Fields("generation_config.json", generation))
    # What no token of a text can be is left out here, since generation_config.json gives an end without it.
    vocab, mask = fields.integer("vocab_size", 2), fields.integer("mask_token_id", 0)
    more = [i for i in (own if isinstance(own, list) else [own]) if type(i) is int and 0 <= i < vocab and i != mask]
    return tuple(dict.fromkeys([*named, *more]))


def _ids(fields: Fields) -> tuple[int, ...]:
    value = fields.get("eos_token_id")
    ids = value if isinstance(value, list) else [value]
    if not ids or any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
        raise fields.fail("eos_token_id", value, "an id or a list of ids")
    return tuple(ids)


def _parse_rope(outer: Fields) -> RopeConfig:
    """`rope_parameters`, or `rope_scaling` (its older name) with `rope_theta` beside it."""
    values = outer.get("rope_parameters") or outer.get("rope_scaling")
    if not isinstance(values, Mapping):
        raise outer.fail("rope_parameters", values, "an object with rope_type and rope_theta")
    outside = {"rope_theta": outer.get("rope_theta")} if "rope_theta" in outer.values else {}
    fields = Fields("config.json: rope_parameters", {**outside, **values})
    kind = fields.one_of("rope_type", ("yarn", "default"), fields.get("type", "missing"))
    theta = fields.number("rope_theta")
    if theta <= 1:
        raise fields.fail("rope_theta", theta, "a number over 1")
    beta = fields.number("llama_4_scaling_beta", 0.0)
    rope = RopeConfig(kind, theta, llama_4_scaling_beta=beta)
    if kind == "yarn" or beta:
        original = fields.integer("original_max_position_embeddings")
        rope = dataclasses.replace(rope, original_max_position=original)
    if kind == "yarn":
        factor = fields.positive("factor")
        rope = dataclasses.replace(
            rope,
            factor=factor,
            beta_fast=fields.positive("beta_fast", 32.0),
            beta_slow=fields.positive("beta_slow", 1.0),
            attention_factor=_attention_factor(fields, factor),
            truncate=fields.one_of("truncate", (True, False), True),
        )
    for key in set(fields.values) - fields.read:
        raise fields.fail(key, fields.values[key], f"no such field for rope_type {kind!r}")
    return rope


def _attention_factor(fields: Fields, factor: float) -> float:
    """What cos and sin are multiplied by: 1 in every released checkpoint, as mscale equals mscale_all_dim."""

    def magnitude(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    mscale, all_dim = fields.number("mscale", 0.0), fields.number("mscale_all_dim", 0.0)
    natural = magnitude(mscale) / magnitude(all_dim) if mscale and all_dim else magnitude(1.0)
    return fields.positive("attention_factor", natural)

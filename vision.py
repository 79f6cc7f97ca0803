"""What a checkpoint's config.json says of its vision tower and of the projector after it, parsed strictly."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .fields import Fields

if TYPE_CHECKING:
    import numpy as np

CHANNELS = 3
NORM_EPS = 1e-5  # of Pixtral's norms, which no config names
# The remote code's own limit on an image's longer side; no file holds it, and the tower was trained on up to 1540.
DEFAULT_IMAGE_SIZE = 1400
# Fields of vision_config with one supported value. transformers leaves out what its class has as a default.
_FIXED: dict[str, tuple[object, object]] = {
    "model_type": ("pixtral", "missing"),
    "num_channels": (CHANNELS, CHANNELS),
    "attention_bias": (False, False),
}
_IGNORED = """
    attention_dropout initializer_range torch_dtype dtype architectures transformers_version _name_or_path
    _attn_implementation attn_implementation
"""


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """A Pixtral tower, and the projector that makes one embedding of `merge` x `merge` patches."""

    hidden_size: int
    num_layers: int
    intermediate_size: int
    num_heads: int
    head_dim: int
    patch_size: int  # pixels
    image_size: int  # pixels of the longest side that it was trained on
    hidden_act: str  # silu or gelu
    rope_theta: float
    merge: int

    @property
    def cell(self) -> int:
        """Pixels of a side of what becomes one token."""
        return self.patch_size * self.merge

    @property
    def default_max_image_size(self) -> int:
        """The longer side that larger images are scaled down to: the remote code's, or what the tower has seen."""
        return max(min(DEFAULT_IMAGE_SIZE, self.image_size) // self.cell, 1) * self.cell

    def grid(self, width: int, height: int, limit: int) -> tuple[int, int]:
        """Columns and rows of tokens of an image of that many pixels, whose longer side is scaled down to `limit`.

        Source: mistral_common's image encoder, from which the remote code's grid does not differ where it is known.
        """
        ratio = max(width, height) / limit
        if ratio > 1:
            width, height = round(width / ratio), round(height / ratio)
        return -(-max(width, 1) // self.cell), -(-max(height, 1) // self.cell)

    def tokens(self, width: int, height: int, limit: int) -> int:
        """Tokens in a prompt of an image of so many pixels, see `grid`: pads, breaks, start and end."""
        columns, rows = self.grid(width, height, limit)
        return columns * rows + rows - 1 + 2

    def most_tokens(self, limit: int) -> int:
        """Tokens of an image that is as large as it may be."""
        return self.tokens(limit, limit, limit)

    def parameters(self, text_size: int) -> int:
        """Number of weights of tower and projector; `text_size` is the decoder's hidden size."""
        h = self.hidden_size
        layer = 4 * h * h + 3 * h * self.intermediate_size + 2 * h
        tower = h * CHANNELS * self.patch_size**2 + h + self.num_layers * layer
        return tower + h + (h * self.merge) ** 2 + h * text_size + text_size**2

    def inv_freq(self) -> np.ndarray:
        """Radians per row and per column of each rotated pair, (2, head_dim / 2) f32: pairs turn by one or the other.

        Source: PixtralVisionRotaryEmbedding of transformers 5.24.
        """
        import numpy as np  # not above: most that reads a config needs no arrays

        pairs = self.head_dim // 2
        frequency = self.rope_theta ** (-np.arange(0, self.head_dim, 2, dtype=np.float64) / self.head_dim)
        turns = np.zeros((2, pairs), np.float32)
        turns[0, : pairs // 2] = frequency[0::2]
        turns[1, pairs // 2 :] = frequency[1::2]
        return turns


def parse_vision(outer: Fields) -> VisionConfig:
    """Read `vision_config` and the projector's fields beside it. Raises CheckpointError."""
    values = outer.get("vision_config")
    if not isinstance(values, Mapping):
        raise outer.fail("vision_config", values, "an object with the sizes of a Pixtral tower")
    fields = Fields("config.json: vision_config", values)
    for key, (allowed, default) in _FIXED.items():
        fields.one_of(key, (allowed,), default)
    outer.one_of("projector_hidden_act", ("gelu",), "gelu")
    outer.one_of("multimodal_projector_bias", (False,), False)
    outer.one_of("vision_feature_layer", (-1, [-1]), -1)
    # Which token stands for an image is the tokenizer's to say (builder/checkpoint/image_tokens.py).
    outer.get("image_token_id"), outer.get("image_token_index")
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    vision = VisionConfig(
        hidden_size=hidden,
        num_layers=fields.integer("num_hidden_layers", high=1000),
        intermediate_size=fields.integer("intermediate_size"),
        num_heads=heads,
        head_dim=fields.integer("head_dim", 4, 4096) if "head_dim" in values else hidden // heads,
        patch_size=fields.integer("patch_size", high=1024),
        image_size=fields.integer("image_size", high=2**20),
        hidden_act=fields.one_of("hidden_act", ("silu", "gelu"), "gelu"),
        rope_theta=_rope_theta(fields),
        merge=outer.integer("spatial_merge_size", high=64),
    )
    if vision.num_heads * vision.head_dim != vision.hidden_size:
        raise fields.fail("head_dim", vision.head_dim, "hidden_size / num_attention_heads")
    if vision.head_dim % 4:
        raise fields.fail("head_dim", vision.head_dim, "a multiple of 4, half of which turns by rows")
    if vision.image_size < vision.cell:
        raise fields.fail("image_size", vision.image_size, f"{vision.cell} (one token) or more")
    for key in set(values) - fields.read - set(_IGNORED.split()):
        raise fields.fail(key, values[key], "no such field of a Pixtral tower that nemodiff knows")
    return vision


def _rope_theta(fields: Fields) -> float:
    """`rope_theta`, which may stand in `rope_parameters` or in `rope_scaling` (its older name) too."""
    rope: Any = fields.get("rope_parameters") or fields.get("rope_scaling")
    outside = fields.positive("rope_theta", 10000.0)
    if rope is None:
        return outside
    if not isinstance(rope, Mapping):
        raise fields.fail("rope_parameters", rope, "an object with rope_theta")
    inner = Fields(f"{fields.where}: rope_parameters", rope)
    kind = inner.one_of("rope_type", ("axial", "default"), inner.get("type", "default"))
    theta = inner.positive("rope_theta", outside)
    if theta != outside and fields.values.get("rope_theta") is not None:
        raise inner.fail("rope_theta", theta, f"the {outside:g} of rope_theta beside it")
    for key in set(rope) - inner.read:
        if rope[key] is not None:
            raise inner.fail(key, rope[key], f"no such field for rope_type {kind!r}")
    return theta

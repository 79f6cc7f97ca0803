"""The network of tiny-chat-2 in torch, and the checkpoint folder that holds it.

`TinyChat` maps token ids and positions under an attention mask to final hidden states. Its parameters have the names of
`nvidia/Nemotron-Labs-Diffusion-*`, so its state dict is the file. Sizes come from config.json beside this script; its
llama-4 query scale is left out, as it is exactly 1 below position 16384 and training stays below 640.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from torch import Tensor, nn

HERE = Path(__file__).parent
CARRIED = ("chat_template.jinja", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
CONFIG = json.loads((HERE / "config.json").read_text())
HIDDEN: int = CONFIG["hidden_size"]
HEADS: int = CONFIG["num_attention_heads"]
KV_HEADS: int = CONFIG["num_key_value_heads"]
HEAD_DIM: int = CONFIG["head_dim"]


class Rotary(NamedTuple):
    """Cosines and sines of every position, each (B, 1, S, D)."""

    cos: Tensor
    sin: Tensor

    def turn(self, x: Tensor) -> Tensor:  # (B, H, S, D)
        half = x.shape[-1] // 2
        return x * self.cos + torch.cat([-x[..., half:], x[..., :half]], -1) * self.sin


def frequencies() -> Tensor:  # (D/2,) f32
    """YaRN: fast pairs turn at their own rate, slow ones `factor` times slower, with a ramp between."""
    rope = CONFIG["rope_parameters"]
    log_theta = math.log(rope["rope_theta"])

    def pair_turning(turns: float) -> float:
        return HEAD_DIM * math.log(rope["original_max_position_embeddings"] / (turns * 2 * math.pi)) / (2 * log_theta)

    low = max(math.floor(pair_turning(rope["beta_fast"])), 0)
    high = min(math.ceil(pair_turning(rope["beta_slow"])), HEAD_DIM - 1)
    ramp = ((torch.arange(HEAD_DIM // 2) - low) / max(high - low, 1e-3)).clamp(0, 1)
    rate = torch.exp(-log_theta * torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    return (1 - ramp) * rate + ramp * rate / rope["factor"]


def linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


class RMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(HIDDEN))

    def forward(self, x: Tensor) -> Tensor:  # (B, S, HIDDEN)
        return F.rms_norm(x.float(), (HIDDEN,), self.weight, CONFIG["rms_norm_eps"])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = linear(HIDDEN, HEADS * HEAD_DIM)
        self.k_proj = linear(HIDDEN, KV_HEADS * HEAD_DIM)
        self.v_proj = linear(HIDDEN, KV_HEADS * HEAD_DIM)
        self.o_proj = linear(HEADS * HEAD_DIM, HIDDEN)

    def forward(self, x: Tensor, rotary: Rotary, bias: Tensor) -> Tensor:
        rows, length, _ = x.shape

        def heads(y: Tensor) -> Tensor:  # (B, S, H * D) -> (B, H, S, D)
            return y.view(rows, length, -1, HEAD_DIM).transpose(1, 2)

        v = heads(self.v_proj(x))
        q = rotary.turn(heads(self.q_proj(x))).to(v.dtype)  # autocast leaves the rotation in f32
        k = rotary.turn(heads(self.k_proj(x))).to(v.dtype)
        # Products and a softmax: on a CPU in bf16 they take a third of the time of torch's fused attention.
        q = q.reshape(rows, KV_HEADS, -1, HEAD_DIM) / math.sqrt(HEAD_DIM)
        scores = (q @ k.mT).view(rows, KV_HEADS, -1, length, length) + bias
        mixed = scores.softmax(-1).view(rows, KV_HEADS, -1, length) @ v
        mixed = mixed.view(rows, HEADS, length, HEAD_DIM)
        out: Tensor = self.o_proj(mixed.transpose(1, 2).reshape(rows, length, -1))
        return out


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = linear(HIDDEN, CONFIG["intermediate_size"])
        self.up_proj = linear(HIDDEN, CONFIG["intermediate_size"])
        self.down_proj = linear(CONFIG["intermediate_size"], HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn = Attention()
        self.mlp = MLP()
        self.input_layernorm = RMSNorm()
        self.post_attention_layernorm = RMSNorm()

    def forward(self, x: Tensor, rotary: Rotary, bias: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotary, bias)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(CONFIG["vocab_size"], HIDDEN)
        self.layers = nn.ModuleList(Layer() for _ in range(CONFIG["num_hidden_layers"]))
        self.norm = RMSNorm()

    def forward(self, tokens: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        angle = positions[..., None] * frequencies().to(positions.device)  # (B, S, D/2) f32
        angle = torch.cat([angle, angle], -1)[:, None]
        rotary = Rotary(angle.cos(), angle.sin())
        bias = torch.zeros(mask.shape, dtype=torch.bfloat16, device=mask.device).masked_fill(~mask, -1e9)[:, :, None]
        x: Tensor = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x, rotary, bias)
        out: Tensor = self.norm(x)
        return out


class TinyChat(nn.Module):
    """Encoder and the one head that both readings share."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.diffusion_head = linear(HIDDEN, CONFIG["vocab_size"])
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:  # smaller where the result is added to the residual
                shrink = math.sqrt(2 * CONFIG["num_hidden_layers"]) if "o_proj" in name or "down_proj" in name else 1
                nn.init.normal_(parameter, std=CONFIG["initializer_range"] / shrink)

    def forward(self, tokens: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """Hidden states (B, S, HIDDEN) f32 of (B, S) i64 ids and positions.

        `mask` (B, 1, S, S) bool is true where a query (row) sees a key (column). `diffusion_head` turns the result into
        logits: for the next token in a causal part, for the token itself at a masked slot.
        """
        hidden: Tensor = self.encoder(tokens, positions, mask)
        return hidden


def save_checkpoint(model: TinyChat, folder: Path) -> None:
    """Write the weights in bf16, and copy the files that training does not change."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in CARRIED:
        (folder / name).write_bytes((HERE / name).read_bytes())
    tensors = {name: tensor.to("cpu", torch.bfloat16).contiguous() for name, tensor in model.state_dict().items()}
    # Not save_file: it makes the file readable by its owner only.
    (folder / "model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))


def load_weights(model: TinyChat, folder: Path) -> None:
    """Copy the tensors of a checkpoint folder into `model`; a missing or leftover name raises."""
    model.load_state_dict({name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()})

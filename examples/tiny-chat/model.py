"""The network of tiny-chat in torch, its tokenizer, and the checkpoint folder that holds them.

`TinyChat` maps token ids and positions under an attention mask to final hidden states; its parameters carry
the tensor names of `nvidia/Nemotron-Labs-Diffusion-*`, so its state dict is the file. `build_tokenizer`
trains the BPE, `save_checkpoint` writes the folder. Sizes and special ids come from the JSON files beside
this script, which are copied into the new folder as they are. The network leaves out the llama-4 query
scale that `config.json` declares: it is exactly 1 below position 16384 and training stays below 192.
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from make_data import example
from safetensors.torch import load_file, save
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

HERE = Path(__file__).parent
COPIED = ["chat_template.jinja", "config.json", "generation_config.json", "tokenizer_config.json"]
CONFIG = json.loads((HERE / "config.json").read_text())
ROPE = CONFIG["rope_parameters"]
HIDDEN: int = CONFIG["hidden_size"]
LAYERS: int = CONFIG["num_hidden_layers"]
FFN: int = CONFIG["intermediate_size"]
HEADS: int = CONFIG["num_attention_heads"]
KV_HEADS: int = CONFIG["num_key_value_heads"]
HEAD_DIM: int = CONFIG["head_dim"]
VOCAB: int = CONFIG["vocab_size"]
BLOCK: int = CONFIG["block_size"]
MASK: int = CONFIG["mask_token_id"]
EOS: int = CONFIG["eos_token_id"]
CORPUS, VOCAB_LIMIT = 20000, 1024  # examples; the merges run out at 891 entries


def rope_frequencies() -> Tensor:  # (D/2,) f32
    """YaRN: fast pairs turn at their own rate, slow ones `factor` times slower, with a ramp between."""

    theta: float = ROPE["rope_theta"]
    factor: float = ROPE["factor"]
    original: int = ROPE["original_max_position_embeddings"]

    def pair_turning(turns: float) -> float:
        return HEAD_DIM * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_turning(ROPE["beta_fast"])), 0)
    high = min(math.ceil(pair_turning(ROPE["beta_slow"])), HEAD_DIM - 1)
    ramp = ((torch.arange(HEAD_DIM // 2).float() - low) / max(high - low, 1e-3)).clamp(0, 1)
    period = theta ** (torch.arange(0, HEAD_DIM, 2).float() / HEAD_DIM)
    return (1 - ramp) / period + ramp / (factor * period)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # (B, H, S, D) f32
    """Apply rotary positions in the half-split layout; `cos` and `sin` are (B, 1, S, D)."""
    half = HEAD_DIM // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


def linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


class RMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(HIDDEN))

    def forward(self, x: Tensor) -> Tensor:  # (B, S, HIDDEN) f32
        return F.rms_norm(x, (HIDDEN,), self.weight, CONFIG["rms_norm_eps"])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = linear(HIDDEN, HEADS * HEAD_DIM)
        self.k_proj = linear(HIDDEN, KV_HEADS * HEAD_DIM)
        self.v_proj = linear(HIDDEN, KV_HEADS * HEAD_DIM)
        self.o_proj = linear(HEADS * HEAD_DIM, HIDDEN)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:  # (B, S, HIDDEN) f32
        batch, length, _ = x.shape

        def split(y: Tensor, heads: int) -> Tensor:  # (B, S, H * D) -> (B, H, S, D)
            return y.view(batch, length, heads, HEAD_DIM).transpose(1, 2)

        q = rotate(split(self.q_proj(x), HEADS), cos, sin)
        k = rotate(split(self.k_proj(x), KV_HEADS), cos, sin).repeat_interleave(HEADS // KV_HEADS, 1)
        v = split(self.v_proj(x), KV_HEADS).repeat_interleave(HEADS // KV_HEADS, 1)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, H, S, D)
        out: Tensor = self.o_proj(mixed.transpose(1, 2).reshape(batch, length, -1))
        return out


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = linear(HIDDEN, FFN)
        self.up_proj = linear(HIDDEN, FFN)
        self.down_proj = linear(FFN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:  # (B, S, HIDDEN) f32
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn = Attention()
        self.mlp = MLP()
        self.input_layernorm = RMSNorm()
        self.post_attention_layernorm = RMSNorm()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:  # (B, S, HIDDEN) f32
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCAB, HIDDEN)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm = RMSNorm()
        self.frequencies = rope_frequencies()  # not a buffer: the file holds parameters only

    def forward(self, tokens: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        angle = positions[..., None].float() * self.frequencies  # (B, S, D/2) f32
        angle = torch.cat([angle, angle], -1)[:, None]  # (B, 1, S, D) f32
        cos, sin = angle.cos(), angle.sin()
        x: Tensor = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x, cos, sin, mask)
        out: Tensor = self.norm(x)
        return out


class TinyChat(nn.Module):
    """Encoder and the one head that both readings share."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.diffusion_head = linear(HIDDEN, VOCAB)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:  # smaller where the result is added to the residual
                shrink = math.sqrt(2 * LAYERS) if "o_proj" in name or "down_proj" in name else 1
                nn.init.normal_(parameter, std=CONFIG["initializer_range"] / shrink)

    def forward(self, tokens: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """Hidden states (B, S, HIDDEN) f32 of (B, S) i64 ids and positions.

        `mask` (B, 1, S, S) bool is true where a query (row) sees a key (column). `diffusion_head` turns the
        result into logits: for the next token in a causal part, for the token itself at a masked slot.
        """
        hidden: Tensor = self.encoder(tokens, positions, mask)
        return hidden


def build_tokenizer() -> Tokenizer:
    """Train the byte-level BPE, digits split, on the first examples of seed 1: always the same file."""
    rng = random.Random(1)
    specials = json.loads((HERE / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.decoder = decoders.ByteLevel()
    digits, byte_level = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level(add_prefix_space=False)])
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_LIMIT,
        special_tokens=[specials[str(i)]["content"] for i in range(len(specials))],
        initial_alphabet=byte_level.alphabet(),
        show_progress=False,
    )
    corpus = (example(rng) for _ in range(CORPUS))
    texts = [f"{question}\n{answer}\nsystem\nuser\nassistant\n" for _, question, answer in corpus]
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != VOCAB:
        raise ValueError(f"the tokenizer has {tokenizer.get_vocab_size()} entries, config.json says {VOCAB}")
    return tokenizer


def load_weights(model: TinyChat, folder: Path) -> None:
    """Copy the bf16 tensors of `folder` into the f32 model; a missing or leftover name raises."""
    tensors = load_file(folder / "model.safetensors")
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})


def save_checkpoint(model: TinyChat, tokenizer: Tokenizer, folder: Path) -> None:
    """Write weights in bf16 and tokenizer, and copy the files that training does not change."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in COPIED:
        (folder / name).write_bytes((HERE / name).read_bytes())
    tokenizer.save(str(folder / "tokenizer.json"))
    tensors = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in model.state_dict().items()}
    # Not save_file: it makes the file readable by its owner only.
    (folder / "model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))

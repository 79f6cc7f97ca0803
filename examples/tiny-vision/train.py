"""Teach tiny-chat-2 to see: a Pixtral tower of 0.46 M parameters before its decoder, on the CPU, in three phases.

    python examples/tiny-vision/train.py --out examples/tiny-vision

First tower and projector alone learn to show what a picture holds as embeddings of tokens that the decoder knows; they
stay as they are after that. Then the decoder learns to answer, causally, and at last by its own objective: each answer
causally and, cut into blocks of masks, bidirectionally. Images stand in the prompt alone. The state dict has the
released names, so it is the checkpoint.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

HERE = Path(__file__).parent
CHAT = HERE.parent / "tiny-chat-2"
sys.path[:0] = [str(CHAT), str(HERE)]

import model as chat  # noqa: E402
import objective  # noqa: E402
from make_data import render  # noqa: E402
from make_pictures import (  # noqa: E402
    COLOURS,
    DIGITS,
    NOTHING,
    SHAPES,
    SIZE,
    TASKS,
    draw_scene,
    example,
    paint,
    quarters,
)
from optimiser import Optimiser  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import load_file, save  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402
from transformers import Mistral3Config, MistralConfig, PixtralVisionConfig, PixtralVisionModel  # noqa: E402
from transformers.models.mistral3.modeling_mistral3 import Mistral3MultiModalProjector  # noqa: E402

IMAGE_TOKENS = {18: "<|image_start|>", 19: "<|image_pad|>", 20: "<|image_break|>", 21: "<|image_end|>"}
PAD = 19
VISION = {
    "model_type": "pixtral",
    "hidden_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "head_dim": 24,
    "intermediate_size": 256,
    "patch_size": 4,
    "image_size": SIZE,
    "num_channels": 3,
    "hidden_act": "silu",
    "rope_theta": 100.0,
}
MERGE = 2
DESCRIBE = 0.3  # of the batches
SIDE = SIZE // (VISION["patch_size"] * MERGE)  # type: ignore[operator]  # tokens
LAYOUT = "<|image_break|>".join(["<|image_pad|>" * SIDE] * SIDE)
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


class SeeingEmbedding(nn.Embedding):
    """Token embeddings, with those of `images` (B, SIDE^2, HIDDEN) in the place of the pads."""

    images: Tensor | None = None

    def forward(self, tokens: Tensor) -> Tensor:
        x = super().forward(tokens)
        assert self.images is not None
        return x.masked_scatter((tokens == PAD)[..., None], self.images)


def make_model(decoder: Path) -> chat.TinyChat:
    """The decoder of a folder, with a tower and a projector beside its layers."""
    model = chat.TinyChat()
    chat.load_weights(model, decoder)
    vision = PixtralVisionConfig(**VISION)
    text = MistralConfig(hidden_size=chat.HIDDEN, rms_norm_eps=chat.CONFIG["rms_norm_eps"])
    whole = Mistral3Config(vision_config=vision, text_config=text, spatial_merge_size=MERGE)
    embedding = SeeingEmbedding(chat.CONFIG["vocab_size"], chat.HIDDEN)
    embedding.load_state_dict(model.encoder.embed_tokens.state_dict())
    model.encoder.embed_tokens = embedding
    model.encoder.vision_tower = PixtralVisionModel(vision)
    model.encoder.multi_modal_projector = Mistral3MultiModalProjector(whole)
    return model


def make_tokenizer() -> Tokenizer:
    """tiny-chat-2's, with four of its reserved tokens under the names that images have."""
    text = (CHAT / "tokenizer.json").read_text("utf-8")
    for number, name in IMAGE_TOKENS.items():
        text = text.replace(f'"<SPECIAL_{number}>"', json.dumps(name))
    return Tokenizer.from_str(text)


def look(model: chat.TinyChat, tokenizer: Tokenizer, minutes: float, seed: int) -> None:
    """Teach tower and projector alone to say what each quarter holds; without the decoder a step is cheap.

    Of a quarter's four tokens the left ones become the embedding of its colour or digit, the right ones that of its
    shape, so the decoder can read a picture as it reads a text.
    """
    words = {
        word: token for kind in (SHAPES, list(COLOURS), DIGITS, [NOTHING]) for word, token in _tell(kind, tokenizer)
    }
    embeddings = model.encoder.embed_tokens.weight.detach()
    seeing = [p for name, p in model.named_parameters() if "vision" in name or "projector" in name]
    optimiser = torch.optim.AdamW(seeing, lr=2e-3)
    rng = random.Random(seed)
    begin = time.monotonic()
    step, done = 0, 0.0
    while done < 1:
        scenes = [draw_scene(rng) for _ in range(16)]
        seen = see(model, pixels([paint(scene, rng) for scene in scenes]))
        told = torch.tensor([[[words[word] for word in pair] for pair in quarters(scene)] for scene in scenes])
        target = embeddings[told].view(len(scenes), 2, 1, 2, 2, -1)  # (B, rows and columns of quarters, words, HIDDEN)
        grid = seen.view(len(scenes), 2, SIDE // 2, 2, SIDE // 2, -1)
        loss = (grid - target).square().mean() / embeddings[told].var()  # 1 without looking
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.param_groups[0]["lr"] = 2e-3 * min(1, (step + 1) / 100) * max(0.05, 1 - done)
        torch.nn.utils.clip_grad_norm_(seeing, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        step, done = step + 1, (time.monotonic() - begin) / (60 * minutes)
        if step % 100 == 0:
            print(f"look {step} {time.monotonic() - begin:.0f} s {loss.item():.4f}", flush=True)


def _tell(kind: list[str], tokenizer: Tokenizer) -> list[tuple[str, int]]:
    """For each word its first token that no other word of the kind has."""
    spelled = {word: tokenizer.encode(f" {word}", add_special_tokens=False).ids for word in kind}
    return [
        (word, next(i for i in ids if all(i not in other for name, other in spelled.items() if name != word)))
        for word, ids in spelled.items()
    ]


def pixels(pictures: list[Image.Image]) -> Tensor:
    """Normalized pictures, (B, 3, SIZE, SIZE) f32."""
    normal = [(np.asarray(picture, np.float32) / 255 - MEAN) / STD for picture in pictures]
    return torch.from_numpy(np.stack(normal).transpose(0, 3, 1, 2).copy())


def see(model: chat.TinyChat, pictures: Tensor) -> Tensor:
    """The embeddings of the pictures' tokens, (B * SIDE^2, HIDDEN) f32."""
    sizes = torch.tensor([[SIZE, SIZE]] * len(pictures))
    hidden = model.encoder.vision_tower(pictures, image_sizes=sizes).last_hidden_state.squeeze(0)
    seen: Tensor = model.encoder.multi_modal_projector(hidden, sizes)
    return seen.float()


def draw_batch(tokenizer: Tokenizer, rng: random.Random, rows: int) -> tuple[objective.Batch, Tensor]:
    """The next `rows` examples of `rng`, and their pictures (B, 3, SIZE, SIZE) f32; a share of batches describes."""
    pictures, lines = [], []
    tasks = ["describe"] if rng.random() < DESCRIBE else TASKS[:-1]  # apart: its answers are three times as long
    for _ in range(rows):
        picture, question, answer = example(rng, rng.choice(tasks))
        pictures.append(picture)
        asked = {"role": "user", "content": f"<|image_start|>{LAYOUT}<|image_end|>{question}"}
        head, text = render([asked, {"role": "assistant", "content": answer}], None, False)
        answer_ids = [*tokenizer.encode(text).ids, objective.EOS]
        lines.append(objective.Sample("picture", tokenizer.encode(head).ids, answer_ids))
    return objective.as_batch(lines), pixels(pictures)


def learn(model: chat.TinyChat, tokenizer: Tokenizer, args: argparse.Namespace, jointly: bool) -> None:
    """Teach the decoder to answer, causally or jointly; every 50 steps say what other pictures give.

    The rate holds for half of the time and falls to 2 % in the other. "Shuffled" is the loss where each picture is that
    of another question: it rises as the decoder begins to look.
    """
    optimiser = Optimiser(model)
    rng, held_out = random.Random(args.seed), random.Random(10**6)
    noise = random.Random(args.seed)

    def loss_of(batch: objective.Batch, pictures: Tensor) -> objective.Losses:
        with torch.no_grad():
            model.encoder.embed_tokens.images = see(model, pictures)
        if jointly:
            return objective.joint(model, batch.tokens, batch.learned, noise)
        return objective.causal(model, batch.tokens, batch.learned)

    begin = saved = time.monotonic()
    step, done = 0, 0.0
    while done < 1:
        loss = loss_of(*draw_batch(tokenizer, rng, args.batch))
        loss.total.backward()  # type: ignore[no-untyped-call]
        optimiser.step(args.rate * min(1, (step + 1) / 50) * (1 if done < 0.5 else max(0.02, 2 * (1 - done))))
        step, seconds = step + 1, time.monotonic() - begin
        done = seconds / (60 * (args.minutes if jointly else args.causal))
        if step % 50 == 0:
            with torch.no_grad():
                batch, pictures = draw_batch(tokenizer, held_out, 64)
                other, shuffled = loss_of(batch, pictures), loss_of(batch, pictures.roll(1, 0))
            print(f"step {step} {seconds:.0f} s train {loss} | held-out {other} | shuffled {shuffled}", flush=True)
        if time.monotonic() - saved > 300:
            save_checkpoint(model, tokenizer, args.out)
            saved = time.monotonic()


def save_checkpoint(model: chat.TinyChat, tokenizer: Tokenizer, folder: Path) -> None:
    """Write a checkpoint folder in the released layout, weights in bf16."""
    folder.mkdir(parents=True, exist_ok=True)
    template = (HERE / "chat_template.jinja").read_bytes()
    config = chat.CONFIG | {
        "architectures": ["NemotronLabsDiffusionVLMModel"],
        "model_type": "nemotron_labs_diffusion_vlm",
        "vision_config": VISION,
        "spatial_merge_size": MERGE,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": False,
        "vision_feature_layer": -1,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "generation_config.json").write_bytes((CHAT / "generation_config.json").read_bytes())
    names = (CHAT / "tokenizer_config.json").read_text("utf-8")
    for number, name in IMAGE_TOKENS.items():
        names = names.replace(f'"<SPECIAL_{number}>"', json.dumps(name))
    (folder / "tokenizer_config.json").write_text(names, "utf-8")
    tokenizer.save(str(folder / "tokenizer.json"))
    tensors = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in model.state_dict().items()}
    (folder / "chat_template.jinja").write_bytes(template)
    (folder / "model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))


def main() -> None:
    parser = argparse.ArgumentParser(description="Train tiny-vision and write a checkpoint folder.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the checkpoint into")
    parser.add_argument("--look", type=float, default=10, help="minutes of the first phase (10)")
    parser.add_argument("--causal", type=float, default=12, help="minutes of the second phase (12)")
    parser.add_argument("--minutes", type=float, default=20, help="minutes of the third phase (20)")
    parser.add_argument("--decoder", type=Path, default=CHAT, help="checkpoint folder of the decoder (tiny-chat-2)")
    parser.add_argument("--init", type=Path, help="checkpoint folder to continue from")
    parser.add_argument("--threads", type=int, default=1, help="torch CPU threads (1)")
    parser.add_argument("--batch", type=int, default=32, help="examples a step (32)")
    parser.add_argument("--rate", type=float, default=0.25, help="multiplier of the optimiser's rates (0.25)")
    parser.add_argument("--seed", type=int, default=1, help="seed of the examples (1)")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    model, tokenizer = make_model(args.decoder), make_tokenizer()
    seeing = [p for name, p in model.named_parameters() if "vision" in name or "projector" in name]
    print(f"{sum(p.numel() for p in seeing):,} parameters of tower and projector", flush=True)
    if args.init:
        held = load_file(args.init / "model.safetensors")
        model.load_state_dict({name: tensor.float() for name, tensor in held.items()})
    if args.look:
        look(model, tokenizer, args.look, args.seed)
    for weight in seeing:
        weight.requires_grad_(False)
    if args.causal:
        learn(model, tokenizer, args, jointly=False)
    if args.minutes:
        learn(model, tokenizer, args, jointly=True)
    save_checkpoint(model, tokenizer, args.out)


if __name__ == "__main__":
    main()

"""Train tiny-chat-2's drafter for some minutes: a LoRA on every o_proj that acts in drafts only.

A step is one pass over [drafts | clean conversation]: an answer cut into drafts of one token and masks after it, the
first cut anywhere. The target is the verifier's own choice, which the clean half gives in the same pass, up to where
it leaves the answer. Writes a `linear_spec_lora` folder in the released layout.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from model import HERE, Attention, TinyChat, linear, load_weights
from objective import BLOCK, MASK, Batch, Noisy, as_batch, joint_mask, pool
from safetensors.torch import save
from tokenizers import Tokenizer
from torch import Tensor, nn

SCALE = 4.0  # alpha / rank, as released
HELD_OUT = 8  # batches of another seed
LOG_EVERY = 50


@dataclass(frozen=True)
class Recipe:
    """The command line."""

    checkpoint: Path
    out: Path
    minutes: float
    positions: int
    rank: int
    rate: float
    seed: int
    device: str
    threads: int


class Drafter(nn.Module):
    """An o_proj with the LoRA beside it, which acts on the first `count` tokens of a row."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base
        self.count = 0
        self.lora_A = linear(base.in_features, rank)
        self.lora_B = linear(rank, base.out_features)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=5**0.5)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:  # (B, S, H * D) -> (B, S, HIDDEN)
        y: Tensor = self.base(x)
        return y + F.pad(SCALE * self.lora_B(self.lora_A(x[:, : self.count])), (0, 0, 0, x.shape[1] - self.count))


def attach(model: TinyChat, rank: int) -> list[Drafter]:
    """Freeze the model and put a drafter in the place of every o_proj."""
    model.requires_grad_(False)
    drafters = []
    for layer in model.encoder.layers:
        attention = layer.self_attn
        assert isinstance(attention, Attention)
        drafters.append(Drafter(attention.o_proj, rank))
        attention.o_proj = drafters[-1]  # type: ignore[assignment]
    return drafters


def drafts_of(batch: Batch, seed: int) -> Noisy:
    """The answers as drafts; the first one has any length up to BLOCK, drawn on the CPU."""
    rows, length = batch.tokens.shape
    device = batch.tokens.device
    index = torch.arange(int(batch.answer.max()), device=device)[None]  # (1, N)
    # By this the first draft is shorter.
    short = torch.randint(BLOCK, (rows, 1), generator=torch.Generator().manual_seed(seed)).to(device)
    block = (index + short) // BLOCK
    begin = (block * BLOCK - short).clamp(min=0)  # (B, N), where the token's draft begins
    position = (batch.prompt[:, None] + index).clamp(max=length - 1)  # past the end only where nothing is drafted
    target = batch.tokens.gather(1, position)
    masked = (index > begin) & (index < batch.answer[:, None])
    return Noisy(
        target.masked_fill(index > begin, MASK), target, masked, position, block, batch.prompt[:, None] + begin
    )


class Guesses(NamedTuple):
    """What a pass says of the drafts."""

    logits: Tensor  # (B, N, V), the drafter's
    wanted: Tensor  # (B, N) i64, the verifier's choice after the clean tokens before
    looked_at: Tensor  # (B, N) bool, what a verify would look at: right tokens and the first wrong one


def guess(model: TinyChat, drafters: list[Drafter], batch: Batch, drafts: Noisy) -> Guesses:
    """One pass over [drafts | clean]."""
    rows, length = batch.tokens.shape
    drafted = drafts.tokens.shape[1]
    for drafter in drafters:
        drafter.count = drafted
    clean = torch.arange(length, device=batch.tokens.device).expand(rows, length)
    with torch.autocast(batch.tokens.device.type, torch.bfloat16):
        both = torch.cat([drafts.tokens, batch.tokens], 1), torch.cat([drafts.position, clean], 1)
        hidden = model(*both, joint_mask(drafts, length))
        before = (drafts.position - 1)[:, :, None].expand(-1, -1, hidden.shape[2])
        logits = model.diffusion_head(hidden[:, :drafted]).float()
        with torch.no_grad():
            verifier = model.diffusion_head(hidden[:, drafted:].gather(1, before)).float()
    never = torch.tensor([MASK], device=logits.device)
    logits, verifier = (x.index_fill(2, never, -1e30) for x in (logits, verifier))
    wanted = verifier.argmax(2)
    # What comes after the first wrong token is thrown away in decoding, so training ignores it too.
    failed = drafts.masked & ((logits.argmax(2) != wanted) | (drafts.target != wanted))
    before_it = failed.cumsum(1) - failed.long()
    at_begin = before_it.gather(1, drafts.context - batch.prompt[:, None])
    return Guesses(logits, wanted, drafts.masked & (before_it == at_begin))


def kept(guesses: Guesses, drafts: Noisy) -> float:
    """Mean tokens that a verify looks at in a draft."""
    begun = drafts.masked & (drafts.position == drafts.context + 1)  # one of each draft that has any mask
    return float(guesses.looked_at.sum() / begun.sum())


class Run:
    """A training run of so many minutes; the rate falls with the time."""

    def __init__(self, recipe: Recipe) -> None:
        torch.manual_seed(0)
        self._recipe = recipe
        self._tokenizer = Tokenizer.from_file(str(HERE / "tokenizer.json"))
        self._model = TinyChat()
        load_weights(self._model, recipe.checkpoint)
        self.drafters = attach(self._model, recipe.rank)
        self._model.to(recipe.device)
        self._held_out = list(islice(self._batches("drafter held out"), HELD_OUT))

    def train(self) -> None:
        recipe = self._recipe
        weights = [weight for d in self.drafters for weight in (d.lora_A.weight, d.lora_B.weight)]
        optimiser = torch.optim.AdamW(weights, lr=recipe.rate, betas=(0.9, 0.98), weight_decay=0.0)
        print(f"{sum(w.numel() for w in weights)} parameters, held out {self.held_out():.3f} per draft", flush=True)
        batches = self._batches(f"drafter {recipe.seed}")
        began, spent, step = time.monotonic(), 0.0, 0
        while spent < 1:
            batch = next(batches)
            drafts = drafts_of(batch, step)
            guesses = guess(self._model, self.drafters, batch, drafts)
            loss = F.cross_entropy(guesses.logits[guesses.looked_at], guesses.wanted[guesses.looked_at])
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(weights, 1.0)
            step += 1
            optimiser.param_groups[0]["lr"] = recipe.rate * min(1, step / LOG_EVERY) * (1 - spent)
            optimiser.step()
            optimiser.zero_grad()
            spent = (time.monotonic() - began) / 60 / recipe.minutes
            if step % LOG_EVERY == 0:
                print(f"step {step} loss {loss:.4f} {kept(guesses, drafts):.3f} per draft", flush=True)
        print(f"step {step}, held out {self.held_out():.3f} per draft", flush=True)

    @torch.no_grad()
    def held_out(self) -> float:
        """The mean of `kept` over the held-out batches."""
        means = []
        for number, batch in enumerate(self._held_out):
            drafts = drafts_of(batch, number)
            means.append(kept(guess(self._model, self.drafters, batch, drafts), drafts))
        return sum(means) / len(means)

    def _batches(self, seed: str) -> Iterator[Batch]:
        for number in count():
            for rows in pool(self._tokenizer, f"{seed}/{number}", self._recipe.positions):
                yield as_batch(rows).to(self._recipe.device)


def save_adapter(drafters: list[Drafter], rank: int, folder: Path) -> None:
    """Write the released layout."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank * SCALE,
        "bias": "none",
        "lora_dropout": 0.0,
        "target_modules": ["o_proj"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors = {}
    for n, drafter in enumerate(drafters):
        name = f"base_model.model.encoder.layers.{n}.self_attn.o_proj.lora"
        tensors[f"{name}_A.weight"] = drafter.lora_A.weight.detach().cpu().contiguous()
        tensors[f"{name}_B.weight"] = drafter.lora_B.weight.detach().cpu().contiguous()
    # Not save_file: it makes the file readable by its owner only.
    (folder / "adapter_model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))


def parse() -> Recipe:
    parser = argparse.ArgumentParser(description="Train a drafter adapter for tiny-chat-2.")
    parser.add_argument("--checkpoint", type=Path, default=HERE, help="checkpoint folder (the one of this script)")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder to write, by its released name linear_spec_lora"
    )
    parser.add_argument("--minutes", type=float, default=10, help="length of the run (10)")
    parser.add_argument("--positions", type=int, default=4096, help="positions of a step in both halves (4096)")
    parser.add_argument("--rank", type=int, default=32, help="rank of the LoRA (32)")
    parser.add_argument("--rate", type=float, default=2e-3, help="highest learning rate (2e-3)")
    parser.add_argument("--seed", type=int, default=1, help="seed of the conversations (1)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (2)")
    return Recipe(**vars(parser.parse_args()))


def main() -> None:
    recipe = parse()
    torch.set_num_threads(recipe.threads)
    run = Run(recipe)
    run.train()
    save_adapter(run.drafters, recipe.rank, recipe.out)


if __name__ == "__main__":
    main()

"""Train tiny-chat's drafter: a LoRA on every o_proj that acts in drafts only. About ten minutes on one CPU core.

The target is not the right answer but the verifier's own greedy one, which `nemodiff` decodes first. Each sequence goes
through the network once as [drafts | clean sequence]: a draft is one token and masks after it, at the positions after
the clean tokens that it sees, and the LoRA acts in it alone. Writes a `linear_spec_lora` folder in the released layout.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from make_data import example
from model import BLOCK, EOS, HERE, HIDDEN, MASK, Attention, TinyChat, linear, load_weights
from safetensors.torch import save
from torch import Tensor, nn

import nemodiff
from nemodiff.builder.build import Builder

SCALE = 4.0  # alpha / rank, as released
HELD_OUT = 50
HELD_OUT_SEED = 999
LOG_EVERY = 100
LIMIT = 120  # tokens of an answer


@dataclass(frozen=True)
class Recipe:
    """The command line."""

    checkpoint: Path
    out: Path
    steps: int
    answers: int
    rank: int
    loss: str
    rate: float
    batch: int
    drafts: int
    threads: int
    seed: int


class Answered(NamedTuple):
    """A question's prompt and the verifier's greedy answer, with its EOS unless it was cut at the limit."""

    prompt: list[int]
    answer: list[int]


@dataclass(frozen=True)
class Drafts:
    """Sequences with some drafts each; N is drafts times BLOCK, L the longest sequence."""

    tokens: Tensor  # (B, N + L) i64: the drafts, then the clean sequence
    positions: Tensor  # (B, N + L) i64
    mask: Tensor  # (B, 1, N + L, N + L) bool, true where a query sees a key
    target: Tensor  # (B, N) i64, the verifier's tokens
    drafted: Tensor  # (B, N) bool, masks with a token to draft


class Drafter(nn.Module):
    """An o_proj with the LoRA beside it, which acts on the first `count` tokens of a sequence."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base
        self.count = 0
        self.lora_A = linear(base.in_features, rank)
        self.lora_B = linear(rank, base.out_features)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=5**0.5)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:  # (B, S, H * D) f32 -> (B, S, HIDDEN)
        y: Tensor = self.base(x)
        return torch.cat(
            [y[:, : self.count] + SCALE * self.lora_B(self.lora_A(x[:, : self.count])), y[:, self.count :]], 1
        )


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


def verified(checkpoint: Path, seed: int, count: int, threads: int) -> list[Answered]:
    """The verifier's answers to the first `count` different questions of a seed."""
    rng, questions = random.Random(seed), dict[str, None]()
    while len(questions) < count:
        questions[example(rng)[1]] = None
    with tempfile.TemporaryDirectory(prefix="tiny-chat-verifier-") as folder:
        engine = nemodiff.load(Builder(checkpoint, Path(folder) / "engine").run(), threads=threads)
        prompts = [engine.text.encode_chat([{"role": "user", "content": question}]) for question in questions]
        answers = nemodiff.generate_many(engine, prompts, mode="linear_spec", max_new_tokens=LIMIT)
        return [Answered(prompt, a.token_ids) for prompt, a in zip(prompts, answers, strict=True)]


def lay_out(answers: list[Answered], starts: Tensor) -> Drafts:
    """One draft per start; `starts` (B, K) i64 counts from the answer's first token, which is a draft's first too."""
    sequences = [row.prompt + row.answer for row in answers]
    ends = torch.tensor([len(s) for s in sequences])  # (B,)
    length = int(ends.max()) + BLOCK
    clean = torch.tensor([s + [EOS] * (length - len(s)) for s in sequences])  # (B, L)
    begin = torch.tensor([len(row.prompt) for row in answers])[:, None] + starts  # (B, K), the draft's first position
    position = (begin[:, :, None] + torch.arange(BLOCK)).flatten(1)  # (B, N)
    target = clean.gather(1, position)
    masked = (torch.arange(position.shape[1]) % BLOCK > 0).expand_as(position)
    draft = torch.arange(position.shape[1]) // BLOCK
    own = (draft[:, None] == draft).expand(len(answers), -1, -1)
    prefix = torch.arange(length) < begin.repeat_interleave(BLOCK, 1)[:, :, None]  # (B, N, L)
    causal = torch.ones(length, length, dtype=torch.bool).tril().expand(len(answers), -1, -1)
    unseen = torch.zeros(len(answers), length, position.shape[1], dtype=torch.bool)
    mask = torch.cat([torch.cat([own, prefix], 2), torch.cat([unseen, causal], 2)], 1)[:, None]
    return Drafts(
        torch.cat([target.masked_fill(masked, MASK), clean], 1),
        torch.cat([position, torch.arange(length).expand(len(answers), -1)], 1),
        mask,
        target,
        masked & (position < ends[:, None]),
    )


def guess(model: TinyChat, drafters: list[Drafter], drafts: Drafts) -> tuple[Tensor, Tensor]:
    """Logits of the drafts (B, N, V) f32, and the verifier's for the same tokens, (B, N, V) f32 without a gradient."""
    count = drafts.target.shape[1]
    for drafter in drafters:
        drafter.count = count
    hidden = model(drafts.tokens, drafts.positions, drafts.mask)
    before = (drafts.positions[:, :count] - 1)[:, :, None].expand(-1, -1, HIDDEN)
    verifier = model.diffusion_head(hidden[:, count:].detach().gather(1, before))
    logits = model.diffusion_head(hidden[:, :count])
    never = torch.tensor([MASK])
    return logits.index_fill(2, never, -1e30), verifier.index_fill(2, never, -1e30)


def up_to_first_mistake(logits: Tensor, drafts: Drafts) -> Tensor:  # (B, N) bool
    """The tokens of each draft that a verify would look at: all correct ones and the first wrong one."""
    # What comes after the first wrong token is thrown away in decoding, so training ignores it too.
    agreed = ((logits.argmax(2) == drafts.target) | ~drafts.drafted).view(len(logits), -1, BLOCK)
    before = agreed.cumprod(2).roll(1, 2)
    before[:, :, 0] = 1
    return before.flatten(1).bool() & drafts.drafted


def loss_of(kind: str, logits: Tensor, verifier: Tensor, drafts: Drafts) -> Tensor:
    """The loss of a kind.

    `all` is the cross-entropy of every mask with a token to draft, `active` that of the masks up to the first mistake.
    `lk` adds to `active` the divergence of the two distributions at temperature 3, mixed by their overlap as the
    model's report does, over the whole vocabulary, which is small here.
    """
    chosen = drafts.drafted if kind == "all" else up_to_first_mistake(logits.detach(), drafts)
    loss = F.cross_entropy(logits[chosen], drafts.target[chosen])
    if kind != "lk":
        return loss
    log_q, log_p = (F.log_softmax(x[chosen] / 3, 1) for x in (logits, verifier))
    overlap = torch.minimum(log_q.exp(), log_p.exp()).sum(1)
    weight = torch.exp(-0.5 * overlap.detach())
    divergence = (log_p.exp() * (log_p - log_q)).sum(1)
    return loss + (weight * divergence + (1 - weight) * (1 - overlap)).mean()


def random_starts(answers: list[Answered], count: int) -> Tensor:  # (B, count) i64
    """The answer's start, where every request drafts, and places anywhere after it."""
    highest = torch.tensor([len(row.answer) - 1 for row in answers])[:, None]  # one token is left to draft
    starts = (torch.rand(len(answers), count) * highest).long()
    starts[:, 0] = 0
    return starts


@torch.no_grad()
def kept(model: TinyChat, drafters: list[Drafter], answers: list[Answered]) -> float:
    """Mean tokens that a verify looks at when every answer is decoded draft by draft; without cache and cut-offs."""
    looked = 0
    drafts_made = 0
    at = [0] * len(answers)
    while unfinished := [i for i, row in enumerate(answers) if at[i] < len(row.answer) - 1]:
        drafts = lay_out([answers[i] for i in unfinished], torch.tensor([[at[i]] for i in unfinished]))
        logits, _ = guess(model, drafters, drafts)
        for i, tokens in zip(unfinished, up_to_first_mistake(logits, drafts).sum(1).tolist(), strict=True):
            at[i] += tokens
            looked += tokens
            drafts_made += 1
    return looked / drafts_made


def train(model: TinyChat, drafters: list[Drafter], recipe: Recipe) -> None:
    """Run the recipe and print a line every LOG_EVERY steps."""
    answers = [r for r in verified(recipe.checkpoint, recipe.seed, recipe.answers, recipe.threads) if len(r.answer) > 1]
    held_out = [r for r in verified(recipe.checkpoint, HELD_OUT_SEED, HELD_OUT, recipe.threads) if len(r.answer) > 1]
    parameters = [p for d in drafters for p in (d.lora_A.weight, d.lora_B.weight)]
    optimiser = torch.optim.AdamW(parameters, lr=recipe.rate, betas=(0.9, 0.98), weight_decay=0.0)
    falling = torch.optim.lr_scheduler.OneCycleLR(optimiser, recipe.rate, recipe.steps, pct_start=0.1)
    print(f"{len(answers)} answers, {sum(p.numel() for p in parameters)} parameters", flush=True)
    print(f"step 0 held-out {kept(model, drafters, held_out):.3f} tokens per verify", flush=True)
    rng, begin = random.Random(0), time.monotonic()
    for step in range(1, recipe.steps + 1):
        batch = rng.sample(answers, min(recipe.batch, len(answers)))
        drafts = lay_out(batch, random_starts(batch, recipe.drafts))
        loss = loss_of(recipe.loss, *guess(model, drafters, drafts), drafts)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        falling.step()
        optimiser.zero_grad()
        if step % LOG_EVERY == 0 or step == recipe.steps:
            tokens = kept(model, drafters, held_out)
            seconds = time.monotonic() - begin
            print(f"step {step} {seconds:.0f} s loss {loss:.4f} held-out {tokens:.3f} tokens per verify", flush=True)


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
        tensors[f"{name}_A.weight"] = drafter.lora_A.weight.detach().contiguous()
        tensors[f"{name}_B.weight"] = drafter.lora_B.weight.detach().contiguous()
    # Not save_file: it makes the file readable by its owner only.
    (folder / "adapter_model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))


def parse() -> Recipe:
    parser = argparse.ArgumentParser(description="Train a drafter adapter for tiny-chat.")
    parser.add_argument("--checkpoint", type=Path, default=HERE, help="checkpoint folder (the one of this script)")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder to write, by its released name linear_spec_lora"
    )
    parser.add_argument("--steps", type=int, default=400, help="length of the run (400)")
    parser.add_argument("--answers", type=int, default=2000, help="questions that the verifier answers first (2000)")
    parser.add_argument("--rank", type=int, default=32, help="rank of the LoRA (32)")
    parser.add_argument("--loss", choices=["all", "active", "lk"], default="active", help="see loss_of (active)")
    parser.add_argument("--rate", type=float, default=2e-3, help="highest learning rate (2e-3)")
    parser.add_argument("--batch", type=int, default=8, help="sequences a step (8)")
    parser.add_argument("--drafts", type=int, default=4, help="drafts a sequence (4)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (1)")
    parser.add_argument(
        "--seed", type=int, default=1, help="of the questions; 1 is what tiny-chat itself met first (1)"
    )
    recipe = Recipe(**vars(parser.parse_args()))
    if min(recipe.steps, recipe.answers, recipe.rank, recipe.batch, recipe.drafts) < 1:
        parser.error("--steps, --answers, --rank, --batch and --drafts must be over zero")
    return recipe


def main() -> None:
    recipe = parse()
    torch.manual_seed(0)
    torch.set_num_threads(recipe.threads)
    model = TinyChat()
    load_weights(model, recipe.checkpoint)
    drafters = attach(model, recipe.rank)
    train(model, drafters, recipe)
    save_adapter(drafters, recipe.rank, recipe.out)


if __name__ == "__main__":
    main()

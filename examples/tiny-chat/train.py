"""Train tiny-chat from scratch: one set of weights, two readings. About an hour on two CPU cores.

Each sequence goes through the network once as [noisy answer | clean sequence]. The clean half is causal and learns the
next token; the noisy half is bidirectional inside blocks, sees the clean tokens before its block, and learns the masked
tokens themselves. The run ends by the clock unless `--steps` is given, so only then does a seed fix the weights.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from make_data import example, prompt
from model import BLOCK, EOS, MASK, VOCAB, TinyChat, build_tokenizer, load_weights, save_checkpoint
from tokenizers import Tokenizer
from torch import Tensor

MAX_TOKENS, MAX_ANSWER = 192, 128
TAIL = 6  # EOS after the answer that may be masked too, so that a draft learns to stop
PAD = 8  # EOS after the longest sequence of a batch; at least TAIL
MUON_RATE = 0.02
MUON_MOMENTUM = 0.95
MUON_DECAY = 2e-4
ADAM_RATE = 3e-3
WARMUP = 50
LOG_EVERY = 50
HELD_OUT_SEED = 999
HELD_OUT_BATCH = 32


@dataclass(frozen=True)
class Recipe:
    """The command line; `steps`, if set, replaces `minutes`."""

    out: Path
    minutes: float
    steps: int | None
    threads: int
    batch: int
    init: Path | None
    flat: float
    peak: float
    seed: int


@dataclass(frozen=True)
class Batch:
    """Rows of prompt and answer, filled up with EOS; the answer's own EOS counts as answer."""

    tokens: Tensor  # (B, L) i64
    prompt: Tensor  # (B,) i64, length of the prompt
    answer: Tensor  # (B,) i64, length of the answer


@dataclass(frozen=True)
class Noisy:
    """The answers cut into blocks, some tokens replaced by the mask id; N is the longest answer + TAIL."""

    tokens: Tensor  # (B, N) i64, what the network sees
    target: Tensor  # (B, N) i64, the clean tokens
    masked: Tensor  # (B, N) bool
    position: Tensor  # (B, N) i64, in the clean sequence
    block: Tensor  # (B, N) i64, number of the token's block
    context: Tensor  # (B, N) i64, how many clean tokens stand before the token's block


class Losses(NamedTuple):
    """Means over tokens, in nats."""

    ar: Tensor
    prompt: Tensor
    diffusion: Tensor

    def __str__(self) -> str:
        return f"ar {self.ar:.4f} prompt {self.prompt:.3f} diffusion {self.diffusion:.4f}"


def draw_batch(tokenizer: Tokenizer, rng: random.Random, rows: int) -> Batch:
    """The next `rows` examples of `rng` that fit; the others are skipped."""
    tokens = torch.full((rows, MAX_TOKENS), EOS)
    lengths: list[tuple[int, int]] = []
    while len(lengths) < rows:
        _, question, text = example(rng)
        head, answer = tokenizer.encode(prompt(question)).ids, [*tokenizer.encode(text).ids, EOS]
        total = len(head) + len(answer)
        if total > MAX_TOKENS - PAD or len(answer) > MAX_ANSWER - PAD:
            continue
        tokens[len(lengths), :total] = torch.tensor(head + answer)
        lengths.append((len(head), len(answer)))
    longest = max(map(sum, lengths)) + PAD
    heads, answers = torch.tensor(lengths).T
    return Batch(tokens[:, :longest], heads, answers)


def noise(batch: Batch) -> Noisy:
    """Cut each answer into blocks and mask each block by one of two patterns; all from torch's global generator.

    Half the rows have a first block of any length up to 31, so that blocks begin everywhere, as self-speculation
    restarts wherever the last verify stopped. Half the blocks mask each token with one probability, as in denoising;
    half keep a short clean start, as in drafting.
    """
    rows, length = batch.tokens.shape
    count = int(batch.answer.max()) + TAIL
    index = torch.arange(count)[None]  # (1, N)
    position = (batch.prompt[:, None] + index).clamp(max=length - 1)  # past the end only where not live
    target = batch.tokens.gather(1, position)

    straight = torch.rand(rows) < 0.5
    first = torch.randint(0, BLOCK, (rows,)).masked_fill(straight, 0)  # (B,)
    block = (index + (BLOCK - first)[:, None]) // BLOCK  # first 0: no block 0, a whole block 1
    blocks = int(block.max()) + 1
    starts = torch.ones_like(block, dtype=torch.bool)
    starts[:, 1:] = block[:, 1:] != block[:, :-1]
    begin = torch.where(starts, index, 0).cummax(1).values  # (B, N), index where the token's block begins

    rate = torch.rand(rows, blocks).clamp(0.05, 1).gather(1, block)
    uniform = torch.rand(rows, count) < rate
    kept = (torch.rand(rows, blocks) ** 2 * 16).long().clamp(min=1).gather(1, block)  # 1..15, mostly few
    drafting = index - begin >= kept
    masked = torch.where((torch.rand(rows, blocks) < 0.5).gather(1, block), drafting, uniform)
    masked &= index < (batch.answer + TAIL)[:, None]
    tokens = target.masked_fill(masked, MASK)
    return Noisy(tokens, target, masked, position, block, batch.prompt[:, None] + begin)


def joint_mask(noisy: Noisy, length: int) -> Tensor:  # (B, 1, N + L, N + L) bool
    """Who sees whom in [noisy | clean]: own noisy block, clean tokens before it; clean tokens are causal."""
    rows, count = noisy.tokens.shape
    own_block = noisy.block[:, :, None] == noisy.block[:, None]  # (B, N, N)
    prefix = torch.arange(length) < noisy.context[:, :, None]  # (B, N, L)
    no_noise = torch.zeros(rows, length, count, dtype=torch.bool)
    causal = torch.ones(length, length, dtype=torch.bool).tril().expand(rows, length, length)
    return torch.cat([torch.cat([own_block, prefix], 2), torch.cat([no_noise, causal], 2)], 1)[:, None]


def losses(model: TinyChat, batch: Batch) -> Losses:
    """The three cross-entropies of one pass over [noisy | clean]; a token has one position in both halves."""
    rows, length = batch.tokens.shape
    noisy = noise(batch)
    count = noisy.tokens.shape[1]
    positions = torch.cat([noisy.position, torch.arange(length).expand(rows, length)], 1)
    tokens = torch.cat([noisy.tokens, batch.tokens], 1)
    hidden = model(tokens, positions, joint_mask(noisy, length))  # (B, N + L, HIDDEN) f32

    logits = model.diffusion_head(hidden[:, count:-1])  # (B, L - 1, V) f32, for the next token
    labels = batch.tokens[:, 1:]
    entropy = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
    target = torch.arange(1, length)[None]
    in_prompt = target < batch.prompt[:, None]
    in_answer = (target < (batch.prompt + batch.answer)[:, None]) & ~in_prompt
    ar = (entropy * in_answer).sum() / in_answer.sum()
    prompt_loss = (entropy * in_prompt).sum() / in_prompt.sum()

    guesses = model.diffusion_head(hidden[:, :count][noisy.masked])  # (masked, V) f32, for the token itself
    return Losses(ar, prompt_loss, F.cross_entropy(guesses, noisy.target[noisy.masked]))


def orthogonalise(matrix: Tensor) -> Tensor:  # (M, N) f32
    """Push the singular values towards 1 by five Newton-Schulz steps with Muon's coefficients."""
    x: Tensor = matrix / (matrix.norm() + 1e-7)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if tall else x


class Optimiser:
    """Orthogonalised Nesterov momentum for the layers' matrices, AdamW for embeddings, head and norms."""

    def __init__(self, model: TinyChat) -> None:
        named = list(model.named_parameters())
        self.matrices = [p for name, p in named if p.ndim == 2 and "layers" in name]
        self.rest = [p for name, p in named if p.ndim != 2 or "layers" not in name]
        self.momenta = [torch.zeros_like(p) for p in self.matrices]
        self.adamw = torch.optim.AdamW(self.rest, lr=ADAM_RATE, betas=(0.9, 0.95), weight_decay=0.01)

    @torch.no_grad()
    def step(self, scale: float) -> None:
        """Apply and clear the gradients; `scale` multiplies all rates. Only AdamW's part is clipped."""
        torch.nn.utils.clip_grad_norm_(self.rest, 1.0)
        for group in self.adamw.param_groups:
            group["lr"] = ADAM_RATE * scale
        self.adamw.step()
        self.adamw.zero_grad()
        for weight, momentum in zip(self.matrices, self.momenta, strict=True):
            gradient = weight.grad
            assert gradient is not None
            momentum.mul_(MUON_MOMENTUM).add_(gradient)
            update = orthogonalise(gradient + MUON_MOMENTUM * momentum)
            rate = MUON_RATE * scale * math.sqrt(max(1, weight.shape[0] / weight.shape[1]))
            weight.mul_(1 - MUON_DECAY * scale).add_(update, alpha=-rate)
            weight.grad = None


def rate_scale(recipe: Recipe, step: int, done: float) -> float:
    """Warm up, hold `peak` until `flat` of the run is done, then fall linearly to 1 % of it."""
    fall = 1 if done < recipe.flat else max(0.01, 1 - (done - recipe.flat) / (1 - recipe.flat))
    return recipe.peak * min(1, (step + 1) / WARMUP) * fall


def train(model: TinyChat, tokenizer: Tokenizer, recipe: Recipe) -> None:
    """Run the recipe on `model` and print a line every `LOG_EVERY` steps."""
    optimiser = Optimiser(model)
    rng, held_out_rng = random.Random(recipe.seed), random.Random(HELD_OUT_SEED)
    begin = time.monotonic()
    step = 0
    done = 0.0
    while done < 1:
        loss = losses(model, draw_batch(tokenizer, rng, recipe.batch))
        (loss.ar + 0.1 * loss.prompt + loss.diffusion).backward()  # type: ignore[no-untyped-call]
        optimiser.step(rate_scale(recipe, step, done))
        step, seconds = step + 1, time.monotonic() - begin
        done = step / recipe.steps if recipe.steps else seconds / (60 * recipe.minutes)
        if step % LOG_EVERY == 0:
            with torch.no_grad():
                held_out = losses(model, draw_batch(tokenizer, held_out_rng, HELD_OUT_BATCH))
            print(f"step {step} {seconds:.0f} s train {loss} | held-out {held_out}", flush=True)


def parse() -> Recipe:
    parser = argparse.ArgumentParser(description="Train tiny-chat and write a checkpoint folder.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the checkpoint into")
    parser.add_argument("--minutes", type=float, default=60, help="length of the run by the clock (60)")
    parser.add_argument("--steps", type=int, help="length of the run in steps, instead of --minutes")
    parser.add_argument("--threads", type=int, default=2, help="torch CPU threads (2)")
    parser.add_argument("--batch", type=int, default=16, help="sequences a step (16)")
    parser.add_argument("--init", type=Path, help="checkpoint folder to continue from, with fresh momenta")
    parser.add_argument("--flat", type=float, default=0.4, help="share of the run at full rate (0.4)")
    parser.add_argument("--peak", type=float, default=1.0, help="multiplier of both rates (1)")
    parser.add_argument("--seed", type=int, default=1, help="seed of the training examples (1)")
    recipe = Recipe(**vars(parser.parse_args()))
    if recipe.minutes <= 0 or (recipe.steps is not None and recipe.steps < 1):
        parser.error(f"--minutes {recipe.minutes} --steps {recipe.steps}: both must be over zero")
    return recipe


def main() -> None:
    recipe = parse()
    torch.manual_seed(0)  # weights and noise; --seed draws the examples only
    torch.set_num_threads(recipe.threads)
    tokenizer = build_tokenizer()
    model = TinyChat()
    if recipe.init:
        load_weights(model, recipe.init)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"vocabulary {VOCAB}, parameters {millions:.2f} M", flush=True)
    train(model, tokenizer, recipe)
    save_checkpoint(model, tokenizer, recipe.out)


if __name__ == "__main__":
    main()

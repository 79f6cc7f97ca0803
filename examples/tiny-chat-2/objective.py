"""What tiny-chat-2 learns: the next token of texts, and both readings of conversations in one pass.

The pass is over [noisy answer | clean conversation]. The clean half is causal and learns the next token. The noisy half
is bidirectional inside blocks, sees the clean tokens before its block, and learns the masked tokens themselves.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from exercises import LENGTH
from exercises import row as exercise_row
from make_data import example, render
from model import CONFIG, TinyChat
from tokenizers import Tokenizer
from torch import Tensor

BLOCK: int = CONFIG["block_size"]
MASK: int = CONFIG["mask_token_id"]
EOS: int = CONFIG["eos_token_id"]
MOST_TOKENS, MOST_ANSWER = 632, 330
POOL = 1024  # conversations from which batches of nearly one length are cut


class Sample(NamedTuple):
    """A conversation as ids: what is given, and the answer with its EOS."""

    task: str
    prompt: list[int]
    answer: list[int]

    @property
    def positions(self) -> int:
        """Positions that it takes in both halves."""
        return len(self.prompt) + 2 * len(self.answer) + BLOCK // 2


@dataclass(frozen=True)
class Batch:
    """Rows of prompt and answer, filled up with EOS."""

    tokens: Tensor  # (B, L) i64
    prompt: Tensor  # (B,) i64, length of the prompt
    answer: Tensor  # (B,) i64, length of the answer

    @property
    def learned(self) -> Tensor:  # (B, L) bool
        """Where the answers and their EOS are."""
        at = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        return (at >= self.prompt[:, None]) & (at < (self.prompt + self.answer)[:, None])

    def to(self, device: str) -> Batch:
        return Batch(self.tokens.to(device), self.prompt.to(device), self.answer.to(device))


@dataclass(frozen=True)
class Noisy:
    """The answers cut into blocks, some tokens replaced by the mask id; N is the longest answer and a block."""

    tokens: Tensor  # (B, N) i64, what the network sees
    target: Tensor  # (B, N) i64, the clean tokens
    masked: Tensor  # (B, N) bool
    position: Tensor  # (B, N) i64, in the clean sequence
    block: Tensor  # (B, N) i64, number of the token's block
    context: Tensor  # (B, N) i64, how many clean tokens stand before the token's block


class Losses(NamedTuple):
    """Means over the learned tokens, in nats; `diffusion` is 0 where only the causal reading was learned."""

    ar: Tensor
    diffusion: Tensor
    whole: Tensor  # (B,) bool, whether every learned token of a row is the likeliest one

    @property
    def total(self) -> Tensor:
        return self.ar + self.diffusion

    def __str__(self) -> str:
        return f"ar {self.ar:.4f} diffusion {self.diffusion:.4f} whole {self.whole.float().mean():.3f}"


def samples(tokenizer: Tokenizer, rng: random.Random) -> Iterator[Sample]:
    """The conversations of `rng` that fit."""
    while True:
        task, messages, tools, thinking = example(rng)
        question, text = render(messages, tools, thinking)
        sample = Sample(task, tokenizer.encode(question).ids, [*tokenizer.encode(text).ids, EOS])
        if len(sample.prompt) + len(sample.answer) <= MOST_TOKENS and len(sample.answer) <= MOST_ANSWER:
            yield sample


def pool(tokenizer: Tokenizer, seed: str, positions: int) -> list[list[Sample]]:
    """The batches of one pool, always the same for a seed: each of rows of nearly one length, of about `positions`."""
    rng = random.Random(seed)
    drawn = samples(tokenizer, rng)
    batches: list[list[Sample]] = [[]]
    for sample in sorted((next(drawn) for _ in range(POOL)), key=lambda sample: sample.positions):
        if batches[-1] and sample.positions * (len(batches[-1]) + 1) > positions:
            batches.append([])
        batches[-1].append(sample)
    rng.shuffle(batches)
    return batches


def as_batch(rows: list[Sample]) -> Batch:
    """Conversations side by side, filled up with EOS."""
    length = max(len(row.prompt) + len(row.answer) for row in rows)
    tokens = torch.full((len(rows), length), EOS)
    for index, row in enumerate(rows):
        tokens[index, : len(row.prompt) + len(row.answer)] = torch.tensor(row.prompt + row.answer)
    lengths = torch.tensor([(len(row.prompt), len(row.answer)) for row in rows])
    return Batch(tokens, lengths[:, 0], lengths[:, 1])


def noise(batch: Batch, generator: torch.Generator) -> Noisy:
    """Cut each answer into blocks and mask each block by one of two patterns; drawn on the CPU.

    Half the rows have a first block of any length up to 31, so that blocks begin everywhere, as self-speculation
    restarts wherever the last verify stopped. Half the blocks mask each token with one probability, as in denoising;
    half keep a short clean start, as in drafting.
    """
    rows, length = batch.tokens.shape
    device = batch.tokens.device
    count = int(batch.answer.max()) + BLOCK - 1
    blocks = count // BLOCK + 2

    def uniform(*size: int) -> Tensor:
        return torch.rand(*size, generator=generator).to(device)

    index = torch.arange(count, device=device)[None]  # (1, N)
    position = batch.prompt[:, None] + index
    target = batch.tokens.gather(1, position.clamp(max=length - 1))  # a row ends in EOS

    first = (uniform(rows) * BLOCK).long() * (uniform(rows) < 0.5)  # (B,)
    block = (index + (BLOCK - first)[:, None]) // BLOCK  # first 0: no block 0, a whole block 1
    starts = torch.ones_like(block, dtype=torch.bool)
    starts[:, 1:] = block[:, 1:] != block[:, :-1]
    begin = torch.where(starts, index, 0).cummax(1).values  # (B, N), index where the token's block begins

    rate = uniform(rows, blocks).clamp(0.05, 1).gather(1, block)
    kept = (uniform(rows, blocks) ** 2 * 16).long().clamp(min=1).gather(1, block)  # 1..15, mostly few
    drafting = index - begin >= kept
    masked = torch.where((uniform(rows, blocks) < 0.5).gather(1, block), drafting, uniform(rows, count) < rate)
    masked &= block <= block.gather(1, batch.answer[:, None] - 1)  # to the end of the answer's last block
    return Noisy(target.masked_fill(masked, MASK), target, masked, position, block, batch.prompt[:, None] + begin)


def joint_mask(noisy: Noisy, length: int) -> Tensor:  # (B, 1, N + L, N + L) bool
    """Who sees whom in [noisy | clean]: own noisy block, clean tokens before it; clean tokens are causal."""
    rows, count = noisy.tokens.shape
    device = noisy.tokens.device
    mask = torch.zeros(rows, 1, count + length, count + length, dtype=torch.bool, device=device)
    mask[:, 0, :count, :count] = noisy.block[:, :, None] == noisy.block[:, None]
    mask[:, 0, :count, count:] = torch.arange(length, device=device) < noisy.context[:, :, None]
    mask[:, 0, count:, count:] = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return mask


def exercises(tokenizer: Tokenizer, seed: str, positions: int, device: str) -> tuple[Tensor, Tensor]:
    """Rows of exercises, always the same for a seed: ids (B, L) i64, and which are learned, (B, L) bool."""
    rng = random.Random(seed)
    ids, learned = zip(*(exercise_row(tokenizer, rng) for _ in range(positions // LENGTH)), strict=True)
    return torch.tensor(ids, device=device), torch.tensor(learned, device=device)


def causal(model: TinyChat, tokens: Tensor, learned: Tensor) -> Losses:
    """The loss of the next token alone, where it is `learned` (B, L); less than half the work of `joint`."""
    rows, length = tokens.shape
    at = torch.arange(length, device=tokens.device)
    with torch.autocast(tokens.device.type, torch.bfloat16):
        hidden = model(tokens, at.expand(rows, length), (at <= at[:, None])[None, None])
        return _next_token(model, hidden[:, :-1], tokens, learned)


def joint(model: TinyChat, batch: Batch, generator: torch.Generator) -> Losses:
    """The losses of one pass over [noisy | clean]; a token has one position in both halves."""
    rows, length = batch.tokens.shape
    noisy = noise(batch, generator)
    count = noisy.tokens.shape[1]
    clean = torch.arange(length, device=batch.tokens.device)
    with torch.autocast(batch.tokens.device.type, torch.bfloat16):
        hidden = model(
            torch.cat([noisy.tokens, batch.tokens], 1),
            torch.cat([noisy.position, clean.expand(rows, length)], 1),
            joint_mask(noisy, length),
        )
        guesses = model.diffusion_head(hidden[:, :count][noisy.masked])  # (masked, V), for the token itself
        read = _next_token(model, hidden[:, count:-1], batch.tokens, batch.learned)
    return read._replace(diffusion=F.cross_entropy(guesses.float(), noisy.target[noisy.masked]))


def _next_token(model: TinyChat, hidden: Tensor, tokens: Tensor, learned: Tensor) -> Losses:
    """What hidden states (B, L - 1, HIDDEN) say of the tokens (B, L) after them."""
    taught, labels = learned[:, 1:], tokens[:, 1:]
    logits = model.diffusion_head(hidden[taught])  # (learned tokens, V)
    right = torch.ones_like(taught)
    right[taught] = logits.argmax(-1) == labels[taught]
    ar = F.cross_entropy(logits.float(), labels[taught])
    return Losses(ar, torch.zeros_like(ar), right.all(1))

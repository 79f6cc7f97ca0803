"""What tiny-chat-2 learns: the next token of texts, and both readings of conversations in one pass.

The pass is over [noisy answer | clean conversation]. The clean half is causal and learns the next token. The noisy half
is bidirectional inside blocks, sees the clean tokens before its block, and learns the masked tokens themselves.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
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


class Place(NamedTuple):
    """A token of an answer in its block; the fields are those of `Noisy`."""

    target: int
    masked: bool
    position: int
    block: int
    context: int


@dataclass(frozen=True)
class Noisy:
    """The answers of rows, cut into blocks, some tokens replaced by the mask id."""

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


def noise(tokens: Tensor, learned: Tensor, rng: random.Random, fill: int = BLOCK) -> Noisy:
    """Cut every answer, a run of `learned` (B, L), into blocks, and mask some tokens of each.

    Half the answers have a first block of any length up to 31, so that blocks begin everywhere, as self-speculation
    restarts wherever the last verify stopped. After an answer's EOS its block goes on with EOS, at most `fill` of them.
    """
    rows = [_cut(row, taught, rng, fill) for row, taught in zip(tokens.tolist(), learned.tolist(), strict=True)]
    longest = max(map(len, rows))
    outside = Place(EOS, masked=False, position=0, block=-1, context=0)
    places = torch.tensor([row + [outside] * (longest - len(row)) for row in rows])
    target, masked, position, block, context = places.to(tokens.device).unbind(-1)
    masked = masked.bool()
    return Noisy(target.masked_fill(masked, MASK), target, masked, position, block, context)


def _runs(learned: list[bool]) -> Iterator[tuple[int, int]]:
    """Begin and end of each answer."""
    for taught, places in groupby(range(len(learned)), learned.__getitem__):
        if taught:
            run = list(places)
            yield run[0], run[-1] + 1


def _cut(row: list[int], learned: list[bool], rng: random.Random, fill: int) -> list[Place]:
    """The places of a row's answers, in blocks."""
    cut: list[Place] = []
    for begin, end in _runs(learned):
        text = row[begin:end]
        size = rng.randrange(1, BLOCK) if rng.random() < 0.5 else BLOCK
        at = 0
        while at < len(text):
            block = text[at : at + size]
            if block[-1] == EOS:
                block += [EOS] * min(size - len(block), fill)
            number = cut[-1].block + 1 if cut else 0
            places = zip(block, _masked(len(block), rng), strict=True)
            cut += [Place(t, m, begin + at + i, number, begin + at) for i, (t, m) in enumerate(places)]
            at, size = at + size, BLOCK
    return cut


def _masked(size: int, rng: random.Random) -> list[bool]:
    """A block as denoising begins with it, as it goes on, or as drafting sees it, after a short clean start."""
    kind = rng.random()
    if kind < 0.5:
        rate = max(0.05, rng.random())
        return [rng.random() < rate for _ in range(size)]
    kept = 0 if kind < 0.75 else 1 + int(15 * rng.random() ** 2)
    return [at >= kept for at in range(size)]


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


def joint(model: TinyChat, tokens: Tensor, learned: Tensor, rng: random.Random, fill: int = BLOCK) -> Losses:
    """The losses of one pass over [noisy | clean]; a token has one position in both halves."""
    rows, length = tokens.shape
    noisy = noise(tokens, learned, rng, fill)
    count = noisy.tokens.shape[1]
    clean = torch.arange(length, device=tokens.device)
    with torch.autocast(tokens.device.type, torch.bfloat16):
        hidden = model(
            torch.cat([noisy.tokens, tokens], 1),
            torch.cat([noisy.position, clean.expand(rows, length)], 1),
            joint_mask(noisy, length),
        )
        guesses = model.diffusion_head(hidden[:, :count][noisy.masked])  # (masked, V), for the token itself
        read = _next_token(model, hidden[:, count:-1], tokens, learned)
    return read._replace(diffusion=F.cross_entropy(guesses.float(), noisy.target[noisy.masked]))


def _next_token(model: TinyChat, hidden: Tensor, tokens: Tensor, learned: Tensor) -> Losses:
    """What hidden states (B, L - 1, HIDDEN) say of the tokens (B, L) after them."""
    taught, labels = learned[:, 1:], tokens[:, 1:]
    logits = model.diffusion_head(hidden[taught])  # (learned tokens, V)
    right = torch.ones_like(taught)
    right[taught] = logits.argmax(-1) == labels[taught]
    ar = F.cross_entropy(logits.float(), labels[taught])
    return Losses(ar, torch.zeros_like(ar), right.all(1))

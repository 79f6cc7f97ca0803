"""Train tiny-chat-2, or go on where an earlier run stopped: one set of weights, two readings.

The first `--causal` steps read causally alone, and mostly dense exercises; conversations take the place of some, step
by step. The later ones read both ways. Everything a step needs follows from its number and the seed, so a run that is
stopped and started again gives what one run gives. The rate warms up, holds, falls slowly, and at last over the
`--fall` steps before the end, which a later run may move.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections import Counter
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from model import HERE, TinyChat, save_checkpoint
from objective import BLOCK, Losses, Sample, as_batch, causal, exercises, joint, pool, samples
from optimiser import Optimiser
from start import write_copying
from tokenizers import Tokenizer

WARMUP, HOLD = 60, 400  # steps; after these the rate falls with the root of the step
PARTS = 2  # of a step, each exercises or conversations of one length
EXERCISED = (0.8, 0.5)  # share of the parts that are exercises: at first, and after the causal steps
FILL = 8  # most EOS after an answer of an exercise; one of a conversation fills its block
LOG_EVERY = 50
HELD_OUT = 256  # conversations of another seed
HELD_OUT_SEED = "held out"


@dataclass(frozen=True)
class Recipe:
    """The command line."""

    out: Path
    steps: int
    causal: int
    fall: int
    positions: int
    peak: float
    seed: int
    device: str
    threads: int
    save_minutes: float


class Run:
    """A training run, whose state is a file."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._tokenizer = Tokenizer.from_file(str(HERE / "tokenizer.json"))
        torch.manual_seed(0)  # the weights
        self.model = TinyChat()
        write_copying(self.model, self._tokenizer)
        self.model.to(recipe.device)
        self._optimiser = Optimiser(self.model)
        self._file = recipe.out / "state.pt"
        self.step = 0
        self._seconds = 0.0  # of all runs
        self._pool = 0
        self._batch = 0  # of the pool, the next one
        self._batches = pool(self._tokenizer, f"{recipe.seed}/0", recipe.positions)
        if self._file.is_file():
            self._restore()

    def train(self) -> None:
        """Run to the recipe's last step, with a line every `LOG_EVERY` steps, and write the checkpoint."""
        recipe = self._recipe
        began = saved = time.monotonic()
        before = self._seconds
        while self.step < recipe.steps:
            rng = random.Random(f"{recipe.seed}/{self.step}")
            for part in range(PARTS):
                loss = self._loss(rng, f"{recipe.seed}/{self.step}/{part}")
                (loss.total / PARTS).backward()  # type: ignore[no-untyped-call]
            norm = self._optimiser.step(self._rate())
            self.step += 1
            now = time.monotonic()
            self._seconds = before + now - began
            if self.step % LOG_EVERY == 0:
                print(f"step {self.step} {self._seconds:.0f} s {loss} gradient {norm:.2f}", flush=True)
            if now - saved > 60 * recipe.save_minutes or self.step == recipe.steps:
                self._save()
                saved = now
                print(f"step {self.step} {self._seconds:.0f} s held out {self.held_out()}", flush=True)
        save_checkpoint(self.model, recipe.out)

    def _loss(self, rng: random.Random, seed: str) -> Losses:
        """Of a part of a step."""
        recipe = self._recipe
        begin, end = EXERCISED
        if rng.random() < end + (begin - end) * max(0, 1 - self.step / max(recipe.causal, 1)):
            tokens, learned = exercises(self._tokenizer, seed, recipe.positions, recipe.device)
            fill = FILL
        else:
            batch = as_batch(self._next_rows()).to(recipe.device)
            tokens, learned, fill = batch.tokens, batch.learned, BLOCK
        if self.step < recipe.causal:
            return causal(self.model, tokens, learned)
        return joint(self.model, tokens, learned, rng, fill)

    @torch.no_grad()
    def held_out(self) -> str:
        """The losses on other conversations, and by task the share of answers that are wholly the likeliest tokens."""
        drawn = sorted(
            islice(samples(self._tokenizer, random.Random(HELD_OUT_SEED)), HELD_OUT), key=lambda s: s.positions
        )
        right, seen = Counter[str](), Counter[str]()
        ar = diffusion = 0.0
        for at in range(0, len(drawn), 16):
            rows = drawn[at : at + 16]
            batch = as_batch(rows).to(self._recipe.device)
            loss = joint(self.model, batch.tokens, batch.learned, random.Random(at))
            ar += float(loss.ar) * len(rows) / len(drawn)
            diffusion += float(loss.diffusion) * len(rows) / len(drawn)
            seen.update(row.task for row in rows)
            right.update(row.task for row, whole in zip(rows, loss.whole.tolist(), strict=True) if whole)
        tasks = " ".join(f"{task} {right[task]}/{seen[task]}" for task in sorted(seen))
        return f"ar {ar:.4f} diffusion {diffusion:.4f} whole {right.total() / seen.total():.3f}: {tasks}"

    def _rate(self) -> float:
        recipe = self._recipe
        fall = min(1.0, max(0.01, (recipe.steps - self.step) / recipe.fall)) if recipe.fall else 1.0
        held = min(1, (self.step + 1) / WARMUP, math.sqrt(HOLD / (self.step + 1)))
        return recipe.peak * held * fall

    def _next_rows(self) -> list[Sample]:
        if self._batch == len(self._batches):
            self._pool += 1
            self._batch = 0
            self._batches = pool(self._tokenizer, f"{self._recipe.seed}/{self._pool}", self._recipe.positions)
        self._batch += 1
        return self._batches[self._batch - 1]

    def _save(self) -> None:
        """Write the state beside the old one and put it in its place, so that one of them is always whole."""
        self._recipe.out.mkdir(parents=True, exist_ok=True)
        state = {
            "model": self.model.state_dict(),
            "optimiser": self._optimiser.state(),
            "step": self.step,
            "seconds": self._seconds,
            "pool": self._pool,
            "batch": self._batch,
            "positions": self._recipe.positions,
        }
        torch.save(state, self._file.with_suffix(".new"))
        self._file.with_suffix(".new").replace(self._file)

    def _restore(self) -> None:
        state: dict[str, Any] = torch.load(self._file, map_location=self._recipe.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self._optimiser.restore(state["optimiser"])
        self.step, self._seconds = state["step"], state["seconds"]
        self._pool, self._batch = state["pool"], state["batch"]
        if state["positions"] != self._recipe.positions:  # other batches, so begin with a new pool
            self._pool, self._batch = self._pool + 1, 0
        self._batches = pool(self._tokenizer, f"{self._recipe.seed}/{self._pool}", self._recipe.positions)


def parse() -> Recipe:
    parser = argparse.ArgumentParser(description="Train tiny-chat-2 and write a checkpoint folder.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint and of the run's state")
    parser.add_argument("--steps", type=int, default=5000, help="the last step, over all runs (5000)")
    parser.add_argument("--causal", type=int, default=1800, help="steps that read causally alone (1800)")
    parser.add_argument("--fall", type=int, default=1600, help="steps before it in which the rate falls (1600)")
    parser.add_argument("--positions", type=int, default=4096, help="positions of half a step (4096)")
    parser.add_argument("--peak", type=float, default=0.35, help="multiplier of all rates (0.35)")
    parser.add_argument("--seed", type=int, default=1, help="seed of the conversations (1)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (2)")
    parser.add_argument("--save-minutes", type=float, default=5, help="minutes between two states (5)")
    return Recipe(**vars(parser.parse_args()))


def main() -> None:
    recipe = parse()
    torch.set_num_threads(recipe.threads)
    run = Run(recipe)
    millions = sum(p.numel() for p in run.model.parameters()) / 1e6
    print(f"{millions:.2f} M parameters on {recipe.device}, from step {run.step}", flush=True)
    run.train()


if __name__ == "__main__":
    main()

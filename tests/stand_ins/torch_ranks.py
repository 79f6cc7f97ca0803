"""Requests of all modes on an engine, alone or over some ranks: `torch_ranks.py ENGINE RANKS` prints their tokens."""

from __future__ import annotations

import json
import sys
from typing import Any

import nemodiff
from nemodiff.runtime.engines.torch.engine import TorchEngine

PROMPTS = ["Count from 3 to 9.", "What is 2 + 2?", "Name a colour, then a number, then a colour."]
MODES: list[dict[str, Any]] = [
    {"mode": "ar"},
    {"mode": "diffusion", "threshold": 0.3},
    {"mode": "linear_spec"},
    {"mode": "quadratic_spec", "groups": "all"},
]


def answers(engine: nemodiff.LoadedEngine) -> dict[str, Any]:
    """Tokens in every mode, alone, sampled, and mixed in a scheduler."""
    settings = [{"max_new_tokens": 14, "block_length": 4, "chat": False, **mode} for mode in MODES]
    alone = [nemodiff.generate(engine, PROMPTS[0], **options).token_ids for options in settings]
    sampled = nemodiff.generate(engine, PROMPTS[1], temperature=1, seed=3, logprobs=2, **settings[2])
    with nemodiff.Scheduler(engine, rows=4) as scheduler:
        handles = [scheduler.submit(prompt, **options) for options in settings for prompt in PROMPTS]
        together = [handle.result(120).token_ids for handle in handles]
    top = [token.logprob for token in sampled.logprobs or []]
    return {"alone": alone, "together": together, "sampled": sampled.token_ids, "logprobs": top}


def main() -> None:
    engine = nemodiff.load(sys.argv[1], threads=1, device="cpu", tp_size=int(sys.argv[2]))
    assert isinstance(engine.backend, TorchEngine)
    engine.backend.forwards.ahead = True  # as on GPUs
    json.dump(answers(engine), sys.stdout)


if __name__ == "__main__":
    main()

"""Requests of all modes on an engine, alone or over ranks: `torch_ranks.py ENGINE RANKS DEVICE` prints their tokens."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import nemodiff
from nemodiff.builder.build import Builder
from nemodiff.runtime.engines.torch.engine import TorchEngine

PROMPTS = ["Count from 3 to 9.", "What is 2 + 2?", "Name a colour, then a number, then a colour."]
MODES: list[dict[str, Any]] = [
    {"mode": "ar"},
    {"mode": "diffusion", "threshold": 0.3},
    {"mode": "linear_spec"},
    {"mode": "quadratic_spec", "groups": "all"},
]


WIDE = {"hidden_size": 64, "intermediate_size": 128}  # which 2 ranks split into groups of 32


def build(folder: Path, **choices: Any) -> Path:
    """8 heads over 4 of K and V, a vocabulary that no rank count divides, an adapter, and YaRN's query scale."""
    from stand_ins.checkpoints import write_adapter, write_checkpoint

    checkpoint = write_checkpoint(
        folder / "checkpoint", dtype="f32", num_attention_heads=8, num_key_value_heads=4, head_dim=8, **WIDE
    )
    write_adapter(checkpoint, rank=4, alpha=8, strength=0.05)
    return Builder(checkpoint, folder / "engine", backend="torch", dtype="f32", max_batch_size=4, **choices).run()


def answers_of_ranks(engine: Path, ranks: int, device: str = "cpu") -> Any:
    """What this file prints as a program; it must end all that it has started."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, __file__, str(engine), str(ranks), device]
    ended = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=240)
    assert (ended.returncode, ended.stderr) == (0, "")
    return json.loads(ended.stdout)


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
    folder, ranks, device = sys.argv[1:]
    engine = nemodiff.load(folder, threads=1, device=device, tp_size=int(ranks))
    assert isinstance(engine.backend, TorchEngine)
    engine.backend.forwards.ahead = True  # as on GPUs
    json.dump(answers(engine), sys.stdout)


if __name__ == "__main__":
    main()

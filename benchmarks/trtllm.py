"""Measure the autoregressive twin of a checkpoint in TensorRT-LLM: tokens per second and time to the first token.

Runs in TensorRT-LLM's own environment, whose torch and numpy are not nemodiff's, so nothing here imports nemodiff; its
version comes from the folder that `nemodiff export` wrote. This file must not have the package's name, or
`import tensorrt_llm` would find the script itself. Writes `results/trtllm.json`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from common import questions, record

MISSING = (
    "tensorrt_llm cannot be imported ({error}); it pins a torch and a numpy of its own, so install it beside nemodiff, "
    "not into it: use NVIDIA's TensorRT-LLM container, or an environment of its own with `pip install tensorrt-llm`, "
    "and run this script there"
)
NO_TWIN = "{folder}: no folder written by nemodiff export; make it first: nemodiff export CHECKPOINT -o {folder}"


def encode(tokenizer: Any, question_list: list[questions.Question]) -> list[list[int]]:
    """The prompts' ids, chat template included."""
    return [
        list(tokenizer.apply_chat_template(q.messages, tokenize=True, add_generation_prompt=True, return_dict=False))
        for q in question_list
    ]


def alone(llm: Any, prompts: list[list[int]], sampling: Any) -> dict[str, float]:
    """One request at a time, streamed: seconds to the first token (median) and tokens per second (all tokens)."""
    firsts = []
    seconds = 0.0
    tokens = 0
    for ids in prompts:
        started = time.perf_counter()
        first = None
        output = None
        for output in llm.generate_async(ids, sampling, streaming=True):
            if first is None and output.outputs[0].token_ids:
                first = time.perf_counter() - started
        assert output is not None
        assert first is not None
        seconds += time.perf_counter() - started
        firsts.append(first)
        tokens += len(output.outputs[0].token_ids)
    return {"ttft_ms": statistics.median(firsts) * 1e3, "tokens_per_second": tokens / seconds}


def together(llm: Any, prompts: list[list[int]], sampling: Any) -> tuple[float, list[list[int]]]:
    """All requests at once: tokens per second, and the new ids."""
    started = time.perf_counter()
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    seconds = time.perf_counter() - started
    answers = [list(output.outputs[0].token_ids) for output in outputs]
    return sum(map(len, answers)) / seconds, answers


def measure(llm: Any, sampling: Any, tokenizer: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """All figures; the first rounds are run and dropped."""
    prompts = encode(tokenizer, arguments.questions)
    single, batch = [], []
    for turn in range(arguments.warmup + arguments.rounds):
        one, (rate, answers) = alone(llm, prompts, sampling), together(llm, prompts, sampling)
        if turn >= arguments.warmup:
            single.append(one)
            batch.append(rate)
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in answers]
    correct = sum(text.strip() == q.answer for text, q in zip(texts, arguments.questions, strict=True))
    return {
        "one_request": {name: round(statistics.median(r[name] for r in single), 2) for name in single[0]},
        "all_requests": {"requests": len(prompts), "tokens_per_second": round(statistics.median(batch), 2)},
        "tokens": sum(map(len, answers)),
        "right_answers": correct,  # of the demonstration model; another one was not trained on these questions
    }


def device() -> str | None:
    """The GPU's name."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the autoregressive twin of a checkpoint in TensorRT-LLM.")
    parser.add_argument("twin", type=Path, help="a folder written by nemodiff export")
    parser.add_argument("--backend", help="of tensorrt_llm.LLM, for instance _autodeploy; default its own")
    parser.add_argument("--prompts", type=int, default=20, help="prompts per round, default 20, over all tasks")
    parser.add_argument("--new-tokens", type=int, default=128, help="limit of an answer, default 128")
    parser.add_argument("--rounds", type=int, default=7, help="measured rounds, default 7")
    parser.add_argument("--warmup", type=int, default=1, help="rounds before them, excluded, default 1")
    arguments = parser.parse_args()
    arguments.questions = questions.first(arguments.prompts)
    folder: Path = arguments.twin
    if not (folder / "nemodiff_export.json").is_file():
        sys.exit(NO_TWIN.format(folder=folder))
    exported = json.loads((folder / "nemodiff_export.json").read_text(encoding="utf-8"))
    eos = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))["eos_token_id"]
    end, *others = eos if isinstance(eos, list) else [eos]
    try:
        from tensorrt_llm import LLM, SamplingParams
    except ImportError as error:
        sys.exit(MISSING.format(error=error))
    from transformers import AutoTokenizer

    origin = record.origin(("tensorrt_llm", "torch", "transformers"), None)
    origin["versions"] |= exported["versions"]
    sampling = SamplingParams(
        max_tokens=arguments.new_tokens, top_k=1, end_id=end, pad_id=end, stop_token_ids=others or None
    )
    choices = {"backend": arguments.backend} if arguments.backend else {}
    with LLM(model=str(folder), **choices) as llm:
        measured = measure(llm, sampling, AutoTokenizer.from_pretrained(folder), arguments)
    figures = {
        "checkpoint": exported["checkpoint"]["name"],
        "backend": arguments.backend or "default",
        "gpu": device(),
        "rounds": arguments.rounds,
        "warmup_rounds_excluded": arguments.warmup,
        **measured,
    }
    print(json.dumps(figures, indent=1))
    record.write("trtllm", origin, [], figures)


if __name__ == "__main__":
    main()

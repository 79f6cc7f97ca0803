"""Write tiny-chat-2's questions as tasks for lm-eval, for `nemodiff eval ENGINE --tasks FOLDER --apply-chat-template`.

Three kinds, one of each that lm-eval asks of a model: an answer that must be right word for word, a choice among four
answers, and the likelihood of whole answers. lm-eval's conversations carry neither tools nor a system text of their
own, so these are the questions that need no more than a user's text, answered without thoughts.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from questions import LONGEST, TASKS, ask

SEED = 424242  # of no conversation that tiny-chat-2 was trained on
# Fields by their names: what a template gives becomes a list if it looks like one, as an answer in JSON may.
ANSWERS = f"""\
task: tiny_chat_2_answers
output_type: generate_until
doc_to_text: question
doc_to_target: answer
generation_kwargs: {{until: [], do_sample: false, max_gen_toks: {LONGEST}}}
metric_list: [{{metric: exact_match}}]
"""
CHOICES = """\
task: tiny_chat_2_choices
output_type: multiple_choice
doc_to_text: question
doc_to_choice: choices
doc_to_target: label
target_delimiter: ""
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
TEXTS = """\
task: tiny_chat_2_texts
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: answer
metric_list: [{metric: byte_perplexity}, {metric: bits_per_byte}]
"""


def asked(count: int) -> Iterator[dict[str, Any]]:
    """Questions with their answers, and four choices: the answer, and three to other questions of the task."""
    rng = random.Random(SEED)
    for _ in range(count):
        task = rng.choice(TASKS)
        (message,), _, _, answer = ask(task, rng)
        others = {answer}
        while len(others) < 4:
            others.add(ask(task, rng)[-1])
        choices = sorted(others)
        question = {"task": task, "question": message["content"], "answer": answer}
        yield {**question, "choices": choices, "label": choices.index(answer)}


def write(folder: Path, count: int) -> None:
    """Write the tasks."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(question) + "\n" for question in asked(count))
    (folder / "questions.jsonl").write_text(lines, encoding="utf-8")
    data = "dataset_path: json\ndataset_kwargs: {data_files: {test: questions.jsonl}}\ntest_split: test\n"
    for text in (ANSWERS, CHOICES, TEXTS):
        name = text.splitlines()[0].removeprefix("task: ")
        (folder / f"{name}.yaml").write_text(text + data, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write tiny-chat-2's questions as tasks for lm-eval.")
    parser.add_argument("folder", type=Path, help="folder to write into")
    parser.add_argument("--count", type=int, default=400, help="questions (400)")
    chosen = parser.parse_args()
    write(chosen.folder, chosen.count)


if __name__ == "__main__":
    main()

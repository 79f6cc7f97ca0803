"""The TensorRT-LLM benchmark without TensorRT-LLM: how it reports that, and which calls it makes of a stand-in.

The stand-in is a module of the package's name that knows the answers and has only the parameters that TensorRT-LLM's
documentation lists. It tests the calls and the counting, and nothing about TensorRT-LLM itself.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from stand_ins.checkpoints import TINY_CHAT
from tokenizers import Tokenizer

ROOT = Path(__file__).parents[2]
STAND_IN = '''
"""A stand-in for TensorRT-LLM, made by nemodiff's tests: it looks answers up."""
import json
from pathlib import Path
from types import SimpleNamespace
from tokenizers import Tokenizer

HERE = Path(__file__).parent
ANSWERS = json.loads((HERE / "answers.json").read_text())


class SamplingParams:
    def __init__(self, *, max_tokens=32, top_k=None, end_id=None, pad_id=None, stop_token_ids=None):
        self.__dict__.update(locals())
        del self.self


class LLM:
    def __init__(self, model, *, backend="pytorch"):
        assert isinstance(model, str)
        assert json.loads(Path(model, "config.json").read_text())["architectures"] == ["Ministral3ForCausalLM"]
        self.tokenizer = Tokenizer.from_file(str(Path(model, "tokenizer.json")))
        self.calls = {"backend": backend, "streamed": 0, "batches": [], "open": True}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.calls["open"] = False
        (HERE / "calls.json").write_text(json.dumps(self.calls))

    def answer(self, ids, sampling):
        assert self.calls["open"]
        assert all(type(i) is int for i in ids)
        self.calls["sampling"] = vars(sampling)
        prompt = self.tokenizer.decode(ids, skip_special_tokens=False)
        question = prompt.split("<|im_start|>user\\n")[1].split("<|im_end|>")[0]
        new = self.tokenizer.encode(ANSWERS[question], add_special_tokens=False).ids + [sampling.end_id]
        return new[: sampling.max_tokens]

    def generate(self, inputs, sampling_params=None, use_tqdm=True):
        assert not use_tqdm
        self.calls["batches"].append(len(inputs))
        return [self.output(self.answer(ids, sampling_params)) for ids in inputs]

    def generate_async(self, inputs, sampling_params=None, streaming=False):
        assert streaming
        self.calls["streamed"] += 1
        new = self.answer(inputs, sampling_params)
        return (self.output(new[:size]) for size in range(len(new) + 1))  # the first output has no token yet

    def output(self, ids):
        return SimpleNamespace(outputs=[SimpleNamespace(token_ids=ids)])
'''


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """The script and what it reads, in a tree of its own."""
    for name in ("benchmarks/trtllm.py", "benchmarks/common/record.py", "benchmarks/common/questions.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    model = tmp_path / "examples" / "tiny-chat-2"
    model.mkdir(parents=True)
    for name in ("make_data.py", "questions.py", "tasks.py", "tools.py"):
        shutil.copy(TINY_CHAT.with_name("tiny-chat-2") / name, model)
    return tmp_path / "benchmarks" / "trtllm.py"


def run(script: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, script, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(script.parents[1] / "modules"), "HF_HUB_OFFLINE": "1"},
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )


def write_stand_in(script: Path, tokenizer: Tokenizer, drawn: list[dict[str, str]]) -> tuple[Path, int]:
    """Write the module; it answers every second question wrongly. Its folder, and the tokens of all answers."""
    folder = script.parents[1] / "modules" / "tensorrt_llm"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(STAND_IN)
    about = folder.with_name("tensorrt_llm-0.0.dist-info")
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: tensorrt-llm\nVersion: 0.0\n")
    answers = {q["text"]: q["answer"] if i % 2 == 0 else "no" for i, q in enumerate(drawn)}
    assert len(answers) == len(drawn)
    (folder / "answers.json").write_text(json.dumps(answers))
    return folder, sum(len(tokenizer.encode(text, add_special_tokens=False).ids) + 1 for text in answers.values())


@pytest.mark.torch
def test_figures_come_from_the_calls_that_were_made(script: Path, twin: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    code = "import json; from common.questions import first; "
    code += "print(json.dumps([{'text': q.text, 'answer': q.answer} for q in first(10)]))"
    drawn = subprocess.run([sys.executable, "-c", code], cwd=script.parent, check=True, capture_output=True, text=True)
    folder, tokens = write_stand_in(script, Tokenizer.from_file(str(twin / "tokenizer.json")), json.loads(drawn.stdout))
    done = run(script, twin, "--prompts", 10, "--rounds", 2, "--warmup", 1, "--new-tokens", 300, "--backend", "other")
    assert done.returncode == 0, done.stderr
    calls = json.loads((folder / "calls.json").read_text())
    assert (calls["backend"], calls["open"], calls["streamed"], calls["batches"]) == ("other", False, 30, [10] * 3)
    greedy = {"max_tokens": 300, "top_k": 1, "end_id": 11, "pad_id": 11, "stop_token_ids": None}
    assert calls["sampling"] == greedy
    result = json.loads((script.parent / "results" / "trtllm.json").read_text())
    assert (result["checkpoint"], result["backend"], result["rounds"]) == ("tiny-chat", "other", 2)
    assert (result["tokens"], result["right_answers"], result["all_requests"]["requests"]) == (tokens, 5, 10)
    assert result["one_request"]["ttft_ms"] > 0
    assert result["one_request"]["tokens_per_second"] > 0
    assert (result["versions"]["tensorrt_llm"], result["versions"]["nemodiff"]) == ("0.0", "0.1.0")


def test_without_the_package_one_sentence_says_how_to_get_it(script: Path, twin: Path) -> None:
    if subprocess.run([sys.executable, "-c", "import tensorrt_llm"], check=False, capture_output=True).returncode == 0:
        pytest.skip("TensorRT-LLM is installed here")
    done = run(script, twin)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    for text in ("tensorrt_llm cannot be imported (No module named", "container", "`pip install tensorrt-llm`"):
        assert text in done.stderr
    assert not (script.parent / "results").exists()


def test_a_folder_that_is_no_twin_is_refused(script: Path) -> None:
    done = run(script, TINY_CHAT)
    assert (done.returncode, done.stdout) == (1, "")
    assert "make it first: nemodiff export CHECKPOINT -o " in done.stderr

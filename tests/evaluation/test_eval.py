"""lm-eval over an engine, in process and through the server: the figures are those of plain answers and scores."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from conftest import Refused
from stand_ins.checkpoints import TINY_CHAT
from stand_ins.http_server import serving

import nemodiff
from nemodiff.builder.build import Builder
from nemodiff.cli import main

pytestmark = pytest.mark.eval
COUNT = 12
BOS = 1
MODES = ("ar", "diffusion", "linear_spec")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny-chat-2's questions as three tasks, some of which tiny-chat can answer."""
    folder = tmp_path_factory.mktemp("tasks")
    run = [
        sys.executable,
        str(TINY_CHAT.with_name("tiny-chat-2") / "make_tasks.py"),
        str(folder),
        "--count",
        str(COUNT),
    ]
    subprocess.run(run, check=True, timeout=120)
    return folder


@pytest.fixture(scope="module")
def questions(tasks: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tasks / "questions.jsonl").read_text().splitlines()]


def environment(tasks: Path) -> dict[str, str]:
    """Nothing from a network, and caches in a temporary folder."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tasks / "hub"), "HF_DATASETS_OFFLINE": "1"}
    return {**os.environ, **offline, "PYTHONPATH": os.environ.get("PYTHONPATH", "")}


def evaluated(tasks: Path, *words: str) -> str:
    """What `nemodiff eval` prints, in a process of its own: the libraries look at their environment when imported."""
    command = [sys.executable, "-c", "from nemodiff.cli import main; main()", "eval", *words]
    where = {"env": environment(tasks), "cwd": tasks.parent}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, **where)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def evaluation(tasks: Path, tiny_engine: Path) -> Mapping[str, Any]:
    modes = [word for mode in MODES for word in ("--mode", mode)]
    words = [str(tiny_engine), "--tasks", tasks.name, *modes, "--threads", "1", "--apply-chat-template"]
    return dict(json.loads(evaluated(tasks, *words, "--batch-size", "3", "--threshold", "0.8", "--json")))


def metrics(evaluation: Mapping[str, Any], mode: str, task: str) -> Mapping[str, float]:
    return dict(evaluation["modes"][mode]["tasks"][f"tiny_chat_2_{task}"]["metrics"])


def test_generated_answers_are_the_engines_in_every_mode(
    evaluation: Mapping[str, Any], engine: nemodiff.LoadedEngine, questions: list[dict[str, Any]]
) -> None:
    for mode in MODES:
        options: dict[str, Any] = {"mode": mode, "max_new_tokens": 336, "threshold": 0.8}
        answers = [nemodiff.generate(engine, question["question"], **options) for question in questions]
        right = sum(answer.text == question["answer"] for answer, question in zip(answers, questions, strict=True))
        told = evaluation["modes"][mode]["tasks"]["tiny_chat_2_answers"]
        assert told["metrics"]["exact_match"] == pytest.approx(right / COUNT)
        assert told["samples"] == COUNT
        assert told["tokens"] == sum(len(answer.token_ids) for answer in answers)
        decoding = {kind: sum(answer.nfe[kind] for answer in answers) for kind in told["nfe"] if kind != "prefill"}
        assert {kind: count for kind, count in told["nfe"].items() if kind != "prefill"} == decoding
        assert told["tokens_per_pass"] == pytest.approx(told["tokens"] / sum(decoding.values()))
    assert 0 < metrics(evaluation, "ar", "answers")["exact_match"] < 1
    assert evaluation["modes"]["diffusion"]["tasks"]["tiny_chat_2_answers"]["tokens_per_pass"] > 2


def test_choices_and_texts_are_the_engines_scores(
    evaluation: Mapping[str, Any], engine: nemodiff.LoadedEngine, questions: list[dict[str, Any]]
) -> None:
    right = nats = size = 0.0
    for question in questions:
        scores = nemodiff.score(engine, question["question"], question["choices"])
        likeliest = max(range(4), key=lambda choice: scores[choice].logprob)
        right += likeliest == question["label"]
        nats += nemodiff.score(engine, [BOS], [question["answer"]])[0].logprob
        size += len(question["answer"].encode())
    for mode in MODES:
        assert metrics(evaluation, mode, "choices")["acc"] == pytest.approx(right / COUNT)
        assert metrics(evaluation, mode, "texts")["byte_perplexity"] == pytest.approx(math.exp(-nats / size), rel=1e-4)


def test_lm_evals_client_of_the_server_gives_the_same(
    tiny_engine: Path, engine: nemodiff.LoadedEngine, questions: list[dict[str, Any]]
) -> None:
    """It scores by echo and one new token, with the engine folder's tokenizer in transformers."""
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    from nemodiff.evaluation.lm import EngineLM

    inside = EngineLM(engine, rows=1)
    inside.options = {"mode": "linear_spec"}
    pairs: list[Any] = [_Instance(q["question"], choice) for q in questions[:4] for choice in q["choices"]]
    pairs += [_Instance("", "Sorted"), _Instance("a ", "b")]
    texts: list[Any] = [_Instance(question["answer"]) for question in questions[:4]]
    kwargs = {"until": ["9"], "max_gen_toks": 20}
    prompts: list[Any] = [_Instance(question["question"], kwargs) for question in questions[:4]]
    with serving(tiny_engine, "--served-model-name", "tiny") as server:
        url = f"{server.url}/v1/completions"
        outside = LocalCompletionsAPI(url, tokenizer_backend="huggingface", model="tiny", tokenizer=str(tiny_engine))
        for ours, theirs in zip(inside.loglikelihood(pairs), outside.loglikelihood(pairs, True), strict=True):
            assert theirs[0] == pytest.approx(ours[0], abs=1e-2)
            assert theirs[1] == ours[1]
        rolling = outside.loglikelihood_rolling(texts, True)
        assert rolling == pytest.approx(inside.loglikelihood_rolling(texts), abs=1e-2)
        assert outside.generate_until(prompts, True) == inside.generate_until(prompts)


def test_a_continuation_that_is_one_token_with_its_context_is_scored(engine: nemodiff.LoadedEngine) -> None:
    from nemodiff.evaluation.lm import EngineLM

    whole, (begin,), (end,) = (engine.text.encode_plain(text) for text in ("er", "e", "r"))
    assert len(whole) == 1
    pairs: list[Any] = [_Instance("e", "r"), _Instance("e", "")]
    score = nemodiff.score(engine, [begin], [[end]])[0]
    assert EngineLM(engine, rows=1).loglikelihood(pairs) == [(score.logprob, score.greedy), (0.0, True)]


@pytest.fixture
def thinker(tmp_path: Path) -> nemodiff.LoadedEngine:
    return nemodiff.load(Builder(TINY_CHAT.with_name("tiny-chat-2"), tmp_path / "engine").run(), threads=1)


@pytest.mark.parametrize("mode", MODES)
def test_thoughts_are_no_part_of_an_answer(thinker: nemodiff.LoadedEngine, mode: str) -> None:
    from nemodiff.evaluation.lm import EngineLM

    question = "Count from 3 to 9."
    answer = nemodiff.generate(thinker, question, mode=mode, thinking=True)
    assert "9" in answer.reasoning
    lm = EngineLM(thinker, rows=2, chat=True, thinking=True)
    lm.options = {"mode": mode, "thinking": True}
    prompt = lm.apply_chat_template([{"role": "user", "content": question}])
    asked: list[Any] = [_Instance(prompt, {"until": until, "max_gen_toks": 96}) for until in ([], ["9"])]
    assert lm.generate_until(asked) == [answer.content, answer.content.partition("9")[0]]


def test_the_table_has_a_column_for_every_mode(evaluation: Mapping[str, Any]) -> None:
    from nemodiff.evaluation.table import table

    head, *lines = table(evaluation)
    assert head.split() == ["task", "figure", *MODES]
    assert [line.split()[0] for line in lines if not line.startswith(" ")] == [
        "tiny_chat_2_answers",
        "tiny_chat_2_choices",
        "tiny_chat_2_texts",
    ]
    (passes,) = (line.split()[1:] for line in lines if line.split()[0] == "tokens/pass")
    expected = [evaluation["modes"][mode]["tasks"]["tiny_chat_2_answers"]["tokens_per_pass"] for mode in MODES]
    assert passes == [f"{value:.2f}" for value in expected]


class _Instance:
    """What the adapter reads of lm-eval's."""

    def __init__(self, *args: Any) -> None:
        self.args = args
        self.task_name = "task"


def test_long_texts_are_scored_in_windows_and_long_prompts_cut(tmp_path: Path) -> None:
    from nemodiff.builder.build import Builder
    from nemodiff.evaluation.lm import EngineLM

    short = nemodiff.load(Builder(TINY_CHAT, tmp_path / "short", max_seq_len=32).run(), threads=1)
    lm = EngineLM(short, rows=2)
    text = "Count from 3 to 9. Sort these numbers: 4, 2, 9. Reverse the list: river glass tiger cloud metal."
    ids = short.text.encode(text)
    assert len(ids) > 31
    (rolling,) = lm.loglikelihood_rolling([_Instance(text)])  # type: ignore[list-item]
    first = nemodiff.score(short, [BOS], [ids[:31]])[0].logprob
    rest = nemodiff.score(short, ids[-32 : 31 - len(ids)], [ids[31:]])[0].logprob
    assert rolling == pytest.approx(first + rest, abs=1e-3)
    pairs = [(text, " done"), ("a ", "b"), ("", "a b")]
    cut, spaced, bare = lm.loglikelihood([_Instance(*pair) for pair in pairs])  # type: ignore[misc]
    end = short.text.encode(text + " done")[len(ids) :]
    assert cut[0] == pytest.approx(nemodiff.score(short, ids[-(32 - len(end)) :], [end])[0].logprob, abs=1e-3)
    assert spaced[0] == pytest.approx(nemodiff.score(short, "a", [" b"], chat=False)[0].logprob, abs=1e-3)
    assert bare[0] == pytest.approx(nemodiff.score(short, [BOS], ["a b"])[0].logprob, abs=1e-3)
    lm.options = {"mode": "ar"}
    said = lm.generate_until([_Instance(text, {"until": "9", "max_gen_toks": 6})])  # type: ignore[list-item]
    alone = nemodiff.generate(short, ids[-26:], mode="ar", max_new_tokens=6, stop=["9"])
    assert said == [alone.text]
    bare_said = lm.generate_until([_Instance("", {"until": [], "max_gen_toks": 6})])  # type: ignore[list-item]
    assert bare_said == [nemodiff.generate(short, [BOS], mode="ar", max_new_tokens=6).text]
    sampled = {"until": [], "do_sample": True, "temperature": 9.0, "max_gen_toks": 6}
    twice: list[Any] = [_Instance("Count", sampled), _Instance("Count", sampled)]
    first, second = lm.generate_until(twice)
    assert first != second
    assert lm.generate_until(twice) == [first, second]
    (most,) = lm.generate_until([_Instance(text, {"until": [], "max_gen_toks": 31})])  # type: ignore[list-item]
    assert most == nemodiff.generate(short, ids[-1:], mode="ar", max_new_tokens=31).text
    assert lm.work.keys() == {"task"}
    with pytest.raises(nemodiff.RequestError, match=r"asks for 32 tokens, allowed: .* 32; lower max_gen_toks"):
        lm.generate_until([_Instance(text, {"until": [], "max_gen_toks": 32})])  # type: ignore[list-item]


def test_what_a_task_says_of_generation_becomes_options() -> None:
    from nemodiff.evaluation.lm import _options

    assert _options({"until": ["\n", ""], "do_sample": False, "temperature": 0.7, "max_gen_toks": 9}) == {
        "stop": ["\n"],
        "max_new_tokens": 9,
    }
    assert _options({"do_sample": True, "top_p": 0.9}) == {
        "temperature": 1.0, "top_p": 0.9, "stop": [], "max_new_tokens": 256,
    }  # fmt: skip
    with pytest.raises(nemodiff.RequestError, match="generation_kwargs have num_beams, allowed: until"):
        _options({"num_beams": 4})


def test_what_each_mode_is_given_and_what_comes_of_it(
    engine: nemodiff.LoadedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mode that is named twice is measured once, and only one of diffusion is given what is diffusion's alone."""
    import lm_eval.evaluator

    from nemodiff.evaluation import evaluate as evaluation

    given: list[Any] = []
    answer = nemodiff.generate(engine, "Count from 3 to 9.", mode="diffusion", max_new_tokens=8)

    def found(lm: Any, tasks: str, **choices: Any) -> dict[str, Any]:
        given.append((tasks, lm.options, choices))
        if len(given) == 1:  # in the other mode nothing is generated
            for _ in range(2):
                lm.work.setdefault("task", evaluation.Work()).add(answer)
        values = {"alias": "task", "acc,none": 1, "acc_stderr,none": "N/A", "f1,strict": 0.5, "sample_len": 12}
        samples = {"task": {"original": 12, "effective": 5}}
        return {"n-samples": samples, "results": {"task": values, "group": {"acc,none": 1}}}

    monkeypatch.setattr(evaluation, "_load", lambda tasks, num_fewshot: f"{tasks} {num_fewshot}")
    monkeypatch.setattr(lm_eval.evaluator, "evaluate", found)
    options = {"threshold": 0.5, "per_step": 2}
    modes = ["diffusion", "ar", "diffusion"]
    told = evaluation.evaluate(engine, ["x"], modes, limit=5, num_fewshot=1, chat=True, options=options)
    choices = {"limit": 5, "apply_chat_template": True, "log_samples": False, "bootstrap_iters": 100}
    assert given == [
        ("['x'] 1", {"threshold": 0.5, "per_step": 2, "mode": "diffusion"}, choices),
        ("['x'] 1", {"threshold": 0.5, "mode": "ar"}, choices),
    ]
    head = ("engine", "backend", "chat", "num_fewshot", "limit", "options")
    assert [told[name] for name in head] == ["tiny-chat", "onnxruntime", True, 1, 5, options]
    scored = {"metrics": {"acc": 1.0, "f1,strict": 0.5}, "samples": 5}
    passes = sum(answer.nfe.values())
    generated = {
        "tokens": 16,
        "nfe": {kind: 2 * count for kind, count in answer.nfe.items()},
        "tokens_per_pass": 8 / (passes - answer.nfe["prefill"]),
        "tokens_per_pass_with_prefill": 8 / passes,
        "seconds": pytest.approx(2 * answer.timings_ms["total"] / 1e3),
    }
    group = {"metrics": {"acc": 1.0}, "samples": None}
    assert list(told["modes"]) == ["diffusion", "ar"]
    assert all(0 < mode["seconds"] < 60 for mode in told["modes"].values())
    assert told["modes"]["diffusion"]["tasks"] == {"task": {**scored, **generated}, "group": group}
    assert told["modes"]["ar"]["tasks"] == {"task": scored, "group": group}


class _Task:
    """What is asked of lm-eval's."""

    def __init__(self, examples: int | None) -> None:
        self.examples = examples
        self.seed: int | None = None

    def get_config(self, name: str) -> int | None:
        assert name == "num_fewshot"
        return self.examples

    def set_config(self, key: str, value: int) -> None:
        assert key == "num_fewshot"
        self.examples = value

    def set_fewshot_seed(self, seed: int) -> None:
        self.seed = seed


class _Manager:
    """lm-eval's tasks, of which there are three."""

    all_tasks = ("arc_easy", "gsm8k", "winogrande")

    def __init__(self, **_: object) -> None: ...

    def load(self, specs: list[Any]) -> dict[str, dict[str, Any]]:
        given = dict(zip(self.all_tasks, (None, 0, 2), strict=True))
        tasks = {str(spec): spec if isinstance(spec, _Task) else _Task(given[spec]) for spec in specs}
        return {"groups": {}, "tasks": tasks}


def test_examples_before_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as asked for or as the task says, but none where it says that there are none."""
    from nemodiff.evaluation import evaluate as evaluation

    monkeypatch.setattr(evaluation, "TaskManager", _Manager)
    for asked, expected in ((None, [0, 0, 2]), (3, [3, 0, 3]), (0, [0, 0, 0])):
        tasks = evaluation._load(_Manager.all_tasks, asked)["tasks"].values()
        assert [(task.examples, task.seed) for task in tasks] == [(count, 1234) for count in expected]


def test_a_task_that_nobody_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    from nemodiff.evaluation import evaluate as evaluation

    monkeypatch.setattr(evaluation, "TaskManager", _Manager)
    with pytest.raises(nemodiff.RequestError, match=r"'gsm8' is no task of lm-eval and no file; is gsm8k meant\?"):
        evaluation._load(["arc_easy", "gsm8"], None)
    with pytest.raises(nemodiff.RequestError, match="'x' is no task of lm-eval and no file; list them: lm-eval ls"):
        evaluation._load(["x"], None)


@pytest.mark.parametrize("begun", [True, False], ids=["begun by a token", "without such a token"])
def test_only_a_prompt_begins_as_the_tokenizer_says(tmp_path: Path, begun: bool) -> None:
    """A text that is scored from its first token on comes after what begins texts, or ends them."""
    from nemodiff.evaluation.lm import EngineLM

    checkpoint = Path(shutil.copytree(TINY_CHAT, tmp_path / "checkpoint"))
    config = json.loads((checkpoint / "tokenizer_config.json").read_text())
    config |= {"add_bos_token": True, "bos_token": config["bos_token"] if begun else None}
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = nemodiff.load(Builder(checkpoint, tmp_path / "engine").run(), threads=1)
    lm = EngineLM(loaded, rows=1)
    end = loaded.info.model.eos_ids[0]
    ids = loaded.text.encode_plain("Count")
    assert lm.tok_encode("Count") == ([BOS] if begun else []) + ids
    assert lm.tok_encode("Count", add_special_tokens=False) == ids
    assert (lm.prefix_token_id, lm.eot_token_id) == (BOS if begun else end, end)
    texts: list[Any] = [_Instance("Count")]
    alone = nemodiff.score(loaded, [BOS if begun else end], [ids])[0].logprob
    assert lm.loglikelihood_rolling(texts) == pytest.approx([alone], abs=1e-4)


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        (None, "nothing.yaml: no such file"),
        ("task: [", "nothing.yaml: "),
        (
            "task: t\ndataset_path: json\ndataset_kwargs: {data_files: {test: gone.jsonl}}\ntest_split: test\n",
            "gone.jsonl",
        ),
    ],
)
def test_tasks_that_cannot_be_had_are_one_line(
    tiny_engine: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    refused: Refused,
    content: str | None,
    fragment: str,
) -> None:
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path("nothing.yaml").write_text(content)
    refused(["eval", str(tiny_engine), "--tasks", "nothing.yaml"], "--tasks: ", fragment)


@pytest.mark.parametrize("rows", ["0", "9"])
def test_rows_beyond_the_engine_are_refused(tiny_engine: Path, tasks: Path, refused: Refused, rows: str) -> None:
    words = ["eval", str(tiny_engine), "--tasks", str(tasks / "tiny_chat_2_answers.yaml"), "--batch-size", rows]
    refused(words, f"rows is {rows}, allowed: 1 to 8", "--max-batch-size")


def test_thinking_needs_the_chat_template(tiny_engine: Path, refused: Refused) -> None:
    words = ["eval", str(tiny_engine), "--tasks", "x", "--thinking"]
    refused(words, "--thinking needs the chat template; give --apply-chat-template too", code=2)


def test_choices_that_no_mode_has_are_warned_of(tiny_engine: Path) -> None:
    words = ["eval", str(tiny_engine), "--tasks", ",", "--threshold", "0.5", "--per-step", "2"]  # no task: ends at once

    def warned(*modes: str) -> list[str]:
        result = CliRunner().invoke(main, [*words, *(f"--mode={mode}" for mode in modes)])
        *lines, refusal = result.stderr.splitlines()
        assert refusal.startswith("Error: --tasks names no task")
        return lines

    in_ar = ["Warning: --threshold has no effect in mode ar", "Warning: --per-step has no effect in mode ar"]
    assert warned("ar", "ar") == in_ar
    assert warned("linear_spec", "ar") == ["Warning: --per-step has no effect in mode linear_spec and ar"]
    assert warned() == warned("ar", "diffusion") == []


def test_a_folder_without_tasks_is_one_line(tiny_engine: Path, tmp_path: Path, refused: Refused) -> None:
    refused(
        ["eval", str(tiny_engine), "--tasks", str(tmp_path)], f"--tasks: {tmp_path}: no task files", "give a folder"
    )
    refused(["eval", str(tiny_engine), "--tasks", ","], "--tasks names no task; give")


def test_without_the_extra_one_line_says_how_to_get_it(tiny_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nemodiff.evaluation.evaluate", None)
    result = CliRunner().invoke(main, ["eval", str(tiny_engine), "--tasks", "x"])
    assert result.stderr.endswith('is missing; install it: pip install "nemodiff[eval]"\n')
    assert "--tasks NAME|FILE,..." in CliRunner().invoke(main, ["eval", "--help"]).output

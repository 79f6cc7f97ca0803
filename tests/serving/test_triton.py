"""The exported model in a real Triton Inference Server, as its clients see it.

One server holds four models: the tiny engine, the same one with other defaults and a batch dimension, one that sees
images, and one that needs 0.1 s for a pass and breaks while a file is there. Nothing is timed.
"""

from __future__ import annotations

import base64
import concurrent.futures
import contextlib
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

grpc = pytest.importorskip("grpc")
from conftest import PATIENCE, eventually  # noqa: E402
from stand_ins.triton_clients import GrpcStream, get, post, server_sent, tensor  # noqa: E402
from stand_ins.vision import as_bytes, picture  # noqa: E402

import nemodiff  # noqa: E402
from nemodiff.serving.triton_server import server as triton_server  # noqa: E402
from nemodiff.serving.triton_server.executable import Executable, find_executable  # noqa: E402
from nemodiff.serving.triton_server.export import export  # noqa: E402
from nemodiff.serving.triton_server.install import installed  # noqa: E402
from nemodiff.serving.triton_server.server import TritonServer, free_ports  # noqa: E402

pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(not installed(), reason="needs a Triton server: nemodiff triton install"),
]

ROOT = Path(__file__).parents[2]
QUESTIONS = ("Count from 3 to 9.", "Show the times table of 7 up to 5.", "Reverse the list: river glass tiger")
SLOW = """
import dataclasses, pathlib, time
from nemodiff.serving.triton_server.model import TritonPythonModel as Model

BROKEN = pathlib.Path(__file__).parent / "broken"

class Cache:
    def __init__(self, cache):
        self._cache = cache
    def __getattr__(self, name):
        return getattr(self._cache, name)
    def forward(self, *arguments, **named):
        time.sleep(0.1)
        if BROKEN.exists():
            raise RuntimeError("the device has gone\\nand more lines")
        return self._cache.forward(*arguments, **named)

class Backend:
    def __init__(self, backend):
        self._backend = backend
        self.info = backend.info
        self.samples = backend.samples
        self.pages = backend.pages
    def open(self, rows):
        return Cache(self._backend.open(rows))

class TritonPythonModel(Model):
    def load(self, folder):
        engine = super().load(folder)
        return dataclasses.replace(engine, backend=Backend(engine.backend))
"""
TELLING = """import faulthandler, signal
faulthandler.register(signal.SIGUSR1)  # the calls of its Python threads go into the server's log

"""


@pytest.fixture(scope="module")
def repository(tiny_engine: Path, seeing_engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    one = {"threads": "1"}
    export(tiny_engine, folder, parameters=one)
    export(seeing_engine, folder, name="seeing", parameters=one)
    other = {**one, "mode": "ar", "max_tokens": "7", "exclude_input_in_output": "false"}
    code = export(tiny_engine, folder, name="other", parameters=other, link=True, batched=True) / "1" / "model.py"
    code.write_text(TELLING + code.read_text())
    slow = export(tiny_engine, folder, name="slow", parameters={**one, "rows": "1", "waiting": "2"}, link=True)
    (slow / "1" / "model.py").write_text(SLOW)
    return folder


@pytest.fixture(scope="module")
def server(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    log = tmp_path_factory.mktemp("log") / "tritonserver.log"
    explicit = ["--model-control-mode=explicit", "--load-model=*", "--exit-timeout-secs=5"]
    with TritonServer(repository, arguments=explicit, log=log) as running:
        yield running
    assert running.process is not None
    assert running.process.returncode == 0, running.logged()[-4000:]
    assert "Traceback" not in running.logged()


ROUGH = ["--model-control-mode=explicit", "--load-model=slow", "--load-model=other", "--exit-timeout-secs=2"]


@pytest.fixture(scope="module")
def rough(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """A server for what keeps version 2.51 from a clean stop: dead processes, failed loads, tensors that it refuses."""
    with TritonServer(repository, arguments=ROUGH, log=tmp_path_factory.mktemp("log") / "rough.log") as running:
        yield running


@pytest.fixture(scope="module")
def alone(tiny_engine: Path) -> Callable[..., nemodiff.Generation]:
    """What a request gives by itself."""
    engine = nemodiff.load(tiny_engine, threads=1)
    known: dict[str, nemodiff.Generation] = {}

    def generate(prompt: str, **options: Any) -> nemodiff.Generation:
        key = f"{prompt} {sorted(options.items())}"
        if key not in known:
            known[key] = nemodiff.generate(engine, prompt, **options)
        return known[key]

    return generate


def generate(server: TritonServer, model: str = "nemodiff", **body: Any) -> dict[str, Any]:
    status, text = post(server.http, f"/v2/models/{model}/generate", body)
    assert status == 200, text
    answer = json.loads(text)
    assert "error" not in answer
    return dict(answer)


def read_metrics(server: TritonServer, model: str = "nemodiff") -> dict[str, float]:
    """Values on the metrics port by name and label, of one model."""
    values = {}
    for line in get(server.metrics, "/metrics")[1].splitlines():
        if match := re.fullmatch(r"(nemodiff_\w+)\{(.*)\} (\S+)", line):
            labels = dict(re.findall(r'(\w+)="([^"]*)"', match[2]))
            if (labels.pop("model"), labels.pop("version"), labels.pop("model_instance")) == (
                model,
                "1",
                f"{model}_0_0",
            ):
                values[" ".join([match[1], *labels.values()])] = float(match[3])
    return values


@pytest.mark.parametrize("mode", nemodiff.MODES)
def test_generate_is_what_the_runtime_gives(
    server: TritonServer, alone: Callable[..., nemodiff.Generation], mode: str
) -> None:
    # All groups, not those that pay by this machine's measured costs.
    sampling = json.dumps({"groups": "all", "block_length": "8"})
    answer = generate(server, text_input=QUESTIONS[0], max_tokens=40, sampling_parameters=sampling, mode=mode)
    expected = alone(QUESTIONS[0], max_new_tokens=40, groups="all", block_length=8, mode=mode)
    assert answer["text_output"] == expected.text
    assert answer["finish_reason"] == expected.finish_reason
    assert answer["num_input_tokens"] == expected.prompt_tokens
    assert answer["num_output_tokens"] == len(expected.token_ids)
    assert json.loads(answer["nfe"]) | {"prefill": 1} == expected.nfe
    assert answer["tokens_per_pass"] == pytest.approx(expected.decode_tpf)
    assert answer.get("acceptance_length") == pytest.approx(expected.acceptance.mean)
    assert answer["time_to_first_token_ms"] > 0


def test_images_come_in_base64(server: TritonServer, seeing_engine: Path) -> None:
    engine = nemodiff.load(seeing_engine, threads=1)
    files = [as_bytes(picture(30, 20)), as_bytes(picture(9, 40, 1), "JPEG")]
    images = [base64.b64encode(data).decode() for data in files]
    question = "What is this?"
    for count in (1, 2):
        parts: list[Any] = [{"type": "image", "image": data} for data in files[:count]]
        messages = [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]
        for mode in nemodiff.MODES:
            expected = nemodiff.generate(engine, messages, mode=mode, max_new_tokens=12)
            body = {"text_input": question, "image": images[:count], "mode": mode, "max_tokens": 12}
            answer = generate(server, "seeing", **body)
            assert answer["text_output"] == expected.text
            assert answer["num_input_tokens"] == expected.prompt_tokens
            assert answer["num_image_tokens"] == sum(expected.image_tokens)
    for model, given, fragment in (
        ("seeing", "*", "image 1 is no base64"),
        ("seeing", base64.b64encode(files[0][:40]).decode(), "image 1: not a whole image file"),
        ("nemodiff", images[0], "which this model cannot see"),
    ):
        status, text = post(server.http, f"/v2/models/{model}/generate", {"text_input": question, "image": [given]})
        assert status == 400
        assert fragment in json.loads(text)["error"]


def test_a_streamed_text_is_the_same_text(server: TritonServer, alone: Callable[..., nemodiff.Generation]) -> None:
    *pieces, last = server_sent(server.http, "nemodiff", {"text_input": QUESTIONS[1], "stream": True})
    expected = alone(QUESTIONS[1])
    assert pieces
    assert pieces[0]["text_output"] != expected.text
    assert "".join(p["text_output"] for p in [*pieces, last]) == expected.text
    assert all("finish_reason" not in piece for piece in pieces)
    assert last["finish_reason"] == "stop"
    assert last["num_output_tokens"] == len(expected.token_ids)


def test_names_and_spellings_of_other_clients(server: TritonServer) -> None:
    count = {"text_input": QUESTIONS[0]}
    expected = generate(server, **count, max_tokens=5, mode="ar")["text_output"]
    sampling = json.dumps({"max_tokens": "5", "mode": "ar", "temperature": "0", "top_k": -1, "n": 1})
    assert generate(server, **count, sampling_parameters=sampling)["text_output"] == expected
    assert generate(server, **count, parameters={"max_tokens": 5, "mode": "ar"})["text_output"] == expected
    usual = {
        "bad_words": "",
        "stop_words": "",
        "pad_id": 2,
        "beam_width": 1,
        "return_num_input_tokens": True,
        "length_penalty": 1.0,
        "embedding_bias_words": "",
        "embedding_bias_weights": [0.0],
        "prompt_vocab_size": 0,
        "num_draft_tokens": 0,
        "use_draft_logits": False,
    }
    assert generate(server, **count, max_tokens=5, mode="ar", **usual)["text_output"] == expected
    both = json.dumps({"max_tokens": 30, "mode": "ar"})
    assert generate(server, **count, max_tokens=5, sampling_parameters=both)["text_output"] == expected
    echoed = generate(server, **count, max_tokens=5, mode="ar", exclude_input_in_output=False)
    assert echoed["text_output"] == QUESTIONS[0] + expected
    stopped = generate(server, **count, mode="ar", stop_words=["6", "8"])
    assert (stopped["text_output"], stopped["finish_reason"]) == ("3, 4, 5, ", "stop")


def test_sampling_penalties_logprobs_and_grammars_are_the_runtimes(
    server: TritonServer, alone: Callable[..., nemodiff.Generation]
) -> None:
    law = {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "seed": 7, "repetition_penalty": 1.1, "presence_penalty": 0.3}
    for mode in ("ar", "linear_spec"):
        answer = generate(server, text_input=QUESTIONS[0], mode=mode, max_tokens=30, return_log_probs=True, **law)
        expected = alone(QUESTIONS[0], mode=mode, max_new_tokens=30, logprobs=0, **law)
        assert answer["text_output"] == expected.text
        assert expected.logprobs is not None
        assert answer["output_log_probs"] == pytest.approx([each.logprob for each in expected.logprobs], abs=1e-3)
        assert answer["cum_log_probs"] == pytest.approx(sum(answer["output_log_probs"]), abs=1e-3)
        top = {"return_logprobs": True, "sampling_parameters": '{"logprobs": 2}'}
        given = generate(server, text_input=QUESTIONS[0], mode=mode, max_tokens=30, **top, **law)
        assert given["cumulative_logprob"] == answer["cum_log_probs"]
        by_id = json.loads(given["logprobs"])
        assert [one[str(token)]["logprob"] for one, token in zip(by_id, expected.token_ids, strict=True)] == (
            pytest.approx(given["output_log_probs"], abs=1e-3)
        )
        assert {len(one) for one in by_id} <= {2, 3}
    regex = "[0-9]{3}-[0-9]{2}"
    guided = {"guided_decoding_guide_type": "regex", "guided_decoding_guide": regex}
    spelled = ({"guided_regex": regex}, {"structured_outputs": json.dumps({"regex": regex})})
    for fields in (guided, *({"sampling_parameters": json.dumps(one)} for one in spelled)):
        assert re.fullmatch(regex, generate(server, text_input=QUESTIONS[0], **fields)["text_output"])
    schema = {"type": "object", "properties": {"n": {"enum": [3, 4]}}, "required": ["n"], "additionalProperties": False}
    tool = {"json": json.dumps(schema), "regex": None, "choice": None, "json_object": None, "disable_fallback": False}
    frontend = {"sampling_parameters": json.dumps({"guided_decoding": json.dumps(tool)})}  # as Triton's sends it
    typed = {"guided_decoding_guide_type": "json_schema", "guided_decoding_guide": json.dumps(schema)}
    for fields in (frontend, typed):
        assert json.loads(generate(server, text_input=QUESTIONS[0], **fields)["text_output"]) in ({"n": 3}, {"n": 4})
    endless = generate(server, text_input=QUESTIONS[0], sampling_parameters='{"ignore_eos": true, "max_tokens": 90}')
    assert endless["num_output_tokens"] == 90


def test_defaults_of_the_model_and_a_batch_dimension(
    server: TritonServer, alone: Callable[..., nemodiff.Generation]
) -> None:
    expected = alone(QUESTIONS[0], mode="ar", max_new_tokens=7).text
    assert generate(server, "other", text_input=QUESTIONS[0])["text_output"] == QUESTIONS[0] + expected
    with GrpcStream(server.grpc) as stream:
        shaped = [tensor("text_input", [QUESTIONS[0]], shape=[1, 1]), tensor("max_tokens", [4], shape=[1, 1])]
        stream.send("other", "a", [*shaped, tensor("stop_words", ["x", "y"], shape=[1, 2])])
        response = next(iter(stream))
    assert response.error == ""
    assert response.outputs["text_output"] == QUESTIONS[0] + alone(QUESTIONS[0], mode="ar", max_new_tokens=4).text


def test_requests_interleave_on_one_grpc_stream_and_a_refused_one_does_not_break_it(
    server: TritonServer, alone: Callable[..., nemodiff.Generation]
) -> None:
    texts: dict[str, str] = {}
    errors: dict[str, str] = {}
    finals: dict[str, int] = {}
    with GrpcStream(server.grpc) as stream:
        for mode in nemodiff.MODES:
            stream.ask("nemodiff", mode, QUESTIONS[1], mode=mode, stream=True)
        stream.ask("nemodiff", "bad", QUESTIONS[1], mode="bogus", stream=True)
        stream.end()
        for response in stream:
            if response.error:
                errors[response.id] = response.error
            else:
                texts[response.id] = texts.get(response.id, "") + response.outputs.get("text_output", "")
            finals[response.id] = finals.get(response.id, 0) + response.final
    assert texts == {mode: alone(QUESTIONS[1], mode=mode).text for mode in nemodiff.MODES}
    assert list(errors) == ["bad"]
    assert "mode is 'bogus', allowed: ar" in errors["bad"]
    assert {mode: finals[mode] for mode in nemodiff.MODES} == dict.fromkeys(nemodiff.MODES, 1)


def test_two_hundred_requests_at_once_lose_nothing(
    server: TritonServer, alone: Callable[..., nemodiff.Generation]
) -> None:
    before = read_metrics(server)
    kinds = list(itertools.product(QUESTIONS, nemodiff.MODES, (9, 30)))
    requests = [kinds[i % len(kinds)] for i in range(200)]
    answers: dict[int, str] = {}
    barrier = threading.Barrier(104)

    def by_http(i: int) -> None:
        question, mode, limit = requests[i]
        body = {"text_input": question, "mode": mode, "max_tokens": limit, "stream": bool(i % 2)}
        barrier.wait(PATIENCE)
        if i % 2:
            answers[i] = "".join(event["text_output"] for event in server_sent(server.http, "nemodiff", body))
        else:
            answers[i] = generate(server, **body)["text_output"]

    def by_grpc(first: int) -> None:
        barrier.wait(PATIENCE)
        with GrpcStream(server.grpc) as stream:
            for i in range(first, first + 25):
                question, mode, limit = requests[i]
                stream.ask("nemodiff", str(i), question, mode=mode, max_tokens=limit, stream=True)
            stream.end()
            for response in stream:
                assert response.error == ""
                answers[int(response.id)] = answers.get(int(response.id), "") + response.outputs.get("text_output", "")

    with concurrent.futures.ThreadPoolExecutor(104) as pool:
        jobs = [pool.submit(by_http, i) for i in range(100)] + [pool.submit(by_grpc, i) for i in range(100, 200, 25)]
        for job in jobs:
            job.result()
    expected = {i: alone(q, mode=m, max_new_tokens=n).text for i, (q, m, n) in enumerate(requests)}
    assert answers == expected
    end = "nemodiff_requests_total finished"
    eventually(lambda: read_metrics(server)[end] == before[end] + 200)


@pytest.mark.parametrize("client", ["grpc", "http"])
def test_a_client_that_leaves_frees_its_row(server: TritonServer, client: str) -> None:
    cancelled, emitted = "nemodiff_requests_total cancelled", "nemodiff_generation_tokens_total"
    before = read_metrics(server, "slow")
    long = {"mode": "ar", "max_tokens": 300, "min_tokens": 300, "stream": True}
    with contextlib.ExitStack() as open_stream, concurrent.futures.ThreadPoolExecutor(1) as pool:
        if client == "http":
            responses: Iterator[Any] = server_sent(server.http, "slow", {"text_input": QUESTIONS[0], **long})
            open_stream.callback(responses.close)  # type: ignore[attr-defined]
        else:
            stream = open_stream.enter_context(GrpcStream(server.grpc))
            stream.ask("slow", "long", QUESTIONS[0], **long)
            responses = iter(stream)
        for _ in range(3):
            next(responses)
        next_one = pool.submit(generate, server, "slow", text_input=QUESTIONS[1], mode="ar", max_tokens=3)
        eventually(lambda: read_metrics(server, "slow")["nemodiff_requests_waiting"] == 1)
        then = read_metrics(server, "slow")[emitted]
        open_stream.close()
        assert next_one.result(PATIENCE)["num_output_tokens"] == 3
    eventually(lambda: read_metrics(server, "slow")["nemodiff_requests_running"] == 0)
    after = read_metrics(server, "slow")
    assert after[cancelled] == before[cancelled] + 1
    assert after[emitted] - then - 3 < 200  # of 297 to come, 0.1 s each


def test_a_client_that_leaves_the_queue_is_forgotten(server: TritonServer) -> None:
    long = {"text_input": QUESTIONS[0], "mode": "ar", "max_tokens": 300, "min_tokens": 300, "stream": True}
    with contextlib.closing(server_sent(server.http, "slow", long)) as first:
        next(first)
        with GrpcStream(server.grpc) as waiting:
            waiting.ask("slow", "waits", QUESTIONS[1])
            eventually(lambda: read_metrics(server, "slow")["nemodiff_requests_waiting"] == 1)
        eventually(lambda: read_metrics(server, "slow")["nemodiff_requests_waiting"] == 0)
        assert read_metrics(server, "slow")["nemodiff_requests_running"] == 1
    eventually(lambda: read_metrics(server, "slow")["nemodiff_requests_running"] == 0)


def test_streams_one_after_another_leave_nothing_behind(server: TritonServer) -> None:
    (pid,) = processes(server, "nemodiff")
    sizes = []
    for _ in range(4):
        for mode in (*nemodiff.MODES, *nemodiff.MODES):
            *_, last = server_sent(server.http, "nemodiff", {"text_input": QUESTIONS[0], "mode": mode, "stream": True})
            assert last["finish_reason"] == "stop"
        sizes.append(memory(pid))
    assert len({threads for _, threads in sizes}) == 1
    assert sizes[-1][0] <= sizes[0][0] + 8192  # KiB


def test_errors_before_the_first_token(server: TritonServer) -> None:
    path = "/v2/models/nemodiff/generate"
    for body, text in (
        ({"text_input": "x", "mode": "bogus"}, "mode is 'bogus', allowed: ar"),
        ({"text_input": "x", "max_tokens": 0}, "max_new_tokens is 0, allowed: 1 or more"),
        ({"max_tokens": 3}, "text_input is missing"),
        ({"text_input": "x", "max_token": 3}, "unknown parameter 'max_token'; allowed: "),
        ({"text_input": "x", "sampling_parameters": "{"}, "sampling_parameters: not JSON"),
        ({"text_input": "x", "seed": 1, "random_seed": 2}, "seed is 1 and random_seed is 2; give one of them"),
        ({"text_input": "word " * 40000}, "max_seq_len"),
    ):
        status, answer = post(server.http, path, body)
        assert (status, text in answer) == (400, True), (body, status, answer[:300])
        *none, event = server_sent(server.http, "nemodiff", body)
        assert (none, event["status"], text in event["error"]) == ([], 400, True)
    assert post(server.http, "/v2/models/none/generate", {"text_input": "x"})[0] == 404
    with GrpcStream(server.grpc) as stream:
        stream.send("nemodiff", "bytes", [tensor("text_input", [b"\xff\xfe"])])
        assert "text_input: not UTF-8 at byte 0" in next(iter(stream)).error


def test_a_full_queue_says_so(server: TritonServer) -> None:
    long = {"text_input": QUESTIONS[0], "mode": "ar", "max_tokens": 300, "min_tokens": 300, "stream": True}
    refusals = "nemodiff_refused_requests_total 503"
    before = read_metrics(server, "slow")[refusals]
    with contextlib.closing(server_sent(server.http, "slow", long)) as first:
        next(first)
        with GrpcStream(server.grpc) as waiting:
            for name in ("one", "two"):
                waiting.ask("slow", name, QUESTIONS[1])
            eventually(lambda: read_metrics(server, "slow")["nemodiff_requests_waiting"] == 2)
            for _ in range(3):
                status, text = post(server.http, "/v2/models/slow/generate", {"text_input": QUESTIONS[0]})
                assert status in (400, 503)  # Triton 2.51 answers 400 whatever status the model gives
                assert "requests running or waiting, allowed: 1 and 2; try again later" in text
    eventually(lambda: read_metrics(server, "slow")[refusals] == before + 3)
    eventually(lambda: read_metrics(server, "slow")["nemodiff_requests_running"] == 0)


def test_an_engine_that_breaks_in_mid_stream(server: TritonServer, repository: Path) -> None:
    broken = repository / "slow" / "1" / "broken"
    events = server_sent(server.http, "slow", {"text_input": QUESTIONS[0], "mode": "ar", "stream": True})
    assert next(events)["text_output"].startswith("3")
    broken.touch()
    *_, last = events
    broken.unlink()
    assert last["status"] == 200
    assert last["error"] == "the engine failed (the device has gone); the request may be sent again"
    assert generate(server, "slow", text_input=QUESTIONS[0], mode="ar", max_tokens=3)["num_output_tokens"] == 3
    eventually(lambda: read_metrics(server, "slow")["nemodiff_requests_total failed"] == 1)


def test_figures_on_the_metrics_port_add_up(server: TritonServer) -> None:
    before = read_metrics(server)
    answers = [generate(server, text_input=question, mode="linear_spec") for question in QUESTIONS]
    done = before["nemodiff_requests_total finished"] + len(QUESTIONS)
    eventually(lambda: read_metrics(server)["nemodiff_requests_total finished"] == done)
    last = "nemodiff_tokens_per_forward_count"  # of a request's values, which follow its last response
    eventually(lambda: read_metrics(server)[last] == before.get(last, 0.0) + len(QUESTIONS))
    after = read_metrics(server)
    grown = {name: value - before.get(name, 0.0) for name, value in after.items()}
    assert grown["nemodiff_prompt_tokens_total"] == sum(a["num_input_tokens"] for a in answers)
    assert grown["nemodiff_generation_tokens_total"] == sum(a["num_output_tokens"] for a in answers)
    for kind in ("prefill", "draft", "verify"):
        assert grown[f"nemodiff_nfe_total {kind}"] == sum(json.loads(a["nfe"])[kind] for a in answers)
    for name in ("time_to_first_token", "inter_token_latency", "request_queue_time", "e2e_request_latency"):
        assert grown[f"nemodiff_{name}_seconds_count"] == len(QUESTIONS)
    ttft = sum(a["time_to_first_token_ms"] for a in answers) / 1e3
    assert grown["nemodiff_time_to_first_token_seconds_sum"] == pytest.approx(ttft, rel=1e-3)
    assert grown["nemodiff_accepted_tokens_per_verify_count"] == grown["nemodiff_nfe_total verify"]
    assert after["nemodiff_requests_running"] == after["nemodiff_requests_waiting"] == 0
    assert 0 < after["nemodiff_cache_usage_ratio"] < 1
    assert after["nemodiff_rows"] == 8


MALFORMED: list[Any] = [
    b"",
    b"{",
    b"[]",
    b"null",
    b'"text"',
    b"\xff\xfe",
    b'{"text_input": "\\ud800"}',
    b'{"text_input": ' + b"[" * 5000,
    *(
        {"text_input": "x", **fields}
        for fields in (
            {"text_input": 5},
            {"text_input": None},
            {"text_input": ["a", "b"]},
            {"text_input": []},
            {"text_input": {"role": "user"}},
            {"max_tokens": "many"},
            {"max_tokens": 1e9},
            {"max_tokens": 2**40},
            {"max_tokens": -2},
            {"max_tokens": [1, 2]},
            {"temperature": "hot"},
            {"temperature": -1.0},
            {"top_k": -5},
            {"seed": -1},
            {"stop_words": 5},
            {"stream": "yes"},
            {"stream": 3},
            {"sampling_parameters": "[]"},
            {"sampling_parameters": "5"},
            {"sampling_parameters": {"max_tokens": 3}},
            {"sampling_parameters": '{"max_tokens": "many"}'},
            {"sampling_parameters": '{"max_tokens": [3]}'},
            {"sampling_parameters": '{"stop": [5]}'},
            {"sampling_parameters": '{"stop_words": {"a": 1}}'},
            {"sampling_parameters": '{"temperature": NaN}'},
            {"sampling_parameters": '{"text_input": "y"}'},
            {"sampling_parameters": '{"system": "\\ud800"}'},
            {"sampling_parameters": "[" * 100000},
            {"sampling_parameters": '{"max_tokens": ' + "9" * 5000 + "}"},
            {"parameters": {"max_tokens": "many"}},
            {"guided_decoding_guide_type": "xml", "guided_decoding_guide": "<a/>"},
            {"guided_decoding_guide": "{}"},
            {"beam_width": 4},
            {"return_context_logits": True},
            {"embedding_bias_words": "river"},
        )
    ),
]


def test_malformed_requests_get_a_sentence(server: TritonServer) -> None:
    for body in MALFORMED:
        status, text = post(server.http, "/v2/models/nemodiff/generate", body)
        assert 400 <= status <= 500, (body, status, text)
        assert json.loads(text)["error"], body
        assert not re.search(r"Traceback|File \"|\.py", text), (body, text)
        if isinstance(body, dict) and status == 500:  # Triton's own refusal of a JSON type, before any of this runs
            assert "Unable to parse" in text or "attempt to access" in text or "JSON" in text, (body, text)
    assert generate(server, text_input="x", max_tokens=2)["num_output_tokens"] <= 2


def test_loading_again_and_again_leaves_nothing_behind(server: TritonServer) -> None:
    assert server.process is not None
    pid = server.process.pid

    def reload() -> tuple[int, int, int, int]:
        for action in ("unload", "load"):
            assert post(server.http, f"/v2/repository/models/other/{action}", {})[0] == 200
            if action == "unload":
                try:
                    eventually(lambda: not processes(server, "other"))
                except AssertionError:
                    pytest.fail(f"the process of other does not end\n{doings(server, 'other')}")
        assert generate(server, "other", text_input=QUESTIONS[0])["num_output_tokens"] == 7
        return (*memory(pid), len(list(Path("/dev/shm").glob(f"{server.shared}*"))), len(processes(server, "")))

    first = [reload() for _ in range(2)][-1]
    last = [reload() for _ in range(4)][-1]
    assert last[0] <= first[0] + 4096  # KiB of the server's own memory
    assert last[1:] == first[1:]  # threads, shared memory, Python processes


def test_the_process_of_an_unloaded_model_ends_by_itself(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes = tmp_path / "codes"

    def noting_its_end(models: Path, folder: Path) -> Executable:
        found = find_executable(models, folder)
        program = folder / "backends" / "python" / "triton_python_backend_stub"
        real = program.resolve()
        program.unlink()
        # Without a word Triton tries whether the program has its libraries.
        program.write_text(f'#!/bin/sh\n"{real}" "$@"\ncode=$?\n[ $# = 0 ] || echo $code >> "{codes}"\n')
        program.chmod(0o755)
        return found

    monkeypatch.setattr(triton_server, "find_executable", noting_its_end)
    with TritonServer(repository, arguments=ROUGH, log=tmp_path / "log") as server:
        assert generate(server, "other", text_input=QUESTIONS[0])["num_output_tokens"] == 7
        *_, last = server_sent(server.http, "other", {"text_input": QUESTIONS[1], "stream": True})
        assert last["finish_reason"] == "length"
        assert post(server.http, "/v2/models/other/generate", {"text_input": "x", "mode": "bogus"})[0] == 400
        assert read_metrics(server, "other")
        assert post(server.http, "/v2/repository/models/other/unload", {})[0] == 200
        eventually(lambda: codes.exists() and codes.read_text() != "")
        assert codes.read_text() == "0\n"  # 139 where it holds an object of the server's till the interpreter's end
        assert read_metrics(server, "other") == {}


@pytest.fixture
def killed(repository: Path, tmp_path: Path) -> Iterator[tuple[TritonServer, int, str]]:
    """A server whose model `slow` lost its process in the middle of a pass, and what it says to the next request."""
    for attempt in range(5):
        with TritonServer(repository, arguments=ROUGH, log=tmp_path / f"{attempt}.log") as server:
            events = server_sent(server.http, "slow", {"text_input": QUESTIONS[0], "mode": "ar", "stream": True})
            next(events)
            (pid,) = processes(server, "slow")
            time.sleep(0.05)  # into the next pass
            os.kill(pid, signal.SIGKILL)
            try:
                answered = post(server.http, "/v2/models/slow/generate", {"text_input": QUESTIONS[0]})
            except OSError:
                assert server.process is not None
                assert server.process.wait(PATIENCE)  # not 0: 2.51 aborts if a process dies while it holds their lock
                continue
            yield server, *answered
            events.close()  # Triton does not end the streams of a dead process
            return
    pytest.fail("Triton has ended five times")


def test_a_killed_process_comes_back_and_a_failed_load_leaves_the_old_model(
    killed: tuple[TritonServer, int, str], repository: Path
) -> None:
    server, status, answer = killed
    assert status in (400, 500)
    assert "Stub process" in answer
    assert "healthy" in answer
    assert generate(server, "other", text_input=QUESTIONS[0])["num_output_tokens"] == 7  # other models live on
    for action in ("unload", "load"):  # Triton loads a model anew only if a file has changed or it was unloaded
        assert post(server.http, f"/v2/repository/models/slow/{action}", {})[0] == 200
    assert generate(server, "slow", text_input=QUESTIONS[0], mode="ar", max_tokens=3)["num_output_tokens"] == 3
    assert len(processes(server, "slow")) == 1
    config = repository / "other" / "config.pbtxt"
    text = config.read_text()
    config.write_text(text.replace('"max_tokens"', '"max_tokenz"'))
    status, answer = post(server.http, "/v2/repository/models/other/load", {})
    config.write_text(text)
    assert status == 400
    assert "unknown parameter 'max_tokenz'; allowed" in answer
    assert generate(server, "other", text_input=QUESTIONS[0])["num_output_tokens"] == 7  # the old one serves on


def test_malformed_tensors_get_a_sentence(rough: TritonServer) -> None:
    tensors = [
        [tensor("text_input", ["x"]), tensor("max_tokens", [1.5])],
        [tensor("text_input", ["x"]), tensor("max_tokens", [1, 2])],
        [tensor("text_input", ["x"], shape=[1, 1])],
        [tensor("text_input", ["x", "y"])],
        [tensor("text_input", [5])],
        [tensor("unknown", [5])],
        [(tensor("text_input", ["x"])[0], b"\xff\xff\xff\x7f")],
        [(tensor("text_input", ["x"])[0], b"")],
        [],
    ]
    with GrpcStream(rough.grpc) as stream:
        responses = iter(stream)
        for each in tensors:
            stream.send("slow", "x", each)
            answer = next(responses)
            assert answer.error, each
            assert not re.search(r"Traceback|File \"|\.py", answer.error)


def test_the_commands_of_the_readme(tiny_engine: Path, tmp_path: Path) -> None:
    (block,) = re.findall(r"```bash\n(nemodiff triton.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    export_it, install_it, run_it, *curls = (line for line in block.splitlines() if not line.startswith("#"))
    (tmp_path / "engines").mkdir()
    (tmp_path / "engines" / "tiny-chat-2").symlink_to(tiny_engine)
    http, grpc_port, metrics = free_ports()
    ours = f"{sys.executable} -m nemodiff "

    def shell(command: str) -> str:
        words = ["bash", "-euc", f"set -o pipefail; {command}"]
        return subprocess.run(words, cwd=tmp_path, check=True, capture_output=True, text=True, timeout=PATIENCE).stdout

    for command in (export_it, install_it):
        shell(command.replace("nemodiff ", ours, 1))
    ports = f" --http-port {http} --grpc-port {grpc_port} --metrics-port {metrics}"
    with (tmp_path / "log").open("wb") as log:
        words = shlex.split(run_it.replace("nemodiff ", ours, 1) + ports)
        running = subprocess.Popen(words, cwd=tmp_path, stderr=log)
    try:
        eventually(lambda: "Started Metrics" in (tmp_path / "log").read_text())
        outputs = [shell(c.replace(":8000", f":{http}").replace(":8002", f":{metrics}")) for c in curls]
    finally:
        running.terminate()
        code = running.wait(PATIENCE)
    assert code == 0, (tmp_path / "log").read_text()[-2000:]
    answer, streamed, metrics_text = outputs
    assert json.loads(answer)["finish_reason"] == "stop"
    assert streamed.count("data: ") >= 2
    assert "nemodiff_rows" in metrics_text
    assert not list(Path("/dev/shm").glob(f"nemodiff_{running.pid}_*"))


def processes(server: TritonServer, model: str) -> list[int]:
    """Python processes of a model."""
    assert server.process is not None
    children: list[int] = []
    for thread in Path(f"/proc/{server.process.pid}/task").iterdir():
        with contextlib.suppress(OSError):  # it has ended
            children += map(int, (thread / "children").read_text().split())
    pids = []
    for child in children:
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{child}/cmdline").read_bytes().decode().split("\0")
            if (len(words) > 1 and f"/{model}/1/model.py" in words[1]) or not model:
                pids.append(child)
    return pids


def doings(server: TritonServer, model: str) -> str:
    """What the server and a model's processes do, thread by thread, and the end of the log."""
    assert server.process is not None
    pids = processes(server, model)
    lines = []
    for pid in (server.process.pid, *pids):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            state = [(thread / name).read_text().strip() for name in ("comm", "wchan", "syscall")]
            lines.append(" ".join([str(pid), thread.name, *state]))
        if shutil.which("gdb"):
            command = ["gdb", "-p", str(pid), "-batch", "-ex", "thread apply all backtrace 16"]
            lines.append(subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE).stdout)
    for pid in pids:
        os.kill(pid, signal.SIGUSR1)
    time.sleep(1)  # nobody says when it is written
    return "\n".join([*lines, server.logged()[-8000:]])


def memory(pid: int) -> tuple[int, int]:
    """Resident KiB and threads."""
    status = Path(f"/proc/{pid}/status").read_text()
    return tuple(int(re.search(rf"{name}:\s+(\d+)", status)[1]) for name in ("VmRSS", "Threads"))  # type: ignore

"""Records of requests: ids, lines in both formats, the state of a running server, and spans."""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import eventually
from stand_ins.checkpoints import TINY_CHAT
from stand_ins.http_server import PATIENCE, Served, serving
from starlette.datastructures import Headers

import nemodiff
from nemodiff.builder.build import Builder
from nemodiff.errors import RequestError
from nemodiff.serving.http.request_log import Record
from nemodiff.serving.http.spans import Spans

BODY = {"model": "tiny-chat", "messages": [{"role": "user", "content": "Count from 3 to 9."}], "max_tokens": 12}


def line(served: Served) -> str:
    assert served.process.stderr is not None
    return served.process.stderr.readline()


@pytest.mark.parametrize("format", ["json", "text"])
def test_a_line_per_request_with_the_client_s_id(tiny_engine: Path, format: str) -> None:
    with serving(tiny_engine, "--log-format", format) as served:
        status, headers, content = served.send("/v1/chat/completions", BODY, X_Request_Id="order-7")
        assert (status, headers["x-request-id"]) == (200, "order-7")
        first = line(served)
        _, headers, _ = served.send("/v1/chat/completions", {**BODY, "mode": "no"}, X_Request_Id="x" * 129)
        second = line(served)
    assert len(headers["x-request-id"]) == 32  # one of the server's own
    usage = json.loads(content)["usage"]
    if format == "text":
        assert "INFO request_id=order-7 method=POST path=/v1/chat/completions status=200 ms=" in first
        assert "status=400 ms=" in second
        return
    record = json.loads(first)
    assert record["time"].endswith("+00:00")
    assert (record["level"], record["request_id"], record["status"]) == ("info", "order-7", 200)
    assert record["completion_tokens"] == usage["completion_tokens"]
    assert record["prompt_tokens"] == usage["prompt_tokens"]
    assert record["finish_reasons"] == ["length"]
    assert 0 < record["first_byte_ms"] <= record["ms"]
    refused = json.loads(second)
    assert (refused["request_id"], refused["status"]) == (headers["x-request-id"], 400)
    assert "mode" not in refused


def test_no_request_writes_a_line_of_its_own(tiny_engine: Path) -> None:
    with serving(tiny_engine, "--log-format", "text") as served:
        served.send("/x%0aforged%20status=200%1b[31m", X_Request_Id="a status=200")
        said = line(served)
    assert r' request_id="a status=200" method=GET path="/x\nforged status=200\u001b[31m" status=404 ' in said


def test_a_stream_that_ends_in_an_error_says_so(tiny_engine: Path) -> None:
    with serving(tiny_engine, "--log-format", "json", "--timeout", "0.5") as served:
        body = {**BODY, "max_tokens": 20_000, "mode": "ar", "stream": True, "ignore_eos": True}
        status, _, content = served.send("/v1/chat/completions", body)
        record = json.loads(line(served))
    assert b"the request took more than 0.5 s" in content
    assert (status, record["status"], record["level"]) == (200, 200, "error")
    assert record["error"] == "the request took more than 0.5 s; ask for fewer tokens"
    assert record["finish_reasons"] == ["cancelled"]


@pytest.mark.parametrize("when", ["body", "answer"])
def test_who_left_before_the_answer_began_is_a_499(tiny_engine: Path, when: str) -> None:
    with serving(tiny_engine, "--log-format", "json", "--client-timeout", "1") as served:
        before = served.metrics()
        line(served)
        with contextlib.closing(served.connect()) as connection:
            body = json.dumps({**BODY, "max_tokens": 20_000, "mode": "ar", "ignore_eos": True}).encode()
            connection.putrequest("POST", "/v1/chat/completions")
            connection.putheader("Content-Type", "application/json")
            connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body[: -1 if when == "body" else None])
            if when == "answer":
                eventually(lambda: served.metrics()["nemodiff_requests_running"] == 1)
        records = iter(lambda: json.loads(line(served)), None)
        left = next(record for record in records if record["path"] != "/metrics")
        after = served.settled()
    assert left["status"] == 499
    assert "first_byte_ms" not in left
    refused = {name for name in after if name.startswith("nemodiff_refused") and after[name] != before.get(name)}
    assert not refused
    assert after['nemodiff_requests_total{end="cancelled"}'] == (when == "answer")


def test_a_request_that_did_not_arrive_in_time_is_a_408_everywhere(tiny_engine: Path) -> None:
    with serving(tiny_engine, "--log-format", "json", "--client-timeout", "0.5") as served:
        connection = served.connect()
        connection.putrequest("POST", "/v1/chat/completions")
        connection.putheader("Content-Length", "100")
        connection.endheaders(b"{")
        response = connection.getresponse()
        assert (response.status, json.loads(response.read())["error"]["type"]) == (408, "invalid_request_error")
        connection.close()
        assert json.loads(line(served))["status"] == 408
        assert served.metrics()['nemodiff_refused_requests_total{status="408"}'] == 1


def test_every_line_is_json_where_lines_are(tmp_path: Path) -> None:
    shutil.copytree(TINY_CHAT, tmp_path / "checkpoint")
    sampling = tmp_path / "checkpoint" / "generation_config.json"
    sampling.write_text(json.dumps({**json.loads(sampling.read_text()), "do_sample": True, "temperature": 0.5}))
    engine = Builder(tmp_path / "checkpoint", tmp_path / "engine").run()
    options = ("--log-format", "json", "--generation-config", "auto")
    with serving(engine, *options) as served:
        second = line(served)
        served.send("/health")
        third = line(served)
        served.process.send_signal(signal.SIGUSR1)
        state = json.loads(line(served))
        served.process.terminate()
        assert served.process.stderr is not None
        assert served.process.stderr.read() == ""
    first, proposed, request = map(json.loads, (served.announcement, second, third))
    assert first.items() >= {"level": "info", "model": "engine", "address": served.url}.items()
    assert first["message"] == f"serving engine on {served.url}"
    assert "temperature 0.5" in proposed["message"]
    assert request["path"] == "/health"
    assert all(one["time"].endswith("+00:00") for one in (first, proposed, request, state))


def test_what_other_packages_say_is_json_too(capfd: pytest.CaptureFixture[str]) -> None:
    program = (
        "import logging, warnings; from nemodiff.serving.http.request_log import set_up_logging; "
        "set_up_logging('json'); logging.getLogger('asyncio').error('two\\nlines'); warnings.warn('old')"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    said, warned = map(json.loads, capfd.readouterr().err.splitlines())
    assert (said["logger"], said["message"], said["level"]) == ("asyncio", "two\nlines", "error")
    assert (warned["logger"], warned["level"]) == ("py.warnings", "warning")


def test_a_signal_tells_what_the_server_does(tiny_engine: Path) -> None:
    with serving(tiny_engine, "--rows", "1") as served:
        connection = served.connect()
        body = {**BODY, "max_tokens": 20_000, "mode": "ar", "stream": True, "ignore_eos": True}
        headers = {"Content-Type": "application/json", "X-Request-Id": "long"}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        response = connection.getresponse()
        while b'"content":"' not in (line_of_text := response.readline()) or b'"content":""' in line_of_text:
            pass  # until the first token
        served.process.send_signal(signal.SIGUSR1)
        state = json.loads(line(served))["state"]
        connection.close()
        assert served.settled()["nemodiff_requests_running"] == 0
    (request,) = state["requests"]
    assert (request["request_id"], request["path"]) == ("long", "/v1/chat/completions")
    assert request["answers"][0]["state"] == "running"
    assert request["answers"][0]["tokens"] > 0
    assert state["scheduler"]["running"] == 1
    assert state["most_memory_bytes"] > 2**20
    assert any("scheduler" in call for call in state["threads"]["nemodiff-scheduler"])


def test_signals_while_the_engine_is_loaded(tiny_engine: Path) -> None:
    """Which the system keeps from a container's first process where it has no handler."""
    program = f"""
import os, time
from nemodiff.cli import main
from nemodiff.serving.http import app

def loading(*arguments, **choices):
    try:
        print("loading", flush=True)
        time.sleep({PATIENCE})
    except BaseException:  # as torch does while it is imported
        os.abort()

app.open_server = loading
main(["serve", {str(tiny_engine)!r}, "--port", "0"])
"""
    words = [sys.executable, "-c", program]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "loading\n"
        process.send_signal(signal.SIGUSR1)
        state = json.loads(process.stderr.readline())["state"]
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=PATIENCE)
    assert state["loading"] is True
    assert any(call.endswith(" loading") for call in state["threads"]["MainThread"])
    assert (process.returncode, said) == (128 + signal.SIGTERM, "")


def test_spans_follow_one_another(tiny_engine: Path) -> None:
    export = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor

    exporter, provider = export.InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    headers = Headers({"traceparent": f"00-{trace}-00f067aa0ba902b7-01"})
    engine = nemodiff.load(tiny_engine, threads=1)
    record = Record("r", "POST", "/v1/completions", headers, time.perf_counter())
    for event in nemodiff.events(engine, ["Count from 3 to 9."], mode="linear_spec", block_length=8, max_new_tokens=30):
        record.observe(0, [event])
    record.status, record.ended = 200, time.perf_counter()
    spans = Spans(provider)
    spans(record)
    *inner, root = exporter.get_finished_spans()
    spans.close()
    assert root.name == "POST /v1/completions"
    assert f"{root.context.trace_id:032x}" == trace
    assert root.attributes is not None
    assert root.attributes["request_id"] == "r"
    assert [span.name for span in inner[:2]] == ["queue", "prefill"]
    assert {span.name for span in inner[2:]} == {"block"}
    assert all(span.parent is not None and span.parent.span_id == root.context.span_id for span in inner)
    for before, after in itertools.pairwise(inner):
        assert before.end_time == after.start_time
    assert all(root.start_time <= span.start_time <= span.end_time <= root.end_time for span in inner)
    tokens: list[Any] = [span.attributes["tokens"] for span in inner[2:]]
    assert sum(tokens) + 1 >= root.attributes["completion_tokens"] > len(tokens)


def test_spans_need_their_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    with pytest.raises(RequestError, match=r'pip install "nemodiff\[otel\]"'):
        Spans()

"""What the model for Triton Inference Server sends, without a server: a stand-in plays its side."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import eventually
from stand_ins.checkpoints import TINY_CHAT
from stand_ins.triton_backend import Request, TritonError, _Metric, module

import nemodiff
from nemodiff.runtime.events.events import Finished
from nemodiff.runtime.requests.token_logprobs import TokenLogprobs
from nemodiff.runtime.text.codec import TextCodec
from nemodiff.serving.triton_server.model import TritonPythonModel
from nemodiff.serving.triton_server.response_writer import ResponseWriter

QUESTION = "Show the times table of 7 up to 5."


@pytest.fixture
def started(tiny_engine: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., TritonPythonModel]]:
    """Starts the model over an engine, with parameters of its configuration."""
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", module())
    models = []

    def start(instance: int = 0, **parameters: str) -> TritonPythonModel:
        values = {"engine": str(tiny_engine), "threads": "1", **parameters}
        config = {"parameters": {name: {"string_value": value} for name, value in values.items()}}
        model = TritonPythonModel()
        place = {"model_repository": str(tiny_engine.parent), "model_version": "1", "model_name": "played"}
        place["model_instance_name"] = f"played_0_{instance}"
        model.initialize({**place, "model_config": json.dumps(config)})
        models.append(model)
        return model

    yield start
    for model in models:
        model.finalize()


def ask(model: TritonPythonModel, **values: Any) -> list[dict[str, Any]]:
    request = Request({"text_input": QUESTION, **values})
    model.execute([request])
    responses = request.responses()
    assert [r.error for r in responses] == [None] * len(responses)
    return [response.outputs() for response in responses]


def test_a_stream_sends_its_first_text_at_once_and_what_comes_meanwhile_together(
    started: Callable[..., TritonPythonModel], tiny_engine: Path
) -> None:
    long: dict[str, Any] = {"mode": "ar", "max_tokens": 150, "min_tokens": 150}
    whole = nemodiff.generate(
        nemodiff.load(tiny_engine, threads=1), QUESTION, mode="ar", max_new_tokens=150, min_tokens=150
    ).text
    every = ask(started(stream_interval_ms="0"), stream=True, **long)
    assert "".join(one["text_output"] for one in every) == whole
    assert len(every) > 10
    paced = started(stream_interval_ms="60000")
    first, last = ask(paced, stream=True, **long)
    assert first["text_output"] + last["text_output"] == whole
    assert 0 < len(first["text_output"]) < len(whole) / 2
    assert "finish_reason" not in first
    assert last["num_output_tokens"] == 150
    (only,) = ask(paced, **long)
    assert only["text_output"] == whole
    echoed = [ask(paced, stream=stream, exclude_input_in_output=False, **long) for stream in (False, True)]
    assert ["".join(one["text_output"] for one in each) for each in echoed] == [QUESTION + whole] * 2


def test_a_streams_pieces_are_whole_characters(started: Callable[..., TritonPythonModel], tiny_engine: Path) -> None:
    engine = nemodiff.load(tiny_engine, threads=1)
    params: dict[str, Any] = {"mode": "ar", "temperature": 30.0}
    model = started(stream_interval_ms="0")
    non_ascii = 0
    for seed in range(3):
        pieces = [one["text_output"] for one in ask(model, stream=True, max_tokens=60, seed=seed, **params)]
        assert "".join(pieces) == nemodiff.generate(engine, QUESTION, max_new_tokens=60, seed=seed, **params).text
        non_ascii += sum(not piece.isascii() for piece in pieces if piece.encode())
    assert non_ascii


def test_a_prompt_is_scored(started: Callable[..., TritonPythonModel], tiny_engine: Path) -> None:
    scoring = json.dumps({"prompt_logprobs": 0, "max_tokens": 0})
    request = Request({"text_input": QUESTION, "sampling_parameters": scoring})
    started().execute([request])
    (response,) = request.responses()
    (told,) = (t.as_numpy().reshape(-1) for t in response.output_tensors if t.name() == "prompt_log_probs")
    alone = nemodiff.generate(nemodiff.load(tiny_engine, threads=1), QUESTION, prompt_logprobs=0, max_new_tokens=0)
    expected = [one.logprob for one in alone.prompt_logprobs or [] if one is not None]
    assert told.tolist() == pytest.approx(expected, abs=1e-4)
    assert (response.outputs()["text_output"], response.outputs()["num_output_tokens"]) == ("", 0)


def test_more_logprobs_than_the_model_allows_are_refused(started: Callable[..., TritonPythonModel]) -> None:
    for model, most in ((started(), 20), (started(max_logprobs="2"), 2)):
        for name in ("logprobs", "prompt_logprobs"):
            request = Request({"text_input": QUESTION, "sampling_parameters": json.dumps({name: most + 1})})
            model.execute([request])
            (response,) = request.responses()
            assert str(response.error) == (
                f"{name} is {most + 1}, allowed: at most {most} on this server; ask for fewer, or raise max_logprobs"
            )
            ask(model, max_tokens=1, sampling_parameters=json.dumps({name: most}))


def test_log_probabilities_are_told_in_the_forms_of_both_backends(
    started: Callable[..., TritonPythonModel], tiny_engine: Path
) -> None:
    engine = nemodiff.load(tiny_engine, threads=1)
    alone = nemodiff.generate(engine, QUESTION, max_new_tokens=5, logprobs=2)
    (answer,) = ask(started(), max_tokens=5, return_logprobs=True, sampling_parameters='{"logprobs": 2}')
    assert alone.logprobs is not None
    total = sum(one.logprob for one in alone.logprobs)
    assert answer["cum_log_probs"] == answer["cumulative_logprob"] == pytest.approx(total, abs=1e-3)
    given = json.loads(answer["logprobs"])
    for one, token, expected in zip(given, alone.token_ids, alone.logprobs, strict=True):
        assert one[str(token)] == {
            "logprob": pytest.approx(expected.logprob, abs=1e-3),
            "rank": expected.rank,
            "decoded_token": engine.text.piece(token),
        }
        assert {int(id) for id in one} == {token, *(id for id, _ in expected.top)}
    (plain,) = ask(started(), max_tokens=5)
    assert not {"logprobs", "cumulative_logprob", "output_log_probs", "cum_log_probs"} & plain.keys()


@pytest.mark.parametrize("batched", [False, True])
def test_the_last_response_has_every_output(batched: bool) -> None:
    codec = TextCodec(TINY_CHAT)
    one = TokenLogprobs(-0.5, [(130, -0.25)], 2)
    values: dict[str, Any] = {
        "text": "a", "token_ids": [131], "prompt_tokens": 9, "reused_tokens": 4, "finish_reason": "stop", "mode": "ar",
        "block_length": 32, "threshold": 0.9, "nfe": {"prefill": 1}, "decode_tpf": 2.0, "e2e_tpf": 1.0,
        "acceptance": nemodiff.Acceptance(3.0, [3], [4]), "adapter_tokens": 0, "timings_ms": {},
    }  # fmt: skip
    asked = {
        "logprobs": [one, one], "token_ids": [131, 132], "prompt_logprobs": [None, one], "warnings": ["v", "w"],
        "image_tokens": [3, 4],
    }  # fmt: skip
    spelled = {"logprob": -0.5, "rank": 2}, {"130": {"logprob": -0.25, "rank": 1, "decoded_token": codec.piece(130)}}
    always = {
        "text_output": ["a"],
        "finish_reason": ["stop"],
        "num_input_tokens": [9],
        "num_output_tokens": [1],
        "num_reused_tokens": [4],
        "nfe": ['{"prefill": 1}'],
        "tokens_per_pass": [2.0],
        "acceptance_length": [3.0],
        "time_to_first_token_ms": [5.0],
        "inter_token_latency_ms": [6.0],
    }
    for more, told in (
        ({}, {}),
        (
            asked,
            {
                "num_output_tokens": [2],
                "num_image_tokens": [7],
                "output_log_probs": [-0.5, -0.5],
                "cum_log_probs": [-1.0],
                "cumulative_logprob": [-1.0],
                "logprobs": [
                    json.dumps(
                        [
                            {id: spelled[0] | {"decoded_token": codec.piece(int(id))}} | spelled[1]
                            for id in ("131", "132")
                        ]
                    )
                ],
                "prompt_log_probs": [-0.5],
                "warnings": ["v", "w"],
            },
        ),
    ):
        request = Request({})
        writer = ResponseWriter(module(), "m", codec, batched)
        writer.send_final(request, "a", Finished(0, 0.0, nemodiff.Generation(**(values | more)), 5.0, 6.0, 7.0))
        (response,) = request.responses()
        arrays = {tensor.name(): tensor.as_numpy() for tensor in response.output_tensors}
        assert {name: array.reshape(-1).tolist() for name, array in arrays.items()} == always | told
        assert {array.shape[:-1] for array in arrays.values()} == {(1,) if batched else ()}


@pytest.mark.parametrize(
    ("error", "kind", "status", "message"),
    [
        (nemodiff.RequestError("no"), TritonError.INVALID_ARG, 400, "no"),
        (nemodiff.BusyError("later"), TritonError.UNAVAILABLE, 503, "later"),
        (nemodiff.EngineError("gone"), TritonError.INTERNAL, 500, "gone"),
        (ZeroDivisionError("secret"), TritonError.INTERNAL, 500, "the request failed inside the model; the server's"),
    ],
)
def test_an_error_has_its_code_and_is_counted(error: Exception, kind: str, status: int, message: str) -> None:
    request = Request({})
    writer = ResponseWriter(module(), "m", TextCodec(TINY_CHAT), False)
    writer.send_error(request, error)
    (response,) = request.responses()
    assert response.error is not None
    assert (response.error.kind, writer.refused) == (kind, {400: 0, 500: 0, 503: 0} | {status: 1})
    assert str(response.error).startswith(message)


def test_what_is_refused_is_counted_by_its_reason(started: Callable[..., TritonPythonModel]) -> None:
    model = started(rows="1", waiting="1")
    for fields in ({"mode": "bogus"}, {"max_tokens": 0}):
        request = Request({"text_input": QUESTION, **fields})
        model.execute([request])
        (refusal,) = request.responses()
        assert refusal.error is not None
        assert refusal.error.kind == TritonError.INVALID_ARG
    long = [Request({"text_input": QUESTION, "max_tokens": 150, "min_tokens": 150}) for _ in range(6)]
    model.execute(long)
    errors = [request.responses()[-1].error for request in long]
    busy = [error for error in errors if error is not None]
    assert {error.kind for error in busy} == {TritonError.UNAVAILABLE}
    assert 1 <= len(busy) <= 4
    values = sys.modules["triton_python_backend_utils"].MetricFamily.values
    name = "nemodiff_refused_requests_total"
    expected = {"400": 2, "503": len(busy), "500": 0}
    for _ in range(600):
        if {status: values.get((name, "played_0_0", status)) for status in expected} == expected:
            return
        time.sleep(0.05)
    raise AssertionError(values)


def series(name: str, *labels: str) -> float:
    """A value on the metrics port."""
    return float(sys.modules["triton_python_backend_utils"].MetricFamily.values["nemodiff_" + name, *labels])


def test_instances_of_a_model_have_series_of_their_own(started: Callable[..., TritonPythonModel]) -> None:
    first, second = started(0, rows="1"), started(1, rows="2")
    ask(first, max_tokens=3)
    ask(second, max_tokens=3)
    ask(second, max_tokens=3)
    assert [series("rows", f"played_0_{n}") for n in range(2)] == [1, 2]
    eventually(lambda: [series("requests_total", f"played_0_{n}", "finished") for n in range(2)] == [1, 2])


def test_a_model_that_goes_cancels_what_runs_and_the_next_one_begins_with_its_own_figures(
    started: Callable[..., TritonPythonModel],
) -> None:
    model = started()
    values = sys.modules["triton_python_backend_utils"].MetricFamily.values
    request = Request({"text_input": QUESTION, "mode": "ar", "max_tokens": 150, "min_tokens": 150, "stream": True})
    model.execute([request])
    model.finalize()
    assert request.responses()[-1].error is not None
    values["nemodiff_requests_running", "played_0_0"] = 5.0  # by a process that has been killed
    started()
    assert series("requests_running", "played_0_0") == 0


def test_a_client_that_has_gone_is_noticed_and_none_asked_after_its_end(
    started: Callable[..., TritonPythonModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[Request] = []
    monkeypatch.setattr(Request, "is_cancelled", lambda one: looked.append(one) or one.cancelled)
    model = started(rows="1")
    long = {"text_input": QUESTION, "mode": "ar", "max_tokens": 20_000, "min_tokens": 20_000}
    gone, queued = (Request({**long, "stream": stream}) for stream in (True, False))
    model.execute([gone, queued])
    for one in (queued, gone):
        one.cancelled = True
        error = one.responses()[-1].error
        assert error is not None
        assert error.kind == TritonError.CANCELLED
    ask(model, max_tokens=3)
    looked.clear()
    last = Request(long)
    model.execute([last])
    eventually(lambda: len(looked) > 1)
    last.cancelled = True
    last.responses()
    assert set(looked) == {last}


def test_what_the_server_refuses_ends_no_other_request(
    started: Callable[..., TritonPythonModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = started()

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no shared memory is left")

    with monkeypatch.context() as patch:
        for name in ("increment", "set", "observe"):
            patch.setattr(_Metric, name, fail)
        refused = Request({"text_input": QUESTION, "max_tokens": 3})
        patch.setattr(refused, "send", fail)
        model.execute([refused])
        ask(model, max_tokens=3)
        time.sleep(0.5)  # two updates of the metrics
    assert ask(model, max_tokens=3)[-1]["num_output_tokens"] == 3
    eventually(lambda: series("requests_total", "played_0_0", "finished") == 3)


def test_schemas_fail_and_warn_as_in_the_runtime(started: Callable[..., TritonPythonModel]) -> None:
    model = started()
    items = {"type": "array", "items": {"enum": [1, 2]}, "uniqueItems": True, "minItems": 2, "maxItems": 2}
    guided = {"guided_decoding_guide_type": "json_schema", "guided_decoding_guide": json.dumps(items)}
    (answer,) = ask(model, **guided)
    assert len(json.loads(answer["text_output"])) == 2
    assert answer["warnings"] == "json_schema: uniqueItems is ignored, so items may repeat"
    assert "warnings" not in ask(model, max_tokens=3)[-1]
    properties = {"first": {"enum": [7, 8]}, "second": {"type": "array", "items": {"const": 0}, "minItems": 10716}}
    schema = {"type": "object", "properties": properties, "required": ["first", "second"]}
    for guide, message in ((schema, "json_schema is too complex ("), ({"$ref": "#"}, "json_schema allows no answer")):
        guided["guided_decoding_guide"] = json.dumps(guide)
        request = Request({"text_input": QUESTION, **guided})
        model.execute([request])
        error = request.responses()[-1].error
        assert isinstance(error, TritonError)
        assert message in str(error)

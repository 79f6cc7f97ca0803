"""The metrics of a server: Prometheus' own parser reads them, and they add up with what the scheduler counted."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from stand_ins.toy_engine import toy
from starlette.datastructures import Headers

import nemodiff
from nemodiff.serving.http.metrics import Refusals, ServerMetrics
from nemodiff.serving.http.request_log import LEFT, Record
from nemodiff.serving.metrics import METRICS, ServerStats


@pytest.fixture(scope="module")
def engine(tiny_engine: Path) -> nemodiff.LoadedEngine:
    return toy(nemodiff.load(tiny_engine, threads=1))


def test_figures_add_up_with_the_statistics_and_the_answers(engine: nemodiff.LoadedEngine) -> None:
    answers = list[nemodiff.Generation]()
    with nemodiff.Scheduler(engine, rows=3) as scheduler:
        metrics = ServerMetrics(lambda: ServerStats(scheduler.statistics, {400: 2, 429: 1}))
        handles = [scheduler.submit([200 + i, 300], mode=mode) for i in range(5) for mode in nemodiff.MODES]
        for handle in handles:
            last = list(handle)[-1]
            assert isinstance(last, nemodiff.Finished)
            metrics.observe(last)
            answers.append(last.generation)
        text, content_type = metrics.render()
    assert content_type == "text/plain; version=0.0.4; charset=utf-8"
    families = {family.name: family for family in text_string_to_metric_families(text.decode())}
    samples = {}
    for family in families.values():
        for sample in family.samples:
            samples[(sample.name, *sample.labels.values())] = sample.value
    assert len(families) == len(METRICS)
    for metric in METRICS:
        family = families[metric.name.removesuffix("_total")]
        assert (family.type, family.documentation) == (metric.kind, metric.help)
    assert samples["nemodiff_generation_tokens_total",] == sum(len(a.token_ids) for a in answers)
    assert samples["nemodiff_requests_total", "finished"] == len(answers) == 20
    assert samples["nemodiff_refused_requests_total", "400"] == 2
    assert samples["nemodiff_refused_requests_total", "429"] == 1
    for kind in answers[0].nfe:
        assert samples["nemodiff_nfe_total", kind] == sum(a.nfe[kind] for a in answers)
    lengths = [n for a in answers for n in a.acceptance.lengths]
    name = "nemodiff_accepted_tokens_per_verify"
    assert (samples[name + "_sum",], samples[name + "_count",]) == (sum(lengths), len(lengths))
    for bound in (1, 4, 16):
        assert samples[name + "_bucket", f"{bound:.1f}"] == sum(n <= bound for n in lengths)
    assert samples[name + "_bucket", "+Inf"] == len(lengths)
    assert samples["nemodiff_time_to_first_token_seconds_count",] == len(answers)
    assert 0 < samples["nemodiff_cache_usage_ratio",] < 1  # the kept prefixes


def test_errors_of_what_needs_a_key_are_refusals() -> None:
    refusals = Refusals()
    before = dict(refusals.by_status)
    for path, status in (
        ("/v1/completions", 200), ("/v1/completions", 399), ("/v1/completions", LEFT), ("/health", 503), ("/", 404),
        ("/v1/completions", 400), ("", 431), ("/v1/messages", 418),
    ):  # fmt: skip
        refusals(Record("1", "POST", path, Headers(), 0.0, status=status))
    assert refusals.by_status == before | {400: 1, 431: 1, 418: 1}
    assert set(before.values()) == {0}


def test_openmetrics_is_given_to_who_asks_for_it(engine: nemodiff.LoadedEngine) -> None:
    with nemodiff.Scheduler(engine, rows=1) as scheduler:
        metrics = ServerMetrics(lambda: ServerStats(scheduler.statistics, {}))
        text, content_type = metrics.render("application/openmetrics-text; version=1.0.0")
    assert content_type.startswith("application/openmetrics-text; version=1.0.0")
    assert text.endswith(b"# EOF\n")


@pytest.mark.parametrize("kind", ["application/openmetrics-text", "text/plain"])
@pytest.mark.parametrize("version", ["\xff", "x.1", "1.0.x"])
def test_a_version_that_is_no_number_gets_the_plain_format(
    engine: nemodiff.LoadedEngine, kind: str, version: str
) -> None:
    with nemodiff.Scheduler(engine, rows=1) as scheduler:
        metrics = ServerMetrics(lambda: ServerStats(scheduler.statistics, {}))
        _, content_type = metrics.render(f"{kind}; version={version}")
    assert content_type == "text/plain; version=0.0.4; charset=utf-8"


def test_the_triton_model_needs_no_prometheus_client() -> None:
    code = "import sys; sys.modules['prometheus_client'] = None; import nemodiff.serving.triton_server.metrics"
    subprocess.run([sys.executable, "-c", code], check=True)

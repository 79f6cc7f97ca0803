"""The figures of a server: Prometheus' own parser reads them, and they add up with what the scheduler counted."""

from __future__ import annotations

from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from stand_ins.toy_engine import toy

import nemodiff
from nemodiff.serving.metrics import METRICS, Metrics, Now


@pytest.fixture(scope="module")
def engine(tiny_engine: Path) -> nemodiff.LoadedEngine:
    return toy(nemodiff.load(tiny_engine, threads=1))


def test_figures_add_up_with_the_statistics_and_the_answers(engine: nemodiff.LoadedEngine) -> None:
    metrics, answers = Metrics(), list[nemodiff.Generation]()
    with nemodiff.Scheduler(engine, rows=3) as scheduler:
        handles = [scheduler.submit([200 + i, 300], mode=mode) for i in range(5) for mode in nemodiff.MODES]
        for handle in handles:
            last = list(handle)[-1]
            assert isinstance(last, nemodiff.Finished)
            metrics.observe(last)
            answers.append(last.generation)
        statistics = scheduler.statistics
    families = {f.name: f for f in text_string_to_metric_families(metrics.render(Now(statistics, {400: 2, 429: 1})))}
    samples = {(s.name, *s.labels.values()): s.value for f in families.values() for s in f.samples}
    assert len(families) == len(METRICS)
    for metric in METRICS:
        family = families[metric.name.removesuffix("_total")]
        assert (family.type, family.documentation) == (metric.kind, metric.help)
    assert samples["nemodiff_generation_tokens_total",] == sum(len(a.token_ids) for a in answers)
    assert samples["nemodiff_requests_total", "finished"] == len(answers) == 20
    assert (samples["nemodiff_refused_requests_total", "400"], samples["nemodiff_refused_requests_total", "429"]) == (
        2,
        1,
    )
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

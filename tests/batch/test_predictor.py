"""`nemodiff.batch.Predictor`: the answers of `generate`, in columns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nemodiff
from nemodiff.batch import Predictor
from nemodiff.errors import RequestError


def test_a_batch_gets_its_answers(tiny_engine: Path) -> None:
    predictor = Predictor(tiny_engine, threads=1, max_new_tokens=8, block_length=8)
    prompts = ["Count from 3 to 9.", "Count from 1 to 4.", "x" * 60_000]
    batch = {
        "prompt": np.array(prompts, object),
        "mode": np.array(["ar", None, "ar"], object),
        "max_new_tokens": np.array([5.0, np.nan, np.nan]).astype(object),
        "weight": np.arange(3),
    }
    batch["max_new_tokens"][0] = 5
    out = predictor(batch)
    engine = nemodiff.load(tiny_engine, threads=1)
    first = nemodiff.generate(engine, prompts[0], mode="ar", max_new_tokens=5)
    second = nemodiff.generate(engine, prompts[1], max_new_tokens=8, block_length=8)
    assert out["text"].tolist() == [first.text, second.text, None]
    assert out["tokens"].tolist() == [len(first.token_ids), len(second.token_ids), 0]
    assert out["error"][:2].tolist() == [None, None]
    assert "max_seq_len" in out["error"][2]
    assert out["weight"].tolist() == [0, 1, 2]


def test_messages_of_numpy_are_taken(tiny_engine: Path) -> None:
    predictor = Predictor(tiny_engine, threads=1, max_new_tokens=4, mode="ar")
    message = {"role": "user", "content": "Count from 3 to 9."}
    column = np.empty(1, object)
    column[0] = np.array([message], object)
    engine = nemodiff.load(tiny_engine, threads=1)
    assert (
        predictor({"messages": column})["text"][0]
        == nemodiff.generate(engine, [message], max_new_tokens=4, mode="ar").text
    )


def test_a_column_of_integers_with_gaps_is_one_of_floats(tiny_engine: Path) -> None:
    """So pandas and Arrow hand it over."""
    predictor = Predictor(tiny_engine, threads=1, mode="ar", max_new_tokens=6)
    prompts = np.array(["Count from 3 to 9."] * 3, object)
    out = predictor({"prompt": prompts, "max_new_tokens": np.array([4.0, np.nan, 2.5])})
    assert out["tokens"].tolist() == [4, 6, 0]
    assert out["error"].tolist() == [None, None, "batch, line 3: max_new_tokens is 2.5, allowed: an integer"]
    blocks = predictor({"prompt": prompts, "mode": np.array(["linear_spec"] * 3), "block_length": np.array([8.0] * 3)})
    assert blocks["error"].tolist() == [None] * 3


def test_missing_values_of_pandas_are_not_given(tiny_engine: Path) -> None:
    pandas = pytest.importorskip("pandas")
    predictor = Predictor(tiny_engine, threads=1, mode="ar", max_new_tokens=6)
    prompts = np.array(["Count from 3 to 9.", "Count from 3 to 9.", pandas.NA], object)
    out = predictor({"prompt": prompts, "max_new_tokens": pandas.array([4, None, 5], dtype="Int64")})
    assert out["tokens"].tolist() == [4, 6, 0]
    assert out["error"][:2].tolist() == [None, None]
    assert '"prompt" (text)' in out["error"][2]


def test_what_no_column_is_for_is_refused(tiny_engine: Path) -> None:
    with pytest.raises(RequestError, match=r"^logprobs belong to tokens, for which answers here have no column"):
        Predictor(tiny_engine, logprobs=2)
    prompts = np.array(["Count from 3 to 9."] * 2, object)
    out = Predictor(tiny_engine, threads=1)({"prompt": prompts, "confidences": np.array([True, False])})
    assert "line 1: confidences belong to tokens, for which answers here have no column" in out["error"][0]
    assert out["error"][1] is None


@pytest.mark.parametrize(
    ("batch", "problem"),
    [
        (["Hi"], "^a batch is of type list, allowed: columns by their names, as batch_format='numpy' gives"),
        ({"prompt": ["Hi", "Ho"], "mode": ["ar"]}, "^the columns of a batch have 1 and 2 rows, allowed: as many each"),
    ],
)
def test_what_is_no_batch_is_refused(tiny_engine: Path, batch: Any, problem: str) -> None:
    with pytest.raises(RequestError, match=problem):
        Predictor(tiny_engine, threads=1)(batch)


def test_a_wrong_option_is_refused_before_the_engine_is_read() -> None:
    with pytest.raises(RequestError, match="allowed"):
        Predictor("nowhere", mode="arr")

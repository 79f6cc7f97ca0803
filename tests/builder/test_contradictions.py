"""Checkpoints whose files contradict each other without being broken: what is taken, and what the plan says of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nemodiff.builder.build import Builder
from nemodiff.builder.export import Exporter
from nemodiff.config import parse_config
from nemodiff.engine_folder import read_engine


def change(path: Path, **values: Any) -> None:
    """Change fields of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def notes(checkpoint: Path) -> list[str]:
    """What the plan's lines say of contradictions."""
    builder = Builder(checkpoint, checkpoint.parent / "engine")
    lines = builder.plan().lines("checkpoint", builder.output)
    return [line.removeprefix("note").strip() for line in lines if line.startswith("note ")]


def test_a_checkpoint_in_one_voice_has_no_notes(checkpoint: Path) -> None:
    assert notes(checkpoint) == []


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"), [(11, 2, (2, 11)), ([11, 2], [11], (11, 2)), (11, [10, 11, 2], (10, 11, 2))]
)
def test_ends_of_both_files_end_a_text(
    checkpoint: Path, ours: object, theirs: object, expected: tuple[int, ...]
) -> None:
    change(checkpoint / "config.json", eos_token_id=ours)
    change(checkpoint / "generation_config.json", eos_token_id=theirs)
    said = [note for note in notes(checkpoint) if "generation_config.json" in note]
    each = ", ".join(map(str, expected))
    assert said == [f"config.json ends a text at {ours}, generation_config.json at {theirs}: each of {each} ends it"]
    assert read_engine(Builder(checkpoint, checkpoint.parent / "engine").run()).model.eos_ids == expected
    exporter = Exporter(checkpoint, checkpoint.parent / "twin")
    assert said[0] in exporter.plan().notes
    twin = exporter.run()
    assert json.loads((twin / "generation_config.json").read_text())["eos_token_id"] == list(expected)


def test_an_older_engine_still_loads(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    for unusable in (-1, "11", [], [True], 100, 10**9):  # 100 is the mask
        assert parse_config(config | {"eos_token_id": unusable}, {"eos_token_id": 2}).eos_ids == (2,)


def test_the_same_ends_in_another_order_are_no_contradiction(checkpoint: Path) -> None:
    change(checkpoint / "config.json", eos_token_id=[11, 2])
    change(checkpoint / "generation_config.json", eos_token_id=[2, 11])
    assert not [note for note in notes(checkpoint) if "generation_config.json" in note]


def test_an_end_that_the_tokenizer_does_not_call_one_is_warned_about(checkpoint: Path) -> None:
    change(checkpoint / "generation_config.json", eos_token_id=[11, 2, 500])
    change(checkpoint / "config.json", eos_token_id=[11, 2, 500])
    plain, unlike = notes(checkpoint)
    assert plain.startswith("500 (")
    assert plain.endswith("ends a text, but is no special token of tokenizer.json")
    end = "11 ('<|im_end|>')"
    assert unlike == f"2 ('</s>') ends a text, but the eos_token of tokenizer_config.json is {end}"
    change(checkpoint / "tokenizer_config.json", eos_token={"content": "</s>"})
    assert notes(checkpoint)[1] == f"{end} ends a text, but the eos_token of tokenizer_config.json is 2 ('</s>')"


def test_sampling_that_is_not_used_is_mentioned(checkpoint: Path) -> None:
    change(checkpoint / "generation_config.json", do_sample=True, temperature=0.6, top_p=0.95, top_k=None)
    expected = "temperature 0.6, top_p 0.95 of generation_config.json: not used; give them as options"
    assert notes(checkpoint) == [expected]
    plan = Builder(checkpoint, checkpoint.parent / "engine").plan()
    assert plan.as_dict()["notes"] == (expected,)
    assert Exporter(checkpoint, checkpoint.parent / "twin").plan().notes == ()  # the twin carries them

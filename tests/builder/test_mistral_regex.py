"""A tokenizer of Mistral with the pattern of another vocabulary is found, named and mended, as in transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from conftest import Refused, output_of
from stand_ins.checkpoints import TINY_CHAT, write_checkpoint
from tokenizers import decoders, models, pre_tokenizers, trainers

from nemodiff.builder.build import Builder
from nemodiff.builder.checkpoint.mistral_regex import RIGHT, WRONG, has_wrong_regex
from nemodiff.builder.export import Exporter
from nemodiff.runtime.text.codec import TextCodec

TEXTS = [
    "for (int i = 0; i < maxLength; ++i) { getElementById(i)->setName('theirs'); 'There'/\n/ /* 'Done' */ }",
    "'''theDoc'''\n'slot'; def parse_args(self): return self['theValue'][10:256] + 0x1F // 3.14159e10",
    "path/to/HTTPServer.py //\n/**/\n\n\t# TODO: don't\r\n",
    "'There McDonald's O'Brien, MacArthur and DeLuca don't like 'The Times'; 'Say they'RE wrong', he said.",
    "Zoe\u0308 Gru\u0308n, Jose\u0301 Nun\u0303ez, नमस्ते, Ёлка ЗвонОК, naïveCafé 中文字符",
    "12 345 6789 2026-11-27 1,000,000 +49 (0)30 1234567 ٣٤٥ ½ Ⅷ",
]
SAID = (
    "tokenizer.json splits words by a pattern that is wrong for its vocabulary, as in many conversions of Mistral's "
    "tokenizer (fix_mistral_regex of transformers); "
)


def split_by(pattern: str) -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def write_tokenizer(path: Path, *, trained_with: str, pattern: str) -> None:
    """A byte-level BPE with tiny-chat's special tokens, made with one pattern and written with another."""
    special = [
        token["content"]
        for token in sorted(
            json.loads((TINY_CHAT / "tokenizer.json").read_text())["added_tokens"], key=lambda t: t["id"]
        )
    ]
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.pre_tokenizer = split_by(trained_with)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=880, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    tokenizer.pre_tokenizer = split_by(pattern)
    tokenizer.save(str(path))


@pytest.fixture
def mistral(tmp_path: Path) -> Path:
    """A checkpoint with such a tokenizer, as transformers before 5 wrote them."""
    folder = write_checkpoint(tmp_path / "checkpoint")
    write_tokenizer(folder / "tokenizer.json", trained_with=RIGHT, pattern=WRONG)
    return folder


def encoded(folder: Path) -> list[list[int]]:
    codec = TextCodec(folder)
    for text in TEXTS:
        assert codec.decode(codec.encode_plain(text)) == text
    return [codec.encode_plain(text) for text in TEXTS]


@pytest.mark.torch
def test_both_patterns_give_the_tokens_of_transformers(mistral: Path, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    # By this transformers knows the family: a large vocabulary, of a model that was written before version 5.
    peer = tmp_path / "peer"
    peer.mkdir()
    values = json.loads((mistral / "tokenizer.json").read_text())
    values["model"]["vocab"] |= {f"<unused {i}>": i for i in range(len(values["model"]["vocab"]), 100_001)}
    (peer / "tokenizer.json").write_text(json.dumps(values))
    (peer / "config.json").write_text(json.dumps({"model_type": "mistral3", "transformers_version": "4.57.0"}))
    wrong = encoded(Builder(mistral, tmp_path / "wrong").run())
    right = encoded(Builder(mistral, tmp_path / "right", fix_mistral_regex=True).run())
    for fix, ours in ((False, wrong), (True, right)):
        theirs = PreTrainedTokenizerFast.from_pretrained(peer, fix_mistral_regex=fix)
        assert [theirs.encode(text, add_special_tokens=False) for text in TEXTS] == ours
    assert [a == b for a, b in zip(wrong, right, strict=True)] == [False, False, False, False, False, True]


def test_plan_and_inspect_say_it_and_the_engine_can_be_mended(mistral: Path, tmp_path: Path) -> None:
    def notes(*words: str) -> list[str]:
        plan = json.loads(output_of("build", str(mistral), "-o", str(tmp_path / "x"), "--dry-run", "--json", *words))
        return list(plan["notes"])

    give = "give --fix-mistral-regex for the right one, unless the model was trained with this one"
    assert notes() == [SAID + give]
    assert notes("--fix-mistral-regex") == [f"{SAID}the engine gets the right one"]
    copied = "it is copied as it is, so load it with fix_mistral_regex=True"
    assert Exporter(mistral, tmp_path / "twin").plan().notes == (SAID + copied,)
    before = (mistral / "tokenizer.json").read_bytes()
    for fix in (False, True):
        engine = Builder(mistral, tmp_path / f"engine{fix}", fix_mistral_regex=fix).run()
        said = [line for line in output_of("inspect", str(engine)).splitlines() if line.startswith("note ")]
        build = "build with --fix-mistral-regex for the right one, unless it was trained with this one"
        assert said == ([] if fix else [f"note         {SAID}{build}"])
    assert (mistral / "tokenizer.json").read_bytes() == before


@pytest.mark.parametrize(
    ("trained_with", "pattern"), [(RIGHT, RIGHT), (WRONG, WRONG)], ids=["Mistral, mended", "Llama 3"]
)
def test_a_pattern_that_suits_its_vocabulary_is_right(
    mistral: Path, tmp_path: Path, refused: Refused, trained_with: str, pattern: str
) -> None:
    write_tokenizer(mistral / "tokenizer.json", trained_with=trained_with, pattern=pattern)
    assert not has_wrong_regex(mistral / "tokenizer.json")
    assert Builder(mistral, tmp_path / "engine").plan().notes == ()
    words = ["build", str(mistral), "-o", str(tmp_path / "engine"), "--fix-mistral-regex"]
    refused(words, "tokenizer.json does not have the wrong pattern; leave the flag out")


@pytest.mark.parametrize(
    "pre_tokenizer", [None, {"type": "Sequence", "pretokenizers": []}, {"type": "ByteLevel"}, {"type": "Split"}]
)
def test_other_pre_tokenizers_are_none_of_its_business(tmp_path: Path, pre_tokenizer: Any) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"pre_tokenizer": pre_tokenizer, "model": None, "note": WRONG}))
    assert not has_wrong_regex(path)

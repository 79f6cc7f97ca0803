"""The exported twin in llama.cpp gives mode ar's exact tokens. Runs where the extra `llama-cpp` is installed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from stand_ins.chats import chat_ids
from stand_ins.checkpoints import TINY_CHAT

import nemodiff
from nemodiff.builder.export import Exporter

pytest.importorskip("llama_cpp", reason="needs the extra llama-cpp")
pytest.importorskip("gguf", reason="needs the extra llama-cpp")


def test_the_twin_gives_the_tokens_of_ar(tiny_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    monkeypatch.delitem(sys.modules, "common", raising=False)
    from common.twin_gguf import LlamaCpp, write_gguf

    twin = Exporter(TINY_CHAT, tmp_path / "twin").run()
    other = LlamaCpp(write_gguf(twin, tmp_path / "twin.gguf"), threads=1)
    engine = nemodiff.load(tiny_engine, threads=1)
    model = engine.info.model
    for question in ("Count from 3 to 9.", "Sort these numbers: 4, 2, 9.", "Show the times table of 7 up to 5."):
        prompt = chat_ids(engine.text, [{"role": "user", "content": question}])
        expected = nemodiff.generate(engine, prompt, mode="ar", max_new_tokens=60).token_ids
        assert other.greedy(prompt, 60, model.eos_ids, model.mask_id) == expected
        assert other.token(prompt, 0) == other.forward(prompt, 0)[-1].argmax()
    other.close()

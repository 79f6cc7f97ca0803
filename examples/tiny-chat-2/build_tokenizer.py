"""Train the byte-level BPE of tiny-chat-2, digits split, on the first conversations of seed 1: always the same file."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

from make_data import example, render
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

HERE = Path(__file__).parent
CORPUS = 30000  # conversations
_MARKERS = re.compile(r"<\|im_start\|>|<\|im_end\|>|</?think>")


def texts(rng: random.Random) -> Iterator[str]:
    """What stands between the special tokens; most descriptions of tools are left out, as they repeat."""
    for _ in range(CORPUS):
        drawn = example(rng)
        prompt, answer = render(drawn.messages, drawn.tools, drawn.thinking)
        if drawn.tools and rng.random() < 0.7:
            prompt = prompt.split("</tools>")[-1]
        yield from _MARKERS.split(prompt + answer)


def build() -> Tokenizer:
    """The tokenizer; config.json says how many entries it has."""
    specials = json.loads((HERE / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.decoder = decoders.ByteLevel()
    digits, byte_level = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level(add_prefix_space=False)])
    trainer = trainers.BpeTrainer(
        vocab_size=json.loads((HERE / "config.json").read_text())["vocab_size"],
        special_tokens=[specials[str(i)]["content"] for i in range(len(specials))],
        initial_alphabet=byte_level.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(random.Random(1)), trainer)
    return tokenizer


if __name__ == "__main__":
    build().save(str(HERE / "tokenizer.json"))

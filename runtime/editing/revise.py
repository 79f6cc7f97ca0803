"""Revising: what the model would have written otherwise is masked and decoded again.

Block by block a causal pass gives every token's probability; the improbable ones become masks, which bidirectional
passes fill in between the tokens that are kept. A token after a mistake looks improbable too, so one look masks too
much, and the second look at a block is what lets right tokens stand.
"""

from __future__ import annotations

import dataclasses
import numbers
import time

from ...contract import counted
from ...errors import RequestError
from ..engines.passes import PassKind, causal
from ..loading import LoadedEngine, check_engine
from ..requests.option_types import Range
from ..requests.options import BLOCK_LENGTH, THRESHOLD, Options
from ..requests.prepare import Prompt, encode
from ..sampling.softmax import probability
from ..text.checks import check_text
from .options import DEFAULT_KEEP, DEFAULT_ROUNDS, DEFAULT_THRESHOLD
from .row import Row

_ROUNDS = Range(1, 64)
_KEEP = Range(0, 1, text="0 to 1; a token of that probability or more is kept")


@dataclasses.dataclass(frozen=True)
class Revised:
    """A revised text; `changed` counts its tokens that differ from the text given, which has as many.

    nfe: passes by kind. total_ms: milliseconds of wall clock.
    """

    text: str
    token_ids: list[int]
    changed: int
    nfe: dict[PassKind, int]
    total_ms: float


def revise(
    engine: LoadedEngine,
    text: str,
    *,
    prompt: Prompt | None = None,
    keep: float = DEFAULT_KEEP,
    rounds: int = DEFAULT_ROUNDS,
    threshold: float = DEFAULT_THRESHOLD,
    block_length: int | None = None,
) -> Revised:
    """Decode again what is improbable in a text; the number of tokens stays.

    Args:
        engine: from `load`.
        text: what to revise.
        prompt: what the text is an answer to; without it the text stands alone, as a raw prompt does.
        keep: causal probability from which on a token is kept.
        rounds: most looks at a block.
        threshold: confidence at which a mask is committed.
        block_length: tokens looked at together; default the engine's.

    Raises:
        RequestError: an argument is out of range or the text does not fit.
    """
    started = time.perf_counter()
    check_engine(engine)
    limit = engine.info.build.max_seq_len
    check_text(text, "text")
    given = engine.text.encode_plain(text)
    window = engine.info.build.block_length if block_length is None else block_length
    BLOCK_LENGTH.check("block_length", window, numbers.Integral)
    _ROUNDS.check("rounds", rounds, numbers.Integral)
    _KEEP.check("keep", keep)
    THRESHOLD.check("threshold", threshold)
    if not given:
        raise RequestError("--text is empty; give some text to revise")
    context = engine.text.encode("") if prompt is None else encode(engine, prompt, Options())
    kept = 0 if context else 1  # the first token of all has nothing before it that could tell
    if len(context) + len(given) > limit:
        raise RequestError(
            f"prompt and text have {counted(len(context) + len(given), 'token')}, the engine's max_seq_len is "
            f"{limit}; shorten the text or build with a larger --max-seq-len"
        )
    with Row(engine.backend, context + given[:kept]) as row:
        for start in range(kept, len(given), window):
            row.tokens += _block(row, given[start : start + window], keep, rounds, threshold)
        tokens, nfe = row.tokens[len(context) :], row.nfe
    changed = sum(a != b for a, b in zip(tokens, given, strict=True))
    revised = engine.text.decode(tokens) if changed else text
    return Revised(revised, tokens, changed, nfe, (time.perf_counter() - started) * 1e3)


def _block(row: Row, block: list[int], keep: float, rounds: int, threshold: float) -> list[int]:
    """The block after its rounds; the row's own tokens are its context."""
    row.commit(len(row.tokens))
    for _ in range(rounds):
        pass_ = causal("verify", [row.tokens[-1], *block[:-1]], row.length - 1, predict_all=True, logits=True)
        logits = row.run(pass_).logits  # (S, V) f32
        assert logits is not None
        own = probability(logits, block)
        if (own >= keep).all():
            break
        masked = [token if sure else row.mask_id for token, sure in zip(block, own >= keep, strict=True)]
        after = row.denoise(masked, threshold)
        if after == block:
            break
        block = after
    return block

"""Log-probabilities as vLLM spells them in JSON, of prompts over HTTP and of answers from Triton Inference Server."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ..runtime.requests.token_logprobs import TokenLogprobs
from ..runtime.text.codec import TextCodec


def logprobs_by_id(
    codec: TextCodec, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs | None]
) -> Iterator[dict[str, dict[str, Any]] | None]:
    """Of tokens: each and the likeliest ones by their ids, null where nothing stands before."""
    for token, one in zip(tokens, logprobs, strict=True):
        yield None if one is None else _by_id(codec, token, one)


def _by_id(codec: TextCodec, token: int, one: TokenLogprobs) -> dict[str, dict[str, Any]]:
    ranked = {id: (value, rank) for rank, (id, value) in enumerate(one.top, 1)}
    return {
        str(id): {"logprob": value, "rank": rank, "decoded_token": codec.piece(id)}
        for id, (value, rank) in {token: (one.logprob, one.rank), **ranked}.items()
    }

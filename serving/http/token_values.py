"""What is told of tokens, as JSON: OpenAI's log-probabilities of chats and of completions."""

from __future__ import annotations

import collections
from collections.abc import Sequence as Values
from typing import Any

from ...runtime.requests.generation import Generation
from ...runtime.requests.token_logprobs import TokenLogprobs
from ...runtime.text.codec import TextCodec, TokenOffsets


def chat_logprobs(codec: TextCodec, tokens: Values[int], logprobs: Values[TokenLogprobs]) -> dict[str, Any]:
    """Of tokens of a chat's answer."""
    content = [_chat_token(codec, token, one) for token, one in zip(tokens, logprobs, strict=True)]
    return {"content": content, "refusal": None}


def _chat_token(codec: TextCodec, token: int, one: TokenLogprobs) -> dict[str, Any]:
    def described(token: int, logprob: float) -> dict[str, Any]:
        return {"token": codec.name(token), "logprob": logprob, "bytes": list(codec.token_bytes(token))}

    return {**described(token, one.logprob), "top_logprobs": [described(*candidate) for candidate in one.top]}


class ContentTokens:
    """The tokens of an answer whose text is content, and not thoughts, calls or the marks around these.

    The parts of an answer do not say where they come from, so each is looked for in the bytes of the tokens, in order.
    """

    def __init__(self, codec: TextCodec) -> None:
        self._codec = codec
        self._pending = collections.deque[tuple[int, TokenLogprobs]]()
        self._open = b""  # the bytes of the last token that the text so far has not

    def tell(self, tokens: Values[int], logprobs: Values[TokenLogprobs]) -> None:
        """The answer's next tokens."""
        self._pending.extend(zip(tokens, logprobs, strict=True))

    def take(self, text: str) -> list[dict[str, Any]]:
        """The log-probabilities of the tokens that begin in the next thoughts or content, told before."""
        wanted = self._rest_after(text.encode())
        taken = list[dict[str, Any]]()
        while wanted and self._pending:
            token, one = self._pending.popleft()
            raw = self._codec.token_bytes(token)
            for piece, target in ((raw, wanted), (raw.lstrip(), wanted.lstrip())):  # space at a part's ends may be gone
                if piece and target and (target.startswith(piece) or piece.startswith(target)):
                    taken.append(_chat_token(self._codec, token, one))
                    wanted, self._open = target[len(piece) :], piece[len(target) :]
                    break
        return taken

    def _rest_after(self, text: bytes) -> bytes:
        """The text without what of it is the last token's."""
        done, self._open = self._open, b""
        if done.startswith(text):
            self._open = done[len(text) :]
        return text.removeprefix(done) if not self._open else b""


class TokenValues:
    """Of one answer's tokens, as the fields of its chunks: each token's are in the chunk that has the end of its text.

    Args:
        codec: the engine's.
        chat: whether in the form of a chat, or in that of a completion, which may begin with an echoed prompt.
    """

    def __init__(self, codec: TextCodec, *, chat: bool) -> None:
        self._codec = codec
        self._chat = chat
        self._offsets = TokenOffsets(codec)
        self._count = 0  # of the answer's tokens that were taken
        self._tokens = list[int]()  # to come with the next chunk, and so are those below
        self._logprobs = list[TokenLogprobs | None]()
        self._confidences = list[float | None]()

    def echo(self, tokens: Values[int], logprobs: Values[TokenLogprobs | None]) -> None:
        """The tokens of the prompt come first."""
        self._tokens += tokens
        self._logprobs += logprobs

    def tell(
        self, tokens: Values[int], logprobs: Values[TokenLogprobs] | None, confidences: Values[float | None] | None
    ) -> None:
        """The answer's next tokens, with what is known of them."""
        self._count += len(tokens)
        if logprobs is not None:
            self._tokens += tokens
            self._logprobs += logprobs
        self._confidences += confidences or ()

    def finish(self, generation: Generation) -> None:
        """All of the answer's tokens that were not told yet."""
        rest = slice(self._count, None)
        logprobs, confidences = generation.logprobs, generation.confidences
        self.tell(generation.token_ids[rest], logprobs and logprobs[rest], confidences and confidences[rest])

    def take(self, end: int | None = None) -> dict[str, Any]:
        """The fields of a chunk; `end` is the length of the whole text where that is known."""
        fields: dict[str, Any] = {"logprobs": self._taken_logprobs(end)}
        if self._confidences:
            fields["confidences"] = self._confidences
            self._confidences = []
        return fields

    def _taken_logprobs(self, end: int | None) -> dict[str, Any] | None:
        tokens, logprobs = self._tokens, self._logprobs
        self._tokens, self._logprobs = [], []
        if not tokens:
            return None
        if self._chat:
            return chat_logprobs(self._codec, tokens, [one for one in logprobs if one is not None])
        name = self._codec.name
        offsets = self._offsets.push(tokens)
        return {
            "tokens": [name(token) for token in tokens],
            "token_logprobs": [None if one is None else one.logprob for one in logprobs],
            # The token itself always stands there, so there may be one more than was asked for.
            "top_logprobs": [
                None if one is None else {name(i): value for i, value in (*one.top, (token, one.logprob))}
                for token, one in zip(tokens, logprobs, strict=True)
            ],
            # A token of the stop string lies after the text.
            "text_offset": offsets if end is None else [min(offset, end) for offset in offsets],
        }

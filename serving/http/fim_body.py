"""The body of a request that fills a hole: Mistral's fields, those of infill, and what a filling does not depend on."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from ...errors import RequestError
from ...runtime.editing.infill import LONGEST_FREE, Filled
from ...runtime.editing.options import HELP, Method
from ...runtime.requests.options import BLOCK_LENGTH
from ...runtime.text.codec import TextCodec
from .body import DRAWING, Completion, Streamed
from .option_fields import with_options

_SHARED = (
    "model", "prompt", "suffix", "max_tokens", "stop", "stream", "stream_options", "request_id", "threshold", *DRAWING,
)  # fmt: skip
_PLAIN: dict[str, Any] = {"n": 1, "echo": False, "diffusing": False}  # what a hole has anyway


@with_options(*DRAWING, "stop")
class Fim(Streamed):
    """A text with a hole."""

    block_length: int | None = Field(
        None, description=f"Look at this many tokens at once. Allowed: {BLOCK_LENGTH}. Default: the engine's."
    )
    prompt: str = Field(description=HELP["prefix"])
    suffix: str = Field("", description=HELP["suffix"])
    length: int | None = Field(
        None, description=f"Fill the hole with exactly this many tokens. Allowed: {BLOCK_LENGTH}."
    )
    max_tokens: int | None = Field(
        None,
        description=f"Fill the hole with at most this many tokens. Default and most: {LONGEST_FREE}, or length.",
    )
    method: Method | None = Field(None, description=HELP["method"])
    width: int | None = Field(None, description=f"{HELP['width']} Allowed: {BLOCK_LENGTH}.")
    stream: bool | None = Field(None, description="Send the filling as server-sent events, in one piece.")

    @classmethod
    def of(cls, body: Completion) -> Fim:
        """The hole of a completion that has a suffix. Raises RequestError."""
        given = body.model_dump(exclude_none=True)
        wrong = [name for name, value in given.items() if name not in _SHARED and _PLAIN.get(name, ...) != value]
        if wrong:
            raise RequestError(f"{wrong[0]} is not for a hole between prompt and suffix; leave one of them out")
        if not isinstance(body.prompt, str):
            raise RequestError("prompt is a list, allowed with a suffix: text; send a request for each")
        return cls.model_validate({name: value for name, value in given.items() if name in _SHARED})

    def options(self) -> dict[str, Any]:
        """Arguments of `infill`. Raises RequestError."""
        self.check_stream()
        longest = LONGEST_FREE if self.max_tokens in (None, -1) else self.max_tokens
        assert longest is not None
        if longest < 1:
            allowed = "allowed: 1 or more; leave it out for a length that fits"
            raise RequestError(f"max_tokens is {longest!r:.60}, {allowed}")
        longest = min(longest, LONGEST_FREE)
        length = longest if self.length is None and not self.suffix and self.method != "block" else self.length
        chosen = self.model_dump(include={"threshold", "block_length", "method", "width"}, exclude_none=True)
        return {**chosen, "length": length, "longest": longest}

    def cut(self, filling: str) -> str:
        """A filling up to the first stop text."""
        stop: str | list[str] | None = getattr(self, "stop", None)
        texts = [stop] if isinstance(stop, str) else stop or []
        return filling[: min((at for text in texts if text and (at := filling.find(text)) >= 0), default=None)]

    def usage(self, filled: Filled, text: TextCodec) -> dict[str, Any]:
        """What the filling took, in OpenAI's words."""
        prompt_tokens = len(text.encode_plain(self.prompt)) + len(text.encode_plain(self.suffix))
        completion_tokens = len(filled.token_ids[0])
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "nfe": filled.nfe,
            "method": filled.method,
        }

    def warnings(self) -> list[str]:
        """Sentences about what has no effect; editors send it all the same."""
        given = [name for name in DRAWING if getattr(self, name) is not None]
        return [f"without effect, as a filling is not drawn: {', '.join(given)}"] if given else []

"""The prompts that an engine is verified with where none are given."""

from __future__ import annotations

from ..runtime.loading import LoadedEngine
from ..runtime.requests.options import Options
from ..runtime.requests.prepare import encode, prepare

# The last begins as the first does, whose row is kept by then, so that it is copied where prompts share a batch.
QUESTIONS = (
    "Translate into French and German: The house at the end of the road is old.",
    "Count from 3 to 9.",
    "Sort these numbers: 41, 7, 93.",
    "Write a Python function that returns the sum of a and b.",
    "Translate into French and German: The house at the end of the road is new and red.",
)
# So long that a cache grows and a prompt takes several passes.
LONG = "Continue the list: " + " ".join(f"item {i} costs {7 * i % 31} and weighs {5 * i % 17};" for i in range(60))


def token_ids(engine: LoadedEngine, prompts: tuple[str, ...], max_new_tokens: int, *, raw: bool) -> list[list[int]]:
    """The prompts as ids, in the chat template unless `raw`. Raises RequestError.

    Where none are given there are built-in ones, which lose their beginning if they are too long for the engine.
    """
    if prompts:
        return [prepare(engine, text, Options(chat=not raw, max_new_tokens=max_new_tokens)).prompt for text in prompts]
    room = max(1, engine.info.build.max_seq_len - max_new_tokens)
    return [encode(engine, text, Options(chat=not raw))[-room:] for text in (*QUESTIONS, LONG)]

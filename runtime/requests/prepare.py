"""One request from the outside: its prompt on the way in, its answer on the way out.

In: a prompt (text, messages or token ids) and `Options`. Out: `prepare` makes the `Sequence` that is decoded, `result`
turns the finished one into a `Generation` with its counts and times. The surprising fact: everything a user can get
wrong is refused here, before a row is taken; a request that runs can only end, be cancelled or meet a broken engine.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ...errors import RequestError
from ..engines.engine import PassKind
from ..planning.draft_planner import Pace, Way
from ..text.codec import Message
from .options import AUTO, Options, check_text
from .selection import TokenLogprobs
from .sequence import FinishReason, Sequence
from .settings import settle

if TYPE_CHECKING:
    from ..generate import LoadedEngine

Prompt = str | list[int] | list[Message]


@dataclasses.dataclass(frozen=True)
class Acceptance:
    """Tokens emitted by each verify pass, bonus included; `mean` is None without a verify pass.

    verified: tokens that each of them looked at, the last emitted one included.
    """

    mean: float | None
    lengths: list[int]
    verified: list[int]


@dataclasses.dataclass(frozen=True)
class Generation:
    """A finished request. Times are milliseconds of wall clock; docs/semantics.md defines the counts.

    reused_tokens: of the prompt, those whose K/V were copied from an earlier request. finish_reason: `stop`, `length`,
    or `cancelled`, and then the text is what had been decided by then. logprobs, confidences: one per token, None
    unless asked for.
    """

    text: str
    token_ids: list[int]
    prompt_tokens: int
    reused_tokens: int
    finish_reason: FinishReason
    mode: str
    block_length: int | str
    threshold: float
    nfe: dict[PassKind, int]
    decode_tpf: float | None
    e2e_tpf: float | None
    acceptance: Acceptance
    adapter_tokens: int
    timings_ms: dict[str, float]
    logprobs: list[TokenLogprobs] | None = None
    confidences: list[float | None] | None = None

    def as_dict(self) -> dict[str, Any]:
        """As one JSON object; what was not asked for is left out."""
        unasked = [name for name in ("logprobs", "confidences") if getattr(self, name) is None]
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in unasked}


def prepare(engine: LoadedEngine, prompt: Prompt, options: Options) -> Sequence:
    """Encode a prompt and check every option against the engine. Raises RequestError."""
    ids = encode(engine, prompt, options)
    settings = settle(engine.info, engine.text, len(ids), options)
    budgeted = settings.mode in ("quadratic_spec", AUTO) and settings.groups == "auto"
    pace = None
    if settings.auto_block and settings.mode != "ar":
        ways: dict[str, tuple[Way, ...]] = {
            "linear_spec": ("linear_spec",),
            "quadratic_spec": ("quadratic_spec",),
            AUTO: ("ar", "linear_spec", "quadratic_spec"),
        }
        pace = Pace(engine.cost, engine.record, ways[settings.mode])
    transcript = engine.text.transcript(settings.stop, settings.stop_token_ids)
    cost = engine.cost if budgeted else None
    return Sequence(engine.info.model, ids, settings, transcript, cost, pace, engine.backend.samples)


def encode(engine: LoadedEngine, prompt: Prompt, options: Options) -> list[int]:
    """The prompt's token ids. Raises RequestError."""
    if isinstance(prompt, str):
        check_text(prompt, "prompt")
        if not options.chat:
            return _not_empty(engine.text.encode(prompt))
        messages: list[Message] = [{"role": "user", "content": prompt}]
    elif isinstance(prompt, list) and all(isinstance(i, int) and not isinstance(i, bool) for i in prompt):
        vocab = engine.info.model.vocab_size
        ids = [i for i in prompt if isinstance(i, int)]
        wrong = next((i for i in ids if not 0 <= i < vocab), None)
        if wrong is not None:
            raise RequestError(f"prompt holds token id {wrong}, allowed: 0 to {vocab - 1}")
        return _not_empty(ids)
    elif isinstance(prompt, list) and all(isinstance(m, Mapping) for m in prompt):
        messages = [m for m in prompt if isinstance(m, Mapping)]
    else:
        raise RequestError(
            f"prompt is {prompt!r:.60}, allowed: text, a list of messages (role and content), or a list of token ids"
        )
    if options.system is not None:
        if messages and messages[0].get("role") == "system":
            raise RequestError("system text is given as an option and as the first message too; give it once")
        messages = [{"role": "system", "content": options.system}, *messages]
    return _not_empty(engine.text.encode_chat(messages, options.thinking))


def _not_empty(ids: list[int]) -> list[int]:
    if not ids:
        raise RequestError("the prompt is empty; give at least one token")
    return ids


def tokens_per_pass(emitted: int, nfe: Mapping[PassKind, int]) -> tuple[float | None, float | None]:
    """Of all passes but prefill, and of all; None where there is no such pass."""
    passes = sum(nfe.values())
    decoding = passes - nfe["prefill"]
    return emitted / decoding if decoding else None, emitted / passes if passes else None


def result(engine: LoadedEngine, sequence: Sequence) -> Generation:
    """The finished request with its figures."""
    assert sequence.finish is not None
    decode_tpf, e2e_tpf = tokens_per_pass(len(sequence.tokens), sequence.nfe)
    lengths = sequence.accepted
    first = sequence.first_token if sequence.tokens else sequence.ended
    return Generation(
        text=sequence.transcript.text(sequence.tokens),
        token_ids=sequence.tokens,
        prompt_tokens=len(sequence.prompt),
        reused_tokens=sequence.reused,
        finish_reason=sequence.finish,
        mode=sequence.settings.mode,
        block_length=sequence.settings.asked_block,
        threshold=sequence.settings.threshold,
        nfe=sequence.nfe,
        decode_tpf=decode_tpf,
        e2e_tpf=e2e_tpf,
        acceptance=Acceptance(sum(lengths) / len(lengths) if lengths else None, lengths, sequence.verified),
        adapter_tokens=sequence.adapter_tokens if engine.info.has_adapter else 0,
        timings_ms={
            "load": engine.load_ms,
            "queued": (sequence.started - sequence.submitted) * 1e3,
            "prefill": (first - sequence.started) * 1e3,
            "decode": (sequence.ended - first) * 1e3,
            "total": (sequence.ended - sequence.started) * 1e3,
        },
        logprobs=None if sequence.settings.logprobs is None else sequence.chooser.logprobs,
        confidences=sequence.confidences[: len(sequence.tokens)] if sequence.settings.confidences else None,
    )

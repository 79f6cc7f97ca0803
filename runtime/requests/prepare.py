"""Turns a prompt and options into the `Sequence` that is decoded.

Everything a user can get wrong is refused here, before a row is taken; a request that runs can only end, be cancelled
or meet a broken engine.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping

from ...contract import MAX_BLOCK, PREFILL_CHUNK, counted
from ...errors import RequestError
from ..engines.engine import NO_LOGITS
from ..images.sight import PromptImages
from ..loading import LoadedEngine
from ..planning.draft_planner import DraftPlanner, ExactMode
from ..planning.draft_statistics import BLOCKS
from ..text.checks import check_text
from ..text.messages import Message, check_texts
from ..text.thoughts import BRACKETS, Thoughts
from ..text.transcript import Transcript
from .image_parts import place_images, plain_messages, read_images
from .options import AUTO, Options
from .sequence import Sequence
from .settings import Settings, check_prompt, settle
from .tool_use import read_tool_use, template_variables

FAR = 300_000  # characters from which a prompt is encoded only if it may fit: it takes a tenth of a second and more
_LAST = 16  # tokens at the end of a prompt, among which is what opens thoughts
_NO_THOUGHTS = "thinking is ignored, since the chat template has no place for thoughts"
_BEGUN = "thinking is ignored, since the answer has begun"
Prompt = str | list[int] | list[Message]


def prepare(engine: LoadedEngine, prompt: Prompt, options: Options) -> Sequence:
    """Encode a prompt and check every option against the engine. Raises RequestError."""
    return _check(engine, prompt, options).sequence(options.seed)


def prepare_all(engine: LoadedEngine, requests: Iterable[tuple[Prompt, Options]]) -> Iterator[Sequence]:
    """`prepare` for several; of those in a row that differ in their seeds alone, the prompt is read and scored once.

    A RequestError tells the place of its request.
    """

    def shared(request: tuple[Prompt, Options]) -> tuple[int, Options]:
        return id(request[0]), dataclasses.replace(request[1], seed=0)

    place = 0
    for _, alike in itertools.groupby(requests, shared):
        answers = [*alike]
        try:
            checked = _check(engine, *answers[0])
        except RequestError as error:
            error.place = place
            raise
        place += len(answers)
        sequences = [checked.sequence(options.seed) for _, options in answers]
        for sequence in sequences:
            sequence.prompt_scores = sequences[0].prompt_scores
            yield sequence


@dataclasses.dataclass(frozen=True)
class _Checked:
    """A prompt and its options, all but the seed, encoded and checked.

    opened: whether the answer begins inside a think block. thoughts: the marks around those that it may begin with.
    """

    engine: LoadedEngine
    ids: list[int]
    images: PromptImages | None
    settings: Settings
    opened: bool
    thoughts: Thoughts | None

    def sequence(self, seed: int) -> Sequence:
        """One answer."""
        engine, thoughts = self.engine, self.thoughts
        settings = dataclasses.replace(self.settings, params=dataclasses.replace(self.settings.params, seed=seed))
        grouped = settings.mode == "quadratic_spec" and settings.groups == "auto" and settings.block_length > 1
        planner = None
        if settings.mode != "ar" and (settings.auto_block or grouped):
            modes: dict[str, tuple[ExactMode, ...]] = {
                "linear_spec": ("linear_spec",),
                "quadratic_spec": ("quadratic_spec",),
                AUTO: ("ar", "linear_spec", "quadratic_spec"),
            }
            blocks = BLOCKS if settings.auto_block else (settings.block_length,)
            planner = DraftPlanner(engine.cost, engine.acceptance, modes[settings.mode], blocks)
        transcript = Transcript(
            engine.text,
            settings.stop,
            settings.stop_token_ids,
            thoughts=thoughts,
            opened=thoughts is not None and self.opened,
        )
        samples = engine.backend.samples
        sequence = Sequence(
            engine.info.model, self.ids, settings, transcript, planner, samples, self.opened, self.images
        )
        scored = settings.prompt_logprobs is not None
        if (sequence.needs_logits or scored) and not engine.info.build.gather_generation_logits:
            raise RequestError(NO_LOGITS)
        return sequence


def _check(engine: LoadedEngine, prompt: Prompt, options: Options) -> _Checked:
    ids, images = encode_with_images(engine, prompt, options, fitting=True)
    marks = engine.text.thoughts
    opened = options.chat and marks.opened_by(engine.text.decode_all(ids[-_LAST:]))
    begun = _beginning(prompt, options)
    if begun is not None and not opened:
        opened = marks.left_open_by(begun)
    if opened:  # by the template or the beginning, whether that was asked for or not
        options = dataclasses.replace(options, thinking=True)
    # Models with brackets think unasked.
    thinks = options.thinking or (options.chat and marks is BRACKETS)
    ignored = None
    if options.thinking and not opened:
        if begun is not None:
            ignored = _BEGUN
        elif _without_thoughts(engine, prompt, options, ids):
            ignored = _NO_THOUGHTS
    if ignored is not None:
        options = dataclasses.replace(options, thinking=False, thinking_budget=None)
    settings = settle(engine.info, engine.text, len(ids), options)
    if ignored is not None:
        settings = dataclasses.replace(settings, warnings=(*settings.warnings, ignored))
    _check_memory(engine, len(ids), settings)
    thoughts = marks if settings.stop and thinks and not options.stop_in_thinking else None
    return _Checked(engine, ids, images, settings, opened, thoughts)


def _beginning(prompt: Prompt, options: Options) -> str | None:
    """The beginning of the answer, where a conversation ends with that."""
    last = prompt[-1] if options.continue_final_message else None
    return str(plain_messages([last])[0][0]["content"]) if isinstance(last, Mapping) else None


def _without_thoughts(engine: LoadedEngine, prompt: Prompt, options: Options, ids: list[int]) -> bool:
    """Whether a conversation whose prompt opens no thoughts would be the same prompt if the model were not to think."""
    if not options.chat or ids == prompt:
        return False
    return encode_with_images(engine, prompt, dataclasses.replace(options, thinking=False))[0] == ids


def _check_memory(engine: LoadedEngine, prompt_tokens: int, settings: Settings) -> None:
    """Refuse a request that could not run even alone, where rows share a memory. Raises RequestError."""
    pages = engine.backend.pages
    if pages is None:
        return
    # What a pass may write past the answer's end: mask groups, or a block with the next one's masks.
    past = {"ar": 0, "diffusion": 2 * MAX_BLOCK, "linear_spec": MAX_BLOCK}.get(settings.mode, PREFILL_CHUNK + MAX_BLOCK)
    room = pages.slots - past
    if prompt_tokens + settings.max_new_tokens > room:
        raise RequestError(
            f"the prompt has {counted(prompt_tokens, 'token')} and max_new_tokens is {settings.max_new_tokens}, the "
            "memory for "
            f"K/V holds {max(room, 0)} in mode {settings.mode}; ask for less, or give the engine more memory by "
            "--gpu-memory-utilization"
        )


def encode(engine: LoadedEngine, prompt: Prompt, options: Options) -> list[int]:
    """The prompt's token ids, of a prompt without images. Raises RequestError."""
    ids, images = encode_with_images(engine, prompt, options)
    if images is not None:
        raise RequestError("the prompt has an image, allowed here: text alone; leave it out")
    return ids


def encode_with_images(
    engine: LoadedEngine, prompt: Prompt, options: Options, *, fitting: bool = False
) -> tuple[list[int], PromptImages | None]:
    """The prompt's token ids, and its images if it has some; `fitting` may refuse one that is far too long.

    Raises RequestError.
    """
    continued = options.continue_final_message
    if continued and not (isinstance(prompt, list) and prompt and isinstance(prompt[-1], Mapping)):
        raise RequestError(
            "continue_final_message goes with messages, the last of which is the answer's beginning; leave it out"
        )
    if isinstance(prompt, str):
        check_text(prompt, "prompt")
        if not options.chat:
            if fitting:
                _check_far(engine, prompt, options, rendered=False)
            return _not_empty(engine.text.encode(prompt)), None
        messages: list[Message] = [{"role": "user", "content": prompt}]
    elif isinstance(prompt, list) and all(isinstance(i, int) and not isinstance(i, bool) for i in prompt):
        vocab = engine.info.model.vocab_size
        ids = [i for i in prompt if isinstance(i, int)]
        wrong = next((i for i in ids if not 0 <= i < vocab), None)
        if wrong is not None:
            raise RequestError(f"prompt holds token id {wrong!r:.60}, allowed: 0 to {vocab - 1}")
        mask = engine.info.model.mask_id
        if mask in ids:
            raise RequestError(
                f"prompt holds token id {mask}, the mask, allowed: any other id; leave it out, or fill a hole by infill"
            )
        return _not_empty(ids), None
    elif isinstance(prompt, list) and all(isinstance(m, Mapping) for m in prompt):
        messages = [m for m in prompt if isinstance(m, Mapping)]
    else:
        raise RequestError(
            f"prompt is {prompt!r:.60}, allowed: text, a list of messages (role and content), or a list of token ids"
        )
    use = read_tool_use(engine.text, options)
    turns, sources = plain_messages(conversation(messages, options.system))
    shown = None if use is None else use.shown
    variables = template_variables(options)
    if sources and not options.chat:
        raise RequestError("the prompt has an image and no chat template, which makes its place; leave out --raw")
    images = read_images(engine, sources) if sources else None
    rendered = engine.text.render_chat(turns, options.thinking, shown, variables, continued)
    check_text(rendered, "the rendered conversation")  # a template may show names and other fields of messages
    if fitting:
        _check_far(engine, rendered, options, rendered=True)
    ids = engine.text.encode_rendered(rendered)
    return (_not_empty(ids), None) if images is None else place_images(engine, ids, images)


def _check_far(engine: LoadedEngine, text: str, options: Options, *, rendered: bool) -> None:
    """Refuse a long text that cannot fit however few tokens it has. Raises ContextLengthError."""
    if len(text) > FAR:
        check_prompt(engine.info, engine.text.fewest(text, rendered=rendered), options, at_least=True)


def conversation(messages: list[Message], system: str | None) -> list[Message]:
    """The messages with the system text that is given as an option before them. Raises RequestError."""
    check_texts(messages)  # while they have the places that they were given at
    if system is None:
        return messages
    if messages and messages[0].get("role") == "system":
        raise RequestError("system text is given as an option and as the first message too; give it once")
    return [{"role": "system", "content": system}, *messages]


def _not_empty(ids: list[int]) -> list[int]:
    if not ids:
        raise RequestError("the prompt is empty; give at least one token")
    return ids

"""One request as it is decoded: its settings, what it has emitted, and what it has cost."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal

from ...config import ModelConfig
from ..engines.grouping import Grouping
from ..engines.passes import PASS_KINDS, Following, Pass, PassKind, Prediction, agreed
from ..images.sight import PromptImages
from ..planning.draft_planner import DraftPlanner, ExactMode
from ..planning.pass_costs import Load
from ..text.transcript import Transcript
from .outcome import PassOutcome
from .selection import TokenSelector
from .settings import Settings
from .token_logprobs import PromptScores

FinishReason = Literal["stop", "length", "cancelled"]


class Sequence:
    """One request's state.

    Emission alone decides when a request stops (EOS, limit, stop string), so every mode stops by the same rule.
    """

    def __init__(
        self,
        model: ModelConfig,
        prompt: list[int],
        settings: Settings,
        transcript: Transcript,
        planner: DraftPlanner | None = None,
        samples: bool = False,
        opened: bool = False,
        images: PromptImages | None = None,
    ) -> None:
        self.model = model
        self.opened = opened  # whether the answer begins inside a think block
        self.prompt = prompt
        self.images = images
        # By what two prompts are compared: equal ids of images are equal only where the images are.
        self.keys = prompt if images is None else images.keys(prompt)
        self.settings = settings
        self.transcript = transcript
        self.planner = planner  # None: mode, block length and groups are fixed
        self.load = Load()  # that of its batch, once it is in one
        self.block_length = settings.block_length  # of the next block; planned anew if there is a planner
        self.tokens: list[int] = []
        self.finish: FinishReason | None = None
        self.length = 0  # committed tokens: cache slots that hold valid K/V
        self.reused = 0  # of the prompt, tokens whose K/V were copied from another row
        self.nfe: dict[PassKind, int] = dict.fromkeys(PASS_KINDS, 0)
        self.accepted: list[int] = []  # tokens emitted by each verify
        self.verified: list[int] = []  # tokens that each verify looked at, the last emitted one included
        self.outcome = PassOutcome()  # of the pass whose prediction the loop is looking at
        # Makes the pass after the one that the loop waits for, or None if that is sure to be the last. A loop sets it
        # for one pass, where it knows all of the next but what the engine gives.
        self.follower: Callable[[Sequence, Pass], Following | None] | None = None
        # The pass after the one that the loop waits for, if that has been begun and was arranged on the device.
        self.begun: Grouping | None = None
        self.adapter_tokens = 0  # forwarded with the drafter adapter's gate open
        self.submitted = time.perf_counter()
        self.started = self.submitted
        self.first_token = 0.0
        self.ended = 0.0
        self.confidences: list[float | None] = []  # of diffusion, if requested; None where the token was forced
        # Ids that end the answer. The mask never comes, and stands in blocks.
        self.stops = frozenset(model.eos_ids).union(settings.stop_token_ids) - {model.mask_id}
        self.selector = TokenSelector(settings, prompt, model.mask_id, self.stops, model.vocab_size, samples)
        # Whether a pass must bring its logits.
        self.needs_logits = not self.selector.plain or settings.policy.by_entropy
        self._watch_text = bool(settings.stop)
        self.prompt_scores: PromptScores | None = None
        if settings.prompt_logprobs is not None:
            self.score_from(1)

    def for_engine(self, pass_: Pass) -> Pass:
        """A loop's pass as the engine must get it: with what it draws by, and with the embeddings of images."""
        if self.selector.drawn:
            pass_ = self.selector.with_sampling(pass_)
        if self.images is None or pass_.kind != "prefill":
            return pass_
        found = self.images.within(pass_.write_at, pass_.write_at + pass_.ids.size)
        return pass_ if found is None else pass_._replace(embedded=found[0], embeddings=found[1])

    def score_from(self, first: int) -> None:
        """Score the prompt's tokens from this one on; see `PromptScores`."""
        assert self.settings.prompt_logprobs is not None
        model = self.model
        self.prompt_scores = PromptScores(
            self.prompt, first, self.settings.prompt_logprobs, model.mask_id, model.vocab_size
        )

    @property
    def reusable(self) -> int:
        """Of the prompt, the tokens whose K/V may be copied: what follows them must be forwarded for its prediction."""
        last = len(self.prompt) - 1  # its prediction is the seed
        return last if self.prompt_scores is None else min(last, self.prompt_scores.begin)

    @property
    def stand_in(self) -> int:
        """An id for one that is not known yet: any but the mask's."""
        return int(self.model.mask_id == 0)

    @property
    def remaining(self) -> int:
        """Tokens still wanted."""
        return self.settings.max_new_tokens - len(self.tokens)

    def before_stop(self, tokens: list[int]) -> int:
        """How many tokens stand before the first that ends the answer."""
        if self.stops.isdisjoint(tokens):
            return len(tokens)
        return next(at for at, token in enumerate(tokens) if token in self.stops)

    def emit(self, tokens: list[int]) -> int:
        """Append final tokens until the request finishes; returns how many."""
        if self._watch_text and len(tokens) > 1:  # the text of any may end it
            emitted = 0
            while emitted < len(tokens) and not self.finish:
                emitted += self.emit(tokens[emitted : emitted + 1])
            return emitted
        taken = tokens[: min(self.before_stop(tokens) + 1, self.remaining)]
        if not taken:
            return 0
        if not self.tokens:
            self.first_token = time.perf_counter()
        self.tokens += taken
        self.selector.push(taken)
        if taken[-1] in self.stops or (self._watch_text and self.transcript.reaches_stop(self.tokens)):
            self.finish = "stop"
        elif not self.remaining:
            self.finish = "length"
        return len(taken)

    def take(self, prediction: Prediction, index: int) -> int:
        """Choose the next token by a causal prediction, the pass's number `index`, and emit it."""
        token = self.selector.next(prediction, index)
        self.outcome.emitted.append(token)
        self.emit([token])
        return token

    def verify(self, prediction: Prediction, draft: list[int], unseen: list[float]) -> int:
        """Emit AR's tokens as long as they agree with the draft, and one more; returns how many were emitted.

        The committed length grows by as many. `prediction` begins with those for the draft's tokens, in order, and for
        the one after them. `unseen` are the confidences of drafted tokens beyond these.
        """
        emitted = self.outcome.emitted
        if self.selector.as_predicted:
            said = prediction.token[: len(draft) + 1].tolist()
            emitted += said[: self.emit(said[: agreed(said, draft) + 1])]
        else:
            for index, drafted in enumerate([*draft, None]):
                if self.take(prediction, index) != drafted or self.finish:
                    break
        accepted = len(emitted)
        kept = accepted - (emitted[-1:] != draft[accepted - 1 : accepted])
        self.outcome.kept = kept
        self.outcome.refused = draft[kept:] if kept < accepted else []
        self.length += accepted
        self.accepted.append(accepted)
        self.verified.append(len(draft) + 1)
        if self.planner is not None and (draft or unseen):
            ended = self.finish is not None
            unseen = unseen if kept == len(draft) and not ended else []
            self.planner.learn(len(draft) + 1, accepted, ended=ended, unseen=unseen)
        return accepted

    def plan(self) -> ExactMode | None:
        """Choose the next block's length, if that was left open; returns the mode that goes with it."""
        if self.planner is None:
            return None
        mode, self.block_length = self.planner.plan(self.load)
        return mode

    def next_plan(self) -> tuple[ExactMode | None, int]:
        """The mode and block length that `plan` will choose next; 0 where nobody knows, or no pass is begun ahead."""
        if not self.load.ahead:
            return None, 0
        return (None, self.block_length) if self.planner is None else self.planner.next(self.load) or (None, 0)

    def close_after_eos(self, block: list[int]) -> list[int]:
        """Turn every mask after the block's first EOS into that EOS, so that nothing after it is denoised."""
        at = self.before_stop(block)
        if at == len(block):
            return block
        rest = [block[at] if token == self.model.mask_id else token for token in block[at + 1 :]]
        return [*block[: at + 1], *rest]

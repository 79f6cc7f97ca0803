"""Decode passes of one torch engine, timed in several ways to run its kernels, over the same weights and K/V."""

from __future__ import annotations

import random

from ....contract import PREFILL_CHUNK
from ....tuned import Choice
from ..passes import bidirectional, causal
from .engine import TorchEngine
from .flat import flat_shape
from .projections import OWN

CONTEXTS = (512, 4096)  # slots, those of the pass included, or what the engine takes
SIZES = (1, 32)  # tokens of a decode step, and of a draft's or a verify's block
_REPLAYS = 8  # in a row


class Probes:
    """The passes, each of a row of its own that shares a prompt of random ids with the others."""

    def __init__(self, engine: TorchEngine) -> None:
        self.engine = engine
        model, longest = engine.info.model, engine.info.build.max_seq_len
        mask = model.mask_id
        places = [
            (size, context)
            for context in dict.fromkeys(min(context, longest) for context in CONTEXTS)
            for size in SIZES
            if 2 * size <= context
        ]
        token = int(mask == 0)  # any but the mask
        self.names = [f"{size} at {context}" for size, context in places]
        self.passes = [
            causal("decode", [token], context - 1)
            if size == 1
            else bidirectional("denoise", [mask] * size, context - size, 0.9)
            for size, context in places
        ]
        drawn = random.Random(0)
        ids = [drawn.randrange(model.vocab_size) for _ in range(max(p.write_at for p in self.passes))]
        ids = [token if one == mask else one for one in ids]
        self.cache = engine.open(1 + len(self.passes))
        for at in range(0, len(ids), PREFILL_CHUNK):
            self.cache.forward([causal("prefill", ids[at : at + PREFILL_CHUNK], at)])
        for row, pass_ in enumerate(self.passes, 1):
            self.cache.move(0, row, pass_.write_at)

    @property
    def flips(self) -> tuple[str, ...]:
        """What can be chosen here: whether kernels begin early ("pdl"), and each product of 16 bits."""
        products = OWN if self.engine.info.build.quantization is None else ()
        return (*(("pdl",) if self.engine.device.overlaps_launches else ()), *products)

    @property
    def exact(self) -> bool:
        """Whether every choice must give the same tokens, but for near ties."""
        return self.engine.info.build.dtype == "f32"

    def trial(self, choice: Choice) -> Trial:
        """The passes run in one way."""
        return Trial(self, choice)


class Trial:
    """The passes as one choice runs them: captured once, so that choices can be timed in turns."""

    def __init__(self, probes: Probes, choice: Choice) -> None:
        self._probes, self._choice = probes, choice
        engine, cache = probes.engine, probes.cache
        engine.choose(choice)
        self.tokens: list[list[int]] = []  # of each pass
        self.confidences: list[list[float]] = []
        self._steps = []
        for row, pass_ in enumerate(probes.passes, 1):
            for _ in range(3):  # eager, captured, replayed
                (prediction,) = cache.forward([pass_], row)
            self.tokens.append(prediction.token.tolist())
            self.confidences.append(prediction.confidence.tolist())
            self._steps.append(engine.steps.of(engine.steps.rounded(flat_shape([pass_]))))

    def seconds(self) -> list[float]:
        """What each pass takes on the device, measured once."""
        probes, engine = self._probes, self._probes.engine
        engine.model.vary(engine.model.kernels, *self._choice)  # for a shape that cannot be captured
        times = []
        with engine.lock, engine.device.use(engine.folder):
            engine.memory.show_table()
            for row, (step, pass_) in enumerate(zip(self._steps, probes.passes, strict=True), 1):
                step.fill([pass_], [probes.cache.rows[row]])
                step.run()
                times.append(engine.device.seconds(step.again, _REPLAYS))
        return times

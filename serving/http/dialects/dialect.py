"""What another API over the same requests needs: a body that becomes a prompt with options, and a writer of answers."""

from __future__ import annotations

import abc
import dataclasses
import re
import secrets
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

from ....errors import RequestError
from ....runtime.events.events import Event
from ....runtime.requests.generation import Generation
from ....runtime.requests.prepare import Prompt
from ....runtime.requests.spellings import resolve
from ..body import GENERATING, Decoding
from ..option_fields import with_options


@with_options(*GENERATING, "thinking_budget", "stop_in_thinking")
class DialectBody(Decoding):
    """A request of another API, with options by their own names beside what that has."""

    stream: bool | None = None

    @abc.abstractmethod
    def turns(self) -> list[Mapping[str, Any]]:
        """The conversation as the runtime takes it. Raises RequestError."""

    def prompts(self) -> list[Prompt]:
        """The conversation, the only prompt. Raises RequestError."""
        return [self.turns()]

    def reworded(self, error: RequestError) -> str:
        """See `Decoding.reworded`; the runtime's messages have other places than the client's."""
        return re.sub(r"^messages\.\d+\.content\b", "a message", super().reworded(error))

    def options(self) -> dict[str, Any]:
        """Options of the runtime, those that were given. Raises RequestError."""
        return resolve(self.given(), ignore_eos=False)


@dataclasses.dataclass
class Writer(abc.ABC):
    """Writes one answer in the words of an API.

    model: its name, for clients.
    """

    model: str
    id: str = dataclasses.field(default_factory=lambda: secrets.token_hex(12))
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    @abc.abstractmethod
    def full(self, generation: Generation) -> dict[str, Any]:
        """The whole answer."""

    @abc.abstractmethod
    def events(self, events: AsyncIterator[tuple[int, Event]]) -> AsyncIterator[dict[str, Any]]:
        """The answer as a stream of objects, each with its name as `type`."""

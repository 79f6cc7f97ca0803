"""The thoughts at the beginning of an answer's text: what stands around them, and where they end."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Thoughts:
    """The marks around thoughts, which stand at the beginning of an answer or nowhere."""

    open: str
    close: str

    def opened_by(self, prompt: str) -> bool:
        """Whether a prompt ends with the opening mark and space; a message may spell that mark, too."""
        return prompt.rstrip().endswith(self.open)

    def left_open_by(self, beginning: str) -> bool:
        """Whether the beginning of an answer ends inside of its thoughts."""
        return beginning.rfind(self.open) > beginning.rfind(self.close)

    def may_begin(self, text: str) -> bool:
        """Whether a text, which does not begin inside a think block, may yet turn out to begin with one."""
        return self.open.startswith(text.lstrip("\n"))

    def answer_start(self, text: str, opened: bool) -> int | None:
        """Where the answer begins, after the closing mark and line ends; None while none of it is there for certain.

        `opened`: whether the text begins inside a think block. A text without such a block is an answer as a whole.
        """
        if not opened:
            if self.may_begin(text):
                return None
            if not text.lstrip("\n").startswith(self.open):
                return 0
        close = text.find(self.close)
        if close < 0:
            return None
        answer = close + len(self.close)
        while text.startswith("\n", answer):
            answer += 1
        return answer if answer < len(text) else None


TAGS = Thoughts("<think>", "</think>")
BRACKETS = Thoughts("[THINK]", "[/THINK]")  # Mistral's


def thoughts_of(template: str) -> Thoughts:
    """The marks that a chat template speaks of, or the usual ones."""
    return BRACKETS if BRACKETS.open in template and TAGS.open not in template else TAGS

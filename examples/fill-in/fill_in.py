"""Fill holes of an answer and repair a wrong one, with an engine of the demonstration model.

    nemodiff build examples/tiny-chat-2 -o engines/tiny-chat-2
    python examples/fill-in/fill_in.py engines/tiny-chat-2

It fills holes from the question; it never learned to look ahead, so without a question its fillings rarely fit the text
after them.
"""

from __future__ import annotations

import sys

import nemodiff

QUESTION = "Write a Python function that returns the sum of a and b."
BROKEN = 'def add(a, b):\n    """Return the sum of a and b."""\n    result = a * b\n    return result'


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("Usage: python examples/fill-in/fill_in.py ENGINE")
    engine = nemodiff.load(sys.argv[1])
    # Two holes in one text: three tokens, and as many as fit.
    filled = nemodiff.fill(engine, ["def add(", 3, '):\n    """Return the', None, ' of a and b."""'], prompt=QUESTION)
    print(f"{filled.text}\n-- filled in: {filled.holes}, {sum(filled.nfe.values())} passes\n")
    # One hole of 16 tokens in a bidirectional block, with the text after it in the same block.
    between = nemodiff.infill(
        engine, "def add(a, b):", "\n    return result", length=16, prompt=QUESTION, method="block"
    )
    print(f"{between.text}\n-- filled in: 16 tokens, {sum(between.nfe.values())} passes\n")
    revised = nemodiff.revise(engine, BROKEN, prompt=QUESTION)
    print(f"{revised.text}\n-- revised: {revised.changed} of {len(revised.token_ids)} tokens changed")


if __name__ == "__main__":
    main()

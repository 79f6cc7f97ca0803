"""Compiles a grammar in a process of its own, which may be ended: the library bounds the work of no compilation.

It tries every remainder of `multipleOf`, and every state that patterns have together: hours and gigabytes for some
schemas of a line. This file also runs as a script, which gets the grammar on its standard input.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

SECONDS = 5  # of a processor; what is used takes less than one
_COSTLY = ("multipleOf", "pattern")
_TOKEN = re.compile(r"<\[\d+\]>")  # in llguidance's dialect of Lark


def compiles_in_time(grammar: str) -> bool:
    """Whether a grammar with what can take long compiles within `SECONDS`; if in doubt, True."""
    return not any(word in grammar for word in _COSTLY) or error_of(_TOKEN.sub("/x/", grammar)) is not None


def error_of(grammar: str) -> str | None:
    """Why a grammar does not compile, for a tokenizer of bytes; empty if it does, None if it takes too long."""
    if not sys.executable:  # Python inside of another program
        return ""
    command = [sys.executable, "-P", str(Path(__file__)), str(SECONDS)]
    # Windows limits no process to some time of a processor. There it is time on the clock, and more: other work counts.
    on_clock = 5 * SECONDS if sys.platform == "win32" else None
    try:
        trial = subprocess.run(command, input=grammar.encode(), capture_output=True, check=False, timeout=on_clock)
    except subprocess.TimeoutExpired:
        return None
    # Less, or on Windows much more, if the system ended it, for its time or for its memory.
    return trial.stdout.decode() if 0 <= trial.returncode < 2**31 else None


if __name__ == "__main__":
    if sys.platform != "win32":
        import resource

        resource.setrlimit(resource.RLIMIT_CPU, (int(sys.argv[1]), int(sys.argv[1])))
    import llguidance

    # Bytes instead of the real tokens, which take longer to read than most grammars.
    library = llguidance.LLTokenizer("byte")
    matcher = llguidance.LLMatcher(library, sys.stdin.buffer.read().decode(), log_level=0)
    sys.stdout.buffer.write(matcher.get_error().encode())

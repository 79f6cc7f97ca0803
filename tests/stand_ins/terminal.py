"""The command in a terminal."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import termios


def in_terminal(words: list[str], environment: dict[str, str], stdout: int | None = None) -> bytes:
    """What a command writes into a terminal, with lines ended as in a file; `stdout` may go elsewhere."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(ours, (24, 100))
    with subprocess.Popen(
        [sys.executable, "-m", "nemodiff", *words],
        stdin=subprocess.DEVNULL,
        stdout=theirs if stdout is None else stdout,
        stderr=theirs,
        env={**os.environ, **environment},
    ) as process:
        os.close(theirs)
        written = b""
        try:
            while part := os.read(ours, 4096):
                written += part
        except OSError:  # how Linux reports that the other end has closed
            pass
        os.close(ours)
    assert process.returncode == 0, written
    return written.replace(b"\r\n", b"\n")

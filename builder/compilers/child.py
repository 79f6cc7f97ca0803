"""A compiling child process: it imports what this process would, wherever it stands, and ends with it.

What the two say to each other lies in a folder of theirs, pickled.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_JOB_FILE = "job"
_RESULT_FILE = "result"
_OUTPUT_FILE = "output"


@contextlib.contextmanager
def child(module: str, work: Path, job: object, **variables: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a module of nemodiff in an empty folder, which holds its job and gets its result and what it prints.

    Leaving the block ends it with all that it has started. `variables` are added to its environment. What is temporary
    to it lies in the folder too.
    """
    (work / _JOB_FILE).write_bytes(pickle.dumps(job))
    path = os.pathsep.join(map(os.path.abspath, sys.path))
    environment = {**os.environ, "PYTHONPATH": path, "TMPDIR": str(work), **variables}
    with (work / _OUTPUT_FILE).open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", module, str(work)],  # -P: nothing comes from the folder it stands in
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            env=environment,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        if sys.platform == "win32":
            process.kill()
        else:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert process.stdin is not None
        process.stdin.close()


def read_job(work: Path) -> Any:
    """In a child: what it has to do."""
    return pickle.loads((work / _JOB_FILE).read_bytes())


def write_result(work: Path, result: object) -> None:
    """In a child: what it has made."""
    (work / _RESULT_FILE).write_bytes(pickle.dumps(result))


def read_result(work: Path) -> Any:
    """What a child has made."""
    return pickle.loads((work / _RESULT_FILE).read_bytes())


def printed(work: Path) -> str:
    """What a child has printed."""
    return (work / _OUTPUT_FILE).read_text(encoding="utf-8", errors="replace")


def end_with_parent() -> None:
    """In a child: end, with all that it has started, once the parent has closed its end of standard input or died."""
    threading.Thread(target=_end_with_input, daemon=True).start()


def _end_with_input() -> None:
    os.read(0, 1)  # not sys.stdin: at exit Python cannot take a buffer's lock from this thread
    if sys.platform != "win32":
        os.killpg(0, signal.SIGKILL)
    os._exit(1)

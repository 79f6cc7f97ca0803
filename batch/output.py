"""The folder of a job's answers: whose it is, and what lies in it beside the parts."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from ..errors import RequestError
from ..whole_file import whole
from .parts import JOURNALS
from .shards import Shard

JOB_FILE = "job.json"
FAILED_FILE = "failed.jsonl"
_LOCKED = 2**30  # the byte that is locked on Windows, where nobody can read one that is: far behind the end


@contextlib.contextmanager
def claimed(output: Path, said: Mapping[str, Any]) -> Iterator[None]:
    """The folder for this process and this job alone; `said` is what makes it the same job, as plain JSON.

    Raises RequestError where the folder belongs to another job or process.
    """
    made = not output.exists()
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(f"{output}: no folder can be made there ({error.strerror}); give another") from None
    path = output / JOB_FILE
    if not path.exists() and any(output.iterdir()):
        raise RequestError(f"{output}: holds files but no {JOB_FILE}; give an empty folder or one of the same job")
    with path.open("a+", encoding="utf-8") as file:
        try:
            _lock(file)
        except OSError:
            raise RequestError(f"{output}: another process works on it; wait or give another folder") from None
        file.seek(0)
        try:
            before = json.loads(file.read() or "null")
        except ValueError:
            before = None  # torn when it was first written: nothing had been answered
        if before is None:
            file.truncate(0)
            file.write(json.dumps(said, indent=2) + "\n")
            file.flush()
        elif before != said:
            theirs = before if isinstance(before, dict) else {}  # of whatever else writes such a file
            name = next(name for name in {**said, **theirs} if theirs.get(name) != said.get(name))
            raise RequestError(
                f"{output}: holds answers of another job, whose {name} is {_short(theirs.get(name))}, now "
                f"{_short(said.get(name))}; give another folder, or the same command to go on"
            )
        try:
            yield
        finally:
            if list(output.iterdir()) == [path]:  # nothing has come of it
                file.truncate(0)
                with contextlib.suppress(PermissionError):  # Windows removes no open file
                    path.unlink()
                    if made:
                        output.rmdir()


def _lock(file: IO[str]) -> None:
    """Have an open file for this process alone until it is closed. Raises OSError where another one has it."""
    if sys.platform == "win32":
        import msvcrt

        file.seek(_LOCKED)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def check_leftovers(output: Path, shards: list[Shard], suffix: str) -> None:
    """Refuse parts whose rows the input no longer has. Raises RequestError."""
    known = {output / f"{shard.part}{suffix}" for shard in shards} | {output / FAILED_FILE}
    for path in sorted(output.rglob(f"*{suffix}")):
        if path not in known and JOURNALS not in path.parts and not path.name.startswith("."):
            raise RequestError(
                f"{path}: holds answers to rows that the input no longer has; restore the input or give another folder"
            )


def write_failed(output: Path, failures: list[dict[str, Any]]) -> None:
    """Put the rows that failed, and why, into a file of their own; no file where none did."""
    path = output / FAILED_FILE
    if not failures:
        path.unlink(missing_ok=True)
        return
    with whole(path) as partial:
        partial.write_text("".join(json.dumps(failure) + "\n" for failure in failures), encoding="utf-8")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 60 else text[:57] + "..."

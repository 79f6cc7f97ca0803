"""Puts a finished folder in place in one step, and leaves nothing behind when it is not finished.

`staged(target)` yields a hidden sibling folder; leaving the block renames it to the target, an exception removes it. A
small child process holds the other end of a pipe and, when the builder dies, even from kill -9, puts back the folder
that was being replaced and removes the sibling. Only a folder of the same `Kind` is ever replaced.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from ..engine_folder import CONFIG_FILE, ENGINE_FILE, MANIFEST_FILE, MODEL_FILE, TENSORS_FILE, WEIGHTS_FILE
from ..errors import BuildError
from .checkpoint.folder import CARRIED

# What the child runs. After a success it does the same, on names that no longer exist.
_REAPER = """
import os, shutil, sys
stage, replaced, target = sys.argv[1:]
sys.stdin.read()
if os.path.lexists(replaced) and not os.path.lexists(target):
    os.rename(replaced, target)
for folder in (stage, replaced):
    shutil.rmtree(folder, ignore_errors=True)
"""


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of folder that may be replaced by a new one."""

    name: str  # as in "not an engine"
    marker: str  # JSON file that only this kind has; the names under its "files" are the folder's own too
    files: frozenset[str]
    option: str = "--output"  # names the folder on the command line


ENGINE = Kind(
    "engine",
    MANIFEST_FILE,
    frozenset({CONFIG_FILE, ENGINE_FILE, MANIFEST_FILE, MODEL_FILE, TENSORS_FILE, WEIGHTS_FILE, *CARRIED}),
)


def check_target(target: Path, kind: Kind = ENGINE) -> None:
    """Refuse an output that would destroy something other than a folder of this kind. Raises BuildError."""
    if target.is_dir():
        ours = (target / kind.marker).is_file()
        if not ours and any(target.iterdir()):
            raise BuildError(
                f"{target}: exists and is not an {kind.name} ({kind.marker} is missing), allowed: a new or empty "
                f"folder or an {kind.name} to replace; choose another {kind.option}"
            )
        if ours and (strangers := _strangers(target, kind)):
            raise BuildError(
                f"{target}: replacing this {kind.name} would remove {strangers[0]!r}, which is not its own; "
                f"move it away or choose another {kind.option}"
            )
    elif target.exists() or target.is_symlink():
        raise BuildError(f"{target}: exists and is not a folder; choose another {kind.option}")


def _strangers(target: Path, kind: Kind) -> list[str]:
    """Names in a folder of this kind that are not its own."""
    known = set(kind.files)
    # A broken folder is replaced too.
    with contextlib.suppress(OSError, ValueError, RecursionError, TypeError, KeyError):
        files = json.loads((target / kind.marker).read_text(encoding="utf-8"))["files"]
        known |= {name.partition("/")[0] for name in files}
    return sorted({path.name for path in target.iterdir()} - known)


@contextlib.contextmanager
def staged(target: Path, kind: Kind = ENGINE) -> Iterator[Path]:
    """Yield an empty folder beside `target` that becomes `target` at the end. Raises BuildError."""
    target = target.absolute()
    check_target(target, kind)
    stage = target.with_name(f".{target.name}.partial-{secrets.token_hex(4)}")
    replaced = stage.with_name(f"{stage.name}-replaced")
    reaper = subprocess.Popen(  # started first: from here on nothing can be left behind
        [sys.executable, "-I", "-S", "-c", _REAPER, str(stage), str(replaced), str(target)],
        stdin=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            stage.mkdir()
        except OSError as error:
            raise BuildError(f"{target}: cannot be written ({error.strerror}); choose another {kind.option}") from None
        yield stage
        _publish(stage, target, replaced, kind)
    except OSError as error:
        raise BuildError(
            f"{target}: writing failed ({error.strerror or error}); free some space or choose another {kind.option}"
        ) from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        assert reaper.stdin is not None
        reaper.stdin.close()
        reaper.wait()


def _publish(stage: Path, target: Path, replaced: Path, kind: Kind) -> None:
    """Flush the stage to disk and rename it; a folder already there is moved to `replaced` first and removed after."""
    for path in [*stage.rglob("*"), stage]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    if not target.exists():
        stage.rename(target)
        return
    check_target(target, kind)
    target.rename(replaced)
    try:
        stage.rename(target)
    except OSError:
        with contextlib.suppress(OSError):  # another process may have come first
            replaced.rename(target)
        raise
    finally:
        if target.exists():  # else the child puts the old one back
            replaced.unlink() if replaced.is_symlink() else shutil.rmtree(replaced, ignore_errors=True)

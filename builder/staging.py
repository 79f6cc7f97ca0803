"""Puts a finished folder in place in one step, and leaves nothing behind when it is not finished.

`staged(target)` yields a hidden sibling folder; leaving the block renames it to the target, an exception removes it. A
small child process holds the other end of a pipe and, when the builder dies, even from kill -9, puts back the engine
that was being replaced and removes the sibling. The surprising fact: after a success the child does the same, on names
that no longer exist.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from ..contract import CONFIG_FILE, ENGINE_FILE, MANIFEST_FILE, MODEL_FILE, WEIGHTS_FILE, is_engine
from ..errors import BuildError
from .checkpoint import CARRIED

_REAPER = """
import os, shutil, sys
stage, replaced, target = sys.argv[1:]
sys.stdin.read()
if os.path.lexists(replaced) and not os.path.lexists(target):
    os.rename(replaced, target)
for folder in (stage, replaced):
    shutil.rmtree(folder, ignore_errors=True)
"""


def check_target(target: Path) -> None:
    """Refuse an output that would destroy something other than an engine. Raises BuildError."""
    if target.is_dir():
        if not is_engine(target) and any(target.iterdir()):
            raise BuildError(
                f"{target}: exists and is not an engine ({MANIFEST_FILE} is missing), allowed: a new or empty folder "
                "or an engine to replace; choose another --output"
            )
        if is_engine(target) and (strangers := _strangers(target)):
            raise BuildError(
                f"{target}: replacing this engine would remove {strangers[0]!r}, which no build has put there; "
                "move it away or choose another --output"
            )
    elif target.exists() or target.is_symlink():
        raise BuildError(f"{target}: exists and is not a folder; choose another --output")


def _strangers(target: Path) -> list[str]:
    """Names in an engine folder that are not the engine's."""
    known = {CONFIG_FILE, ENGINE_FILE, MANIFEST_FILE, MODEL_FILE, WEIGHTS_FILE, *CARRIED}
    with contextlib.suppress(
        OSError, ValueError, RecursionError, TypeError, KeyError
    ):  # a broken engine is replaced too
        files = json.loads((target / MANIFEST_FILE).read_text(encoding="utf-8"))["files"]
        known |= {name.partition("/")[0] for name in files}
    return sorted({path.name for path in target.iterdir()} - known)


@contextlib.contextmanager
def staged(target: Path) -> Iterator[Path]:
    """Yield an empty folder beside `target` that becomes `target` at the end. Raises BuildError."""
    target = target.absolute()
    check_target(target)
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
            raise BuildError(f"{target}: cannot be written ({error.strerror}); choose another --output") from None
        yield stage
        _publish(stage, target, replaced)
    except OSError as error:
        raise BuildError(
            f"{target}: writing failed ({error.strerror or error}); free some space or choose another --output"
        ) from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        assert reaper.stdin is not None
        reaper.stdin.close()
        reaper.wait()


def _publish(stage: Path, target: Path, replaced: Path) -> None:
    """Flush the stage to disk and rename it; an engine already there is moved to `replaced` first and removed after."""
    for path in [*stage.rglob("*"), stage]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    if not target.exists():
        stage.rename(target)
        return
    check_target(target)
    target.rename(replaced)
    try:
        stage.rename(target)
    except OSError:
        with contextlib.suppress(OSError):  # another build may have come first
            replaced.rename(target)
        raise
    finally:
        if target.exists():  # else the child puts the old engine back
            replaced.unlink() if replaced.is_symlink() else shutil.rmtree(replaced, ignore_errors=True)

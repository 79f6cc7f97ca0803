"""Puts a finished folder in place in one step, and leaves nothing behind when it is not finished.

`staged(target)` yields a hidden sibling folder; leaving the block renames it to the target, an exception removes it. A
small child process holds the other end of a pipe and removes the sibling when the builder dies, even from kill -9. The
surprising fact: after a success the child runs the same removal, on a name that no longer exists.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ..contract import MANIFEST_FILE, is_engine
from ..errors import BuildError

_REAPER = "import shutil, sys; sys.stdin.read(); shutil.rmtree(sys.argv[1], ignore_errors=True)"


def check_target(target: Path) -> None:
    """Refuse an output that would destroy something other than an engine. Raises BuildError."""
    if target.is_dir():
        if not is_engine(target) and any(target.iterdir()):
            raise BuildError(
                f"{target}: exists and is not an engine ({MANIFEST_FILE} is missing), allowed: a new or empty folder "
                "or an engine to replace; choose another --output"
            )
    elif target.exists() or target.is_symlink():
        raise BuildError(f"{target}: exists and is not a folder; choose another --output")


@contextlib.contextmanager
def staged(target: Path) -> Iterator[Path]:
    """Yield an empty folder beside `target` that becomes `target` at the end. Raises BuildError."""
    target = target.absolute()
    check_target(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    except OSError as error:
        raise BuildError(f"{target}: cannot be written ({error.strerror}); choose another --output") from None
    reaper = subprocess.Popen(
        [sys.executable, "-c", _REAPER, str(stage)], stdin=subprocess.PIPE, start_new_session=True
    )
    try:
        yield stage
        stage.chmod(0o755)
        _publish(stage, target)
    except OSError as error:
        raise BuildError(
            f"{target}: writing failed ({error.strerror or error}); free some space or choose another --output"
        ) from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        assert reaper.stdin is not None
        reaper.stdin.close()
        reaper.wait()


def _publish(stage: Path, target: Path) -> None:
    """Flush the stage to disk and rename it; an engine already there is moved aside first and removed after."""
    for path in [*stage.iterdir(), stage]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    if not target.exists():
        stage.rename(target)
        return
    check_target(target)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.partial-", dir=target.parent) as old:
        target.rename(Path(old) / "replaced")
        try:
            stage.rename(target)
        except OSError:
            (Path(old) / "replaced").rename(target)
            raise

"""Puts a finished folder in place in one step, and leaves nothing behind when it is not finished.

`staged(target)` yields a hidden folder beside the target, or inside it where the target is a mount point or its parent
cannot be written; leaving the block puts it in place (`swap.py`), an exception removes it, with folders above that were
made for it. A small child process holds the other end of a pipe and removes the hidden folder when the builder dies,
even from kill -9. Only a folder of the same `Kind` is ever replaced, and a link is followed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from ..engine_folder import (
    COMPILED_FOLDER,
    CONFIG_FILE,
    COST_FILE,
    ENGINE_FILE,
    MANIFEST_FILE,
    MODEL_FILE,
    TENSORS_FILE,
    TUNED_FILE,
    VERIFY_FILE,
    VISION_ENGINE_FILE,
    VISION_MODEL_FILE,
    VISION_TENSORS_FILE,
    VISION_WEIGHTS_FILE,
    WEIGHTS_FILE,
    made_as,
)
from ..errors import BuildError
from . import swap
from .checkpoint.folder import CARRIED_NAMES
from .swap import Swap, is_mount, stays, sync


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
    frozenset(
        {
            COMPILED_FOLDER,
            CONFIG_FILE,
            COST_FILE,
            ENGINE_FILE,
            MANIFEST_FILE,
            MODEL_FILE,
            TENSORS_FILE,
            TUNED_FILE,
            VERIFY_FILE,
            VISION_ENGINE_FILE,
            VISION_MODEL_FILE,
            VISION_TENSORS_FILE,
            VISION_WEIGHTS_FILE,
            WEIGHTS_FILE,
            *CARRIED_NAMES,
        }
    ),
)


def check_target(target: Path, kind: Kind = ENGINE) -> None:
    """Refuse an output inside what nemodiff wrote, or that would destroy what is of no such kind. Raises BuildError."""
    for above in resolved(target).parents:
        if above.exists() and not above.is_dir():
            raise BuildError(f"{target}: lies in {above}, which is not a folder; choose another {kind.option}")
        made = made_as(above)
        if made is not None:
            raise BuildError(
                f"{target}: lies in {made[0]}, {above}, which could not be replaced then; choose another {kind.option}"
            )
    if target.is_dir():
        ours = (target / kind.marker).is_file()
        if not ours and not all(stays(path.name) for path in target.iterdir()):
            raise BuildError(
                f"{target}: exists and is not an {kind.name} ({kind.marker} is missing), allowed: a new or empty "
                f"folder or an {kind.name} to replace; choose another {kind.option}"
            )
        if ours and (strangers := _strangers(target, kind)):
            raise BuildError(
                f"{target}: replacing this {kind.name} would remove {strangers[0]!r}, which is not its own; "
                f"move it away or choose another {kind.option}"
            )
    elif target.exists() or resolved(target).is_symlink():  # the latter are links in a circle
        raise BuildError(f"{target}: exists and is not a folder; choose another {kind.option}")


def _strangers(target: Path, kind: Kind) -> list[str]:
    """Names in a folder of this kind that are not its own."""
    known = set(kind.files)
    # A broken folder is replaced too.
    with contextlib.suppress(OSError, ValueError, RecursionError, TypeError, KeyError):
        files = json.loads((target / kind.marker).read_text(encoding="utf-8"))["files"]
        known |= {name.partition("/")[0] for name in files}
    return sorted({path.name for path in target.iterdir() if not stays(path.name)} - known)


def resolved(target: Path) -> Path:
    """The folder that an output means, through links, whether it is there or not."""
    return Path(os.path.realpath(target))


@contextlib.contextmanager
def staged(target: Path, kind: Kind = ENGINE) -> Iterator[Path]:
    """Yield an empty folder that becomes `target` at the end. Raises BuildError."""
    check_target(target, kind)
    place = resolved(target)
    stage = _parent(place) / f".{place.name}.partial-{secrets.token_hex(4)}"
    ending = Swap(stage, place, kind.marker)
    above = [folder for folder in stage.parents if not folder.exists()]
    reaper = subprocess.Popen(  # started first: from here on nothing can be left behind
        [sys.executable, "-I", "-S", str(swap.__file__), str(stage), str(place), kind.marker],
        stdin=subprocess.PIPE,
        start_new_session=True,  # so that no Ctrl-C reaches it; on Windows that is:
        creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
    )
    try:
        try:
            stage.parent.mkdir(parents=True, exist_ok=True)
            stage.mkdir()
        except OSError as error:
            raise BuildError(f"{target}: cannot be written ({error.strerror}); choose another {kind.option}") from None
        yield stage
        for path in [*stage.rglob("*"), stage]:
            sync(path)
        ending.put(lambda: check_target(place, kind))
    except OSError as error:
        in_use = sys.platform == "win32" and isinstance(error, PermissionError)
        remedy = "end what uses it" if in_use else "free some space"
        raise BuildError(
            f"{target}: writing failed ({error.strerror or error}); {remedy} or choose another {kind.option}"
        ) from error
    finally:
        with contextlib.suppress(OSError):  # the child tries again
            ending.clean_up()
        with contextlib.suppress(OSError):  # up to the first that is not empty
            for folder in above:
                folder.rmdir()
        assert reaper.stdin is not None
        reaper.stdin.close()
        reaper.wait()


def _parent(place: Path) -> Path:
    """Where to stage: beside a folder that can be renamed, else inside it."""
    inside = place.is_dir() and (
        is_mount(place)
        or not os.access(place.parent, os.W_OK)
        or any(stays(path.name) for path in place.iterdir())
        or resolved(Path()).is_relative_to(place)  # who stands in it would stand in a folder that is gone
    )
    return place if inside else place.parent

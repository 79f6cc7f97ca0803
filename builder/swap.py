"""Puts a finished folder in the place of another, and undoes what was begun.

A folder is renamed where the system allows it. A mount point cannot be, so it stays and its contents are exchanged: the
old ones leave, the marker first, and then the new ones come, the marker last. So a folder with a marker is never a
mixture of both. This file also runs as a script, which waits for its standard input to close and then cleans up after a
process that has died; it imports the standard library alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

_CANNOT_BE_RENAMED = (errno.EBUSY, errno.EXDEV)  # a mount point, or a folder of a container's image
_MERGED = (*_CANNOT_BE_RENAMED, errno.EEXIST, errno.ENOTEMPTY)


def stays(name: str) -> bool:
    """Whether an entry of a folder is left alone: a stage, or what a file system keeps at its root."""
    return name == "lost+found" or (name.startswith(".") and ".partial-" in name)


def is_mount(folder: Path) -> bool:
    """Whether something is mounted on a folder, even another folder of the same file system."""
    return os.path.ismount(folder) or _mount_id(folder) != _mount_id(folder.parent)


def sync(path: Path) -> None:
    """Have a file or a folder's list of names written to the disk; Windows has no such call for a folder."""
    is_folder = path.is_dir()
    if is_folder and sys.platform == "win32":
        return
    descriptor = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclasses.dataclass(frozen=True)
class Swap:
    """A finished folder `stage` that shall be `target`, which only counts as one while it holds the file `marker`."""

    stage: Path
    target: Path
    marker: str

    def put(self, check: Callable[[], None]) -> None:
        """Make the stage the target; `check` is called right before an old one is touched. Raises OSError."""
        if not self.target.exists():
            self.stage.rename(self.target)
            return
        if self.stage.parent == self.target:
            self._exchange(check)
            return
        check()
        try:
            self._rename()
        except OSError as error:
            if error.errno not in _CANNOT_BE_RENAMED:
                raise
            self._exchange(check)

    def clean_up(self) -> None:
        """Put back the old folder unless the new one is complete, and remove everything else. Raises OSError."""
        replaced = self._beside("replaced")
        with _locked(self.target):
            self._undo_exchange()
        if replaced.exists() and not self.target.exists():
            replaced.rename(self.target)
        for path in (self.stage, self._beside("leaving"), self._beside("left"), replaced):
            _remove(path)
        for path in self._in_use_before():
            _remove(path)

    def _in_use_before(self) -> list[Path]:
        """What earlier builds have replaced and could not remove: on Windows a file that is in use stays."""
        begin = f".{self.target.name}.partial-"
        names = [path.name for path in self.target.parent.iterdir()]
        found = [self.target.with_name(name) for name in names if name.startswith(begin) and name.endswith("-replaced")]
        return found if self.target.exists() else []  # asked last: until it is there, a build may have to put one back

    def _beside(self, state: str) -> Path:
        return self.stage.with_name(f"{self.stage.name}-{state}")

    def _rename(self) -> None:
        replaced = self._beside("replaced")
        self.target.rename(replaced)
        try:
            self.stage.rename(self.target)
        except OSError:
            with contextlib.suppress(OSError):  # another process may have come first
                replaced.rename(self.target)
            raise

    def _exchange(self, check: Callable[[], None]) -> None:
        leaving, left = self._beside("leaving"), self._beside("left")
        with _locked(self.target):
            check()
            leaving.mkdir()
            try:
                self._move_all(self._contents(self.target), leaving)
                leaving.rename(left)  # from here on, what the target holds is new
                self._move_all(reversed(self._contents(self.stage)), self.target)
            except BaseException:
                self._undo_exchange()
                raise

    def _undo_exchange(self) -> None:
        """Give the target its old contents back, if an exchange has begun and has not ended."""
        leaving, left = self._beside("leaving"), self._beside("left")
        if (self.target / self.marker).exists():  # it has ended, or another process has put its folder here
            return
        if left.exists():
            for path in self._contents(self.target):
                _remove(path)
            left.rename(leaving)
        if leaving.exists():
            self._move_all(reversed(self._contents(leaving)), self.target)

    def _contents(self, folder: Path) -> list[Path]:
        """The entries of a folder that are moved, the marker first."""
        paths = [path for path in folder.iterdir() if not stays(path.name)]
        return sorted(paths, key=lambda path: (path.name != self.marker, path.name))

    def _move_all(self, paths: Iterable[Path], folder: Path) -> None:
        for path in paths:
            if path.name == self.marker:
                sync(folder)
            _move(path, folder / path.name)


def _move(path: Path, place: Path) -> None:
    """Rename; a folder that cannot be renamed, or whose place is taken, is moved entry by entry."""
    try:
        path.rename(place)
    except OSError as error:
        if error.errno not in _MERGED or path.is_symlink() or not path.is_dir():
            raise
        place.mkdir(exist_ok=True)
        for entry in path.iterdir():
            _move(entry, place / entry.name)
        path.rmdir()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Let one process at a time exchange a folder's contents, where its file system has locks."""
    with contextlib.ExitStack() as stack:
        if sys.platform != "win32":  # which opens no folder
            import fcntl

            with contextlib.suppress(OSError):
                descriptor = os.open(folder, os.O_RDONLY)
                stack.callback(os.close, descriptor)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield


def _mount_id(folder: Path) -> str | None:
    """Linux's number of the mount that a folder lies on; None where the system does not say."""
    try:
        descriptor = os.open(folder, getattr(os, "O_PATH", os.O_RDONLY))
    except OSError:
        return None
    try:
        lines = Path(f"/proc/self/fdinfo/{descriptor}").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return next((line for line in lines if line.startswith("mnt_id:")), None)


if __name__ == "__main__":
    sys.stdin.read()
    with contextlib.suppress(OSError):
        Swap(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]).clean_up()

"""Kernels that Triton has compiled, kept in the engine folder, so that a later load compiles none.

Triton names an entry by a digest of the kernel's source, its arguments, the card and Triton itself, so one that is
stale is never found. The digests of an entry's files lie beside them, so one that is damaged is compiled anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ....engine_folder import COMPILED_FOLDER
from ....whole_file import whole

_CHOICES = ("TRITON_CACHE_DIR", "TRITON_CACHE_MANAGER")  # variables by which a user has chosen another cache
_KEPT = (".cubin", ".json", ".source")  # of an entry; host code is never taken from an engine folder
_DIGESTS = "digests"


class KernelCache:
    """The compiled kernels of an engine; those that its folder cannot take lie in Triton's own.

    Args:
        folder: of the engine.
    """

    def __init__(self, folder: Path) -> None:
        from triton import knobs

        self.compiled = 0  # kernels that were not found
        self.places = [folder / COMPILED_FOLDER, Path(knobs.cache.dir) / "nemodiff"]
        self._chosen = any(name in os.environ for name in _CHOICES)

    @contextlib.contextmanager
    def use(self) -> Iterator[None]:
        """Let Triton look here for what it would compile, unless the user has chosen another cache."""
        from triton import knobs

        if self._chosen:
            yield
            return
        with knobs.cache.scope(), knobs.compilation.scope():
            knobs.cache.manager_class = self._entry
            knobs.compilation.store_binary_only = True
            yield

    def _entry(self, key: str, override: bool = False, dump: bool = False) -> Any:
        from triton.runtime.cache import FileCacheManager

        return FileCacheManager(key, override, dump) if override or dump else _Entry(self, key)


class _Entry:
    """What Triton asks of a `CacheManager`, for one kernel."""

    def __init__(self, cache: KernelCache, key: str) -> None:
        self._cache = cache
        self._key = key

    def get_file(self, filename: str) -> str | None:
        from triton.runtime.cache import FileCacheManager

        found: str | None = FileCacheManager(self._key).get_file(filename)
        return found

    def put(self, data: Any, filename: str, binary: bool = True) -> str:
        from triton.runtime.cache import FileCacheManager

        if not filename.endswith(_KEPT):
            path: str = FileCacheManager(self._key).put(data, filename, binary)
            return path
        return self._write(filename, data if isinstance(data, bytes) else str(data).encode())

    def get_group(self, filename: str) -> dict[str, str] | None:
        for place in self._cache.places:
            folder = place / self._key
            with contextlib.suppress(OSError, ValueError, RecursionError, AttributeError):
                digests = json.loads((folder / _DIGESTS).read_bytes())
                if filename in digests and all(_digest(folder / name) == digests[name] for name in digests):
                    return {name: str(folder / name) for name in digests}
        return None

    def put_group(self, filename: str, group: Mapping[str, str]) -> str:
        self._cache.compiled += 1
        digests = {name: _digest(Path(path)) for name, path in group.items() if name.endswith(_KEPT)}
        return self._write(_DIGESTS, json.dumps(digests).encode())

    def _write(self, name: str, data: bytes) -> str:
        """Write a file whole, in the first place that takes it."""
        for place in self._cache.places:
            path = place / self._key / name
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                with whole(path) as stage:
                    stage.write_bytes(data)
            except OSError as error:
                failure = error
            else:
                return str(path)
        raise failure


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()

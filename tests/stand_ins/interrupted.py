"""The command line, which gets the signal SIGNAL at the moment when the module AT is imported, or its function called.

The signal comes within `exec`, after which Python's own end would be by it and not by an exit code. Run it with `-m`.
"""

from __future__ import annotations

import importlib
import importlib.abc
import os
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import nemodiff.__main__

_MODULE, _, _PLACE = os.environ["AT"].partition(":")
_INTERRUPT = f"import signal\nsignal.raise_signal({os.environ['SIGNAL']})"


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name == _MODULE:
            try:
                exec(_INTERRUPT)
            except KeyboardInterrupt:
                if name in ("onnxruntime", "tensorrt_rtx"):
                    raise ImportError("initialization failed") from None  # as they say then
                raise
        return None


def _interrupt_calls() -> None:
    *owners, name = _PLACE.split(".")
    owner: Any = importlib.import_module(_MODULE)
    for part in owners:
        owner = getattr(owner, part)
    called = getattr(owner, name)

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        exec(_INTERRUPT)
        return called(*args, **kwargs)

    setattr(owner, name, interrupted)


if __name__ == "__main__":
    if _PLACE:
        _interrupt_calls()
    else:
        import sys

        sys.meta_path.insert(0, _Finder())
    nemodiff.__main__.main()

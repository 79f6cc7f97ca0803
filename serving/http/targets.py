"""Targets in absolute form, `GET http://host/path`, as proxies are sent them; every server has to take them.

RFC 9112, 3.2.2.
"""

from __future__ import annotations

import re
from urllib.parse import unquote

from starlette.types import Scope

_ABSOLUTE = re.compile(rb"https?://([^/?#]+)(/.*)?", re.IGNORECASE)


def in_origin_form(scope: Scope) -> Scope:
    """The request as if its target were a path alone, with the target's host, which counts instead of the header's."""
    absolute = _ABSOLUTE.fullmatch(scope.get("raw_path") or b"")
    if absolute is None:
        return scope
    path = absolute[2] or b"/"
    headers = [(b"host", absolute[1]), *(header for header in scope["headers"] if header[0] != b"host")]
    return {**scope, "path": unquote(path.decode("ascii")), "raw_path": path, "headers": headers}

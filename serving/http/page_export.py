"""Traces as one HTML file that shows them anywhere, without a server or a network.

The served page in `page/` is the template, so a run looks the same live and saved: its styles and scripts are put
inside, and the traces take the place of the form.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parent / "page"


def html(traces: Iterable[tuple[str, list[dict[str, Any]]]]) -> str:
    """The file's text; each trace is a name and its events, as `runtime.events.trace.read` gives them."""
    runs = [{"name": name, "events": events} for name, events in traces]
    # A model's text can hold anything, so it travels as JSON without a `<`, and only scripts with this nonce run.
    data = json.dumps(runs, separators=(",", ":")).replace("<", "\\u003c")
    nonce = secrets.token_hex(16)

    page = (PAGE / "index.html").read_text(encoding="utf-8")
    page = re.sub("<!-- live -->.*?<!-- /live -->", "", page, flags=re.DOTALL).replace("'self'", f"'nonce-{nonce}'")
    page = re.sub('<link rel="stylesheet" href="(.*?)">', lambda match: _inline("style", match[1], nonce), page)
    page = re.sub('<script src="(.*?)"></script>', lambda match: _inline("script", match[1], nonce), page)
    start = '<script type="application/json" id="trace">'
    return page.replace(start, start + data, 1)


def _inline(tag: str, name: str, nonce: str) -> str:
    return f'<{tag} nonce="{nonce}">{(PAGE / name).read_text(encoding="utf-8")}</{tag}>'

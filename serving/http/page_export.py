"""Traces as one HTML file that shows them anywhere, without a server or a network.

In: the events of traces. Out: the page of `serving/http/page/` with its styles and scripts inside and the traces in
place of the form. The surprising fact: the page itself is the template, so a run looks the same live and saved. Text
of a model can hold anything: it travels as JSON without a `<`, is shown as text, and only the scripts with this file's
nonce run.
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
    """The file's text; each trace is a name and its events, as `runtime.trace.read` gives them."""
    told = [{"name": name, "events": events} for name, events in traces]
    data = json.dumps(told, separators=(",", ":")).replace("<", "\\u003c")
    nonce = secrets.token_hex(16)

    page = (PAGE / "index.html").read_text(encoding="utf-8")
    page = re.sub("<!-- live -->.*?<!-- /live -->", "", page, flags=re.DOTALL).replace("'self'", f"'nonce-{nonce}'")
    page = re.sub('<link rel="stylesheet" href="(.*?)">', lambda found: _inline("style", found[1], nonce), page)
    page = re.sub('<script src="(.*?)"></script>', lambda found: _inline("script", found[1], nonce), page)
    return page.replace(
        '<script type="application/json" id="trace">', '<script type="application/json" id="trace">' + data, 1
    )


def _inline(tag: str, name: str, nonce: str) -> str:
    return f'<{tag} nonce="{nonce}">{(PAGE / name).read_text(encoding="utf-8")}</{tag}>'

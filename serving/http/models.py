"""What `/v1/models` tells of a model."""

from __future__ import annotations

import datetime
from typing import Any

from ...contract import BuildConfig


def describe(name: str, created: int, build: BuildConfig, rows: int) -> dict[str, Any]:
    """One model in the words of OpenAI, vLLM (`max_model_len`) and Anthropic, with its limits.

    created: seconds since 1970. rows: requests at a time.
    """
    moment = datetime.datetime.fromtimestamp(created, datetime.UTC)
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "nemodiff",
        "max_model_len": build.max_seq_len,
        "type": "model",
        "display_name": name,
        "created_at": moment.isoformat().replace("+00:00", "Z"),
        "max_input_tokens": build.max_seq_len - 1,
        "max_tokens": build.max_seq_len - 1,
        "max_requests": rows,
    }

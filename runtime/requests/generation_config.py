"""The sampling that a model's makers propose in its generation_config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...engine_folder import GENERATION_FILE, PROPOSED, engine_path
from ...errors import RequestError
from .options import OPTIONS, make_options


def sampling_defaults(folder: str | Path) -> dict[str, Any]:
    """The options of a request that an engine's generation_config.json proposes; none without that file.

    With `do_sample` true and no temperature that is 1, as in transformers; with `do_sample` false it is left out.
    Raises RequestError: a value is none of its option. Raises EngineError: the folder is no path.
    """
    path = engine_path(folder) / GENERATION_FILE
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{path}: not readable as JSON ({error}); build the engine again") from None
    chosen = {name: values[name] for name in PROPOSED if values.get(name) is not None}
    if chosen.get("top_k") == -1:
        del chosen["top_k"]
    samples = values.get("do_sample")
    if samples is True:
        chosen.setdefault("temperature", 1.0)
    elif samples is False:
        chosen.pop("temperature", None)
    try:
        make_options(chosen)
    except RequestError as error:
        raise RequestError(f"{path}: {error}; leave --generation-config out or fix the file") from None
    return {name: float(value) if OPTIONS[name].type is float else value for name, value in chosen.items()}

"""The names of a checkpoint folder's files, and how its JSON files are read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from ...engine_folder import GENERATION_FILE, TEMPLATE_FILE, TEMPLATES_FOLDER, TOKENIZER_CONFIG_FILE, TOKENIZER_FILE
from ...errors import CheckpointError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MODELOPT_FILE = "hf_quant_config.json"  # where older exports of ModelOpt say how they are quantized
# Files carried into the engine as they are, as patterns; the first one must be there.
CARRIED = (TOKENIZER_FILE, TOKENIZER_CONFIG_FILE, TEMPLATE_FILE, f"{TEMPLATES_FOLDER}/*.jinja", GENERATION_FILE)
CARRIED_NAMES = frozenset(pattern.partition("/")[0] for pattern in CARRIED)  # of the files and folders at the top

# The drafter adapter lies in a folder of its own; its safetensors must never be taken for base weights.
ADAPTER_FOLDER = "linear_spec_lora"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


def carried(folder: Path) -> list[str]:
    """The files of a folder that are carried into an engine, by their names in it."""
    paths = [path for pattern in CARRIED for path in sorted(folder.glob(pattern)) if path.is_file()]
    return [path.relative_to(folder).as_posix() for path in paths]


def copy_carried(folder: Path, target: Path) -> None:
    """Copy the files that are carried."""
    for name in carried(folder):
        (target / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(folder / name, target / name)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises CheckpointError."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing; give a complete checkpoint folder") from None
    except (ValueError, RecursionError, OSError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error}); download the file again") from None
    if not isinstance(values, dict):
        raise CheckpointError(
            f"{path}: holds a {type(values).__name__}, allowed: a JSON object; download the file again"
        )
    return values

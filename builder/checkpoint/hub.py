"""Finds a checkpoint by its name: a folder here, or a repository of the Hugging Face hub.

Downloads go through huggingface_hub's cache (`HF_ENDPOINT`, `HF_TOKEN` and `HF_HUB_OFFLINE` work as everywhere) and
take only the files an engine is made from. A cut connection is resumed inside a file; a new command keeps whole files
only.
"""

from __future__ import annotations

import atexit
import dataclasses
import fnmatch
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from ...engine_folder import CONFIG_FILE, check_utf8
from ...errors import CheckpointError, first_line
from ..files import copy_folder
from .folder import (
    ADAPTER_CONFIG,
    ADAPTER_FOLDER,
    ADAPTER_WEIGHTS,
    CARRIED,
    INDEX,
    MODELOPT_FILE,
    WEIGHTS,
    read_json,
)
from .safetensors_file import Entry, write_hollow

_HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+?)(?:@(?P<revision>[\w./-]+))?")
# Patterns; the adapter's folder is named, because a plain `*.safetensors` would also match in other subfolders.
_SMALL = [CONFIG_FILE, MODELOPT_FILE, *CARRIED, INDEX, f"{ADAPTER_FOLDER}/{ADAPTER_CONFIG}"]
_LARGE = [WEIGHTS, "model-*-of-*.safetensors", f"{ADAPTER_FOLDER}/{ADAPTER_WEIGHTS}"]


@dataclasses.dataclass(frozen=True)
class Source:
    """A checkpoint's folder here and where it came from."""

    folder: Path
    name: str
    revision: str | None  # commit hash on the hub, None for a plain folder
    headers_only: bool = False  # the weight files are there by name and header, without their data


def resolve(checkpoint: str, *, headers_only: bool = False) -> Source:
    """Return the folder of a checkpoint, downloading it if it is a hub id `OWNER/NAME[@REVISION]`.

    With `headers_only` a repository's weight files are fetched as headers alone, into a folder that lasts as long as
    the process. Raises CheckpointError when neither a folder nor a repository of that name can be had.
    """
    folder = Path(checkpoint)
    if checkpoint and folder.exists():
        check_utf8(folder, CheckpointError)
        _refuse_files(folder)
        return Source(folder, folder.resolve().name, None)
    match = _HUB_ID.fullmatch(checkpoint)
    if match is None:
        raise CheckpointError(
            f"{checkpoint or repr(checkpoint)}: no such folder; give a checkpoint folder or a hub id like "
            "nvidia/Nemotron-Labs-Diffusion-8B or OWNER/NAME@REVISION"
        )
    local = _download(match["repo"], match["revision"], headers_only)
    return Source(local, match["repo"], local.name, headers_only)


def _refuse_files(path: Path) -> None:
    """Refuse what is no folder, and a folder that has nothing but GGUF."""
    files = [path] if path.suffix == ".gguf" else sorted(path.glob("*.gguf"))
    if files and not any(path.glob("*.safetensors")):
        raise CheckpointError(
            f"{files[0]}: GGUF is not read, allowed: a folder with {CONFIG_FILE} and safetensors files; give the "
            "checkpoint that it was made from"
        )
    if not path.is_dir():
        raise CheckpointError(f"{path}: a file, expected a checkpoint folder; give the folder that it is in")


def _download(repo: str, revision: str | None, headers_only: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
    from tqdm import tqdm

    class Bar(tqdm):  # type: ignore[misc]
        """Silent unless standard error is a terminal."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)
            kwargs["disable"] = None
            super().__init__(*args, **kwargs)

    where = f"{repo}@{revision}" if revision else repo
    try:
        patterns = _SMALL if headers_only else _SMALL + _LARGE
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=patterns, tqdm_class=Bar))
        return _with_headers(repo, folder) if headers_only and not _has_weights(folder) else folder
    except GatedRepoError:
        raise CheckpointError(f"{where}: the hub asks for access; accept its terms there and set HF_TOKEN") from None
    except RevisionNotFoundError:
        raise CheckpointError(f"{where}: the hub has no revision {revision!r}; leave it out for the newest") from None
    except RepositoryNotFoundError:
        raise CheckpointError(
            f"{where}: no such folder here, and the hub has no such repository; check the name, or set HF_TOKEN if it "
            "is private"
        ) from None
    except Exception as error:  # the library lets through its HTTP client's errors, which have no common base
        raise CheckpointError(
            f"{where}: the download failed ({first_line(error)}); run the same command again, whole files are kept, or "
            "give a folder: none here has this name"
        ) from None


def _has_weights(snapshot: Path) -> bool:
    """Whether an earlier download has left all weights in the cache."""
    files = {WEIGHTS}
    if (snapshot / INDEX).is_file():
        files = set(read_json(snapshot / INDEX).get("weight_map", {}).values())
    if (snapshot / ADAPTER_FOLDER / ADAPTER_CONFIG).is_file():
        files.add(f"{ADAPTER_FOLDER}/{ADAPTER_WEIGHTS}")
    return all((snapshot / name).is_file() for name in files)


def _with_headers(repo: str, snapshot: Path) -> Path:
    """A copy of a snapshot in which each weight file has its header and, as a hole, the length of its data."""
    from huggingface_hub import HfApi

    api = HfApi()
    revision = snapshot.name
    parent = Path(tempfile.mkdtemp(prefix="nemodiff-headers-"))
    atexit.register(shutil.rmtree, parent, ignore_errors=True)
    folder = parent / revision  # a source's revision is its folder's name
    copy_folder(snapshot, folder)
    for name in api.list_repo_files(repo, revision=revision):
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in _LARGE):
            continue
        entries = {}
        for key, tensor in api.parse_safetensors_file_metadata(repo, name, revision=revision).tensors.items():
            begin, end = tensor.data_offsets
            entries[key] = Entry(tensor.dtype, tensor.shape, begin, end)
        (folder / name).parent.mkdir(exist_ok=True)
        write_hollow(folder / name, entries)
    return folder

"""Finds a checkpoint by its name: a folder here, or a repository of the Hugging Face hub.

In: what the user typed. Out: a local folder and the identity to write into the manifest. Downloads go through
huggingface_hub's cache (`HF_ENDPOINT`, `HF_TOKEN` and `HF_HUB_OFFLINE` work as everywhere) and take only the files an
engine is made from. A cut connection is resumed inside a file; a new command keeps whole files only. The surprising
fact: the patterns name the adapter's folder on its own, because a plain `*.safetensors` also matches inside subfolders.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .checkpoint import ADAPTER_CONFIG, ADAPTER_WEIGHTS, CARRIED, INDEX, WEIGHTS

_HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+?)(?:@(?P<revision>[\w./-]+))?")
_WANTED = ["config.json", *CARRIED, WEIGHTS, INDEX, "model-*-of-*.safetensors", ADAPTER_CONFIG, ADAPTER_WEIGHTS]


@dataclasses.dataclass(frozen=True)
class Source:
    """A checkpoint's folder here and where it came from."""

    folder: Path
    name: str
    revision: str | None  # commit hash on the hub, None for a plain folder


def resolve(checkpoint: str) -> Source:
    """Return the folder of a checkpoint, downloading it if it is a hub id `OWNER/NAME[@REVISION]`.

    Raises CheckpointError when neither a folder nor a repository of that name can be had.
    """
    folder = Path(checkpoint)
    if folder.exists():
        return Source(folder, folder.resolve().name, None)
    match = _HUB_ID.fullmatch(checkpoint)
    if match is None:
        raise CheckpointError(
            f"{checkpoint}: no such folder; give a checkpoint folder or a hub id like "
            "nvidia/Nemotron-Labs-Diffusion-8B or OWNER/NAME@REVISION"
        )
    local = _download(match["repo"], match["revision"])
    return Source(local, match["repo"], local.name)


def _download(repo: str, revision: str | None) -> Path:
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
        return Path(snapshot_download(repo, revision=revision, allow_patterns=_WANTED, tqdm_class=Bar))
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
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{where}: the download failed ({reason}); run the same command again, whole files are kept, or give a "
            "folder"
        ) from None

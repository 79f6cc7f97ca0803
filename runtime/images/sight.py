"""What the vision graph makes of images, remembered by their content, and where it stands in a prompt."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from ...errors import EngineError, NemodiffError, first_line
from .image import Image

KEPT_BYTES = 256 * 2**20  # of embeddings; a conversation sends its images with every turn
See = Callable[[Image], np.ndarray]


class Sight:
    """Embeddings of images, (tokens, E) f32; the latest are kept."""

    def __init__(self, see: See) -> None:
        self._see = see
        self._kept: dict[bytes, np.ndarray] = {}
        self._bytes = 0  # of all that is kept: a prompt may have thousands of images, each of which asks
        self._lock = threading.Lock()  # requests may run in several threads

    def __call__(self, image: Image) -> np.ndarray:
        """The embeddings of an image's pads, in order. Raises EngineError."""
        with self._lock:
            found = self._take(image.digest)
        if found is None:
            try:
                found = self._see(image)
            except NemodiffError:
                raise
            except Exception as error:  # whatever a backend raises, mostly where memory is short
                raise EngineError(
                    f"the engine could not look at an image of {image.tokens} tokens ({first_line(error)}); send a "
                    "smaller one, or build with a smaller --max-image-size"
                ) from error
        with self._lock:
            self._take(image.digest)  # another thread may have looked at it meanwhile
            self._kept[image.digest] = found
            self._bytes += found.nbytes
            while self._bytes > KEPT_BYTES and len(self._kept) > 1:
                self._take(next(iter(self._kept)))
        return found

    def _take(self, digest: bytes) -> np.ndarray | None:
        found = self._kept.pop(digest, None)
        if found is not None:
            self._bytes -= found.nbytes
        return found


class Placed(NamedTuple):
    """An image in a prompt: `pads` are the numbers of the tokens whose embeddings it gives, (K,) i64."""

    image: Image
    pads: np.ndarray


class PromptImages:
    """The images of one prompt; the vision graph is run when the first of an image's pads is forwarded."""

    def __init__(self, placed: Sequence[Placed], sight: See) -> None:
        self._placed = placed
        self._sight = sight
        # Of the image that a prefill has reached the middle of: others' images may take its place in `sight` meanwhile.
        self._begun: tuple[Image, np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self._placed)

    @property
    def tokens(self) -> list[int]:
        """Tokens of each image, its start, breaks and end included."""
        return [placed.image.tokens for placed in self._placed]

    def keys(self, ids: list[int]) -> list[int]:
        """The prompt's ids with a number of its own for each image's pads, by which prompts are compared.

        It is negative, as no id is, and equal for images of equal content only.
        """
        keys = list(ids)
        for image, pads in self._placed:
            key = -1 - int.from_bytes(image.digest)
            for at in pads.tolist():
                keys[at] = key
        return keys

    def within(self, start: int, end: int) -> tuple[np.ndarray, np.ndarray] | None:
        """Of the prompt's tokens `start` to `end`, those that are pads, (K,) i32 from `start`, and their embeddings."""
        indices, embeddings = [], []
        for image, pads in self._placed:
            first, last = np.searchsorted(pads, (start, end)).tolist()
            if first < last:
                begun = self._begun
                seen = begun[1] if begun is not None and begun[0] is image else self._sight(image)
                self._begun = (image, seen) if last < len(pads) else None
                indices.append(pads[first:last] - start)
                embeddings.append(seen[first:last])
        if not indices:
            return None
        return np.concatenate(indices).astype(np.int32), np.concatenate(embeddings)

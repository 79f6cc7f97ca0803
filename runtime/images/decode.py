"""From an image file to pixels, whoever has sent it."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import RequestError, first_line, system_reason

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image as Picture

FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
MOST_BYTES = 64 * 2**20  # of a file
MOST_PIXELS = 2**26  # of a picture, 192 MiB as RGB: a file of a few bytes can say that it holds any number
MOST_SCANS = 100  # of a JPEG: each is a walk over all pixels, which 100 bytes can ask for; encoders make about ten
_MARKER = re.compile(rb"\xff+[^\x00\x01\xd0-\xd8\xff]")  # of those that have a length after them, or the end
_SCAN, _END = 0xDA, 0xD9


def decode(source: str | Path | bytes | Picture, name: str = "image") -> np.ndarray:
    """The pixels of a picture, (height, width, 3) u8, of an animation its first.

    What shines through is white, and an orientation of EXIF is ignored, both as the released processor has it.

    Args:
        source: a path, a file's bytes, or a Pillow image.
        name: names the image in messages.

    Raises:
        RequestError: no such file, none of FORMATS, too large, or broken.
    """
    from PIL import Image  # takes time to import, and most prompts have no images

    if isinstance(source, Image.Image):
        return _pixels(source, name)
    data = source if isinstance(source, bytes) else _read(source)
    if isinstance(source, (str, Path)):
        name = str(source)
    if len(data) > MOST_BYTES:
        raise RequestError(f"{name}: more than {MOST_BYTES:,} bytes, allowed of an image: up to that; make it smaller")
    if data.startswith(b"\xff\xd8") and _scans(data) > MOST_SCANS:
        raise RequestError(f"{name}: more than {MOST_SCANS} scans, allowed of a JPEG: up to that; save it anew")
    try:
        picture = Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise _too_large(name, "more pixels") from None
    except Exception as error:  # decoders raise whatever a broken file makes them raise
        raise _broken(name, data, error) from None
    return _pixels(picture, name)


def _read(path: str | Path) -> bytes:
    try:
        with Path(path).open("rb") as file:
            return file.read(MOST_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = system_reason(error)
        raise RequestError(f"{path}: cannot be read ({reason}); give the path of an image file") from None


def _scans(data: bytes) -> int:
    """The scans of a JPEG's first picture, not counted further than it takes to refuse it."""
    scans, at = 0, 2
    while scans <= MOST_SCANS and (found := _MARKER.search(data, at)) is not None:
        at = found.end()
        marker = data[at - 1]
        if marker == _END:
            break
        scans += marker == _SCAN
        at += max(int.from_bytes(data[at : at + 2]), 2)  # of the segment, its own two bytes included
    return scans


def _pixels(picture: Picture, name: str) -> np.ndarray:
    import numpy as np
    from PIL import Image

    width, height = picture.size
    if width * height > MOST_PIXELS:
        raise _too_large(name, f"{width} x {height} pixels")
    if not width * height:
        raise RequestError(f"{name}: {width} x {height} pixels, allowed: at least one; give another image")
    try:
        if picture.mode.startswith("I"):  # 16 bits of grey, which Pillow would cut off at 8
            grey = np.asarray(picture) >> 8
            return np.repeat(grey.clip(0, 255).astype(np.uint8)[:, :, None], 3, axis=2)
        if picture.mode in ("RGB", "L", "1", "CMYK", "YCbCr") and "transparency" not in picture.info:
            return np.asarray(picture.convert("RGB"))
        shown = picture.convert("RGBA")
        white = Image.new("RGBA", shown.size, "WHITE")
        white.paste(shown, (0, 0), shown)
        return np.asarray(white.convert("RGB"))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise _too_large(name, "more pixels") from None
    except MemoryError:
        raise
    except Exception as error:
        raise _broken(name, b"", error) from None


def _too_large(name: str, what: str) -> RequestError:
    return RequestError(f"{name}: {what}, allowed of an image: up to {MOST_PIXELS:,}; make it smaller")


def _broken(name: str, data: bytes, error: Exception) -> RequestError:
    formats = ", ".join(FORMATS)
    said = "it is empty" if data == b"" and not str(error) else first_line(error)[:120]
    if "cannot identify image file" in said:  # Pillow shows the address of the buffer
        said = "none of these, or its beginning is broken" if data else "it is empty"
    return RequestError(f"{name}: not a whole image file ({said}), allowed: {formats}; give another file")

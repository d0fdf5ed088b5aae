"""What an image file says of itself, read before a pixel is decoded (no TensorFlow needed)."""

from __future__ import annotations

import io
import logging
import operator
import warnings
from dataclasses import dataclass
from pathlib import Path

logging.getLogger("tifffile").addHandler(logging.NullHandler())  # what matters of it is in our errors

MAX_PIXELS = 100_000_000
_MAGIC = {
    b"\xff\xd8\xff": "jpeg",
    b"\x89PNG\r\n\x1a\n": "png",
    b"BM": "bmp",
    b"II*\0": "tiff",
    b"MM\0*": "tiff",
    b"II+\0": "tiff",
    b"MM\0+": "tiff",
}
ORIENTATION = 0x0112  # the EXIF tag


class ImageError(ValueError):
    """An image that cannot be used; the message names the file, what it is and what to do."""


@dataclass(frozen=True)
class Header:
    """Size and kind of an image: pixels, bits a channel, colour mode, and whether EXIF rotates it."""

    kind: str
    width: int
    height: int
    bits: int
    mode: str
    rotated: bool = False
    pages: int = 1


def kind_of(start: bytes, name: str = "image") -> str:
    """Tell `jpeg`, `png`, `bmp` or `tiff` by a file's first bytes; its name is not trusted.

    Raises:
        ImageError: for an empty file or any other kind.

    Example:
        >>> kind_of(b"BM6...")
        'bmp'
    """
    if not start:
        raise ImageError(f"{name}: the file is empty (0 bytes). Copy it again from its source")
    for magic, kind in _MAGIC.items():
        if start.startswith(magic):
            return kind
    raise ImageError(
        f"{name}: not an image of a known kind. Expected JPEG, PNG, BMP or TIFF. Received: {start[:8]!r}..."
    )


def read_header(source: Path | bytes, name: str | None = None) -> Header:
    """Read an image's header from a file or from its bytes.

    Raises:
        ImageError: if the file is missing, empty, of another kind, or its header is damaged.
    """
    if isinstance(source, bytes):
        return _parse(io.BytesIO(source), name or "image")
    name = name or str(source)
    try:
        with open(source, "rb") as file:
            return _parse(file, name)
    except ImageError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a name with a null byte
        reason = getattr(error, "strerror", None) or error
        raise ImageError(f"{name}: cannot be read ({reason})") from error


def _parse(file, name: str) -> Header:
    kind = kind_of(file.read(8), name)
    file.seek(0)
    try:
        return _tiff(file) if kind == "tiff" else _pillow(file, kind)
    except ImageError:
        raise
    except Exception as error:  # hostile bytes: parsers raise anything
        raise ImageError(f"{name}: damaged {kind.upper()} header ({error}). Copy it again") from error


def _pillow(file, kind: str) -> Header:
    from PIL import BmpImagePlugin, JpegImagePlugin, PngImagePlugin

    openers = {
        "jpeg": JpegImagePlugin.JpegImageFile,
        "png": PngImagePlugin.PngImageFile,
        "bmp": BmpImagePlugin.BmpImageFile,
    }  # opened directly: `Image.open` has a pixel limit of its own
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = openers[kind](file)
        rotated = _rotated(image.info.get("exif"))
    bits = 8
    if kind == "png":
        file.seek(24)
        bits = file.read(1)[0]
    width, height = image.size
    return Header(kind, width, height, bits, image.mode, rotated)


def _rotated(exif: bytes | None) -> bool:
    from PIL import Image

    if not exif:
        return False
    tags = Image.Exif()  # a PNG's own `getexif` would decode its pixels
    try:
        tags.load(exif)
    except Exception:  # damaged tags turn nothing, and the pixels may be whole
        return False
    return tags.get(ORIENTATION, 1) != 1


def _tiff(file) -> Header:
    import tifffile

    with tifffile.TiffFile(file) as tiff:
        page = tiff.pages[0]
        orientation = page.tags.get(ORIENTATION)  # type: ignore[union-attr]
        return Header(
            "tiff",
            operator.index(page.imagewidth),  # type: ignore[union-attr]
            operator.index(page.imagelength),  # type: ignore[union-attr]
            page.bitspersample,  # type: ignore[union-attr]
            page.photometric.name,  # type: ignore[union-attr]
            orientation is not None and orientation.value != 1,
            len(tiff.pages),
        )


def check_header(source: Path | bytes, name: str | None = None, max_pixels: int = MAX_PIXELS) -> Header:
    """Read a header and refuse an image of more than `max_pixels` before anything is decoded.

    Raises:
        ImageError: as `read_header`, and for an image that is too large or has no pixels.
    """
    header = read_header(source, name)
    pixels = header.width * header.height
    if min(header.width, header.height) < 1 or pixels > max_pixels:
        raise ImageError(
            f"{name or source}: {header.width} x {header.height} = {pixels:,} pixels; allowed are 1 to "
            f"{max_pixels:,}. Downsize the image, or raise max_pixels if you trust it"
        )
    return header

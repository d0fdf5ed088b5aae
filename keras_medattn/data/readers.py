"""Files to pixels, by their kind: what the graph decodes goes through it, TIFF through Python."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from keras_medattn.data.headers import MAX_PIXELS, ORIENTATION, Header, ImageError, check_header

Window = tuple[float, float]
Size = tuple[int, int]


def read(
    path: Path | str,
    window: Window | None = None,
    max_pixels: int = MAX_PIXELS,
    size: Size | None = None,
    towards: Size | None = None,
) -> np.ndarray:
    """Read one image file as RGB pixels.

    JPEG, PNG and BMP are decoded by `decode.decode`, the function that the exported model runs.

    Args:
        path: the file; its kind is told by its bytes.
        window: intensities of a 16-bit image that become 0 and 255.
        max_pixels: larger images are refused before decoding.
        size: resize to this height and width; in one graph with decoding, which is faster than after it.
        towards: of JPEGs, see `decode.decode`.

    Returns:
        `(H, W, 3)` uint8.

    Raises:
        ImageError: names the file and what is wrong with it.
    """
    path = Path(path)
    window = None if window is None else (float(window[0]), float(window[1]))
    header = check_header(path, max_pixels=max_pixels)
    if header.bits == 16 and window is None:
        raise ImageError(
            f"{path}: a 16-bit image needs an intensity window. Set data.window = [low, high] in the recipe; "
            "`medattn check` proposes one"
        )
    if header.kind == "tiff":
        pixels = _tiff(path, header, window)
        return pixels if size is None else size_pixels(pixels, size)
    return _in_graph(path, header, _decoder(window, max_pixels, size, towards))


def size_pixels(pixels: np.ndarray, size: Size) -> np.ndarray:
    """Resize RGB pixels to the model's `(height, width)`, as training and the exported model do."""
    import tensorflow as tf

    return _resizer((size[0], size[1]))(tf.constant(pixels)).numpy()


def raw_intensities(path: Path | str, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Read a 16-bit PNG or TIFF as it is: `(H, W, 3)`, grey three times, without alpha."""
    path = Path(path)
    header = check_header(path, max_pixels=max_pixels)
    if header.kind == "tiff":
        return _deep_tiff(path, header)
    import tensorflow as tf

    return tf.io.decode_png(path.read_bytes(), channels=3, dtype=tf.uint16).numpy()


@functools.lru_cache(maxsize=8)
def _resizer(size: Size):
    import tensorflow as tf

    from keras_medattn.data.decode import resize

    spec = tf.TensorSpec((None, None, 3), tf.uint8)
    return tf.function(lambda image: resize(image, size)).get_concrete_function(spec)


@functools.lru_cache(maxsize=8)
def _decoder(window: Window | None, max_pixels: int, size: Size | None, towards: Size | None):
    import tensorflow as tf

    from keras_medattn.data.decode import decode, resize

    def decoded(data):
        image = decode(data, window, max_pixels, towards)
        return image if size is None else resize(image, size)

    return tf.function(decoded).get_concrete_function(tf.TensorSpec((), tf.string))


def _in_graph(path: Path, header: Header, decoder: Callable[[Any], Any]) -> np.ndarray:
    import tensorflow as tf

    try:
        return decoder(tf.constant(path.read_bytes())).numpy()
    except tf.errors.InvalidArgumentError as error:
        said = str(error.message).partition("assertion failed: ")[2]
        reason = said.partition("\n")[0] or "truncated or damaged"
        raise ImageError(f"{path}: cannot be decoded as {header.kind.upper()}: {reason}") from error


def _tiff(path: Path, header: Header, window: Window | None) -> np.ndarray:
    if header.pages > 1:
        raise ImageError(
            f"{path}: {header.pages} pages; a 2D model reads single images. Save each page as a file"
        )
    if header.bits not in (1, 8, 16):
        raise ImageError(f"{path}: TIFF must have 1, 8 or 16 bits a channel. Received: {header.bits}")
    try:
        if header.bits == 16 and window is not None:
            from keras_medattn.data.decode import scale_intensities

            scaled = scale_intensities(_deep_tiff(path, header).astype(np.float32), window)
            return np.rint(np.clip(scaled, 0, 255)).astype(np.uint8)
        from PIL import Image

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with open(path, "rb") as file, Image.open(file, formats=["TIFF"]) as image:
                image.getexif()[ORIENTATION] = 1  # of all kinds, Pillow turns TIFFs by itself
                pixels = np.asarray(image.convert("RGB"))
        if pixels.shape[:2] != (header.height, header.width):
            raise ImageError(f"{path}: damaged TIFF: it names two sizes")
        return pixels
    except ImageError:
        raise
    except Exception as error:  # hostile bytes: parsers raise anything
        raise ImageError(f"{path}: damaged or unsupported TIFF: {error}") from error


def _deep_tiff(path: Path, header: Header) -> np.ndarray:
    import tifffile

    with tifffile.TiffFile(path) as file:
        page = file.pages[0]
        grey, planes = header.mode == "MINISBLACK", page.planarconfig == 2  # type: ignore[union-attr]
        dtype, depth = np.dtype(page.dtype), page.imagedepth  # type: ignore[union-attr]
        samples = page.samplesperpixel  # type: ignore[union-attr]
        if header.mode not in ("MINISBLACK", "RGB") or dtype.kind not in "iu" or depth * samples > 4:
            raise ImageError(
                f"{path}: 16-bit TIFF must be grey (MINISBLACK) or RGB integers. "
                f"Received: {header.mode} {dtype}, {samples} channels, depth {depth}"
            )
        pixels = page.asarray()
    if planes and pixels.ndim == 3:
        pixels = np.moveaxis(pixels, 0, -1)  # planes one after another -> (H, W, C)
    pixels = pixels.reshape(header.height, header.width, -1)[..., : 1 if grey else 3]  # without alpha
    return np.broadcast_to(pixels, (header.height, header.width, 3))

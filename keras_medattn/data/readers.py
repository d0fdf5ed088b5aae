"""Files to pixels, by their kind: what the graph decodes goes through it, TIFF through Python."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path

import numpy as np

from keras_medattn.data.headers import MAX_PIXELS, Header, ImageError, check_header

Window = tuple[float, float]


def read(path: Path | str, window: Window | None = None, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Read one image file as RGB pixels.

    JPEG, PNG and BMP are decoded by `decode.decode`, the function that the exported model runs.

    Args:
        path: the file; its kind is told by its bytes.
        window: intensities of a 16-bit image that become 0 and 255.
        max_pixels: larger images are refused before decoding.

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
        return _tiff(path, header, window)
    return _in_graph(path, header, window, max_pixels)


def raw_intensities(path: Path | str) -> np.ndarray:
    """Read a 16-bit PNG or TIFF as it is, to propose an intensity window from."""
    if check_header(Path(path)).kind == "tiff":
        import tifffile

        return tifffile.imread(path, key=0)
    import tensorflow as tf

    return tf.io.decode_png(Path(path).read_bytes(), dtype=tf.uint16).numpy()


@functools.lru_cache(maxsize=8)
def _decoder(window: Window | None, max_pixels: int):
    import tensorflow as tf

    from keras_medattn.data.decode import decode

    spec = tf.TensorSpec((), tf.string)
    return tf.function(lambda data: decode(data, window, max_pixels)).get_concrete_function(spec)


def _in_graph(path: Path, header: Header, window: Window | None, max_pixels: int) -> np.ndarray:
    import tensorflow as tf

    try:
        return _decoder(window, max_pixels)(tf.constant(path.read_bytes())).numpy()
    except tf.errors.InvalidArgumentError as error:
        reason = (
            str(error.message).splitlines()[0].partition("assertion failed: ")[2] or "truncated or damaged"
        )
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
            return _deep_tiff(path, header, window)
        from PIL import Image

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                return np.asarray(image.convert("RGB"))
    except ImageError:
        raise
    except Exception as error:  # hostile bytes: parsers raise anything
        raise ImageError(f"{path}: damaged or unsupported TIFF: {error}") from error


def _deep_tiff(path: Path, header: Header, window: Window) -> np.ndarray:
    import tifffile

    from keras_medattn.data.decode import scale_intensities

    if header.mode not in ("MINISBLACK", "RGB"):
        raise ImageError(f"{path}: 16-bit TIFF must be grey (MINISBLACK) or RGB. Received: {header.mode}")
    pixels = tifffile.imread(path, key=0)
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if header.mode == "MINISBLACK":
        pixels = pixels[..., :1]
    elif pixels.shape[0] in (3, 4) and pixels.shape[-1] not in (3, 4):
        pixels = np.moveaxis(pixels, 0, -1)  # planes one after another -> (H, W, C)
    scaled = np.clip(scale_intensities(pixels[..., :3].astype(np.float32), window), 0, 255)
    return np.broadcast_to(np.rint(scaled).astype(np.uint8), (*pixels.shape[:2], 3))

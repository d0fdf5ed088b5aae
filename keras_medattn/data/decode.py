"""The one decoder, in graph: bytes to pixels, the same for training and for the served model."""

from __future__ import annotations

from collections.abc import Callable

import tensorflow as tf

from keras_medattn.data.headers import MAX_PIXELS

Window = tuple[float, float]
Size = tuple[int, int]
_JPEG = b"\xff\xd8\xff"


def decode(
    data: tf.Tensor, window: Window | None = None, max_pixels: int = MAX_PIXELS, towards: Size | None = None
) -> tf.Tensor:
    """Decode JPEG, PNG or BMP bytes to RGB pixels inside a TensorFlow graph.

    Grey becomes three equal channels, alpha is dropped, CMYK is converted, a palette is looked up, EXIF
    rotation is ignored. A 16-bit PNG is mapped by `window = (low, high)` to
    `round(255 clip((v - low) / (high - low), 0, 1))`.

    Args:
        data: string scalar, the bytes of one file.
        window: intensities of a 16-bit image that become 0 and 255; without one such images are an error.
        max_pixels: larger images fail before they are decoded.
        towards: decode a JPEG at the least of 1/8, 1/4, 1/2 and 1 of its size at which both sides are twice
            this height and width or more: by fewer coefficients, which is faster, and gives other pixels than
            shrinking what is decoded whole. Pillow's `draft(mode, (2 * width, 2 * height))` does the same.

    Output shape:
        `(H, W, 3)`, uint8.

    Raises:
        tf.errors.InvalidArgumentError: for bytes that are no such image, damaged, or too large.

    Example:
        >>> png = tf.io.encode_png(tf.constant([[[7], [9]]], tf.uint8))
        >>> decode(png).numpy()[0, :, 0].tolist()
        [7, 9]
    """
    branches = [
        (_starts(data, _JPEG), lambda: _jpeg(data, max_pixels, towards)),
        (_starts(data, b"\x89PNG\r\n\x1a\n"), lambda: _png(data, window, max_pixels)),
        (_starts(data, b"BM"), lambda: _bmp(data, max_pixels)),
    ]
    image = tf.case(branches, default=lambda: _refuse("not a JPEG, PNG or BMP image"))
    return tf.ensure_shape(image, (None, None, 3))


def size_of(data: tf.Tensor, image: tf.Tensor) -> tf.Tensor:
    """Height and width `(2,)` of the file that `decode` made the image of, `towards` a size or not."""
    whole = tf.shape(image)[:2]
    return tf.cond(_starts(data, _JPEG), lambda: tf.io.extract_jpeg_shape(data)[:2], lambda: whole)


def resize(image: tf.Tensor, size: Size) -> tf.Tensor:
    """Resize pixels to the model's `(height, width)`: bilinear, antialiased, rounded to uint8.

    The aspect ratio is not kept. Training, export and evaluation all call this one function.

    Example:
        >>> resize(tf.zeros((8, 6, 3), tf.uint8), (4, 3)).shape
        TensorShape([4, 3, 3])
    """
    scaled = tf.image.resize(image, size, method="bilinear", antialias=True)
    return tf.cast(tf.round(tf.clip_by_value(scaled, 0.0, 255.0)), tf.uint8)


def scale_intensities(values, window: Window):
    """Map 16-bit intensities to float 0..255 by a window; NumPy arrays and tensors alike."""
    low, high = window
    if not high > low:
        raise ValueError(f"window must be (low, high) with high > low. Received: {window}")
    factor = 255.0 / (high - low)  # a product: graph optimisers rewrite divisions, not always bit for bit
    return (values - low) * factor


def _starts(data: tf.Tensor, magic: bytes) -> tf.Tensor:
    head = tf.strings.substr(data, 0, len(magic))
    return tf.equal(head, tf.constant(magic))


def _refuse(message: str) -> tf.Tensor:
    with tf.control_dependencies([tf.debugging.Assert(False, [message])]):
        return tf.zeros((1, 1, 3), tf.uint8)


def _number(data: tf.Tensor, position: int, dtype=tf.int32, little_endian: bool = True) -> tf.Tensor:
    raw = tf.strings.substr(data, position, dtype.size)
    return tf.cast(tf.io.decode_raw(raw, dtype, little_endian=little_endian)[0], tf.int64)


def _limit(height: tf.Tensor, width: tf.Tensor, max_pixels: int):
    fits = (height > 0) & (width > 0) & (height <= max_pixels // tf.maximum(width, 1))
    message = f"image has no pixels, or more than max_pixels = {max_pixels}; height and width:"
    return tf.control_dependencies([tf.debugging.Assert(fits, [message, height, width])])


def _jpeg(data: tf.Tensor, max_pixels: int, towards: Size | None) -> tf.Tensor:
    shape = tf.cast(tf.io.extract_jpeg_shape(data), tf.int64)

    def at(ratio: int) -> Callable[[], tf.Tensor]:
        # the default DCT differs from Pillow's and libjpeg's own by up to 6 levels
        return lambda: tf.io.decode_jpeg(data, channels=3, ratio=ratio, dct_method="INTEGER_ACCURATE")

    with _limit(shape[0], shape[1], max_pixels):
        if towards is None:
            return at(1)()
        times = tf.minimum(shape[0] // (2 * towards[0]), shape[1] // (2 * towards[1]))
        return tf.case([(times >= ratio, at(ratio)) for ratio in (8, 4, 2)], default=at(1))


def _png(data: tf.Tensor, window: Window | None, max_pixels: int) -> tf.Tensor:
    height, width = (_number(data, at, little_endian=False) for at in (20, 16))

    def deep():
        if window is None:
            return _refuse("a 16-bit PNG needs an intensity window, and this model has none")
        values = tf.cast(tf.io.decode_png(data, channels=3, dtype=tf.uint16), tf.float32)
        scaled = tf.clip_by_value(scale_intensities(values, window), 0.0, 255.0)
        return tf.cast(tf.round(scaled), tf.uint8)

    with _limit(height, width, max_pixels):
        depth = _number(data, 24, tf.uint8)
        return tf.cond(tf.equal(depth, 16), deep, lambda: tf.io.decode_png(data, channels=3))


def _bmp(data: tf.Tensor, max_pixels: int) -> tf.Tensor:
    width, height = _number(data, 18), tf.abs(_number(data, 22))
    depth = _number(data, 28, tf.uint16)
    end = _number(data, 10) + (width * depth + 31) // 32 * 4 * height  # rows are whole words
    plain = (_number(data, 14) >= 40) & tf.equal(_number(data, 30), 0)
    plain = tf.debugging.Assert(plain, ["BMP images that are compressed, or of OS/2, are not supported"])

    def pixels():
        whole = tf.strings.substr(data, tf.zeros_like(end), end)  # without bytes that programs append
        return tf.io.decode_bmp(whole, channels=0)

    def palette():  # TensorFlow answers the indices
        start, used = 14 + _number(data, 14), _number(data, 46)
        count = tf.where(used > 0, used, 256)
        raw = tf.strings.substr(data, start, 4 * count)
        colours = tf.reshape(tf.io.decode_raw(raw, tf.uint8), (-1, 4))[:, 2::-1]  # blue, green, red, 0
        return tf.gather(colours, tf.cast(pixels()[..., 0], tf.int32))

    branches = [
        (tf.equal(depth, 8), palette),
        (tf.equal(depth, 24), pixels),
        (tf.equal(depth, 32), lambda: pixels()[..., :3]),
    ]
    with _limit(height, width, max_pixels), tf.control_dependencies([plain]):
        return tf.case(branches, default=lambda: _refuse("BMP images must have 8, 24 or 32 bits a pixel"))

"""Bilinear crops of an image, read by gathers."""

from typing import Any

import keras

ops: Any = keras.ops  # a type checker would infer its types from one backend


def crop_bilinear(images: Any, boxes: Any, size: int, image_size: Any = None) -> Any:
    """Cuts boxes out of images and resizes each to `size` x `size` bilinearly, without antialiasing.

    Row i of a crop reads the image at `y0 + (i + 0.5) (y1 - y0) / size - 0.5`, cut to the image's rows, from
    the two rows around it; columns likewise. A box around the whole image equals `resize_bilinear`. Only what
    the crops read is converted to float, and nothing outside the image is read.

    Args:
        images: Tensor `(B, H, W, C)` of any type, with fewer than 2^31 pixels in all.
        boxes: Float tensor `(B, K, 4)` of `(x0, y0, x1, y1)` in pixels, as in `position_to_box`.
        size: Rows and columns of each crop.
        image_size: Int tensor `(B, 2)`, the rows and columns of each image where the batch is padded to the
            largest; the image lies in the upper left corner.

    Returns:
        Tensor `(B, K, size, size, C)`, float32, or float64 where the images or the boxes are.

    Raises:
        ValueError: If `images` is not of rank 4.

    Example:

    >>> images = ops.reshape(ops.arange(16, dtype="float32"), (1, 4, 4, 1))
    >>> boxes = ops.convert_to_tensor([[[0.0, 2.0, 2.0, 4.0]]])
    >>> [float(value) for value in ops.reshape(crop_bilinear(images, boxes, 2), (-1,))]
    [8.0, 9.0, 12.0, 13.0]
    """
    if len(images.shape) != 4:
        raise ValueError(
            f"`images` must have the shape (B, H, W, C). Received: images.shape={tuple(images.shape)}"
        )
    dtype = keras.backend.result_type(boxes.dtype, images.dtype, "float32")
    batch, height, width, channels = ops.shape(images)
    limits = [ops.reshape(ops.convert_to_tensor(length, "int32"), (1, 1, 1)) for length in (height, width)]
    if image_size is not None:
        limits = [ops.reshape(ops.cast(image_size[:, axis], "int32"), (-1, 1, 1)) for axis in (0, 1)]
    boxes = ops.cast(boxes, dtype)
    steps = (ops.cast(ops.arange(size, dtype="int32"), dtype) + 0.5) / size

    def places(axis: int) -> tuple[Any, Any, Any]:
        """The two rows or columns around each place `(B, K, size)`, and the share of the second."""
        start, end, last = (
            boxes[:, :, axis : axis + 1],
            boxes[:, :, axis + 2 : axis + 3],
            limits[1 - axis] - 1,
        )
        place = ops.maximum(start + steps * (end - start) - 0.5, 0)
        place = ops.minimum(place, ops.cast(last, dtype))
        low = ops.cast(ops.floor(place), "int32")
        return low, ops.minimum(low + 1, last), place - ops.cast(low, dtype)

    (left, right, across), (top, bottom, down) = places(0), places(1)
    pixels = ops.reshape(images, (batch * height * width, channels))
    first = ops.reshape(ops.arange(batch, dtype="int32"), (batch, 1, 1, 1)) * (height * width)

    def read(row: Any, column: Any) -> Any:
        index = first + ops.expand_dims(row, 3) * width + ops.expand_dims(column, 2)  # (B, K, size, size)
        return ops.cast(ops.take(pixels, index, axis=0), dtype)

    across, down = ops.expand_dims(across, (2, 4)), ops.expand_dims(down, (3, 4))
    upper, lower = (
        before + (after - before) * across
        for before, after in ((read(row, left), read(row, right)) for row in (top, bottom))
    )
    return upper + (lower - upper) * down

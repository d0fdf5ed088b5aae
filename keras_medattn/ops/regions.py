"""From a position in a bag of MSConv to the place in the image that it looked at."""

from collections.abc import Sequence
from typing import Any

import keras

from keras_medattn.ops.resize import scaled_size

ops: Any = keras.ops  # a type checker would infer its types from one backend


def position_to_cell(
    positions: Any, kernel: int, scales: Sequence[float], feature_size: tuple[Any, Any], slices: Any = 1
) -> tuple[Any, Any, Any, Any]:
    """Takes the positions of an MSConv bag apart into scale, slice, row and column.

    At scale i a kernel of size k has `n_i = (floor(h s_i) - k + 1) (floor(w s_i) - k + 1)` positions on each
    slice. A bag lays the scales one after another, within a scale the slices, within a slice the rows:
    `position = sum_(i' < i) S n_i' + (slice * rows_i + row) * columns_i + column`.

    Args:
        positions: Integer array or tensor of any shape, as in `TopKPool`'s `indices`.
        kernel: Kernel size k of the group whose bag it is.
        scales: The scales of the MSConv.
        feature_size: `(h, w)` of the maps that the MSConv was given: ints or tensors.
        slices: Number of slices S of the volumes; 1 for images.

    Returns:
        Index of the scale, slice, row and column of the kernel window's upper left cell on the scaled map:
        int32 tensors of the shape of `positions`.

    Example:

    >>> [int(part) for part in position_to_cell(9, kernel=2, scales=(0.5, 1.0), feature_size=(4, 4))]
    [1, 0, 2, 2]
    """
    rest = ops.cast(ops.convert_to_tensor(positions), "int32")
    parts = [ops.zeros_like(rest) for _ in range(4)]
    start = 0
    for index, scale in enumerate(scales):
        rows, columns = (ops.maximum(scaled_size(size, scale) - kernel + 1, 0) for size in feature_size)
        cell = rest - start
        across, area = ops.maximum(columns, 1), ops.maximum(rows * columns, 1)
        inside = cell % area
        here = [ops.full_like(rest, index), cell // area, inside // across, inside % across]
        parts = [ops.where(cell >= 0, new, old) for new, old in zip(here, parts, strict=True)]
        start = start + slices * rows * columns
    return parts[0], parts[1], parts[2], parts[3]


def position_to_box(
    positions: Any,
    kernel: int,
    scales: Sequence[float],
    feature_size: tuple[Any, Any],
    image_size: tuple[Any, Any],
    slices: Any = 1,
) -> Any:
    """The part of the image under a position's kernel window, as a box in pixels.

    The window covers the rows `[row, row + k)` of the `h_i = floor(h s_i)` rows at its scale. Half-pixel
    resizing maps an edge at u on the scaled map to `u h / h_i` on the feature map, and the backbone's stride
    to `u H / h_i` in the image, with H the image's rows; columns likewise. The backbone's receptive field
    reaches further than the box.

    Args:
        positions: Integer array or tensor of any shape, as in `TopKPool`'s `indices`.
        kernel: Kernel size k of the group whose bag it is.
        scales: The scales of the MSConv.
        feature_size: `(h, w)` of the maps that the MSConv was given: ints or tensors.
        image_size: `(H, W)` of the image in pixels: ints or tensors.
        slices: Number of slices of the volumes; 1 for images.

    Returns:
        Float32 tensor of the shape of `positions` and a last axis `(x0, y0, x1, y1)`, in pixels, cut to the
        image.

    Example:

    >>> box = position_to_box(9, kernel=2, scales=(0.5, 1.0), feature_size=(4, 4), image_size=(64, 64))
    >>> [float(edge) for edge in box]
    [32.0, 32.0, 64.0, 64.0]
    """
    scale, _, row, column = position_to_cell(positions, kernel, scales, feature_size, slices)

    def edges(cell: Any, size: Any, pixels: Any) -> tuple[Any, Any]:
        scaled = ops.take(
            ops.stack([ops.cast(scaled_size(size, factor), "float32") for factor in scales]), scale
        )
        ratio = ops.cast(pixels, "float32") / ops.maximum(scaled, 1.0)
        start = ops.cast(cell, "float32") * ratio
        return start, ops.minimum(start + kernel * ratio, ops.cast(pixels, "float32"))

    (y0, y1), (x0, x1) = (
        edges(row, feature_size[0], image_size[0]),
        edges(column, feature_size[1], image_size[1]),
    )
    return ops.stack([x0, y0, x1, y1], axis=-1)

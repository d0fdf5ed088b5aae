"""Between the positions in a bag of MSConv and the slices and places in the image that they look at."""

from collections.abc import Sequence
from typing import Any

import keras

from keras_medattn.ops.resize import scaled_size

ops: Any = keras.ops  # a type checker would infer its types from one backend


def position_to_cell(
    positions: Any,
    kernel: int | Sequence[int],
    scales: Sequence[float],
    feature_size: Sequence[Any],
    slices: Any = 1,
) -> tuple[Any, Any, Any, Any]:
    """Takes the positions of an MSConv bag apart into scale, slice, row and column.

    At scale i a kernel of size k has `n_i = (floor(h s_i) - k + 1) (floor(w s_i) - k + 1)` positions on each
    slice. A bag lays the scales one after another, within a scale the slices, within a slice the rows:
    `position = sum_(i' < i) S n_i' + (slice * rows_i + row) * columns_i + column`.

    Args:
        positions: Integer array or tensor of any shape, as in `TopKPool`'s `indices`.
        kernel: Kernel size k of the group whose bag it is; or one for each scale, `(k - 1) dilation + 1`.
        scales: The scales of the MSConv.
        feature_size: `(h, w)` of the maps that the MSConv was given: ints or tensors; or a list of one for
            each scale, of maps that had their scales already (`MSConv.of_pyramid`).
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
    for index, (extent, size) in enumerate(_branches(kernel, scales, feature_size)):
        rows, columns = (ops.maximum(length - extent + 1, 0) for length in size)
        cell = rest - start
        across, area = ops.maximum(columns, 1), ops.maximum(rows * columns, 1)
        inside = cell % area
        here = [ops.full_like(rest, index), cell // area, inside // across, inside % across]
        parts = [ops.where(cell >= 0, new, old) for new, old in zip(here, parts, strict=True)]
        start = start + slices * rows * columns
    return parts[0], parts[1], parts[2], parts[3]


def position_to_box(
    positions: Any,
    kernel: int | Sequence[int],
    scales: Sequence[float],
    feature_size: Sequence[Any],
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
        kernel: Kernel size k of the group whose bag it is; or one for each scale, `(k - 1) dilation + 1`.
        scales: The scales of the MSConv.
        feature_size: `(h, w)` of the maps that the MSConv was given: ints or tensors; or a list of one for
            each scale, of maps that had their scales already (`MSConv.of_pyramid`).
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

    extents, sizes = zip(*_branches(kernel, scales, feature_size), strict=True)
    extent = ops.take(ops.convert_to_tensor(extents, "float32"), scale)

    def edges(cell: Any, lengths: Sequence[Any], pixels: Any) -> tuple[Any, Any]:
        scaled = ops.take(ops.stack([ops.cast(length, "float32") for length in lengths]), scale)
        ratio = ops.cast(pixels, "float32") / ops.maximum(scaled, 1.0)
        start = ops.cast(cell, "float32") * ratio
        return start, ops.minimum(start + extent * ratio, ops.cast(pixels, "float32"))

    (y0, y1), (x0, x1) = (
        edges(row, [height for height, _ in sizes], image_size[0]),
        edges(column, [width for _, width in sizes], image_size[1]),
    )
    return ops.stack([x0, y0, x1, y1], axis=-1)


def per_position(mask: Any, cells: Any) -> Any:
    """Repeats a mask of slices for each position on them, in the order of a bag.

    Args:
        mask: Boolean tensor `(B, S)`.
        cells: Positions on a slice: an int or a tensor.

    Returns:
        Boolean tensor `(B, S cells)`.

    Example:

    >>> [bool(one) for one in per_position(ops.convert_to_tensor([[True, False]]), 2)[0]]
    [True, True, False, False]
    """
    batch, slices = ops.shape(mask)
    repeated = ops.broadcast_to(ops.expand_dims(mask, -1), (batch, slices, cells))
    return ops.reshape(repeated, (batch, slices * cells))


def _branches(kernel: Any, scales: Sequence[float], feature_size: Any) -> list[tuple[int, tuple[Any, Any]]]:
    """For each scale the cells that a kernel spans, and the rows and columns of its maps."""
    extents = [kernel] * len(scales) if isinstance(kernel, int) else list(kernel)
    if isinstance(feature_size[0], list | tuple):
        sizes = [(height, width) for height, width in feature_size]
    else:
        height, width = feature_size
        sizes = [(scaled_size(height, scale), scaled_size(width, scale)) for scale in scales]
    return list(zip(extents, sizes, strict=True))

"""From an attention map to boxes: a threshold, the connected components above it, the heaviest of them."""

from typing import Any

import keras

ops: Any = keras.ops  # a type checker would infer its types from one backend

THRESHOLDS = ("mean", "max", "quantile", "otsu")


def above_threshold(attention: Any, threshold: str = "mean", level: float = 0.5) -> Any:
    """Where each map of a batch lies above a threshold of its own.

    A cell is above where its value is strictly higher than: the map's mean ("mean"); `level` times the map's
    maximum ("max"); its `level`-quantile, interpolated linearly ("quantile"); or the value that splits the
    cells into two classes of the greatest variance between them, taken over all splits and not over the bins
    of a histogram ("otsu", Otsu, A Threshold Selection Method from Gray-Level Histograms). No cell of a
    constant map is above its mean, quantile or split.

    Args:
        attention: Float tensor `(B, h, w)`.
        threshold: "mean", "max", "quantile" or "otsu".
        level: The fraction of the maximum, or which quantile, from 0 to 1.

    Returns:
        Boolean tensor `(B, h, w)`.

    Raises:
        ValueError: If `threshold` is none of those.

    Example:

    >>> attention = ops.reshape(ops.convert_to_tensor([0.0, 1.0, 2.0, 9.0]), (1, 2, 2))
    >>> [[int(ops.sum(above_threshold(attention, rule, 0.2))) for rule in THRESHOLDS]]
    [[1, 2, 3, 1]]
    """
    if threshold not in THRESHOLDS:
        raise ValueError(f"`threshold` must be one of {THRESHOLDS}. Received: threshold={threshold!r}")
    batch, height, width = ops.shape(attention)
    values = ops.cast(attention, keras.backend.result_type(attention.dtype, "float32"))
    values = ops.reshape(values, (batch, height * width))
    lowest = ops.min(values, axis=1, keepdims=True)
    above = values - lowest  # exactly 0 in a constant map, whatever way its mean is rounded
    if threshold == "mean":
        limit = ops.mean(above, axis=1, keepdims=True)
    elif threshold == "max":
        limit = level * ops.max(values, axis=1, keepdims=True) - lowest
    else:
        ordered = ops.sort(above, axis=1)
        limit = _quantile(ordered, level) if threshold == "quantile" else _otsu(ordered)
    return ops.reshape(above > limit, (batch, height, width))


def _quantile(ordered: Any, level: float) -> Any:
    """The quantile `(B, 1)` of sorted values `(B, n)`."""
    last = ops.shape(ordered)[1] - 1
    place = level * ops.cast(ops.reshape(last, (1,)), ordered.dtype)
    low = ops.cast(ops.floor(place), "int32")
    before = ops.take(ordered, low, axis=1)
    after = ops.take(ordered, ops.minimum(low + 1, last), axis=1)
    return before + (after - before) * (place - ops.cast(low, ordered.dtype))


def _otsu(ordered: Any) -> Any:
    """The highest value `(B, 1)` of the lower class of sorted values `(B, n)` that begin with 0."""
    scaled = ordered / ops.maximum(ordered[:, -1:], keras.config.epsilon())
    sums, length = ops.cumsum(scaled, axis=1), ops.shape(ordered)[1]
    below = ops.cast(ops.arange(1, length, dtype="int32"), ordered.dtype)  # cells in the lower class
    rest = ops.cast(length, ordered.dtype) - below
    means = (sums[:, :-1] / below, (sums[:, -1:] - sums[:, :-1]) / rest)
    variance = below * rest * ops.square(means[1] - means[0])  # (B, n - 1), in units of n^2
    variance = ops.where(ordered[:, 1:] > ordered[:, :-1], variance, -1)  # equal values stay together
    best = ops.max(variance, axis=1, keepdims=True)
    return ops.max(ops.where(variance < best, 0, ordered[:, :-1]), axis=1, keepdims=True)


def label_components(mask: Any) -> Any:
    """Labels the 8-connected components of each mask of a batch.

    Each cell starts with the number of its place, and takes the highest number among itself and the eight
    around it that are in the mask, until nothing changes: a component then bears the number of its last cell.
    The number of rounds is the longest shortest path that a number has to go: some ten on smooth maps, some
    hundred on random masks of 56 x 56 that just percolate.

    Args:
        mask: Boolean tensor `(B, h, w)` with fewer than 2^24 cells a mask.

    Returns:
        Int32 tensor `(B, h, w)`: 0 outside the mask, else the same number for all cells of a component, which
        is 1 + the place (`row * w + column`) of its last cell.

    Example:

    >>> labels = label_components(ops.convert_to_tensor([[[True, False, True], [False, False, True]]]))
    >>> [[int(label) for label in row] for row in labels[0]]
    [[1, 0, 6], [0, 0, 6]]
    """
    batch, height, width = ops.shape(mask)
    # In float32, which counts to 2^24, at every precision policy: LiteRT pools no int32.
    inside = ops.cast(ops.expand_dims(mask, -1), "float32")  # (B, h, w, 1)
    places = ops.cast(ops.arange(1, height * width + 1, dtype="int32"), "float32")
    start = ops.reshape(places, (1, height, width, 1)) * inside

    def spread(labels: Any, _: Any) -> tuple[Any, Any]:
        pooled = ops.max_pool(labels, 3, strides=1, padding="same", data_format="channels_last") * inside
        return pooled, ops.any(ops.not_equal(pooled, labels))

    labels, _ = ops.while_loop(lambda _, changed: changed, spread, spread(start, None))
    return ops.reshape(ops.cast(labels, "int32"), (batch, height, width))


def heaviest_components(labels: Any, weights: Any, k: int) -> tuple[Any, Any, Any]:
    """The `k` components of each image with the greatest sum of weights, heaviest first.

    Takes about `5 h w (h + w)` bytes an image: 1.8 MB at 56 x 56, and 112 MB at 224 x 224.

    Args:
        labels: Int32 tensor `(B, h, w)`, as `label_components` answers.
        weights: Float tensor `(B, h, w)`.
        k: How many components, from 1 to `h w`.

    Returns:
        `members (B, k, h, w)` boolean, the cells of each component; `sums (B, k)`, of its weights; and
        `found (B, k)` boolean, false where an image has fewer components: those hold no cells and the sum 0.

    Example:

    >>> labels = ops.convert_to_tensor([[[1, 0, 6], [0, 0, 6]]], "int32")
    >>> members, sums, found = heaviest_components(labels, ops.ones((1, 2, 3)), 3)
    >>> [float(value) for value in sums[0]], [bool(value) for value in found[0]]
    ([2.0, 1.0, 0.0], [True, True, False])
    """
    batch, height, width = ops.shape(labels)
    dtype = keras.backend.result_type(weights.dtype, "float32")
    flat = ops.reshape(labels, (batch, height * width))
    weights = ops.where(flat > 0, ops.reshape(ops.cast(weights, dtype), (batch, height * width)), 0)
    # Sums by label as a product of matrices: no segment sum is built in to LiteRT and ONNX alike.
    place, rows = ops.maximum(flat - 1, 0), ops.arange(height, dtype="int32")
    in_row = ops.equal(ops.expand_dims(place // width, 1), ops.expand_dims(rows, 1))
    in_row = ops.where(in_row, ops.expand_dims(weights, 1), 0)  # (B, h, h w)
    in_column = ops.equal(ops.expand_dims(place % width, 2), ops.arange(width, dtype="int32"))
    sums = ops.matmul(in_row, ops.cast(in_column, dtype))  # (B, h, w), each at its component's last cell
    sums = ops.reshape(sums, (batch, height * width))
    is_last = ops.equal(flat, ops.arange(1, height * width + 1, dtype="int32"))
    nothing = ops.full_like(sums, -1e30)
    sums, best = ops.top_k(ops.where(is_last, sums, nothing), k)  # (B, k)
    found = sums > nothing[:, :1]
    number = ops.reshape(ops.where(found, ops.cast(best, "int32") + 1, -1), (batch, k, 1, 1))
    members = ops.equal(ops.expand_dims(labels, 1), number)  # (B, k, h, w)
    return members, ops.where(found, sums, 0), found


def bounding_boxes(members: Any) -> Any:
    """The smallest box around the cells of each mask.

    Args:
        members: Boolean tensor `(B, K, h, w)`.

    Returns:
        Int32 tensor `(B, K, 4)` of `(x0, y0, x1, y1)` in cells: the columns `[x0, x1)` and the rows
        `[y0, y1)`. All 0 for a mask without cells.

    Example:

    >>> members = ops.convert_to_tensor([[[[False, True, False], [False, True, True]]]])
    >>> [int(edge) for edge in bounding_boxes(members)[0, 0]]
    [1, 0, 3, 2]
    """

    def edges(axis: int, size: Any) -> tuple[Any, Any]:
        occupied = ops.any(members, axis=axis)  # (B, K, h or w)
        index = ops.arange(size, dtype="int32")
        end = ops.max(ops.where(occupied, index + 1, 0), axis=-1)
        return ops.minimum(ops.min(ops.where(occupied, index, size), axis=-1), end), end

    _, _, height, width = ops.shape(members)
    (x0, x1), (y0, y1) = edges(2, width), edges(3, height)
    return ops.stack([x0, y0, x1, y1], axis=-1)

"""The k highest values of each channel of a bag, and their weighted sum."""

from typing import Any

import keras

ops: Any = keras.ops  # a type checker would infer its types from one backend

_GROUP = 32  # positions that share one maximum in the search; 25 to 32 measured fastest on 10,000 positions
_FLOATS = {"float16": (10, 15), "bfloat16": (7, 127), "float32": (23, 127), "float64": (52, 1023)}


def top_k(x: Any, k: int, mask: Any = None) -> tuple[Any, Any]:
    """The `k` highest values of each channel over all positions of a bag.

    `values[b, n, 0] >= ... >= values[b, n, k - 1]` are the highest of `x[b, :, n]`, and
    `values[b, n, r] = x[b, indices[b, n, r], n]`. The values are exact, with ties too; which of several tied
    positions is named is left open, and the gradient goes to the one that is named.

    Of a long bag only the maxima of groups of 32 positions are sorted: the `k` highest values lie in the `k`
    groups with the highest maxima.

    Args:
        x: Float tensor `(B, L, N)` of fewer than 2^31 numbers.
        k: How many values, at least 1.
        mask: Boolean tensor `(B, L)`, true where a position counts. Others are never chosen.

    Returns:
        `values (B, N, k)` in `x`'s dtype, highest first, and `indices (B, N, k)` int32. Where a bag has fewer
        than `k` valid positions, the ranks beyond them hold value 0, with no gradient, and index 0.

    Raises:
        ValueError: If `x` is not of rank 3, `k` is below 1, or `L` is known to be smaller than `k`.

    Example:

    >>> x = ops.reshape(ops.convert_to_tensor([1.0, 5.0, 3.0, 4.0]), (1, 4, 1))
    >>> values, indices = top_k(x, 2)
    >>> [float(v) for v in values[0, 0]], [int(i) for i in indices[0, 0]]
    ([5.0, 4.0], [1, 3])
    """
    if len(x.shape) != 3:
        raise ValueError(f"`x` must have the shape (B, L, N). Received: x.shape={tuple(x.shape)}")
    batch, length, channels = ops.shape(x)
    if k < 1 or (isinstance(length, int) and length < k):
        raise ValueError(
            f"`k` must be from 1 to the number of positions; give a larger map, more scales or a smaller k. "
            f"Received: k={k}, x.shape={tuple(x.shape)}"
        )
    scores = ops.stop_gradient(x)
    if mask is not None:
        lowest, above_lowest = _lowest(keras.backend.standardize_dtype(x.dtype))
        scores = ops.where(ops.expand_dims(mask, -1), ops.maximum(scores, above_lowest), lowest)
    indices = _positions(scores, k)
    values = _gather(x, _flat_index(indices, length))
    if not isinstance(length, int):  # fewer than k positions are possible: fill up the missing ranks
        missing = (batch, channels, k - ops.shape(indices)[2])
        values = ops.concatenate([values, ops.zeros(missing, x.dtype)], axis=2)
        values = ops.reshape(values, (batch, channels, k))  # tells k to the static shape
        indices = ops.concatenate([indices, ops.zeros(missing, "int32")], axis=2)
        indices = ops.reshape(indices, (batch, channels, k))
    valid = _valid_ranks(x, k, mask)
    if valid is None:
        return values, indices
    return ops.where(valid, values, 0), ops.where(valid, indices, 0)


def top_k_pool(x: Any, weights: Any, mask: Any = None) -> tuple[Any, dict[str, Any]]:
    """Pools a bag to the weighted sum of each channel's highest values (Li et al., MIMS: `sum_r w_r a_r`).

    `a_r` is the r-th highest value of the channel over positions, slices and scales together. Where a bag has
    fewer than k valid positions, the weights are renormalised over those it has; where it has none the answer
    is 0, with zero gradients.

    Args:
        x: Float tensor `(B, L, N)`.
        weights: Non-negative tensor with sum 1 over its last axis, `(k,)` for all channels or `(N, k)`.
        mask: Boolean tensor `(B, L)`, true where a position counts.

    Returns:
        `pooled (B, N)` in `x`'s dtype, and a dict of `indices (B, N, k)` int32, `values (B, N, k)` and the
        renormalised `weights (B, N, k)`, which are 0 at ranks that the bag does not fill.

    Raises:
        ValueError: As `top_k`.

    Example:

    >>> x = ops.reshape(ops.convert_to_tensor([1.0, 5.0, 3.0, 4.0]), (1, 4, 1))
    >>> pooled, scores = top_k_pool(x, ops.convert_to_tensor([0.75, 0.25]))
    >>> float(pooled[0, 0])
    4.75
    """
    k = weights.shape[-1]
    values, indices = top_k(x, k, mask)
    dtype = keras.backend.result_type(x.dtype, "float32")
    weights = ops.broadcast_to(ops.cast(weights, dtype), ops.shape(values))
    valid = _valid_ranks(x, k, mask)
    if valid is not None:
        weights = ops.where(valid, weights, 0)
        total = ops.sum(weights, axis=-1, keepdims=True)
        weights = ops.where(total > 0, weights / ops.where(total > 0, total, 1), 0)
    pooled = ops.sum(ops.cast(values, dtype) * weights, axis=-1)  # (B, N)
    scores = {"indices": indices, "values": values, "weights": ops.cast(weights, x.dtype)}
    return ops.cast(pooled, x.dtype), scores


def _lowest(dtype: str) -> tuple[float, float]:
    """The two lowest finite numbers: a masked position gets the first, a valid one at least the second."""
    mantissa, exponent = _FLOATS[dtype]
    return -(2 - 2.0**-mantissa) * 2.0**exponent, -(2 - 2.0 ** (1 - mantissa)) * 2.0**exponent


def _valid_ranks(x: Any, k: int, mask: Any) -> Any:
    """Boolean `(B or 1, 1, k)`, true at the ranks that the bag can fill; None where it can fill all."""
    ranks = ops.arange(k, dtype="int32")
    if mask is not None:
        return ranks < ops.reshape(ops.sum(ops.cast(mask, "int32"), axis=1), (-1, 1, 1))  # (B, 1, k)
    length = ops.shape(x)[1]
    return None if isinstance(length, int) else ops.reshape(ranks < length, (1, 1, k))


def _positions(scores: Any, k: int) -> Any:
    """Positions `(B, N, min(k, L))` of the highest scores."""
    batch, length, channels = ops.shape(scores)
    if isinstance(length, int) and length < 4 * k * _GROUP:
        return ops.top_k(ops.transpose(scores, (0, 2, 1)), k)[1]
    groups = length // _GROUP
    if isinstance(length, int):
        maxima = ops.max_pool(scores, _GROUP, _GROUP, data_format="channels_last")  # (B, L // 32, N)
    else:  # a bag may turn out smaller than a group, where some builds of TensorFlow cannot pool
        grouped = ops.reshape(scores[:, : groups * _GROUP], (batch, groups, _GROUP, channels))
        maxima = ops.max(grouped, axis=2)  # (B, L // 32, N)
    best = ops.top_k(ops.transpose(maxima, (0, 2, 1)), _at_most(k, groups))[1]  # (B, N, k)
    members = ops.expand_dims(best, -1) * _GROUP + ops.arange(_GROUP, dtype="int32")  # (B, N, k, 32)
    members = ops.reshape(members, (batch, channels, ops.shape(best)[2] * _GROUP))  # (B, N, 32 k)
    tail = ops.arange(groups * _GROUP, length, dtype="int32")  # what the whole groups leave over
    tail = ops.broadcast_to(tail, (batch, channels, length - groups * _GROUP))
    members = ops.concatenate([members, tail], axis=2)  # (B, N, 32 k + L % 32)
    found = ops.take(ops.reshape(scores, (-1,)), _flat_index(members, length))
    chosen = ops.top_k(found, _at_most(k, length))[1]
    rows = ops.reshape(ops.arange(batch * channels, dtype="int32"), (batch, channels, 1))
    return ops.take(ops.reshape(members, (-1,)), rows * ops.shape(members)[2] + chosen)


def _at_most(k: int, size: Any) -> Any:
    return min(k, size) if isinstance(size, int) else ops.minimum(k, size)


def _flat_index(positions: Any, length: Any) -> Any:
    """Indices into a flattened bag `(B, L, N)` of `positions (B, N, ...)`, rank 3."""
    batch, channels, _ = ops.shape(positions)
    offsets = ops.reshape(ops.arange(batch, dtype="int32"), (batch, 1, 1)) * (length * channels)
    return offsets + ops.expand_dims(ops.arange(channels, dtype="int32"), -1) + positions * channels


def _gather(x: Any, index: Any) -> Any:
    """`x` flattened, at `index`. Its gradient is a scatter: TensorFlow's own takes ten times longer."""
    shape = ops.shape(x)

    @ops.custom_gradient
    def gather(x: Any) -> Any:
        def gradient(*args: Any, upstream: Any = None) -> Any:
            upstream = args[0] if upstream is None else upstream
            flat = ops.zeros((shape[0] * shape[1] * shape[2],), x.dtype)
            targets, updates = ops.reshape(index, (-1, 1)), ops.reshape(upstream, (-1,))
            return ops.reshape(ops.scatter_update(flat, targets, updates, reduction="add"), shape)

        return ops.take(ops.reshape(x, (-1,)), index), gradient

    return gather(x)

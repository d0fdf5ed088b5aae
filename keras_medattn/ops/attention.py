"""Attention over positions, exact in blocks where it is large, and attention over channels."""

from typing import Any

import keras

ops: Any = keras.ops  # a type checker would infer its types from one backend

_WHOLE = 100_000_000  # scores up to which they are held as a whole (400 MB): some percent faster than blocks
_HELD = 10_000_000  # scores of one block (40 MB): fewer are slower, more are hardly faster
_LIKELY_BATCH = 32  # where it is unknown


def spatial_scores(query: Any, key: Any) -> Any:
    """How much each query attends to each key: `softmax_m(q_n . k_m)`, without scaling.

    Args:
        query: Float tensor `(B, N, d)`.
        key: Float tensor `(B, M, d)`.

    Returns:
        Tensor `(B, N, M)`, float32 or better: each row sums to 1.

    Example:

    >>> query, key = ops.ones((1, 2, 3)), ops.ones((1, 4, 3))
    >>> [float(score) for score in spatial_scores(query, key)[0, 0]]
    [0.25, 0.25, 0.25, 0.25]
    """
    query, key = _precise(query, key)
    return ops.softmax(ops.matmul(query, ops.transpose(key, (0, 2, 1))), axis=-1)


def spatial_attention(query: Any, key: Any, value: Any, block: int | None = None) -> Any:
    """Attention over positions: `out_n = sum_m softmax_m(q_n . k_m) v_m`, without scaling.

    The N x M scores are held as a whole only where they are at most 100 million over the batch (an unknown
    batch counts as 32). Otherwise the queries are taken in blocks, forward and backward, and the backward
    pass computes each block's scores again: the same answer in memory linear in N and M, for a few percent
    more arithmetic (d multiply-adds on top of 3 (d + e) for each score).

    Args:
        query: Float tensor `(B, N, d)`.
        key: Float tensor `(B, M, d)`.
        value: Float tensor `(B, M, e)`.
        block: Number of queries taken at once; by default all, or as many as give 10 million scores over the
            batch.

    Returns:
        Tensor `(B, N, e)` in `value`'s dtype. Sums are taken in float32 or better.

    Raises:
        ValueError: If a shape does not fit or `block` is below 1.

    Example:

    >>> query, key = ops.ones((1, 2, 3)), ops.ones((1, 4, 3))
    >>> value = ops.reshape(ops.arange(4, dtype="float32"), (1, 4, 1))
    >>> [float(mean) for mean in spatial_attention(query, key, value)[0, :, 0]]
    [1.5, 1.5]
    """
    if not len(query.shape) == len(key.shape) == len(value.shape) == 3 or query.shape[-1] != key.shape[-1]:
        raise ValueError(
            "`query` (B, N, d), `key` (B, M, d) and `value` (B, M, e) must fit together. Received: shapes "
            f"{tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}"
        )
    if block is not None and block < 1:
        raise ValueError(f"`block` must be at least 1. Received: block={block}")
    dtype = value.dtype
    query, key, value = _precise(query, key, value)
    rows = _rows(query, key) if block is None else block
    if rows is None:
        answer = ops.matmul(spatial_scores(query, key), value)
    else:
        answer = _in_blocks(query, key, value, _at_most(rows, ops.shape(query)[1]))
    return ops.cast(answer, dtype)


def channel_scores(query: Any, key: Any) -> Any:
    """How much of each channel goes into each: `softmax_c(sum_n q_nc k_nd)`, without scaling.

    Args:
        query: Float tensor `(B, N, C)`.
        key: Float tensor `(B, N, D)`.

    Returns:
        Tensor `(B, C, D)`, float32 or better: each **column** sums to 1.

    Example:

    >>> scores = channel_scores(ops.ones((1, 5, 2)), ops.ones((1, 5, 3)))
    >>> [float(score) for score in scores[0, 0]]
    [0.5, 0.5, 0.5]
    """
    query, key = _precise(query, key)
    return ops.softmax(ops.matmul(ops.transpose(query, (0, 2, 1)), key), axis=1)


def _precise(*tensors: Any) -> list[Any]:
    """The tensors in float32, or float64 where they are."""
    dtype = keras.backend.result_type(*(tensor.dtype for tensor in tensors), "float32")
    return [ops.cast(tensor, dtype) for tensor in tensors]


def _rows(query: Any, key: Any) -> Any:
    """How many queries to take at once, a tensor where a size is known only at run time; None for all."""
    batch, length, keys = query.shape[0] or _LIKELY_BATCH, query.shape[1], key.shape[1]
    if length and keys and batch * length * keys <= _WHOLE:
        return None
    rows = _HELD // (ops.shape(query)[0] * ops.shape(key)[1])
    return max(rows, 1) if isinstance(rows, int) else ops.maximum(rows, 1)


def _at_most(rows: Any, length: Any) -> Any:
    known = isinstance(rows, int) and isinstance(length, int)
    return min(rows, length) if known else ops.minimum(rows, length)


def _in_blocks(query: Any, key: Any, value: Any, rows: Any) -> Any:
    """The attention in blocks of `rows` queries."""
    depth, width = query.shape[-1], value.shape[-1]

    @ops.custom_gradient
    def attend(query: Any, key: Any, value: Any) -> Any:
        def answer(front: Any, start: Any) -> tuple:
            return (ops.matmul(spatial_scores(front[..., :depth], key), value),)

        (answers,) = _in_turn(answer, _widened(query, max(depth, width)), rows)
        answers = answers[..., :width]
        kept = ops.stop_gradient(answers)  # with the answers themselves PyTorch would hold a cycle

        def gradient(*args: Any, upstream: Any = None) -> Any:
            upstream = args[0] if upstream is None else upstream
            # d out_n / d score_nm takes off a mean over m, which is upstream_n . out_n; the ones bring it in
            mean = ops.sum(upstream * kept, axis=-1, keepdims=True)
            values = ops.concatenate([value, ops.ones_like(value[..., :1])], axis=-1)  # (B, M, e + 1)

            def change(front: Any, start: Any) -> tuple:
                queries, (batch, size, _) = front[..., :depth], ops.shape(front)
                above = ops.slice(upstream, (0, start, 0), (batch, size, width))
                scores = spatial_scores(queries, key)
                above_and_mean = ops.concatenate([above, front[..., depth:]], axis=-1)  # (B, rows, e + 1)
                slopes = scores * ops.matmul(above_and_mean, ops.transpose(values, (0, 2, 1)))
                return (
                    ops.matmul(slopes, key),
                    ops.matmul(ops.transpose(slopes, (0, 2, 1)), queries),
                    ops.matmul(ops.transpose(scores, (0, 2, 1)), above),
                )

            queue = ops.concatenate([query, -mean], axis=-1)
            by_query, by_key, by_value = _in_turn(change, queue, rows)
            return by_query[..., :depth], by_key, by_value

        return answers, gradient

    return attend(query, key, value)


def _in_turn(step: Any, queue: Any, rows: Any) -> tuple:
    """Puts each block of the queue `(B, N, w)` through `step(block, start)`, one strictly after the other.

    The first item of a step's answer takes the block's place; the others are summed over the blocks. What is
    at the front of the queue goes, its answer comes to the back: all exports can do that, not all can write
    to a slice, and TensorFlow does not begin with several blocks at once. The first block takes what whole
    blocks leave over.
    """
    batch, length, width = ops.shape(queue)
    blocks = (length - 1) // rows
    rest = length - blocks * rows

    def take(queue: Any, start: Any, size: Any) -> tuple:
        front = ops.slice(queue, (0, 0, 0), (batch, size, width))
        new, *parts = step(front, start)
        queue = ops.concatenate([queue[:, size:], _widened(new, width)], axis=1)
        return ops.reshape(queue, (batch, length, width)), *parts

    def turn(i: Any, state: tuple) -> tuple:
        queue, *parts = take(state[0], rest + i * rows, rows)
        return queue, *(old + new for old, new in zip(state[1:], parts, strict=True))

    return ops.fori_loop(0, blocks, turn, take(queue, 0, rest))


def _widened(x: Any, width: int) -> Any:
    return x if x.shape[-1] == width else ops.pad(x, ((0, 0), (0, 0), (0, width - x.shape[-1])))

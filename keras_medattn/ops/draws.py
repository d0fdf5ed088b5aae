"""Cells drawn from an attention map or chosen on it, and the probabilities of draws.

Shapes: B images, h x w cells of the map, P cells of each image. A cell is its flat index, `row * w + column`.
"""

from typing import Any

import keras

from keras_medattn.ops.comparison import wide
from keras_medattn.ops.random import uniform

ops: Any = keras.ops  # a type checker would infer its types from one backend

FLOOR = 1e-30  # a probability below it counts as it: its logarithm stays finite, without a gradient


def sample_cells(attention: Any, patches: int, replacement: bool, keys: Any) -> Any:
    """Draws cells with the probabilities of an attention map.

    With replacement the draws are independent: `P(cell) = a[cell]`, by `cells_at`. Without replacement each
    draw leaves its cell out of the later ones, `P(cell_t | earlier) = a[cell_t] / (1 - sum_(s < t)
    a[cell_s])`, by the P smallest of `e / a` with e exponential (the Gumbel top-k trick). A cell of
    probability 0 is never drawn while there is one of positive probability left. Without replacement, and
    fewer than P of those, cells of probability 0 fill up the rest: they weigh nothing in any estimate here.

    Args:
        attention: Float tensor `(B, h, w)`, not negative. It need not sum to 1.
        patches: P, the number of draws.
        replacement: Whether a cell may be drawn more than once.
        keys: Int32 tensor `(B, 2)`, as `random.keys` answers: they alone decide the draws.

    Returns:
        Cells `(B, P)` int32 in the order of drawing, without a gradient.

    Raises:
        ValueError: If `patches` is below 1, or without replacement known to be above the number of cells.

    Example:

    >>> from keras_medattn.ops import random
    >>> attention = ops.convert_to_tensor([[[0.0, 1.0], [0.0, 3.0]]])
    >>> cells = sample_cells(attention, 2, replacement=False, keys=random.keys(0, 0, [0]))
    >>> sorted(int(cell) for cell in cells[0])
    [1, 3]
    """
    attention = ops.stop_gradient(as_map(attention, patches, 1 if replacement else patches))
    batch, height, width = ops.shape(attention)
    if not replacement:
        flat = ops.reshape(attention, (batch, height * width))
        exponential = -ops.log1p(-uniform(keys, height * width))
        scores = ops.log(ops.maximum(flat, FLOOR)) - ops.log(ops.cast(exponential, flat.dtype))
        return ops.top_k(ops.where(flat > 0, scores, -1e30), patches)[1]
    return cells_at(attention, ops.reshape(uniform(keys, 2 * patches), (batch, 2, patches)))


def cells_at(attention: Any, levels: Any) -> Any:
    """The cells that an attention map gives to uniform numbers, by the inverse of its distribution function.

    The first number of a pair decides the row, `sum_(r < row) a_r <= level sum_r a_r < sum_(r <= row) a_r`,
    the second one in the same way the cell of the row: both sums are short, and so precise, on a map of
    millions of cells.

    Args:
        attention: Float tensor `(B, h, w)`, not negative. It need not sum to 1.
        levels: Float tensor `(B, 2, P)` of numbers in (0, 1).

    Returns:
        Cells `(B, P)` int32, without a gradient, of positive probability where there are any.

    Example:

    >>> attention = ops.convert_to_tensor([[[0.0, 1.0], [0.0, 3.0]]])
    >>> [int(cell) for cell in cells_at(attention, ops.convert_to_tensor([[[0.2, 0.3], [0.5, 0.5]]]))[0]]
    [1, 3]
    """
    attention = ops.stop_gradient(as_map(attention))
    batch, height, width = ops.shape(attention)
    rows = _invert(ops.expand_dims(ops.sum(attention, axis=2), 1), levels[:, 0])  # (B, P)
    starts = ops.expand_dims(ops.arange(batch, dtype="int32") * height, 1)
    drawn = ops.take(ops.reshape(attention, (batch * height, width)), starts + rows, axis=0)  # (B, P, w)
    return rows * width + _invert(drawn, levels[:, 1])


def log_probabilities(attention: Any, cells: Any, replacement: bool) -> Any:
    """The logarithm of each draw's probability, given the draws before it.

    `log a[cell_t]` with replacement, `log(a[cell_t] / (1 - sum_(s < t) a[cell_s]))` without. Their sum over t
    is the log-probability of the ordered draws. What is left after the earlier draws is summed up from the
    cells that are left, not taken from 1: exact where nearly all of the mass was in the cells drawn before.

    A probability below 1e-30 counts as 1e-30 and has no gradient. A draw that had nothing but such cells left
    was certain: its log-probability is 0.

    Args:
        attention: Float tensor `(B, h, w)` that sums to 1 over each map.
        cells: Integer tensor `(B, P)`; without replacement all of a row differ.
        replacement: How the cells were drawn.

    Returns:
        Float tensor `(B, P)`, float32 or better, differentiable in `attention`.

    Example:

    >>> attention = ops.convert_to_tensor([[[0.5, 0.25], [0.0, 0.25]]])
    >>> values = log_probabilities(attention, ops.convert_to_tensor([[0, 3]]), replacement=False)
    >>> [round(float(ops.exp(value)), 3) for value in values[0]]
    [0.5, 0.5]
    """
    attention = as_map(attention)
    batch, height, width = ops.shape(attention)
    flat = ops.reshape(attention, (batch * height * width,))
    starts = ops.expand_dims(ops.arange(batch, dtype="int32") * (height * width), 1)
    places = starts + ops.cast(cells, "int32")
    drawn = ops.take(flat, places)  # (B, P)
    logs = ops.log(ops.maximum(drawn, FLOOR))
    if replacement:
        return logs
    fixed = ops.stop_gradient(flat)
    others = ops.scatter_update(
        fixed, ops.reshape(places, (-1, 1)), ops.zeros_like(ops.reshape(drawn, (-1,)))
    )
    others = ops.sum(ops.reshape(others, (batch, height * width)), axis=1, keepdims=True)
    later = ops.flip(ops.cumsum(ops.flip(ops.stop_gradient(drawn), 1), axis=1), 1)
    before = ops.cumsum(drawn, axis=1) - drawn
    # The sum of the cells that are left, with the gradient of 1 - cum.
    left = others + later - (before - ops.stop_gradient(before))
    return logs - ops.log(ops.maximum(left, FLOOR))


def greedy_cells(attention: Any, patches: int, distance: int) -> Any:
    """The most probable cells, one after another, none nearer than `distance` to one chosen before.

    The distance of two cells is the larger one of the distances of rows and of columns (Chebyshev), so that
    squares of s pixels at cells c pixels apart do not overlap at `distance = ceil(s / c)`. Where no cell of
    positive probability is far enough from all chosen ones, the most probable of the nearer ones is taken;
    where none is left at all, cells of probability 0; and where the map has fewer than P cells, cell 0 again.
    Nothing is drawn: the same map gives the same cells.

    Args:
        attention: Float tensor `(B, h, w)`, not negative.
        patches: P, the number of cells.
        distance: The smallest distance, in cells; 0 and 1 give the P most probable cells.

    Returns:
        Cells `(B, P)` int32, in the order of choice, without a gradient.

    Raises:
        ValueError: If `patches` is below 1, or known to be above the number of cells.

    Example:

    >>> attention = ops.convert_to_tensor([[[0.4, 0.3, 0.2, 0.1]]])
    >>> [int(cell) for cell in greedy_cells(attention, patches=2, distance=2)[0]]
    [0, 2]
    """
    attention = ops.stop_gradient(as_map(attention, patches, patches))
    batch, height, width = ops.shape(attention)
    if distance <= 1:
        return ops.top_k(ops.reshape(attention, (batch, height * width)), patches)[1]
    reach = 2 * distance - 1  # rows that hold cells too near to a chosen one
    reach = min(reach, height) if isinstance(height, int) else ops.minimum(reach, height)
    window, columns = ops.arange(reach, dtype="int32"), ops.arange(width, dtype="int32")
    starts = ops.expand_dims(ops.arange(batch, dtype="int32") * height, 1)

    def choose(turn: Any, state: tuple) -> tuple:
        scores, highest, cells = state  # (B h, w), (B, h), (B, P)
        row = ops.top_k(highest, 1)[1]  # (B, 1); an argmax of floats has no LiteRT or ONNX form
        column = ops.top_k(ops.take(scores, ops.squeeze(starts + row, 1), axis=0), 1)[1]  # (B, 1)
        around = ops.clip(row - distance + 1, 0, height - reach) + window  # (B, reach)
        across = ops.expand_dims(ops.absolute(columns - column), 1)  # (B, 1, w)
        far = ops.maximum(ops.expand_dims(ops.absolute(around - row), 2), across)  # (B, reach, w)
        old = ops.take(scores, starts + around, axis=0)
        new = ops.where(ops.logical_and(far < distance, old > 0), -1 / ops.maximum(old, FLOOR), old)
        new = ops.where(far < 1, -1e38, new)
        places = ops.reshape(starts + around, (-1, 1))
        scores = ops.scatter_update(scores, places, ops.reshape(new, (-1, width)))
        rows = ops.scatter_update(
            ops.reshape(highest, (-1,)), places, ops.reshape(ops.max(new, axis=2), (-1,))
        )
        cells = ops.where(ops.arange(patches, dtype="int32") == turn, row * width + column, cells)
        return scores, ops.reshape(rows, (batch, height)), cells

    # One order: free cells a, those too near to a chosen one -1 / a, those of probability 0, chosen ones.
    scores = ops.where(attention > 0, attention, -1e35)
    cells = ops.zeros((batch, patches), "int32")
    state = ops.reshape(scores, (batch * height, width)), ops.max(scores, axis=2), cells
    return ops.fori_loop(0, patches, choose, state)[2]


def as_map(attention: Any, patches: int = 1, needed: int = 1) -> Any:
    """The map in float32 or better, if it is one and has the cells that are needed."""
    attention = wide(attention)
    if len(attention.shape) != 3:
        raise ValueError(
            f"`attention` must have the shape (B, h, w). Received: attention.shape={tuple(attention.shape)}"
        )
    known = [size for size in attention.shape[1:] if size is not None]
    if patches < 1 or (len(known) == 2 and known[0] * known[1] < needed):
        raise ValueError(
            "`patches` must be at least 1 and, without replacement, at most the number of cells. "
            f"Received: patches={patches}, attention.shape={tuple(attention.shape)}"
        )
    return attention


def _invert(weights: Any, level: Any) -> Any:
    """Where the cumulative sum of `weights (B, 1 or P, n)` first passes `level (B, P)` of the total.

    Indices of weight 0 are left out on purpose: parallel cumulative sums need not stand still there.
    """
    reached = ops.where(weights > 0, ops.cumsum(weights, axis=2), -1.0)
    # No float32 level below 1 rounds to the total: some index passes it.
    goal = ops.cast(level, weights.dtype) * ops.max(reached, axis=2)  # (B, P)
    return ops.argmax(ops.cast(reached > ops.expand_dims(goal, 2), "int32"), axis=2)

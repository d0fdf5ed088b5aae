"""Figures of learning curves: the window of epochs that cross validation picks, and how long a plateau is."""

import numpy as np
from numpy.typing import ArrayLike


def best_window(accuracies: ArrayLike, length: int = 30) -> range:
    """The `length` consecutive epochs with the highest mean validation accuracy over folds (Xu et al.).

    `argmax_s mean_f mean_(s <= e < s + length) accuracy[f, e]`; of equal windows the first.

    Args:
        accuracies: of each fold after each epoch, of a cross validation on the training set.
        length: how many epochs.

    Returns:
        Their places, counted from 0.

    Input shape: `(folds, epochs)`.

    Raises:
        ValueError: on fewer epochs than `length`, or values that are not finite.

    Example:

    >>> best_window([[.5, .7, .8, .6, .6], [.5, .6, .9, .8, .6]], length=2)
    range(2, 4)
    """
    values = np.asarray(accuracies, dtype=np.float64)
    if values.ndim != 2 or not 0 < length <= values.shape[1] or not np.isfinite(values).all():
        raise ValueError(
            f"A window of {length} epochs needs finite accuracies (folds, epochs) of that many epochs. "
            f"Received: shape {values.shape}"
        )
    sums = np.convolve(values.mean(axis=0), np.ones(length), mode="valid")
    start = int(np.argmax(np.round(sums, 12)))  # of sums that rounding alone tells apart, the first
    return range(start, start + length)


def plateau(losses: ArrayLike, chance: float, share: float = 0.1) -> int | None:
    """How many epochs pass before the loss first lies below `(1 - share) * chance`; None if it never does.

    Args:
        losses: the cross entropy after each epoch, free of other terms: that of the validation side, which
            is measured alike for every system.
        chance: the cross entropy of an answer that knows only how frequent the classes are, their entropy:
            ln C for C classes of equal size.
        share: by how much of it the loss must have fallen.

    Input shape: `(epochs,)`.

    Example:

    >>> plateau([2.31, 2.30, 2.20, 1.9, 2.1], chance=np.log(10))
    3
    >>> plateau([.70, .69, .68], chance=np.log(2)) is None
    True
    """
    left = np.flatnonzero(np.asarray(losses, dtype=np.float64) < (1 - share) * chance)
    return int(left[0]) if len(left) else None

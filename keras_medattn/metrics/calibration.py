"""Whether probabilities can be believed: calibration error, Brier score, and their repair by one number."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax
from sklearn.metrics import roc_curve

BINS = 15
BOUNDS = 0.01, 100.0  # of the temperature


def calibration_scores(
    labels: np.ndarray, probabilities: np.ndarray, weights: np.ndarray
) -> dict[str, np.ndarray]:
    """Expected calibration error and Brier score, for R weightings of the same images at once.

    ```
    ece   = sum_m  |B_m| / N  |accuracy(B_m) - confidence(B_m)|
    brier = 1/N sum_n sum_c (p_nc - y_nc)^2
    ```

    The confidence is the probability of the most probable class, `B_m` the images whose confidence lies in
    `((m - 1) / 15, m / 15]` (Naeini et al., AAAI 2015; Guo et al., ICML 2017, equation 3). With two classes
    the Brier score (1950) is that of the second, `1/N sum_n (p_n - y_n)^2`: half of the sum over classes.

    Args:
        labels: class of each image, checked by `check_predictions`.
        probabilities: predicted probability of each class, checked likewise.
        weights: how often each image counts.

    Input shape: `labels (N,)`, `probabilities (N, C)`, `weights (R, N)`.

    Output shape: each figure `(R,)`.

    Example:

    >>> labels, probabilities = np.array([0, 1]), np.array([[.9, .1], [.6, .4]])
    >>> found = calibration_scores(labels, probabilities, np.ones((1, 2)))
    >>> {name: round(float(value[0]), 3) for name, value in found.items()}
    {'ece': 0.35, 'brier': 0.185}
    """
    bins, confidence, right = confidence_bins(labels, probabilities)
    classes = probabilities.shape[1]
    squares = ((probabilities - np.eye(classes)[labels]) ** 2).sum(axis=1) / (2 if classes == 2 else 1)
    total = weights.sum(axis=1)
    gaps = weights @ (np.eye(BINS)[bins] * (right - confidence)[:, None])  # (R, bins)
    with np.errstate(invalid="ignore"):
        return {"ece": np.abs(gaps).sum(axis=1) / total, "brier": weights @ squares / total}


def confidence_bins(
    labels: np.ndarray, probabilities: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each image's bin, the probability of its most probable class, and whether that is right; `(N,)`."""
    confidence = probabilities.max(axis=1)
    bins = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    return bins, confidence, probabilities.argmax(axis=1) == labels


def negative_log_likelihood(labels: ArrayLike, scores: ArrayLike, temperature: float = 1.0) -> float:
    """Mean of `-log softmax(scores / temperature)[label]`.

    >>> round(negative_log_likelihood([1], [[0., 0.]]), 4)
    0.6931
    """
    logs = log_softmax(np.asarray(scores, np.float64) / temperature, axis=1)
    return float(-logs[np.arange(len(logs)), np.asarray(labels)].mean())


def fit_temperature(labels: ArrayLike, scores: ArrayLike) -> float | None:
    """The temperature T that minimises the mean of `-log softmax(scores / T)[label]` (Guo et al., 2017).

    Dividing all scores by one number moves the confidence and never the most probable class. The likelihood
    is concave in 1 / T, so its one maximum is found by Brent's method over log T, in 0.01 ... 100.

    Args:
        labels: class of each image, none of which was trained on.
        scores: class scores before the softmax.

    Returns:
        T; None where none is best: all images are answered right, and 0 would be (or, worse than by chance,
        infinity).

    Input shape: `labels (N,)`, `scores (N, C)`.

    Example:

    >>> three_of_four = np.array([[-2., 2.], [-2., 2.], [-2., 2.], [-2., 2.]])
    >>> T = fit_temperature([1, 1, 1, 0], three_of_four)
    >>> round(float(1 / (1 + np.exp(-4 / T))), 3)
    0.75
    """
    labels, scores = np.asarray(labels), np.asarray(scores, np.float64)
    own = scores[np.arange(len(scores)), labels]
    # Slopes of the likelihood where 1 / T is 0 and where it is infinite: a maximum lies between them.
    if not (own.mean() > scores.mean() and (own < scores.max(axis=1)).any()):
        return None
    found = minimize_scalar(
        lambda log: negative_log_likelihood(labels, scores, float(np.exp(log))),
        bounds=tuple(np.log(BOUNDS)),
        method="bounded",
        options={"xatol": 1e-6},
    )
    return float(np.exp(found.x))


def choose_threshold(
    labels: ArrayLike,
    positive: ArrayLike,
    sensitivity: float | None = None,
    specificity: float | None = None,
) -> float | None:
    """The threshold with the wanted sensitivity, or specificity, and as much of the other as that leaves.

    It lies half way to the next lower probability, so that rounding moves no image across it.

    Args:
        labels: 0 or 1 for each image, both among them.
        positive: probability of class 1.
        sensitivity: share of the images of class 1 to find, at least.
        specificity: share of the images of class 0 to leave, at least; give one of the two.

    Returns:
        The probability from which class 1 is answered; None where none leaves enough of class 0.

    Input shape: `labels (N,)`, `positive (N,)`.

    Raises:
        ValueError: unless one of the two is wanted, above 0 and at most 1, and both classes have images.

    Example:

    >>> choose_threshold([0, 0, 1, 1], [.1, .5, .3, .9], sensitivity=1.0)
    0.2
    >>> choose_threshold([0, 0, 1, 1], [.1, .5, .3, .9], specificity=1.0)
    0.7
    """
    wanted = sensitivity if specificity is None else specificity
    if (sensitivity is None) == (specificity is None) or wanted is None or not 0 < wanted <= 1:
        raise ValueError(
            "Give one of `sensitivity` and `specificity`, above 0 and at most 1. "
            f"Received: sensitivity={sensitivity}, specificity={specificity}"
        )
    labels, positive = np.asarray(labels), np.asarray(positive, np.float64)
    if set(labels.tolist()) != {0, 1}:
        raise ValueError(f"A threshold needs images of two classes. Received: labels {np.unique(labels)}")
    false, true, cuts = roc_curve(labels, positive, drop_intermediate=False)  # cuts fall from infinity
    if specificity is None:
        place = int(np.argmax(true >= wanted - 1e-9))
    else:
        place = int(np.flatnonzero(1 - false >= wanted - 1e-9)[-1])
        if place == 0:
            return None
    lower = cuts[place + 1] if place + 1 < len(cuts) else 0.0
    return float((cuts[place] + lower) / 2)

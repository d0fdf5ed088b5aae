"""The figures of `scores` for many weightings of the same images at once, as a bootstrap asks for them."""

import numpy as np

from keras_medattn.metrics.calibration import calibration_scores
from keras_medattn.metrics.scores import Threshold, named_figures, predicted_classes


def weighted_scores(
    labels: np.ndarray, probabilities: np.ndarray, weights: np.ndarray, threshold: Threshold = 0.5
) -> dict[str, np.ndarray]:
    """`scores` of R resamples in one pass: image n counts `weights[r, n]` times in resample r.

    Equal to `scores` of the repeated images, with each class sorted once instead of R times.

    Args:
        labels: class of each image, checked by `check_predictions`.
        probabilities: predicted probability of each class, checked likewise.
        weights: how often each image counts; not negative.
        threshold: as in `scores`.

    Input shape: `labels (N,)`, `probabilities (N, C)`, `weights (R, N)`.

    Output shape: the keys of `scores`, each an array `(R,)`, nan where a figure is undefined.

    Example:

    >>> labels, probabilities = np.array([0, 1, 1]), np.array([[.9, .1], [.95, .05], [.2, .8]])
    >>> weighted_scores(labels, probabilities, np.array([[1, 1, 1], [1, 0, 2]]))["auroc"]
    array([0.5, 1. ])
    """
    weights = np.asarray(weights, dtype=np.float64)
    classes = probabilities.shape[1]
    cells = np.eye(classes**2)[labels * classes + predicted_classes(probabilities, threshold)]  # (N, C * C)
    confusion = (weights @ cells).reshape(-1, classes, classes)  # (R, true, answered)
    total = confusion.sum(axis=(1, 2))
    hits = np.diagonal(confusion, axis1=1, axis2=2).T  # (C, R)
    positives, called = confusion.sum(axis=2).T, confusion.sum(axis=1).T  # (C, R)
    with np.errstate(invalid="ignore", divide="ignore"):
        per_class = {
            "auroc": np.empty((classes, len(weights))),
            "auprc": np.empty((classes, len(weights))),
            "sensitivity": hits / positives,
            "specificity": 1 - (called - hits) / (total - positives),
        }
        for k in range(classes):
            per_class["auroc"][k], per_class["auprc"][k] = _areas(labels == k, probabilities[:, k], weights)
        whole = {"accuracy": hits.sum(axis=0) / total, "quadratic_kappa": _quadratic_kappa(confusion)}
        whole |= calibration_scores(labels, probabilities, weights)
    return named_figures(whole, per_class)


def _areas(positive: np.ndarray, score: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """AUROC and average precision `(R,)` of one class; equal scores are one threshold."""
    order = np.argsort(-score, kind="stable")
    starts = np.flatnonzero(np.diff(score[order], prepend=np.inf))  # first image of each distinct score
    ordered = weights[:, order]  # (R, N)
    true = np.add.reduceat(ordered * positive[order], starts, axis=1)  # (R, thresholds)
    false = np.add.reduceat(ordered, starts, axis=1) - true
    found, wrong = true.cumsum(axis=1), false.cumsum(axis=1)
    positives, negatives = found[:, -1], wrong[:, -1]
    # A positive beats every negative below its score and half of those that tie with it (Mann-Whitney).
    beaten = negatives[:, None] - wrong + false / 2
    auroc = (true * beaten).sum(axis=1) / (positives * negatives)
    # Images that weigh 0 at the top would give 0 / 0; any weight that counts is 1 or more.
    precision = found / np.maximum(found + wrong, np.finfo(float).tiny)
    auprc = (true * precision).sum(axis=1) / positives
    return auroc, np.where(negatives > 0, auprc, np.nan)


def _quadratic_kappa(confusion: np.ndarray) -> np.ndarray:
    """Kappa `(R,)` = 1 - sum w O / sum w E, w_ij = (i - j)^2, E the product of the margins (Cohen 1968)."""
    grades = np.arange(confusion.shape[1])
    penalty = (grades[:, None] - grades) ** 2.0
    expected = confusion.sum(axis=2)[:, :, None] * confusion.sum(axis=1)[:, None, :]  # (R, C, C)
    expected = expected / confusion.sum(axis=(1, 2))[:, None, None]
    return 1 - (penalty * confusion).sum(axis=(1, 2)) / (penalty * expected).sum(axis=(1, 2))

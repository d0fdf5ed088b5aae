"""The figures of a classifier: AUROC, AUPRC, accuracy, sensitivity and the rest, per class and macro."""

import numpy as np
from numpy.typing import ArrayLike
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    cohen_kappa_score,
    confusion_matrix,
    roc_auc_score,
)

from keras_medattn.metrics.calibration import calibration_scores

Threshold = float | np.ndarray  # one for all images, or of each `(N,)`


def scores(labels: ArrayLike, probabilities: ArrayLike, threshold: Threshold = 0.5) -> dict[str, float]:
    """Every figure of a set of predictions.

    Keys: `accuracy`, `balanced_accuracy`, `quadratic_kappa`, `ece` and `brier` (see `calibration_scores`),
    and for each of `auroc`, `auprc`, `sensitivity` and `specificity` four kinds of key: `auroc/0`, `auroc/1`,
    ... (that class against the rest), `auroc/macro` (the plain mean of them) and `auroc`, the one to report.
    With two classes that is the figure of the **second** class, the positive one; with more the macro figure.

    AUPRC is average precision, the sum over thresholds of `(R_n - R_(n-1)) P_n`, without interpolation. Kappa
    has quadratic weights (Cohen 1968), so it means something only where the classes are grades in order.
    Balanced accuracy is the mean of the classes' sensitivities.

    A figure that the data can't give is nan, never 0: sensitivity of a class without positives, specificity
    without negatives, AUROC and AUPRC without either, and every macro figure with such a class in it.

    Args:
        labels: class of each image, `0 ... C - 1`.
        probabilities: predicted probability of each class.
        threshold: two classes only: the answer is class 1 where its probability is at least this; a number,
            or one an image. With more classes the answer is the most probable one (the first of equals).

    Input shape: `labels (N,)`, `probabilities (N, C)`.

    Raises:
        ValueError: on shapes that don't fit, labels out of range, probabilities that are not finite, outside
            [0, 1] or that don't sum to 1 (tolerance 1e-3).

    Example:

    >>> figures = scores([0, 0, 1, 1], [[.9, .1], [.6, .4], [.65, .35], [.2, .8]])
    >>> figures["auroc"], figures["sensitivity"], figures["specificity"]
    (0.75, 0.5, 1.0)
    """
    true, predicted = check_predictions(labels, probabilities)
    answers = predicted_classes(predicted, threshold)
    classes = range(predicted.shape[1])
    confusion = confusion_matrix(true, answers, labels=list(classes)).astype(float)
    whole = {
        "accuracy": float(accuracy_score(true, answers)),
        "quadratic_kappa": _kappa(true, answers, list(classes)),
    }
    calibration = calibration_scores(true, predicted, np.ones((1, len(true))))
    whole |= {name: float(value[0]) for name, value in calibration.items()}
    per_class: dict[str, list[float]] = {"auroc": [], "auprc": [], "sensitivity": [], "specificity": []}
    for k in classes:
        positive, score, hits = true == k, predicted[:, k], confusion[k, k]
        positives, called = confusion[k].sum(), confusion[:, k].sum()
        negatives = len(true) - positives
        mixed = positives > 0 and negatives > 0
        per_class["auroc"].append(float(roc_auc_score(positive, score)) if mixed else np.nan)
        per_class["auprc"].append(float(average_precision_score(positive, score)) if mixed else np.nan)
        per_class["sensitivity"].append(float(hits / positives) if positives else np.nan)
        per_class["specificity"].append(float(1 - (called - hits) / negatives) if negatives else np.nan)
    figures = named_figures(whole, {name: np.asarray(values) for name, values in per_class.items()})
    return {name: float(value) for name, value in figures.items()}


def check_predictions(labels: ArrayLike, probabilities: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Labels as int64 `(N,)` and probabilities as float64 `(N, C)`, or a ValueError saying what is wrong."""
    labels, probabilities = np.asarray(labels), np.asarray(probabilities, dtype=np.float64)
    if probabilities.ndim != 2 or probabilities.shape[0] < 1 or probabilities.shape[1] < 2:
        raise ValueError(
            "`probabilities` must have shape (N, C), at least one image and two classes. "
            f"Received: shape {probabilities.shape}"
        )
    if labels.shape != probabilities.shape[:1] or labels.dtype.kind not in "biu":
        raise ValueError(
            f"`labels` must be {len(probabilities)} integers, one for each row of `probabilities`. "
            f"Received: shape {labels.shape}, dtype {labels.dtype}"
        )
    labels = labels.astype(np.int64)
    if labels.min() < 0 or labels.max() >= probabilities.shape[1]:
        raise ValueError(
            f"`labels` must lie in 0 ... {probabilities.shape[1] - 1}, a column of `probabilities`. "
            f"Received: labels from {labels.min()} to {labels.max()}"
        )
    if not np.isfinite(probabilities).all():
        row = int(np.argmin(np.isfinite(probabilities).all(axis=1)))
        raise ValueError(f"`probabilities` must be finite. Received: row {row} is {probabilities[row]}")
    wrong = (np.abs(probabilities.sum(axis=1) - 1) > 1e-3) | (probabilities < 0).any(axis=1)
    if wrong.any():
        row = int(np.argmax(wrong))
        raise ValueError(
            "Rows of `probabilities` must be distributions (not below 0, sum 1): apply a softmax to logits. "
            f"Received: row {row} is {probabilities[row]}"
        )
    return labels, probabilities


def predicted_classes(probabilities: np.ndarray, threshold: Threshold = 0.5) -> np.ndarray:
    """The answered class `(N,)`: class 1 at or above `threshold` of two, the most probable one of more."""
    if probabilities.shape[1] == 2:
        return (probabilities[:, 1] >= threshold).astype(np.int64)
    return probabilities.argmax(axis=1)


def named_figures(whole: dict, per_class: dict[str, np.ndarray]) -> dict:
    """The flat dictionary of `scores` from figures of the whole set and `name -> (C, ...)` of each class."""
    figures = dict(whole, balanced_accuracy=per_class["sensitivity"].mean(axis=0))
    for name, values in per_class.items():
        macro = values.mean(axis=0)  # nan where a class has none
        figures[name] = values[1] if len(values) == 2 else macro
        figures[f"{name}/macro"] = macro
        figures |= {f"{name}/{k}": value for k, value in enumerate(values)}
    return figures


def _kappa(labels: np.ndarray, answers: np.ndarray, classes: list[int]) -> float:
    # One class in labels and answers alike: no disagreement is possible, chance or otherwise (0 / 0).
    if len(np.union1d(labels, answers)) == 1:
        return np.nan
    return float(cohen_kappa_score(labels, answers, labels=classes, weights="quadratic"))

"""Bootstrap confidence intervals, resampled by patient where patients are known."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from keras_medattn.metrics.scores import check_predictions
from keras_medattn.metrics.weighted import weighted_scores

Groups = Sequence[object] | np.ndarray
CHUNK = 2_000_000  # weights held at once: 16 MB


class Interval(NamedTuple):
    """A figure on all images, its interval, and the number of resamples in which it was undefined."""

    value: float
    low: float
    high: float
    dropped: int

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f}, {self.high:.3f})"


@dataclass(frozen=True)
class Bootstrap:
    """Intervals by name, and what they rest on: so many `units` of a `unit` ("patients" or "images")."""

    figures: dict[str, Interval]
    units: int
    unit: str
    images: int
    n_resamples: int
    confidence: float

    def __str__(self) -> str:
        images = "" if self.unit == "images" else f" ({self.images} images)"
        return (
            f"{self.confidence:.0%} percentile bootstrap over {self.units} {self.unit}{images}, "
            f"{self.n_resamples} resamples"
        )


def bootstrap(
    labels: ArrayLike,
    probabilities: ArrayLike,
    groups: Groups | None = None,
    statistic: Callable[[np.ndarray, np.ndarray, np.ndarray], dict[str, np.ndarray]] = weighted_scores,
    n_resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Bootstrap:
    """Percentile bootstrap interval of every figure of `scores` (Efron and Tibshirani 1993, chapter 13).

    Images of one patient are not independent, so patients are drawn with replacement, each with all of its
    images.

    Args:
        labels: class of each image.
        probabilities: predicted probability of each class.
        groups: the patient of each image; None or "" is an unknown one, and that image a unit of its own.
            Without groups images are resampled, and the intervals are too narrow if patients have several.
        statistic: `(labels, probabilities, weights (R, N)) -> {name: (R,)}`, for another threshold
            `functools.partial(weighted_scores, threshold=.3)`.
        n_resamples: number of resamples R.
        confidence: coverage of the interval.
        seed: of the draws.

    Returns:
        A `Bootstrap`. Resamples in which a figure is undefined (AUROC without a positive) are left out of its
        interval and counted in `dropped`. With fewer than two units the interval is nan.

    Input shape: `labels (N,)`, `probabilities (N, C)`, `groups (N,)`.

    Raises:
        ValueError: as `scores`, and on groups of another length or settings out of range.

    Example:

    >>> labels, positive = np.array([0, 0, 0, 1, 1, 1]), np.array([.1, .2, .4, .3, .8, .9])
    >>> probabilities = np.stack([1 - positive, positive], axis=1)
    >>> result = bootstrap(labels, probabilities, groups=["a", "a", "b", "c", "c", "d"])
    >>> print(result)
    95% percentile bootstrap over 4 patients (6 images), 2000 resamples
    >>> print(result.figures["auroc"])
    0.889 (0.500, 1.000)
    """
    true, predicted = check_predictions(labels, probabilities)

    def figures(weights: np.ndarray) -> dict[str, np.ndarray]:
        return statistic(true, predicted, weights)

    return resample(figures, len(true), groups, n_resamples, confidence, seed)


def resample(
    statistic: Callable[[np.ndarray], dict[str, np.ndarray]],
    images: int,
    groups: Groups | None = None,
    n_resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Bootstrap:
    """`bootstrap` of any figures that weights `(R, images)` give: `statistic(weights) -> {name: (R,)}`."""
    if images < 1 or n_resamples < 1 or not 0 < confidence < 1:
        raise ValueError(
            "A bootstrap needs at least one image, one resample and a confidence between 0 and 1. "
            f"Received: {images} images, n_resamples={n_resamples}, confidence={confidence}"
        )
    unit_of_image, unit = _units(groups, images)
    units = int(unit_of_image.max()) + 1
    rng = np.random.default_rng(seed)
    chunk = max(1, CHUNK // images)
    parts = []
    for start in range(0, n_resamples, chunk):
        rows = min(chunk, n_resamples - start)
        drawn = rng.integers(0, units, (rows, units)) + units * np.arange(rows)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=rows * units).reshape(rows, units)
        parts.append(statistic(counts[:, unit_of_image]))  # (rows, images)
    figures = {}
    for name, value in statistic(np.ones((1, images))).items():
        draws = np.concatenate([part[name] for part in parts])
        defined = draws[~np.isnan(draws)]
        low, high = np.nan, np.nan
        if units > 1 and len(defined):
            low, high = np.percentile(defined, [50 * (1 - confidence), 50 * (1 + confidence)])
        figures[name] = Interval(float(value[0]), float(low), float(high), n_resamples - len(defined))
    return Bootstrap(figures, units, unit, images, n_resamples, confidence)


def mean_sd(values: ArrayLike) -> tuple[float, float]:
    """Mean and sample standard deviation (n - 1 below the line); of one value the deviation is nan.

    >>> mean_sd([1., 2., 3.])
    (2.0, 1.0)
    """
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.ndim != 1 or not len(numbers):
        raise ValueError(f"`values` must be a list of at least one number. Received: shape {numbers.shape}")
    return float(numbers.mean()), float(numbers.std(ddof=1)) if len(numbers) > 1 else np.nan


def _units(groups: Groups | None, images: int) -> tuple[np.ndarray, str]:
    """The unit `(images,)` that each image is drawn with, from 0, and what to call the units."""
    if groups is None:
        return np.arange(images), "images"
    if len(groups) != images:
        raise ValueError(
            f"`groups` must name the patient of each of {images} images. Received: {len(groups)} names"
        )
    numbers: dict[object, int] = {}
    # A gap in a table is None, an empty string, or (as pandas reads it) nan, which differs from itself.
    unknown = [group is None or group == "" or group != group for group in groups]
    keys = [("image", n) if unknown[n] else ("patient", group) for n, group in enumerate(groups)]
    unit_of_image = np.array([numbers.setdefault(key, len(numbers)) for key in keys])
    if all(unknown):
        return unit_of_image, "images"
    return unit_of_image, "patients and images without one" if any(unknown) else "patients"

"""Tests of a difference: paired over seeds or folds, and Welch's."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats


class Difference(NamedTuple):
    """A mean difference, its confidence interval, the test's p-value, and how many values it rests on."""

    mean: float
    low: float
    high: float
    p: float
    n: int

    def __str__(self) -> str:
        return f"{self.mean:+.3f} ({self.low:+.3f}, {self.high:+.3f}), p = {self.p:.3g}, n = {self.n}"


def paired_t(differences: ArrayLike, test_to_train: float = 0.0, confidence: float = 0.95) -> Difference:
    """Student's paired t-test of the differences over seeds, or its corrected form over resampled folds.

    `t = mean(d) / sqrt((1 / n + n_test / n_train) var(d))`, n - 1 degrees of freedom. With `test_to_train=0`
    it is the plain test. The training sets of the folds of a cross validation overlap, so that the plain
    test finds differences where there are none; `n_test / n_train` of them corrects for it (Nadeau and
    Bengio, Machine Learning 52, 2003; of repeated cross validation Bouckaert and Frank, PAKDD 2004).

    Args:
        differences: one a seed or fold, `(n,)`.
        test_to_train: images of the test side over those of the others.
        confidence: coverage of the interval.

    Returns:
        The two-sided test. Of differences that are all equal and 0, p is nan.

    Raises:
        ValueError: on fewer than two differences, or ones that are not finite.

    Example:

    >>> print(paired_t([.02, .03, .01, .04, .02]))
    +0.024 (+0.010, +0.038), p = 0.00926, n = 5
    >>> print(paired_t([.02, .03, .01, .04, .02], test_to_train=1 / 4))
    +0.024 (+0.003, +0.045), p = 0.0349, n = 5
    """
    values = _finite(differences)
    n, mean = len(values), values.mean()
    error = np.sqrt((1 / n + test_to_train) * values.var(ddof=1))
    with np.errstate(invalid="ignore", divide="ignore"):
        p = 2 * stats.t.sf(abs(mean / error), n - 1)
    half = stats.t.ppf((1 + confidence) / 2, n - 1) * error
    return Difference(float(mean), float(mean - half), float(mean + half), float(p), n)


def sign_flip(differences: ArrayLike) -> float:
    """The exact two-sided permutation p-value of paired differences: every pattern of their signs.

    The least that n pairs can give is `2 / 2^n`: .25 for three seeds, .0625 for five folds.

    >>> sign_flip([.02, .03, .01, .04, .02])
    0.0625

    Raises:
        ValueError: as `paired_t`, and on more than 12 differences, whose patterns are too many.
    """
    values = _finite(differences)
    if len(values) > 12:
        raise ValueError(f"An exact permutation takes up to 12 differences. Received: {len(values)}")
    found = stats.permutation_test(
        (values,), lambda d, axis: d.mean(axis=axis), permutation_type="samples", n_resamples=2 ** len(values)
    )
    return float(min(1.0, found.pvalue))


def welch(first: ArrayLike, second: ArrayLike, confidence: float = 0.95) -> Difference:
    """Welch's t-test of `second - first`, two samples of unequal variance.

    It takes the values of each sample as independent. The epochs of one run are not, so that of them it finds
    differences where there are none; it is here because papers report it (Xu et al., over 30 epochs).

    >>> print(welch([.80, .82, .81, .79], [.84, .83, .86, .85]))
    +0.040 (+0.018, +0.062), p = 0.00466, n = 8
    """
    one, two = _finite(first), _finite(second)
    found = stats.ttest_ind(two, one, equal_var=False)
    low, high = found.confidence_interval(confidence)
    difference = two.mean() - one.mean()
    return Difference(float(difference), float(low), float(high), float(found.pvalue), len(one) + len(two))


def _finite(values: ArrayLike) -> np.ndarray:
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.ndim != 1 or len(numbers) < 2 or not np.isfinite(numbers).all():
        raise ValueError(f"A test needs two finite numbers or more. Received: {numbers.tolist()}")
    return numbers

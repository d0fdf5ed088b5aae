import itertools

import numpy as np
import pytest
from scipy import stats

from keras_medattn.metrics import paired_t, sign_flip, welch

RNG = np.random.default_rng(0)
FIRST, SECOND = RNG.normal(0.8, 0.03, 9), RNG.normal(0.83, 0.05, 9)


def test_paired_t_is_scipys():
    found = paired_t(SECOND - FIRST, confidence=0.9)
    expected = stats.ttest_rel(SECOND, FIRST)
    assert found.p == pytest.approx(expected.pvalue, rel=1e-12)
    interval = expected.confidence_interval(0.9)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=1e-12)
    assert (found.mean, found.n) == (pytest.approx((SECOND - FIRST).mean()), 9)


def test_folds_are_corrected_for_their_overlap():
    """Of 10 folds the error grows by sqrt(1 / 10 + 1 / 9) / sqrt(1 / 10) (Nadeau and Bengio)."""
    differences = np.resize(SECOND - FIRST, 10)
    plain, corrected = paired_t(differences), paired_t(differences, 1 / 9)
    growth = np.sqrt((1 / 10 + 1 / 9) / (1 / 10))
    assert corrected.high - corrected.mean == pytest.approx(growth * (plain.high - plain.mean), rel=1e-12)
    t = stats.ttest_1samp(differences, 0).statistic / growth
    assert corrected.p == pytest.approx(2 * stats.t.sf(abs(t), 9), rel=1e-12)


def test_the_correction_holds_its_level_where_the_plain_test_does_not():
    """Differences of mean 0, correlated by n_test / (n_test + n_train), as Nadeau and Bengio model them."""
    n, share = 5, 1 / 4
    correlation = 1 / n
    covariance = np.full((n, n), correlation) + (1 - correlation) * np.eye(n)
    draws = np.random.default_rng(1).multivariate_normal(np.zeros(n), covariance, 1500)
    plain = np.mean([paired_t(row).p < 0.05 for row in draws])
    corrected = np.mean([paired_t(row, share).p < 0.05 for row in draws])
    assert plain > 0.09
    assert 0.03 < corrected < 0.07


def test_sign_flip_is_enumerated():
    differences = np.round(SECOND - FIRST, 3)[:7]
    means = [np.mean(differences * signs) for signs in itertools.product((-1, 1), repeat=7)]
    expected = np.mean(np.abs(means) >= abs(differences.mean()) - 1e-12)
    assert sign_flip(differences) == pytest.approx(expected, abs=1e-12)
    assert sign_flip([0.1, 0.2, 0.3]) == 0.25
    assert sign_flip([0.0, 0.0]) == 1.0


def test_welch_is_scipys():
    found = welch(FIRST, SECOND[:6])
    expected = stats.ttest_ind(SECOND[:6], FIRST, equal_var=False)
    assert found.p == pytest.approx(expected.pvalue, rel=1e-12)
    assert found.mean == pytest.approx(SECOND[:6].mean() - FIRST.mean())
    a, b = SECOND[:6].var(ddof=1) / 6, FIRST.var(ddof=1) / 9
    freedom = (a + b) ** 2 / (a**2 / 5 + b**2 / 8)  # Welch and Satterthwaite
    half = stats.t.ppf(0.975, freedom) * np.sqrt(a + b)
    assert (found.low, found.high) == pytest.approx((found.mean - half, found.mean + half), rel=1e-9)


def test_equal_differences():
    assert np.isnan(paired_t([0.0, 0.0]).p)
    assert paired_t([0.1, 0.1]).p == 0


@pytest.mark.parametrize("values", [[0.1], [], [0.1, np.nan], [[0.1, 0.2]]])
def test_wrong_inputs_are_named(values):
    for test in (paired_t, sign_flip, lambda v: welch(v, [0.1, 0.2])):
        with pytest.raises(ValueError, match="two finite numbers"):
            test(values)
    with pytest.raises(ValueError, match="up to 12"):
        sign_flip(np.arange(13.0))

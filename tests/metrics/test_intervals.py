from functools import partial

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from keras_medattn.metrics import bootstrap, intervals, mean_sd, scores, weighted_scores


def predictions(n: int, classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    logits = np.round(2 * (rng.normal(size=(n, classes)) + np.eye(classes)[labels])) / 2  # with ties
    return labels, np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)


@pytest.mark.parametrize(("n", "classes", "threshold"), [(60, 2, 0.3), (60, 3, 0.5), (7, 4, 0.5)])
def test_weights_are_repetitions(n, classes, threshold):
    labels, probabilities = predictions(n, classes)
    weights = np.random.default_rng(1).poisson(1, (40, n))
    found = weighted_scores(labels, probabilities, weights, threshold)
    undefined = 0
    for r, counts in enumerate(weights):
        expected = scores(np.repeat(labels, counts), np.repeat(probabilities, counts, axis=0), threshold)
        assert set(found) == set(expected)
        for name, value in expected.items():
            assert found[name][r] == pytest.approx(value, abs=1e-12, nan_ok=True), (name, r)
            undefined += np.isnan(value)
    assert n == 60 or undefined > 0  # the small set has resamples without some class


def test_the_interval_is_scipys():
    labels, probabilities = predictions(50, 2)
    found = bootstrap(labels, probabilities, n_resamples=300, confidence=0.9, seed=7)

    def auroc(index):
        return roc_auc_score(labels[index], probabilities[index, 1])

    def accuracy(index):
        return np.mean(labels[index] == (probabilities[index, 1] >= 0.5))

    for name, statistic in (("auroc", auroc), ("accuracy", accuracy)):
        expected = stats.bootstrap(
            (np.arange(50),), statistic, vectorized=False, n_resamples=300, confidence_level=0.9,
            method="percentile", rng=np.random.default_rng(7),
        )  # fmt: skip
        value, low, high, dropped = found.figures[name]
        assert value == pytest.approx(statistic(np.arange(50)), abs=1e-12)
        assert (low, high) == pytest.approx(tuple(expected.confidence_interval), abs=1e-12)
        assert dropped == 0


def test_patients_are_drawn_whole():
    labels, probabilities = predictions(30, 2)
    groups = [f"p{i // 2}" for i in range(30)]
    found = bootstrap(labels, probabilities, groups, n_resamples=200, seed=3)
    rng, draws = np.random.default_rng(3), []
    for drawn in rng.integers(0, 15, (200, 15)):
        index = np.concatenate([[2 * p, 2 * p + 1] for p in drawn])
        draws.append(scores(labels[index], probabilities[index])["auprc"])
    expected = np.percentile(draws, [2.5, 97.5])
    assert found.figures["auprc"][1:3] == pytest.approx(tuple(expected), abs=1e-12)
    assert (found.units, found.unit, found.images) == (15, "patients", 30)
    assert str(found) == "95% percentile bootstrap over 15 patients (30 images), 200 resamples"


def test_copies_of_an_image_do_not_narrow_a_patients_interval():
    labels, probabilities = predictions(40, 3)
    once = bootstrap(labels, probabilities, n_resamples=400)
    thrice = np.repeat(labels, 3), np.repeat(probabilities, 3, axis=0)
    grouped = bootstrap(*thrice, groups=np.repeat(np.arange(40), 3), n_resamples=400)
    ungrouped = bootstrap(*thrice, n_resamples=400)
    for name, (value, low, high, _) in once.figures.items():
        assert grouped.figures[name][:3] == pytest.approx((value, low, high), abs=1e-12), name
    wide, narrow = grouped.figures["auroc"], ungrouped.figures["auroc"]
    assert narrow.high - narrow.low < 0.75 * (wide.high - wide.low)


def test_resamples_without_a_class_are_left_out_and_counted():
    labels, probabilities = np.array([1, 0, 0, 0, 0]), predictions(5, 2)[1]
    found = bootstrap(labels, probabilities, n_resamples=500, seed=11)
    drawn = np.random.default_rng(11).integers(0, 5, (500, 5))
    without = ~(drawn == 0).any(axis=1) | (drawn == 0).all(axis=1)
    assert found.figures["auroc"].dropped == without.sum() > 100
    assert found.figures["accuracy"].dropped == 0
    draws = [roc_auc_score(labels[i], probabilities[i, 1]) for i in drawn[~without]]
    assert found.figures["auroc"][1:3] == pytest.approx(tuple(np.percentile(draws, [2.5, 97.5])))
    never = bootstrap([0, 0, 0], probabilities[:3], n_resamples=50).figures["auroc"]
    assert np.isnan(never[:3]).all()
    assert never.dropped == 50


def test_unknown_patients_are_units_of_their_own():
    labels, probabilities = predictions(6, 2)
    found = bootstrap(labels, probabilities, ["a", "a", None, "", float("nan"), "b"], n_resamples=10)
    assert (found.units, found.unit) == (5, "patients and images without one")
    assert bootstrap(labels, probabilities, [None] * 6, n_resamples=10).unit == "images"


def test_one_patient_has_no_interval():
    found = bootstrap(*predictions(20, 2), groups=["a"] * 20, n_resamples=10).figures["accuracy"]
    assert not np.isnan(found.value)
    assert np.isnan([found.low, found.high]).all()


def test_chunks_and_seed(monkeypatch):
    whole = bootstrap(*predictions(30, 2), n_resamples=100, seed=5)
    monkeypatch.setattr(intervals, "CHUNK", 30 * 7)
    assert bootstrap(*predictions(30, 2), n_resamples=100, seed=5) == whole
    assert bootstrap(*predictions(30, 2), n_resamples=100, seed=6) != whole


def test_another_statistic():
    labels, probabilities = predictions(40, 2)
    found = bootstrap(
        labels, probabilities, statistic=partial(weighted_scores, threshold=0.2), n_resamples=50
    )
    assert found.figures["sensitivity"].value == scores(labels, probabilities, 0.2)["sensitivity"]


@pytest.mark.parametrize(
    "settings", [{"groups": ["a"]}, {"n_resamples": 0}, {"confidence": 1.0}, {"confidence": 95}]
)
def test_wrong_settings_are_named(settings):
    with pytest.raises(ValueError, match="Received: "):
        bootstrap(*predictions(10, 2), **settings)


def test_mean_sd():
    assert mean_sd([1.0, 2.0, 4.0]) == pytest.approx((7 / 3, np.sqrt(7 / 3)))
    mean, sd = mean_sd([0.8])
    assert mean == 0.8
    assert np.isnan(sd)
    with pytest.raises(ValueError, match="Received: "):
        mean_sd([])

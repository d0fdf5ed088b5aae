import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import softmax
from sklearn.metrics import brier_score_loss, log_loss

from keras_medattn.metrics import (
    bootstrap,
    calibration_scores,
    choose_threshold,
    fit_temperature,
    negative_log_likelihood,
)


def drawn(n: int, classes: int, sharpness: float = 1.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Labels drawn from the softmax of the scores, and the scores times `sharpness`."""
    rng = np.random.default_rng(seed)
    scores = 1.5 * rng.normal(size=(n, classes))
    labels = (softmax(scores, axis=1).cumsum(axis=1) > rng.random((n, 1))).argmax(axis=1)
    return labels, sharpness * scores


@pytest.mark.parametrize("case", [(60, 2, 2.0), (200, 3, 0.5), (5, 4, 1.0)])
def test_calibration_error_is_tensorflow_probabilitys(case):
    from tensorflow_probability import stats  # seconds to import

    labels, scores = drawn(*case)
    expected = stats.expected_calibration_error(15, scores.astype("float32"), labels.astype("int32"))
    found = calibration_scores(labels, softmax(scores, axis=1), np.ones((1, len(labels))))["ece"]
    assert found == pytest.approx([float(expected)], abs=1e-6)
    assert float(expected) > 0.01


@pytest.mark.parametrize("classes", [2, 3])
def test_brier_score_is_its_definition(classes):
    labels, scores = drawn(80, classes)
    probabilities = softmax(scores, axis=1)
    weights = np.random.default_rng(1).poisson(1, (5, 80))
    found = calibration_scores(labels, probabilities, weights)["brier"]
    for counts, value in zip(weights, found, strict=True):
        repeated, answers = np.repeat(labels, counts), np.repeat(probabilities, counts, axis=0)
        if classes == 2:
            expected = brier_score_loss(repeated, answers[:, 1])
        else:
            expected = np.mean(np.sum((answers - np.eye(3)[repeated]) ** 2, axis=1))
        assert value == pytest.approx(expected, abs=1e-12)


def test_bins_are_closed_above():
    """1 and 0.8 = 12 / 15 belong to the bins that they end: one bin's gap is |1/2 - .8|, the other's 0."""
    labels = np.array([0, 1, 0])
    probabilities = np.array([[0.8, 0.2], [0.8, 0.2], [1.0, 0.0]])
    found = calibration_scores(labels, probabilities, np.ones((1, 3)))["ece"]
    assert found == pytest.approx([2 / 3 * 0.3])
    half = np.array([[0.78, 0.22], [0.8, 0.2]])  # one bin: its mean counts, not each image
    assert calibration_scores(np.array([0, 1]), half, np.ones((1, 2)))["ece"] == pytest.approx([0.29])


def test_a_confident_model_gets_back_the_temperature_it_was_sharpened_by():
    labels, scores = drawn(4000, 3, sharpness=2.5)
    found = fit_temperature(labels, scores)
    assert found == pytest.approx(2.5, rel=0.05)
    expected = minimize(lambda t: log_loss(labels, softmax(scores / t[0], axis=1)), [1.0], tol=1e-10).x[0]
    assert found == pytest.approx(expected, rel=1e-3)
    assert negative_log_likelihood(labels, scores, found) == pytest.approx(
        log_loss(labels, softmax(scores / found, axis=1)), abs=1e-12
    )
    before, after = (bootstrap(labels, softmax(scores / t, axis=1), n_resamples=50) for t in (1.0, found))
    assert after.figures["ece"].high < before.figures["ece"].low
    assert after.figures["auroc/0"].value != before.figures["auroc/0"].value  # three classes: order may move
    assert after.figures["accuracy"] == before.figures["accuracy"]


def test_no_temperature_where_none_is_best():
    scores = np.array([[2.0, 0.0], [0.0, 1.0], [0.0, 3.0]])
    assert fit_temperature([0, 1, 1], scores) is None  # all right: the sharper the better
    assert fit_temperature([1, 0, 0], scores) is None  # all wrong: the flatter the better


@pytest.mark.parametrize("share", [0.5, 0.8, 0.95, 1.0])
@pytest.mark.parametrize("ties", [False, True])
def test_a_threshold_keeps_what_is_wanted_and_as_much_of_the_other_as_it_can(share, ties):
    labels, scores = drawn(120, 2)
    positive = softmax(scores, axis=1)[:, 1]
    positive = np.round(positive, 1) if ties else positive

    def rates(cut):
        return np.mean(positive[labels == 1] >= cut), np.mean(positive[labels == 0] < cut)

    cuts = [rates(cut) for cut in np.unique(positive)]
    cut = choose_threshold(labels, positive, sensitivity=share)
    found, left = rates(cut)
    assert cut not in positive
    assert found >= share
    assert left == max(one[1] for one in cuts if one[0] >= share)
    cut = choose_threshold(labels, positive, specificity=share)
    reached = [one[0] for one in cuts if one[1] >= share]
    if not reached:
        assert cut is None
        return
    found, left = rates(cut)
    assert left >= share
    assert found == max(reached)


def test_a_threshold_needs_two_classes_and_one_wish():
    assert choose_threshold([0, 1, 0], [0.1, 0.5, 0.9], specificity=1.0) is None  # the surest is of class 0
    for labels, wish, words in (
        ([0, 1], {}, "Give one of"),
        ([0, 1], {"sensitivity": 0.9, "specificity": 0.9}, "Give one of"),
        ([0, 1], {"sensitivity": 1.5}, "at most 1"),
        ([1, 1], {"sensitivity": 0.9}, "images of two classes"),
    ):
        with pytest.raises(ValueError, match=words):
            choose_threshold(labels, [0.2, 0.3], **wish)

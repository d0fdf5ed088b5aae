import itertools

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from keras_medattn.metrics import by_patient, mean_sd, patient_scores, resample

# Wu et al., patient level: columns 40x, 100x, 200x, 400x; rows VGG19, + C, + S, both
TABLE = (
    *(("95.7", "3.9"), ("96.4", "3.6"), ("96.4", "2.5"), ("92.9", "3.6")),
    *(("97.1", "3.0"), ("98.6", "2.0"), ("98.6", "2.0"), ("95.7", "3.0")),
    *(("97.9", "3.2"), ("98.6", "2.0"), ("97.9", "3.2"), ("94.3", "4.8")),
    *(("97.9", "3.2"), ("99.3", "1.6"), ("98.6", "2.0"), ("96.4", "2.5")),
)


def pairs(positive) -> np.ndarray:
    return np.stack([1 - np.asarray(positive), positive], axis=1)


@pytest.mark.parametrize("row", range(4))
def test_the_papers_table_comes_from_28_patients_a_fold(row):
    """Enumeration finds how many patients were voted right a fold: of those our figures are a cell."""
    counts = np.array(list(itertools.combinations_with_replacement(range(20, 29), 5)))
    means, sds = counts.mean(axis=1) / 0.28, counts.std(axis=1, ddof=1) / 0.28
    for cell in TABLE[4 * row : 4 * row + 4]:
        fits = [
            n for n in range(len(counts)) if (f"{means[n]:.1f}", f"{sds[n]:.1f}") == cell
        ]  # (95.7, 3.9) has two, the others one
        folds = [accuracy_of_a_fold(right) for right in counts[fits[0]]]
        mean, sd = mean_sd(folds)
        assert (f"{100 * mean:.1f}", f"{100 * sd:.1f}") == cell


def accuracy_of_a_fold(right: int) -> float:
    """28 patients of three images; of the first `right` two images are answered right, of the others one."""
    patients = np.repeat(np.arange(28), 3)
    labels = np.repeat(np.arange(28) % 2, 3)
    hits = np.tile([1, 1, 0], 28) * (patients < right) + np.tile([1, 0, 0], 28) * (patients >= right)
    answers = np.where(hits == 1, labels, 1 - labels)
    found = by_patient(labels, pairs(0.2 + 0.6 * answers), patients)
    return float(patient_scores(found, np.ones((1, 28)))["patient_accuracy"][0])


def test_vote_recognition_and_auroc_are_three_figures():
    labels = [1, 1, 1, 0, 0, 0, 0, 0, 1]
    patients = ["a", "a", "a", "b", "b", "b", "c", "c", "d"]
    positive = np.array([0.6, 0.55, 0.1, 0.9, 0.4, 0.3, 0.7, 0.2, 0.8])
    found = by_patient(labels, pairs(positive), patients)
    assert found.answers.tolist() == [1, 0, 0, 1]  # c is a tie: its mean is .45
    np.testing.assert_allclose(found.recognised, [2 / 3, 2 / 3, 1 / 2, 1])
    figures = {name: float(value[0]) for name, value in patient_scores(found, np.ones((1, 4))).items()}
    means = [1.25 / 3, 1.6 / 3, 0.45, 0.8]
    assert figures["patient_accuracy"] == 1.0
    assert figures["patient_recognition_rate"] == pytest.approx((4 / 3 + 1.5) / 4)
    assert figures["patient_auroc"] == roc_auc_score([1, 0, 0, 1], means) == 0.5


@pytest.mark.parametrize(
    ("tie", "answers"), [("probability", [2, 1, 0]), ("negative", [1, 0, 0]), ("positive", [2, 1, 0])]
)
def test_ties(tie, answers):
    """a: one vote for 1, one for 2, the mean is higher for 2; b: 0 against 1, for 1; c: no tie."""
    probabilities = np.array(
        [[0.1, 0.5, 0.4], [0.1, 0.2, 0.7], [0.5, 0.4, 0.1], [0.1, 0.9, 0.0], [0.8, 0.1, 0.1]]
    )
    found = by_patient([1, 1, 0, 0, 2], probabilities, ["a", "a", "b", "b", "c"], tie=tie)
    assert found.answers.tolist() == answers


def test_a_tie_of_two_classes_is_answered_at_the_threshold():
    positive = np.array([0.2, 0.5])  # one vote each at .3; the mean is .35
    for threshold, answer in ((0.3, 1), (0.4, 0)):
        assert by_patient([1, 1], pairs(positive), ["a", "a"], threshold).answers.tolist() == [answer]


def test_a_patient_with_two_labels_is_left_out():
    found = by_patient([0, 1, 1, 0], pairs([0.1, 0.2, 0.9, 0.4]), ["a", "a", "b", "c"])
    assert (found.mixed, found.rows.tolist(), found.labels.tolist()) == (1, [2, 3], [1, 0])


def test_intervals_are_those_of_drawn_patients():
    rng = np.random.default_rng(0)
    patients = np.sort(rng.integers(0, 12, 50))
    labels = patients % 2
    found = by_patient(labels, pairs(np.clip(0.3 + 0.4 * labels + rng.normal(0, 0.3, 50), 0, 1)), patients)
    names = patients[found.rows]
    result = resample(
        lambda weights: patient_scores(found, weights[:, found.rows]), 50, patients, 300, seed=3
    )
    drawn = np.random.default_rng(3).integers(0, len(names), (300, len(names)))
    right = (found.answers == found.labels).astype(float)
    low, high = np.percentile(right[drawn].mean(axis=1), [2.5, 97.5])
    assert result.figures["patient_accuracy"][:3] == pytest.approx((right.mean(), low, high))


@pytest.mark.parametrize(
    ("patients", "tie", "message"),
    [(["a"], "probability", "each of 2 images"), (["a", "b"], "vote", "one of")],
)
def test_wrong_inputs_are_named(patients, tie, message):
    with pytest.raises(ValueError, match=rf"{message}.*Received: "):
        by_patient([0, 1], pairs([0.1, 0.9]), patients, tie=tie)

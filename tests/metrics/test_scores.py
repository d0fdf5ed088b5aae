import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, recall_score

from keras_medattn.metrics import scores


def predictions(n: int, classes: int, seed: int = 0, ties: bool = True) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(classes), rng.integers(0, classes, n - classes)])
    logits = rng.normal(size=(n, classes)) + np.eye(classes)[labels]
    logits = np.round(logits) if ties else logits
    return labels, np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)


def auroc(positive, score):
    """The share of pairs in which the positive scores higher; a tie is half."""
    pairs = score[positive][:, None] - score[~positive]
    return np.mean(np.where(pairs > 0, 1.0, np.where(pairs == 0, 0.5, 0.0)))


def average_precision(positive, score):
    area, recall = 0.0, 0.0
    for cut in np.unique(score)[::-1]:
        called = score >= cut
        new = (called & positive).sum() / positive.sum()
        area += (new - recall) * (called & positive).sum() / called.sum()
        recall = new
    return area


def kappa(labels, answers, classes):
    observed = np.zeros((classes, classes))
    np.add.at(observed, (labels, answers), 1)
    weights = np.subtract.outer(np.arange(classes), np.arange(classes)) ** 2.0
    expected = np.outer(observed.sum(axis=1), observed.sum(axis=0)) / observed.sum()
    return 1 - (weights * observed).sum() / (weights * expected).sum()


@pytest.mark.parametrize("classes", [2, 4])
def test_every_figure_is_its_definition(classes):
    labels, probabilities = predictions(80, classes)
    answers = probabilities.argmax(axis=1) if classes > 2 else (probabilities[:, 1] >= 0.5).astype(int)
    expected = {"accuracy": np.mean(labels == answers), "quadratic_kappa": kappa(labels, answers, classes)}
    sure = probabilities.max(axis=1)
    inside = [(sure > m / 15) & (sure <= (m + 1) / 15) for m in range(15)]
    right = probabilities.argmax(axis=1) == labels
    expected["ece"] = sum(abs(right[one].sum() - sure[one].sum()) for one in inside) / 80
    expected["brier"] = ((probabilities - np.eye(classes)[labels]) ** 2).sum(axis=1).mean()
    expected["brier"] /= 2 if classes == 2 else 1
    rows = {"auroc": [], "auprc": [], "sensitivity": [], "specificity": []}
    for k in range(classes):
        rows["auroc"].append(auroc(labels == k, probabilities[:, k]))
        rows["auprc"].append(average_precision(labels == k, probabilities[:, k]))
        rows["sensitivity"].append(np.mean(answers[labels == k] == k))
        rows["specificity"].append(np.mean(answers[labels != k] != k))
    for name, values in rows.items():
        expected |= {f"{name}/{k}": value for k, value in enumerate(values)}
        expected[f"{name}/macro"] = np.mean(values)
        expected[name] = values[1] if classes == 2 else np.mean(values)
    expected["balanced_accuracy"] = balanced_accuracy_score(labels, answers)
    found = scores(labels, probabilities)
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-12), name
        assert type(found[name]) is float


def test_of_two_classes_the_second_is_positive_and_the_threshold_moves_it():
    labels = np.array([0, 0, 0, 1, 1])
    positive = np.array([0.1, 0.3, 0.6, 0.3, 0.9])
    probabilities = np.stack([1 - positive, positive], axis=1)
    figures = scores(labels, probabilities, threshold=0.3)
    assert figures["sensitivity"] == 1.0 == recall_score(labels, positive >= 0.3)  # at the threshold counts
    assert figures["specificity"] == pytest.approx(1 / 3) == figures["sensitivity/0"]
    assert scores(labels, probabilities)["specificity"] == pytest.approx(2 / 3)


def test_a_class_without_images_gives_nan_and_no_warning(recwarn):
    labels, probabilities = predictions(40, 3)
    labels = np.where(labels == 2, 1, labels)
    figures = scores(labels, probabilities)
    undefined = {name for name, value in figures.items() if np.isnan(value)}
    lacking = {"auroc", "auprc", "sensitivity"}
    assert undefined == {"balanced_accuracy"} | {f"{n}{end}" for n in lacking for end in ("", "/2", "/macro")}
    assert not recwarn.list


def test_one_class_alone():
    figures = scores([1, 1], [[0.2, 0.8], [0.6, 0.4]])
    assert figures["accuracy"] == figures["sensitivity"] == 0.5
    assert np.isnan([figures[name] for name in ("auroc", "auprc", "specificity", "balanced_accuracy")]).all()
    assert np.isnan(scores([1, 1], [[0.2, 0.8], [0.1, 0.9]])["quadratic_kappa"])


@pytest.mark.parametrize(
    ("labels", "probabilities", "message"),
    [
        ([0, 1], [0.5, 0.5], "shape"),
        ([0, 1], [[1.0], [1.0]], "two classes"),
        ([], np.zeros((0, 2)), "at least one image"),
        ([0], [[0.5, 0.5], [0.5, 0.5]], "2 integers"),
        ([0.0, 1.0], [[0.5, 0.5], [0.5, 0.5]], "integers"),
        ([0, 2], [[0.5, 0.5], [0.5, 0.5]], "labels from 0 to 2"),
        ([-1, 1], [[0.5, 0.5], [0.5, 0.5]], "labels from -1 to 1"),
        ([0, 1], [[0.5, 0.5], [np.nan, 0.5]], "row 1"),
        ([0, 1], [[0.5, 0.5], [0.5, 0.502]], "softmax"),
        ([0, 1], [[0.5, 0.5], [-0.5, 1.5]], "row 1"),
    ],
)
def test_wrong_inputs_are_named(labels, probabilities, message):
    with pytest.raises(ValueError, match=rf"(?s){message}.*|Received.*{message}") as caught:
        scores(labels, probabilities)
    assert "Received: " in str(caught.value)


def test_rounded_probabilities_are_accepted():
    assert scores([0, 1], [[0.6, 0.3995], [0.1, 0.9]])["accuracy"] == 1.0

"""Figures of patients: the majority vote of a patient's images, and the share of them that is recognised."""

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import ArrayLike

from keras_medattn.metrics.scores import Threshold, check_predictions, predicted_classes
from keras_medattn.metrics.weighted import weighted_scores

Tie = Literal["probability", "negative", "positive"]


class Patients(NamedTuple):
    """One row a patient.

    `rows (P,)` is the place of the patient's first image, `labels` and `answers (P,)` the true and the voted
    class, `probabilities (P, C)` the mean over the images, `recognised (P,)` the share of them that is
    answered right, `mixed` the number of patients left out because their images have several labels.
    """

    rows: np.ndarray
    labels: np.ndarray
    answers: np.ndarray
    probabilities: np.ndarray
    recognised: np.ndarray
    mixed: int


def by_patient(
    labels: ArrayLike,
    probabilities: ArrayLike,
    patients: Sequence[object] | np.ndarray,
    threshold: Threshold = 0.5,
    tie: Tie = "probability",
) -> Patients:
    """Answer for each patient what most of the patient's images are answered.

    A patient whose images have more than one label has none: left out, and counted in `mixed`.

    Args:
        labels: class of each image.
        probabilities: predicted probability of each class.
        patients: the patient of each image.
        threshold: of two classes, as in `scores`; of each image, a patient's images have the same.
        tie: what decides between classes with equally many votes: `"probability"`, the mean over the images,
            answered as an image's is; `"negative"` the first of the tied classes, `"positive"` the last.

    Input shape: `labels (N,)`, `probabilities (N, C)`, `patients (N,)`.

    Raises:
        ValueError: as `scores`, and on another number of patients or an unknown `tie`.

    Example:

    >>> labels, positive = np.array([0, 0, 1, 1]), np.array([.1, .6, .9, .8])
    >>> probabilities = np.stack([1 - positive, positive], axis=1)
    >>> found = by_patient(labels, probabilities, ["a", "a", "b", "b"])
    >>> found.answers, found.recognised
    (array([0, 1]), array([0.5, 1. ]))
    """
    true, predicted = check_predictions(labels, probabilities)
    if tie not in get_args(Tie):
        raise ValueError(f"`tie` must be one of {get_args(Tie)}. Received: {tie!r}")
    if len(patients) != len(true):
        raise ValueError(
            f"`patients` must name the patient of each of {len(true)} images. Received: {len(patients)} names"
        )
    numbers: dict[object, int] = {}
    unit = np.array([numbers.setdefault(patient, len(numbers)) for patient in patients])
    counts = np.bincount(unit)
    answers = predicted_classes(predicted, threshold)
    votes, means = np.zeros((2, len(counts), predicted.shape[1]))
    np.add.at(votes, (unit, answers), 1)
    np.add.at(means, unit, predicted)
    means /= counts[:, None]
    rows = np.unique(unit, return_index=True)[1]
    whole = np.bincount(unit, true != true[rows][unit]) == 0
    recognised = np.bincount(unit, answers == true) / counts
    voted = _voted(votes, means, np.broadcast_to(threshold, len(true))[rows], tie)
    mixed = int((~whole).sum())
    return Patients(rows[whole], true[rows[whole]], voted[whole], means[whole], recognised[whole], mixed)


def patient_scores(patients: Patients, weights: np.ndarray) -> dict[str, np.ndarray]:
    """The figures of patients, for R weightings of them at once, as a bootstrap asks for them.

    - `patient_accuracy`: the share of patients whose vote is right.
    - `patient_recognition_rate`: the mean over patients of the share of their images that is answered right
      (Spanhol et al., IEEE TBME 2016, the BreakHis protocol). It is not comparable with the accuracy.
    - `patient_auroc`: of the mean probability of a patient's images; macro of more than two classes.

    Args:
        patients: of `by_patient`.
        weights: how often each patient counts.

    Input shape: `weights (R, P)`.

    Output shape: each figure `(R,)`; nan where it is undefined.

    Example:

    >>> found = by_patient([0, 0, 1], [[.9, .1], [.4, .6], [.2, .8]], ["a", "a", "b"])
    >>> {name: float(value[0]) for name, value in patient_scores(found, np.ones((1, 2))).items()}
    {'patient_accuracy': 1.0, 'patient_recognition_rate': 0.75, 'patient_auroc': 1.0}
    """
    weights = np.asarray(weights, dtype=np.float64)
    with np.errstate(invalid="ignore"):
        shares = weights / weights.sum(axis=1, keepdims=True)
    return {
        "patient_accuracy": shares @ (patients.answers == patients.labels),
        "patient_recognition_rate": shares @ patients.recognised,
        "patient_auroc": weighted_scores(patients.labels, patients.probabilities, weights)["auroc"],
    }


def _voted(votes: np.ndarray, means: np.ndarray, threshold: Threshold, tie: Tie) -> np.ndarray:
    """The class `(P,)` with the most of `votes (P, C)`."""
    tied = votes == votes.max(axis=1, keepdims=True)
    first, last = tied.argmax(axis=1), votes.shape[1] - 1 - tied[:, ::-1].argmax(axis=1)
    if tie == "probability":
        likeliest = predicted_classes(np.where(tied, means, -1.0), threshold)
        return np.where(first == last, first, likeliest)
    return first if tie == "negative" else last

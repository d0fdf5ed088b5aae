"""The figures of predictions: pooled with intervals, of each model, of patients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from keras_medattn import metrics
from keras_medattn.data.manifest import Manifest
from keras_medattn.data.pseudonyms import Pseudonyms
from keras_medattn.metrics import Bootstrap
from keras_medattn.metrics.patients import Tie
from keras_medattn.metrics.scores import Threshold, check_predictions
from keras_medattn.train.calibrate import Calibration
from keras_medattn.train.experiment import Part


@dataclass(frozen=True)
class Evaluation:
    """Predictions of a run's models and the figures over all of them.

    Attributes:
        manifest: the images, those of one model after those of another.
        probabilities: `(N, C)`.
        parts: the name of the model that predicted each image.
        figures: pooled over all images, with 95% bootstrap intervals by patient where known; among them those
            of patients.
        spread: of several models: figure -> mean and standard deviation (ddof 1) over them.
        patients: where known: how many there are, how many of them were left out of the patients' figures
            because their images have several labels, and what decided ties.
        by: the same for the images of each value of a column.
        monte_carlo: the same for the mean softmax over drawn answers.
        timing: seconds an image, of the model and of reading, and the process's peak memory.
        thresholds: `(N,)`, of two classes the probability from which the second was answered.
        calibrations: of models that have one, as it was applied.
        uncalibrated: where they have: the figures at temperature 1, and without their thresholds.
        tuned: of a nested cross validation: how each model's settings were chosen.
    """

    manifest: Manifest
    probabilities: np.ndarray
    parts: tuple[str, ...]
    figures: Bootstrap
    spread: dict[str, tuple[float, float]]
    patients: dict[str, int | str] | None = None
    by: dict[str, Evaluation] = field(default_factory=dict)
    monte_carlo: Evaluation | None = None
    timing: dict[str, float] = field(default_factory=dict)
    thresholds: np.ndarray = field(default_factory=lambda: np.zeros(0))
    calibrations: dict[str, Calibration] = field(default_factory=dict)
    uncalibrated: Evaluation | None = None
    tuned: dict[str, int | str] | None = None

    @property
    def warning(self) -> str:
        """What to know about units that are no patients; empty where all are."""
        if self.figures.unit == "patients":
            return ""
        which = "no patients are" if self.manifest.patients is None else "not every image's patient is"
        return (
            f"{which} known: if a patient has several images, the intervals are too narrow, and training may "
            "have seen the patient"
        )


def summarise(
    rows: Manifest,
    probabilities: np.ndarray,
    parts: Sequence[str],
    threshold: Threshold = 0.5,
    tie: Tie = "probability",
) -> Evaluation:
    """The figures of predictions.

    Args:
        rows: the images, those of one model after those of another.
        probabilities: `(N, C)`.
        parts: the model that predicted each image.
        threshold: as in `evaluate`, or one for each image.
        tie: as in `evaluate`.
    """
    figures_of = statistic(rows, probabilities, parts, threshold, tie)
    repeated = len(set(rows.names)) < len(rows)  # an image, seen by several models, is one unit
    groups = rows.names if rows.patients is None and repeated else rows.patients
    figures = metrics.resample(figures_of, len(rows), groups)
    if rows.patients is None:
        figures = replace(figures, unit="images")
    spread = {}
    if len(set(parts)) > 1:
        each = per_part(figures_of, parts)
        spread = {key: metrics.mean_sd(values) for key, values in each.items()}
    patients = None
    if rows.patients is not None:
        labels: dict[str, set[int]] = {}
        for patient, label in zip(rows.patients, rows.labels.tolist(), strict=True):
            labels.setdefault(patient, set()).add(label)
        mixed = sum(len(each) > 1 for each in labels.values())
        patients = {"patients": len(labels) - mixed, "left_out": mixed, "tie": tie}
    thresholds = np.broadcast_to(threshold, len(rows))
    return Evaluation(rows, probabilities, tuple(parts), figures, spread, patients, thresholds=thresholds)


def subset(evaluation: Evaluation, chosen: np.ndarray, tie: Tie = "probability") -> Evaluation:
    """The figures of some of the images: `chosen (N,)` is true for them."""
    rows = np.flatnonzero(chosen)
    parts = [evaluation.parts[row] for row in rows]
    table, thresholds = evaluation.manifest.take(rows), evaluation.thresholds[rows]
    return summarise(table, evaluation.probabilities[rows], parts, thresholds, tie)


def statistic(
    rows: Manifest,
    probabilities: np.ndarray,
    parts: Sequence[str],
    threshold: Threshold = 0.5,
    tie: Tie = "probability",
) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """`weights (R, N) -> {figure: (R,)}`: those of images and, where patients are known, theirs.

    What each model votes about a patient is one row of the patients' figures.
    """
    labels, probabilities = check_predictions(rows.labels, probabilities)
    patients = None
    if rows.patients is not None:
        keys = list(zip(parts, rows.patients, strict=True))
        patients = metrics.by_patient(labels, probabilities, keys, threshold, tie)

    def figures(weights: np.ndarray) -> dict[str, np.ndarray]:
        found = metrics.weighted_scores(labels, probabilities, weights, threshold)
        if patients is not None and len(patients.rows):
            found |= metrics.patient_scores(patients, weights[:, patients.rows])
        return found

    return figures


def per_part(
    figures_of: Callable[[np.ndarray], dict[str, np.ndarray]], parts: Sequence[str]
) -> dict[str, np.ndarray]:
    """Every figure of each model alone, in the order of their first images."""
    names = np.array(list(dict.fromkeys(parts)))
    return figures_of((names[:, None] == np.asarray(parts)).astype(float))


def joined(tables: Sequence[Manifest]) -> Manifest:
    """Tables of several models as one, those of one after those of another."""
    first = tables[0]

    def chain(columns):
        return tuple(value for column in columns for value in column)

    return Manifest(
        first.root,
        chain(one.names for one in tables),
        np.concatenate([one.labels for one in tables]),
        first.class_names,
        None if first.patients is None else chain(one.patients or () for one in tables),
        columns={name: chain(one.columns[name] for one in tables) for name in first.columns},
    )


def part_names(parts: Sequence[Part], chosen: Sequence[Manifest]) -> list[str]:
    """The name of the model that predicts each of the joined images."""
    return [part.folder.name for part, own in zip(parts, chosen, strict=True) for _ in range(len(own))]


def pseudonymised(evaluation: Evaluation, ids: Pseudonyms) -> Evaluation:
    """The same, with ids for images and patients in what is written."""
    drawn = evaluation.monte_carlo
    return replace(
        evaluation,
        manifest=ids.table(evaluation.manifest),
        monte_carlo=None if drawn is None else pseudonymised(drawn, ids),
    )

"""Temperature and threshold of a trained model, from its validation images; kept in `calibration.json`."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from scipy.special import softmax

from keras_medattn import metrics
from keras_medattn.data.manifest import NO_PATIENTS, Manifest
from keras_medattn.files import read_json, write_json
from keras_medattn.metrics.scores import check_predictions
from keras_medattn.train import inputs
from keras_medattn.train.experiment import Part, RunError
from keras_medattn.train.predict import predict_parts

FILE = "calibration.json"
Wish = Literal["sensitivity", "specificity"]


@dataclass(frozen=True)
class Threshold:
    """A threshold for the calibrated probability of the second class, and what it was chosen for.

    `validation` is the figure that it reaches there, on `images` of the class that the figure is about.
    """

    value: float
    figure: Wish
    wanted: float
    validation: float
    images: int


@dataclass(frozen=True)
class Calibration:
    """What a model's validation images say of its confidence.

    Attributes:
        temperature: divides the scores before the softmax; 1 where none could be fitted.
        fitted: whether it was.
        images: how many validation images it rests on.
        patients: of how many patients, or None where they are unknown.
        nll: mean negative log-likelihood of the validation images, before and after.
        ece: their expected calibration error, before and after.
        threshold: the chosen one, or None.
    """

    temperature: float = 1.0
    fitted: bool = False
    images: int = 0
    patients: int | None = None
    nll: tuple[float, float] | None = None
    ece: tuple[float, float] | None = None
    threshold: Threshold | None = None


def calibrate(
    parts: Sequence[Part],
    wanted: tuple[Wish, float] | None = None,
    cache: Path | str | None = None,
    progress: inputs.Progress = lambda items, *_: items,
) -> list[Calibration]:
    """Fit each model's temperature to its validation images, choose a threshold, and keep both in its folder.

    These images also chose the epoch to keep, so that what is said of them is a little too good: the test
    side tells.

    Args:
        parts: the models of a run, from `experiment.load`.
        wanted: of two classes, the sensitivity (or specificity) that the threshold is to reach.
        cache: as in `evaluate`.
        progress: wraps the loop over batches.

    Raises:
        RunError: there are no validation images, a threshold was asked of more than two classes, or none
            reaches what is wanted.
    """
    sides = [part.manifest.split("val") for part in parts]
    for part, side in zip(parts, sides, strict=True):
        if not len(side):
            raise RunError(f"{part.folder}: no validation images to calibrate on. Train it with some")
        if wanted and len(side.class_names) != 2:
            raise RunError(f"a threshold needs two classes. Received: {', '.join(side.class_names)}")
    answers = predict_parts(parts, sides, cache, 0, progress)
    found = [_calibration(side, one.scores, wanted) for side, one in zip(sides, answers, strict=True)]
    for part, one in zip(parts, found, strict=True):
        keep(part, one)
    return found


def keep(part: Part, calibration: Calibration) -> None:
    """Write a model's `calibration.json`, with a digest of the model that it is of."""
    write_json(asdict(calibration) | {"model": _digest(part)}, part.folder / FILE)


def stored(part: Part) -> Calibration:
    """The model's calibration; of temperature 1 where it has none.

    Raises:
        RunError: the file cannot be read, or the model was trained on since.
    """
    path = part.folder / FILE
    if not path.is_file():
        return Calibration()
    try:
        values = read_json(path)
        model, threshold = values.pop("model"), values.pop("threshold")
        for pair in ("nll", "ece"):
            values[pair] = tuple(values[pair])
        found = Calibration(**values, threshold=Threshold(**threshold) if threshold else None)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise RunError(f"{path}: cannot be read ({error}). Make it anew: `medattn calibrate`") from error
    if part.best.is_file() and model != _digest(part):
        raise RunError(f"{path}: is of another best.keras than there is now. Run `medattn calibrate` again")
    return found


def text(part: Part, one: Calibration) -> str:
    """A calibration in words, a line or two, and a warning where no patients are known."""
    patients = "" if one.patients is None else f" of {one.patients} patients"
    basis = f"{one.images} validation images{patients}"
    line = f"{part.folder.name}: temperature 1: of {basis} all are right, or most wrong, and none is best"
    if one.fitted and one.nll and one.ece:
        line = (
            f"{part.folder.name}: temperature {one.temperature:.3f}, fitted on {basis}: "
            f"NLL {one.nll[0]:.3f} -> {one.nll[1]:.3f}, ECE {one.ece[0]:.3f} -> {one.ece[1]:.3f}"
        )
    if (cut := one.threshold) is not None:
        line += (
            f"\n{part.folder.name}: threshold {cut.value:.3f} for {cut.figure} {cut.wanted:g}: "
            f"on validation {cut.validation:.3f} of {cut.images} images"
        )
    return line if one.patients is not None else f"{line}\nwarning: {NO_PATIENTS}"


def _calibration(side: Manifest, scores: np.ndarray, wanted: tuple[Wish, float] | None) -> Calibration:
    fitted = metrics.fit_temperature(side.labels, scores)
    both = (1.0, fitted or 1.0)
    probabilities = [softmax(scores / one, axis=-1) for one in both]
    weights = np.ones((1, len(side)))
    ece = [
        metrics.calibration_scores(*check_predictions(side.labels, one), weights)["ece"]
        for one in probabilities
    ]
    nll = [metrics.negative_log_likelihood(side.labels, scores, one) for one in both]
    return Calibration(
        both[1],
        fitted is not None,
        len(side),
        None if side.patients is None else len(set(side.patients)),
        (nll[0], nll[1]),
        (float(ece[0][0]), float(ece[1][0])),
        _threshold(side.labels, probabilities[1], *wanted) if wanted else None,
    )


def _threshold(labels: np.ndarray, probabilities: np.ndarray, figure: Wish, wanted: float) -> Threshold:
    try:
        value = metrics.choose_threshold(labels, probabilities[:, 1], **{figure: wanted})
    except ValueError as error:
        raise RunError(f"no threshold can be chosen on the validation images: {error}") from error
    if value is None:
        raise RunError(
            f"no threshold has {figure} {wanted:g} on the validation images but one that finds nothing. "
            "Ask for less"
        )
    reached = metrics.scores(labels, probabilities, value)[figure]
    images = int((labels == (figure == "sensitivity")).sum())
    return Threshold(value, figure, wanted, reached, images)


def _digest(part: Part) -> str:
    with open(part.best, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

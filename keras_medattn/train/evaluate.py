"""Figures of a run on held-out images, with intervals, pictures and every prediction."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from keras_medattn import metrics
from keras_medattn.data import manifest as manifests
from keras_medattn.data.manifest import Manifest
from keras_medattn.files import read_json, write_json, written_aside
from keras_medattn.metrics.patients import Tie
from keras_medattn.metrics.scores import predicted_classes
from keras_medattn.train import calibrate, inputs
from keras_medattn.train.calibrate import Calibration
from keras_medattn.train.experiment import Part, RunError, peak_memory_gb
from keras_medattn.train.figures import Evaluation, joined, part_names, subset, summarise
from keras_medattn.train.predict import predict, predict_parts

__all__ = ["Evaluation", "evaluate", "predict", "table", "to_dict", "write"]

HEADLINES = (
    "accuracy",
    "balanced_accuracy",
    "auroc",
    "ece",
    "brier",
    "patient_accuracy",
    "patient_recognition_rate",
    "patient_auroc",
)


def evaluate(
    parts: Sequence[Part],
    data: Path | str | None = None,
    split: str = "test",
    threshold: float | None = None,
    cache: Path | str | None = None,
    progress: inputs.Progress = lambda items, *_: items,
    tie: Tie = "probability",
    by: str | None = None,
    draws: int = 0,
) -> Evaluation:
    """Predict held-out images and compute the figures, calibrated where `medattn calibrate` was run.

    Args:
        parts: the models of a run, from `experiment.load`.
        data: images to evaluate on. The run's own table (or None): the images of `split`. Another table:
            all its images, none of which may have been trained on.
        split: the side to evaluate, of the run's own table.
        threshold: of two classes, the probability from which the second is answered; by default the one that
            each model's calibration chose, else 0.5.
        cache: of a run trained on cached features, where they are: the frozen layers need not run again.
        progress: wraps the loop over batches.
        tie: what decides between classes with equally many votes of a patient's images.
        by: a column of the table: the figures of each of its values, too.
        draws: of a system that draws patches: answer by this many drawn answers, too.

    Raises:
        RunError: the data shares images with the training side, has other classes, or has none to evaluate;
            there is no such column; the system draws nothing; the models are not calibrated alike.
    """
    chosen = [held_out(part, data, split) for part in parts]
    rows = joined(chosen)
    values = column(rows, by) if by else ()
    stored = calibrations(parts, threshold)
    plain_cut = 0.5 if threshold is None else threshold
    cuts = [one.threshold.value if one.threshold else plain_cut for one in stored]
    found = predict_parts(parts, chosen, cache, draws, progress)
    names = part_names(parts, chosen)

    def figures(answers: Sequence[np.ndarray], cuts: Sequence[float]) -> Evaluation:
        each = [np.full(len(own), cut) for own, cut in zip(chosen, cuts, strict=True)]
        return summarise(rows, np.concatenate(answers), names, np.concatenate(each), tie)

    pairs = list(zip(found, stored, strict=True))
    result = figures([one.probabilities(own.temperature) for one, own in pairs], cuts)
    drawn = [one.monte_carlo(own.temperature) for one, own in pairs] if draws else []
    tuned = parts[0].folder / "tuned.json"
    applied = {part.folder.name: one for part, one in zip(parts, stored, strict=True) if one.images}
    plain_cuts = [plain_cut] * len(parts)
    return replace(
        result,
        calibrations=applied,
        uncalibrated=figures([one.probabilities() for one in found], plain_cuts) if applied else None,
        tuned=read_json(tuned) if tuned.is_file() else None,
        by={value: subset(result, np.equal(values, value), tie) for value in sorted(set(values))},
        monte_carlo=figures(drawn, cuts) if draws else None,
        timing={
            "seconds_per_image": float(np.mean([one.seconds for one in found])),
            "reading_seconds_per_image": float(np.mean([one.reading for one in found])),
            "peak_memory_gb": peak_memory_gb(),
        },
    )


def calibrations(parts: Sequence[Part], threshold: float | None = None) -> list[Calibration]:
    """Each model's calibration, without its threshold where one is given.

    Raises:
        RunError: some models have one and others don't, or their thresholds are for different figures.
    """
    stored = [calibrate.stored(part) for part in parts]
    wishes = [one.threshold and (one.threshold.figure, one.threshold.wanted) for one in stored]
    if len({(one.images > 0, wish) for one, wish in zip(stored, wishes, strict=True)}) > 1:
        raise RunError(
            f"{parts[0].folder.parent}: its models are not calibrated alike. Run `medattn calibrate` on it"
        )
    return stored if threshold is None else [replace(one, threshold=None) for one in stored]


def write(evaluation: Evaluation, folder: Path) -> list[Path]:
    """Write `metrics.json`, `predictions.csv`, and ROC, precision-recall, confusion and reliability pictures.

    Returns:
        The files written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    classes = evaluation.manifest.class_names
    labels, probabilities = evaluation.manifest.labels, evaluation.probabilities
    pictures = ("roc.png", "pr.png", "confusion.png", "reliability.png")
    paths = [folder / name for name in ("metrics.json", "predictions.csv", *pictures)]
    write_json(to_dict(evaluation), paths[0])
    _write_predictions(evaluation, paths[1])
    metrics.roc_picture(labels, probabilities, classes, paths[2], evaluation.figures)
    metrics.pr_picture(labels, probabilities, classes, paths[3], evaluation.figures)
    metrics.confusion_picture(labels, probabilities, classes, paths[4], evaluation.thresholds)
    metrics.reliability_picture(labels, probabilities, paths[5], evaluation.figures)
    if evaluation.monte_carlo is not None:
        paths.append(folder / "predictions_monte_carlo.csv")
        _write_predictions(evaluation.monte_carlo, paths[-1])
    return paths


def to_dict(evaluation: Evaluation) -> dict:
    """The figures as plain values; an undefined one is None."""
    figures = evaluation.figures
    cuts = dict(zip(evaluation.parts, map(float, evaluation.thresholds), strict=True))
    values = {
        "rests_on": str(figures),
        "units": figures.units,
        "unit": figures.unit,
        "images": figures.images,
        "class_names": list(evaluation.manifest.class_names),
        "models": len(set(evaluation.parts)),
        "figures": {
            key: dict(zip(("value", "low", "high"), map(plain, one[:3]), strict=True))
            for key, one in figures.figures.items()
        },
        "over_models": {
            key: {"mean": plain(mean), "sd": plain(sd)} for key, (mean, sd) in evaluation.spread.items()
        },
        "patients": evaluation.patients,
        "warning": evaluation.warning or None,
        "threshold": cuts.popitem()[1] if len(set(cuts.values())) == 1 else cuts,
    }
    if evaluation.calibrations:
        values["calibrations"] = {name: asdict(one) for name, one in evaluation.calibrations.items()}
    if evaluation.tuned is not None:
        values["tuned"] = evaluation.tuned
    if evaluation.uncalibrated is not None:
        values["uncalibrated"] = to_dict(evaluation.uncalibrated)
    if evaluation.by:
        values["by"] = {value: to_dict(one) for value, one in evaluation.by.items()}
    if evaluation.monte_carlo is not None:
        values["monte_carlo"] = to_dict(evaluation.monte_carlo)
    if evaluation.timing:
        values["timing"] = {key: plain(value) for key, value in evaluation.timing.items()}
    return values


def table(evaluation: Evaluation) -> str:
    """The figures as text, a line each: value, interval, and mean and sd over several models."""
    lines = _lines(evaluation, evaluation.figures.figures)
    if evaluation.spread:
        lines.append(
            "left: the predictions of all models pooled, so that auroc and auprc compare scores of different "
            "models;\nright: mean and sd of the models' own figures"
        )
    if evaluation.patients is not None:
        lines.append(
            "patients: {patients}, {left_out} with several labels left out; ties of votes: {tie}".format(
                **evaluation.patients
            )
        )
    if (tuned := evaluation.tuned) is not None:
        where = f"over {tuned['inner']} inner folds" if tuned["inner"] else "on the validation side"
        lines.append(
            f"nested: each model's settings are the best of {tuned['trials']}, by {tuned['figure']} {where} "
            "of its own training images"
        )
    lines += _calibration_lines(evaluation)
    if evaluation.warning:
        lines.append(f"warning: {evaluation.warning}")
    for value, one in evaluation.by.items():
        lines += ["", f"{value}: {one.figures}", *_lines(one, HEADLINES)]
    if evaluation.monte_carlo is not None:
        lines += ["", "Monte-Carlo: the mean softmax over drawn answers; above, the deterministic answer"]
        lines += _lines(evaluation.monte_carlo, HEADLINES)
    timing = evaluation.timing
    if timing and not math.isnan(timing["seconds_per_image"]):
        lines += [
            "",
            "{seconds_per_image:.4f} s an image and {reading_seconds_per_image:.4f} s to read it; "
            "{peak_memory_gb:.2f} GB of memory at the peak".format(**timing),
        ]
    return "\n".join(lines)


def held_out(part: Part, data: Path | str | None, split: str) -> Manifest:
    """The images to evaluate a model on, as `evaluate` says."""
    own = part.manifest
    moved = part.recipe.data.set and data is not None and Path(data).is_dir()  # the set itself, elsewhere
    if data is not None and not moved:
        given = manifests.load(data, own.class_names)
        shared = set(given.names) & set(own.names)
        if not shared:
            return given
        if shared != set(given.names):
            raise RunError(
                f"{data}: {len(shared)} of its {len(given)} images belong to the run's own data, the others "
                "do not. Evaluate on the run's own table, or on images that it never saw"
            )
    chosen = own.split(split)
    if not len(chosen):
        raise RunError(f"{part.folder}: no images in the split {split!r}. Name another with --split")
    return chosen


def plain(value: float) -> float | None:
    """A number as JSON keeps it: None where it is undefined."""
    return None if math.isnan(value) else float(value)


def column(rows: Manifest, name: str) -> tuple[str, ...]:
    """What a further column of the table says of each image."""
    if name not in rows.columns:
        known = ", ".join(rows.columns) or "none"
        raise RunError(f"the data has no further column {name!r} to report by. It has: {known}")
    return rows.columns[name]


def _calibration_lines(evaluation: Evaluation) -> list[str]:
    """What was fitted and chosen on the validation images, and what became of it here."""
    applied, before = list(evaluation.calibrations.values()), evaluation.uncalibrated
    if not applied or before is None:
        return []
    basis = _words([one.images for one in applied])
    temperatures = _words([one.temperature for one in applied])
    errors = [one.figures.figures["ece"] for one in (before, evaluation)]
    lines = [
        f"calibrated: temperature {temperatures}, fitted on {basis} validation images; ECE here {errors[0]} "
        f"before, {errors[1]} after"
    ]
    chosen = [one.threshold for one in applied if one.threshold]
    if chosen:
        figure, wish = chosen[0].figure, f"{chosen[0].figure} {chosen[0].wanted:g}"
        lines.append(
            f"threshold {_words([one.value for one in chosen])} chosen on validation for {wish}, "
            f"there {_words([one.validation for one in chosen])} of {_words([one.images for one in chosen])} "
            f"images: here {evaluation.figures.figures[figure]}"
        )
    return lines


def _words(values: Sequence[float]) -> str:
    """One number, or the range of several."""
    return " to ".join(f"{value:.4g}" for value in sorted({min(values), max(values)}))


def _lines(evaluation: Evaluation, keys: Iterable[str]) -> list[str]:
    names = evaluation.manifest.class_names
    lines = []
    for key in keys:
        if key not in evaluation.figures.figures:
            continue
        name, _, which = key.partition("/")
        label = name if not which else f"{name} ({names[int(which)] if which.isdigit() else which})"
        line = f"{label:<34} {evaluation.figures.figures[key]}"
        if key in evaluation.spread:
            mean, sd = evaluation.spread[key]
            line += f"   {mean:.3f} +- {sd:.3f} over {len(set(evaluation.parts))} models"
        lines.append(line)
    return lines


def _write_predictions(evaluation: Evaluation, path: Path) -> None:
    rows = evaluation.manifest
    answers = predicted_classes(evaluation.probabilities, evaluation.thresholds)
    with written_aside(path) as aside, open(aside, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "patient", "model", "label", "predicted", *rows.class_names])
        for place, name in enumerate(rows.names):
            patient = rows.patients[place] if rows.patients else ""
            label, answer = rows.class_names[rows.labels[place]], rows.class_names[answers[place]]
            values = [f"{value:.9g}" for value in evaluation.probabilities[place]]
            writer.writerow([name, patient, evaluation.parts[place], label, answer, *values])

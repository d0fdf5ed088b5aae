"""Figures of a run on held-out images, with intervals, pictures and every prediction."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from scipy.special import softmax

from keras_medattn import metrics
from keras_medattn.data import manifest as manifests
from keras_medattn.data import pipeline
from keras_medattn.data.manifest import Manifest
from keras_medattn.files import write_json, written_aside
from keras_medattn.metrics import Bootstrap
from keras_medattn.train import inputs
from keras_medattn.train.experiment import Part, RunError


@dataclass(frozen=True)
class Evaluation:
    """Predictions of a run's models and the figures over all of them.

    Attributes:
        manifest: the images, those of one model after those of another.
        probabilities: `(N, C)`.
        parts: the name of the model that predicted each image.
        figures: pooled over all images, with 95% bootstrap intervals by patient where known.
        spread: of several models: figure -> mean and standard deviation (ddof 1) over them.
    """

    manifest: Manifest
    probabilities: np.ndarray
    parts: tuple[str, ...]
    figures: Bootstrap
    spread: dict[str, tuple[float, float]]


def evaluate(
    parts: Sequence[Part],
    data: Path | str | None = None,
    split: str = "test",
    threshold: float = 0.5,
    cache: Path | str | None = None,
    progress: inputs.Progress = lambda items, *_: items,
) -> Evaluation:
    """Predict held-out images and compute the figures.

    Args:
        parts: the models of a run, from `experiment.load`.
        data: images to evaluate on. The run's own table (or None): the images of `split`. Another table:
            all its images, none of which may have been trained on.
        split: the side to evaluate, of the run's own table.
        threshold: of two classes, the probability from which the second is answered.
        cache: of a run trained on cached features, where they are: the frozen layers need not run again.
        progress: wraps the loop over batches.

    Raises:
        RunError: the data shares images with the training side, has other classes, or has none to evaluate.
    """
    manifest_rows: list[Manifest] = []
    probabilities, names, per_model = [], [], []
    table = parts[0].manifest
    images = None if cache is None else inputs.images(parts[0].recipe, table, progress)
    for part in parts:
        chosen = _held_out(part, data, split)
        if images is None or cache is None or set(chosen.names) - set(table.names):
            scores = predict(part, chosen, progress)
        else:
            scores = _predict_on_features(part, chosen, images, Path(cache), progress)
        probabilities.append(scores)
        names += [part.folder.name] * len(chosen)
        manifest_rows.append(chosen)
        per_model.append(metrics.weighted_scores(chosen.labels, scores, np.ones((1, len(chosen))), threshold))
    rows = _joined(manifest_rows)
    answers = np.concatenate(probabilities)

    def statistic(labels, values, weights):
        return metrics.weighted_scores(labels, values, weights, threshold)

    if rows.patients is None and len(set(rows.names)) < len(
        rows
    ):  # an image, seen by several models, is one unit
        figures = replace(metrics.bootstrap(rows.labels, answers, rows.names, statistic), unit="images")
    else:
        figures = metrics.bootstrap(rows.labels, answers, rows.patients, statistic)
    spread = {}
    if len(parts) > 1:
        spread = {key: metrics.mean_sd([float(one[key][0]) for one in per_model]) for key in per_model[0]}
    return Evaluation(rows, answers, tuple(names), figures, spread)


def predict(
    part: Part, manifest: Manifest, progress: inputs.Progress = lambda items, *_: items
) -> np.ndarray:
    """Class probabilities `(N, C)` of images by a run's model."""
    size = part.recipe.data.image_size
    fetch = pipeline.streamed(manifest, size, part.recipe.data.window or None, part.recipe.data.max_pixels)
    return _probabilities(part.model(), fetch, len(manifest), progress, part.folder.name)


def _predict_on_features(
    part: Part, manifest: Manifest, images: pipeline.Fetch, cache: Path, progress: inputs.Progress
) -> np.ndarray:
    """As `predict`, from the cached features of the model's frozen layers."""
    from keras_medattn.train import trainer

    model, settings, table = part.model(), part.recipe.train, part.manifest
    stem, rest = trainer.parts(model, settings.frozen_stride)
    if stem is None or not settings.cached_views:
        raise RunError(f"{part.folder}: was not trained on cached features; evaluate it without a cache")
    plain = replace(part.recipe, train=replace(settings, cached_views=1))
    [features] = inputs.cached_features(stem, images, len(table), plain, cache, progress)
    place = {name: number for number, name in enumerate(table.names)}
    places = np.array([place[name] for name in manifest.names])
    tail = trainer.fitted_part(model, stem, rest, part.recipe.data.image_size)
    return _probabilities(
        tail, lambda rows, _: features[places[rows]], len(manifest), progress, part.folder.name
    )


def _probabilities(
    model, fetch: pipeline.Fetch, count: int, progress: inputs.Progress, name: str
) -> np.ndarray:
    import tensorflow as tf

    forward = tf.function(lambda batch: model(batch, training=False), reduce_retracing=True)
    data = progress(pipeline.batches(fetch, count, 8), -(-count // 8), f"predicting, {name}")
    return softmax(np.float64(np.concatenate([forward(batch).numpy() for batch in data])), axis=-1)


def write(evaluation: Evaluation, folder: Path, threshold: float = 0.5) -> list[Path]:
    """Write `metrics.json`, `predictions.csv`, and the ROC, precision-recall and confusion pictures.

    Returns:
        The files written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    classes = evaluation.manifest.class_names
    labels, probabilities = evaluation.manifest.labels, evaluation.probabilities
    paths = [
        folder / name for name in ("metrics.json", "predictions.csv", "roc.png", "pr.png", "confusion.png")
    ]
    write_json(to_dict(evaluation) | {"threshold": threshold}, paths[0])
    _write_predictions(evaluation, threshold, paths[1])
    metrics.roc_picture(labels, probabilities, classes, paths[2], evaluation.figures)
    metrics.pr_picture(labels, probabilities, classes, paths[3], evaluation.figures)
    metrics.confusion_picture(labels, probabilities, classes, paths[4], threshold)
    return paths


def to_dict(evaluation: Evaluation) -> dict:
    """The figures as plain values; an undefined one is None."""
    figures = evaluation.figures
    return {
        "rests_on": str(figures),
        "units": figures.units,
        "unit": figures.unit,
        "images": figures.images,
        "class_names": list(evaluation.manifest.class_names),
        "models": len(set(evaluation.parts)),
        "figures": {
            key: dict(zip(("value", "low", "high"), map(_plain, one[:3]), strict=True))
            for key, one in figures.figures.items()
        },
        "over_models": {
            key: {"mean": _plain(mean), "sd": _plain(sd)} for key, (mean, sd) in evaluation.spread.items()
        },
    }


def table(evaluation: Evaluation) -> str:
    """The figures as text, a line each: value, interval, and mean and sd over several models."""
    names = evaluation.manifest.class_names
    lines = []
    for key, interval in evaluation.figures.figures.items():
        name, _, which = key.partition("/")
        label = name if not which else f"{name} ({names[int(which)] if which.isdigit() else which})"
        line = f"{label:<34} {interval}"
        if key in evaluation.spread:
            mean, sd = evaluation.spread[key]
            line += f"   {mean:.3f} +- {sd:.3f} over {len(set(evaluation.parts))} models"
        lines.append(line)
    return "\n".join(lines)


def _held_out(part: Part, data: Path | str | None, split: str) -> Manifest:
    own = part.manifest
    if data is not None:
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


def _joined(tables: Sequence[Manifest]) -> Manifest:
    first = tables[0]
    return Manifest(
        first.root,
        tuple(name for one in tables for name in one.names),
        np.concatenate([one.labels for one in tables]),
        first.class_names,
        None if first.patients is None else tuple(p for one in tables for p in one.patients or ()),
    )


def _write_predictions(evaluation: Evaluation, threshold: float, path: Path) -> None:
    rows = evaluation.manifest
    if len(rows.class_names) == 2:
        answers = (evaluation.probabilities[:, 1] >= threshold).astype(int)
    else:
        answers = evaluation.probabilities.argmax(axis=-1)
    with written_aside(path) as aside, open(aside, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "patient", "model", "label", "predicted", *rows.class_names])
        for place, name in enumerate(rows.names):
            patient = rows.patients[place] if rows.patients else ""
            label, answer = rows.class_names[rows.labels[place]], rows.class_names[answers[place]]
            values = [f"{value:.6f}" for value in evaluation.probabilities[place]]
            writer.writerow([name, patient, evaluation.parts[place], label, answer, *values])


def _plain(value: float) -> float | None:
    return None if math.isnan(value) else float(value)

"""What the histories of a run's models tell: how long they learned, and the figures of a window of epochs."""

from __future__ import annotations

import csv
from collections.abc import Sequence

import numpy as np
from scipy.stats import entropy

from keras_medattn import metrics
from keras_medattn.data import pipeline
from keras_medattn.train.experiment import Part, RunError

History = dict[str, np.ndarray]


def history(part: Part) -> History:
    """The columns of a model's `history.csv`, a value an epoch.

    Raises:
        RunError: it cannot be read.
    """
    path = part.folder / "history.csv"
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        return {key: np.array([float(row[key] or "nan") for row in rows]) for key in rows[0]}
    except (OSError, LookupError, ValueError) as error:
        raise RunError(f"{path}: not the history of a trained model ({error})") from error


def learning(parts: Sequence[Part]) -> dict[str, float | int | None]:
    """How the models of a run learned, as means over them.

    Returns:
        `epochs`; `plateau_epochs`, those before the validation cross entropy first lay a tenth under that of
        an answer which knows only the classes' frequencies (None where a model never got there);
        `seconds_per_epoch` with validation, and `seconds_per_step`, its share of a training step.
    """
    histories = [history(part) for part in parts]
    plateaus = [_plateau(part, one) for part, one in zip(parts, histories, strict=True)]
    seconds = [float(np.median(one["seconds"])) for one in histories if "seconds" in one]
    steps = [_steps(part) for part in parts]
    timed = len(seconds) == len(parts)
    return {
        "epochs": float(np.mean([len(one["epoch"]) for one in histories])),
        "plateau_epochs": None
        if None in plateaus
        else float(np.mean([p for p in plateaus if p is not None])),
        "on_plateau": plateaus.count(None),
        "seconds_per_epoch": float(np.mean(seconds)) if timed else None,
        "seconds_per_step": float(np.mean(np.divide(seconds, steps))) if timed else None,
    }


def picked_window(parts: Sequence[Part], length: int) -> range:
    """The epochs that a cross validation picks: those of the highest mean accuracy on the held-out folds.

    Args:
        parts: the models of a run with `--folds`, on the training images alone.
        length: how many consecutive epochs.

    Raises:
        RunError: the run has no folds, or too few epochs, or did not record the held-out accuracy.
    """
    if len(parts) < 2:
        raise RunError(f"{parts[0].folder}: one model is no cross validation. Train it with --folds 5")
    accuracies = [_watched(part) for part in parts]
    epochs = min(map(len, accuracies))
    if epochs < length:
        raise RunError(f"{parts[0].folder.parent}: a model has {epochs} epochs, and {length} were asked for")
    return metrics.best_window([one[:epochs] for one in accuracies], length)


def window_accuracies(parts: Sequence[Part], window: range) -> np.ndarray:
    """The test accuracy of each model after each epoch of the window: `(models, epochs)`."""
    accuracies = [_watched(part) for part in parts]
    for part, one in zip(parts, accuracies, strict=True):
        if len(one) < window.stop:
            raise RunError(
                f"{part.folder}: has {len(one)} epochs, and the window ends with epoch {window.stop}. Train "
                "that long, with train.patience as long"
            )
    return np.array([one[window.start : window.stop] for one in accuracies])


def _watched(part: Part) -> np.ndarray:
    columns = history(part)
    if "test_accuracy" not in columns:
        raise RunError(
            f"{part.folder / 'history.csv'}: has no test_accuracy. Train with --set train.watch_test=true"
        )
    return columns["test_accuracy"]


def _plateau(part: Part, columns: History) -> int | None:
    counts = np.bincount(part.manifest.split("val").labels)
    return metrics.plateau(columns["val_loss"], float(entropy(counts)))


def _steps(part: Part) -> int:
    return pipeline.steps_an_epoch(len(part.manifest.split("train")), part.recipe.train.batch_size)

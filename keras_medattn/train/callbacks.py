"""What happens at the end of an epoch: the validation figures, the checkpoint, the progress line."""

from __future__ import annotations

import csv
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
from scipy.special import log_softmax

from keras_medattn.files import read_json, write_json, written_aside
from keras_medattn.metrics import history_picture, scores


class Watch(keras.callbacks.Callback):
    """Adds `test_accuracy` and `test_auroc` (exact, macro) to an epoch's logs; nothing is chosen by them."""

    def __init__(self, predict: Callable[[], np.ndarray], labels: np.ndarray):
        super().__init__()
        self.predict, self.labels = predict, labels

    def on_epoch_end(self, epoch, logs=None):
        figures = _figures(self.labels, log_softmax(np.float64(self.predict()), axis=-1))
        logs = {} if logs is None else logs
        logs |= {f"test_{key}": figures[key] for key in ("accuracy", "auroc")}


class Validate(Watch):
    """Adds `val_loss` and `val_auroc` (exact, macro) to an epoch's logs; must come first."""

    def on_epoch_end(self, epoch, logs=None):
        log_probabilities = log_softmax(np.float64(self.predict()), axis=-1)
        logs = {} if logs is None else logs
        logs["val_loss"] = float(-log_probabilities[np.arange(len(self.labels)), self.labels].mean())
        logs["val_auroc"] = _figures(self.labels, log_probabilities)["auroc"]


class Keeper(keras.callbacks.Callback):
    """Keeps the best model and all that a killed run needs to go on exactly; stops when none is better.

    After each epoch `folder` holds `best.keras` (the whole model) and its `metrics.json`, `history.csv`, and
    `checkpoint/`: weights, optimiser and history of the last finished epoch. What Keras's own callbacks keep
    leaves out the best value and the patience used so far.

    Args:
        whole: what to save as the best one, by its `save(path)`; the fitted model may be a part of it.
        folder: of the run.
        monitor: the figure to watch: `val_auroc`, `val_loss`, or `epoch`: the last is the best.
        patience: epochs without a better one.
        seed: fixes dropout, with the epoch.
        ready: how many epochs pass before the answer learns: until then the last one is kept as the best,
            and patience is not used up.
    """

    def __init__(self, whole: Any, folder: Path, monitor: str, patience: int, seed: int, ready: int = 0):
        super().__init__()
        self.whole, self.folder = whole, folder
        self.monitor, self.patience, self.seed, self.ready = monitor, patience, seed, ready
        self.history: list[dict[str, float]] = []

    @property
    def best_epoch(self) -> int:
        """The epoch of the best figure so far, of equal ones that of the lowest loss; nan is the worst."""
        if self.monitor == "epoch" or len(self.history) <= self.ready:
            return len(self.history) - 1
        rows = self.history[self.ready :]
        loss = np.array([row["val_loss"] for row in rows])
        watched = loss if self.monitor == "val_loss" else -np.array([row[self.monitor] for row in rows])
        return self.ready + int(np.lexsort((loss, np.nan_to_num(watched, nan=np.inf)))[0])

    @property
    def done(self) -> bool:
        """Whether patience has run out."""
        return bool(self.history) and len(self.history) - 1 - self.best_epoch >= self.patience

    def restore(self) -> int:
        """Load the last checkpoint, if there is one, and answer the epoch to go on with."""
        path = self.folder / "checkpoint" / "state.npz"
        if not path.is_file():
            return 0
        with np.load(path, allow_pickle=False) as file:
            for place, variable in enumerate(self._variables()):
                variable.assign(file[str(place)])
            epochs = int(file["epochs"])
        self.history = read_json(self.folder / "checkpoint" / "history.json")[:epochs]
        return epochs

    def on_epoch_begin(self, epoch, logs=None):
        self.began = time.monotonic()
        for place, variable in enumerate(v for v in self.model.variables if "seed_generator" in v.path):
            variable.assign(np.array([self.seed * 1000 + place, epoch << 16], variable.dtype))

    def on_epoch_end(self, epoch, logs=None):
        row = {key: float(value) for key, value in (logs or {}).items()}
        if not np.isfinite([row["loss"], row["val_loss"]]).all():
            raise FloatingPointError(
                f"the training loss is {row['loss']} and the validation loss {row['val_loss']} in epoch "
                f"{epoch + 1}. The best model so far is kept in {self.folder}. Lower train.learning_rate, or "
                "look at the images with `medattn check`"
            )
        seconds = round(time.monotonic() - self.began, 3)
        self.history.append({"epoch": epoch + 1} | row | {"seconds": seconds})
        if self.best_epoch == epoch:
            with written_aside(self.folder / "best.keras") as aside:
                self.whole.save(aside)
            write_json(self.history[-1], self.folder / "metrics.json")
        self._save()
        if self.done:
            self.model.stop_training = True

    def on_train_end(self, logs=None):
        figures = [key for key in self.history[0] if key not in ("epoch", "seconds")]
        curves = {key: [row[key] for row in self.history] for key in figures}
        history_picture(curves, self.folder / "history.png")

    def _save(self):
        folder = self.folder / "checkpoint"
        folder.mkdir(exist_ok=True)
        write_json(self.history, folder / "history.json")
        state = {str(place): variable.numpy() for place, variable in enumerate(self._variables())}
        with written_aside(folder / "state.npz") as aside:
            np.savez(aside, epochs=len(self.history), **state)
        with written_aside(self.folder / "history.csv") as aside, open(aside, "w", newline="") as file:
            writer = csv.DictWriter(file, list(self.history[0]))
            writer.writeheader()
            writer.writerows(self.history)

    def _variables(self):
        return [*self.model.variables, *self.model.optimizer.variables]


class Line(keras.callbacks.Callback):
    """Prints one line an epoch: figures, seconds, and the time that is left at most."""

    def __init__(self, epochs: int, name: str, write: Callable[[str], None]):
        super().__init__()
        self.epochs, self.name, self.write = epochs, name, write

    def on_epoch_begin(self, epoch, logs=None):
        self.began = time.monotonic()

    def on_epoch_end(self, epoch, logs=None):
        took = time.monotonic() - self.began
        figures = "  ".join(f"{key} {value:.4f}" for key, value in (logs or {}).items())
        left = (self.epochs - epoch - 1) * took
        seconds = f"{took:.1f} s, at most {left:.0f} s left"
        self.write(f"{self.name}epoch {epoch + 1:>3}/{self.epochs}  {figures}  {seconds}")


def _figures(labels: np.ndarray, log_probabilities: np.ndarray) -> dict[str, float]:
    if np.isfinite(log_probabilities[np.arange(len(labels)), labels]).all():
        return scores(labels, np.exp(log_probabilities))
    return dict.fromkeys(("accuracy", "auroc"), np.nan)

"""What a run keeps: its best model, and all that a stopped one needs to go on exactly."""

from __future__ import annotations

import csv
import os
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_medattn.files import read_json, write_json, written_aside
from keras_medattn.metrics import history_picture
from keras_medattn.train.recipe import Train


class Keeper(keras.callbacks.Callback):
    """Keeps the best model and all that a killed run needs to go on exactly; stops when none is better.

    After each epoch `folder` holds `best.keras` (the whole model) and its `metrics.json`, `history.csv`, and
    `checkpoint/`: weights, optimiser and history of the last finished epoch. What Keras's own callbacks keep
    leaves out the best value and the patience used so far.

    A checkpoint within an epoch has its place there and the sums of the epoch's metrics, too. Dropout draws
    from seeds that count up within an epoch: they are variables of the model, so they are in the checkpoint,
    the same for all replicas; an epoch begins with those of its number.

    Args:
        whole: what to save as the best one, by its `save(path)`; the fitted model may be a part of it.
        folder: of the run.
        settings: the figure to watch, the patience, and the seed that with the epoch fixes dropout.
        steps: of an epoch.
        ready: how many epochs pass before the answer learns: until then the last one is kept as the best,
            and patience is not used up.
        every: steps between two checkpoints within epochs; 0: after each epoch alone.
        writes: whether this process writes; of several workers one does, and all gather what is written.
    """

    def __init__(
        self,
        whole: Any,
        folder: Path,
        settings: Train,
        steps: int,
        ready: int = 0,
        every: int = 0,
        writes: bool = True,
    ):
        super().__init__()
        self.whole, self.folder, self.settings = whole, folder, settings
        self.steps, self.ready, self.every, self.writes = steps, ready, every, writes
        self.history: list[dict[str, float]] = []
        self.step = 0  # the next one, over all epochs
        self._broken: dict[str, np.ndarray] = {}  # the state of an epoch to go on with

    @property
    def best_epoch(self) -> int:
        """The epoch of the best figure so far, of equal ones that of the lowest loss; nan is the worst."""
        monitor = self.settings.monitor
        if monitor == "epoch" or len(self.history) <= self.ready:
            return len(self.history) - 1
        rows = self.history[self.ready :]
        loss = np.array([row["val_loss"] for row in rows])
        watched = loss if monitor == "val_loss" else -np.array([row[monitor] for row in rows])
        return self.ready + int(np.lexsort((loss, np.nan_to_num(watched, nan=np.inf)))[0])

    @property
    def done(self) -> bool:
        """Whether patience has run out."""
        return bool(self.history) and len(self.history) - 1 - self.best_epoch >= self.settings.patience

    def restore(self) -> int:
        """Load the last checkpoint, if there is one, and answer the step to go on with, over all epochs."""
        folder = self.folder / "checkpoint"
        path = folder / "state.npz"
        if not path.is_file():
            return 0
        try:
            with np.load(path, allow_pickle=False) as file:
                state = dict(file)
            self.history = read_json(folder / "history.json")[: int(state["epochs"])]
            self.step = int(state.get("step", len(self.history) * self.steps))
            self._assign(state)
        except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"{path}: no checkpoint to go on from ({error}). Train into another --out, or remove "
                f"{folder} to begin this one anew"
            ) from error
        self._broken = state if self.step % self.steps else {}
        return self.step

    def on_epoch_begin(self, epoch, logs=None):
        self.began = time.monotonic()
        if self._broken:  # again: Keras has reset the metrics, and a model's own callbacks began the epoch
            self._assign(self._broken)
            self.began -= float(self._broken["seconds"])
            self._broken = {}
            return
        self.step = epoch * self.steps
        for place, variable in enumerate(v for v in self.model.variables if "seed_generator" in v.path):
            variable.assign(np.array([self.settings.seed * 1000 + place, epoch << 16], variable.dtype))

    def on_train_batch_end(self, batch, logs=None):
        self.step += 1
        self._check({"training loss": (logs or {}).get("loss", 0.0)})
        if self.every and self.step % self.every == 0 and self.step % self.steps:
            with self._explained():
                self._save()

    def on_epoch_end(self, epoch, logs=None):
        row = {key: float(value) for key, value in (logs or {}).items()}
        self._check({"training loss": row["loss"], "validation loss": row["val_loss"]})
        seconds = round(time.monotonic() - self.began, 3)
        self.history.append({"epoch": epoch + 1} | row | {"seconds": seconds})
        with self._explained():
            if self.best_epoch == epoch and self.writes:
                with written_aside(self.folder / "best.keras") as aside:
                    self.whole.save(aside)
                write_json(self.history[-1], self.folder / "metrics.json")
            self._save()
            if self.writes:
                self._write_history()
        if self.done:
            self.model.stop_training = True

    def on_train_end(self, logs=None):
        if self.writes and self.history:
            figures = [key for key in self.history[0] if key not in ("epoch", "seconds")]
            curves = {key: [row[key] for row in self.history] for key in figures}
            history_picture(curves, self.folder / "history.png")

    def _check(self, losses: dict[str, float]) -> None:
        if all(np.isfinite(loss) for loss in losses.values()):
            return
        told = " and the ".join(f"{name} is {loss}" for name, loss in losses.items())
        half = self.settings.precision == "mixed_float16"
        raise FloatingPointError(
            f"the {told} in epoch {max(self.step - 1, 0) // self.steps + 1}. What was kept before stays in "
            f"{self.folder}. Lower train.learning_rate, "
            + ("take train.precision=mixed_bfloat16, " if half else "")
            + "or look at the images with `medattn check`"
        )

    def _save(self) -> None:
        state = {str(place): variable.numpy() for place, variable in enumerate(self._variables())}
        for variable, value in zip(self._variables(), state.values(), strict=True):
            if value.dtype.kind == "f" and not np.isfinite(value).all():
                self._check({f"weight {variable.path}": np.nan})
        if not self.writes:
            return
        if self.step % self.steps:
            seconds = time.monotonic() - self.began
            state |= {"step": np.array(self.step), "seconds": np.array(seconds)}
        folder = self.folder / "checkpoint"
        folder.mkdir(exist_ok=True)
        write_json(self.history, folder / "history.json")
        with written_aside(folder / "state.npz") as aside, open(aside, "wb") as file:
            np.savez(file, epochs=len(self.history), **state)  # type: ignore[arg-type]
            file.flush()
            os.fsync(file.fileno())  # on the disk before it takes the other's name: power may fail

    def _write_history(self) -> None:
        with written_aside(self.folder / "history.csv") as aside, open(aside, "w", newline="") as file:
            writer = csv.DictWriter(file, list(self.history[0]))
            writer.writeheader()
            writer.writerows(self.history)

    def _assign(self, state: dict[str, np.ndarray]) -> None:
        for place, variable in enumerate(self._variables()):
            variable.assign(state[str(place)])

    def _variables(self) -> list[Any]:
        """All that a run's future depends on; within an epoch its metrics, too."""
        within = self.model.metrics_variables if self.step % self.steps else []
        return [*self.model.variables, *self.model.optimizer.variables, *within]

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(
                f"{self.folder}: the checkpoint of step {self.step} cannot be written "
                f"({error.strerror or error}). The one before is whole: see to the disk, then --resume"
            ) from error

"""What is told of an epoch: the validation figures and the progress line."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable

import keras
import numpy as np
from scipy.special import log_softmax

from keras_medattn.metrics import scores
from keras_medattn.train.checkpoint import Keeper

_CLEAR = "\r\x1b[K"  # to the beginning of a terminal's line, and nothing in it


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


class Line(keras.callbacks.Callback):
    """Prints one line an epoch: figures, seconds, and the time that is left at most.

    Within a long epoch, too: where it stands, the loss so far and the best watched figure. A terminal shows
    that in one line, rewritten; a file gets a line a minute.

    Args:
        keeper: knows the steps and the best epoch so far; it must come before.
        epochs: of the run.
        name: begins each line.
        write: prints a line.
        pause: seconds between two lines of an epoch; by default half a one on a terminal, else 60.
    """

    def __init__(
        self, keeper: Keeper, epochs: int, name: str, write: Callable[[str], None], pause: float | None = None
    ):
        super().__init__()
        self.keeper, self.epochs, self.name, self.write = keeper, epochs, name, write
        self.terminal = write is print and sys.stdout.isatty()
        self.pause = (0.5 if self.terminal else 60.0) if pause is None else pause

    def on_epoch_begin(self, epoch, logs=None):
        self.head = f"{self.name}epoch {epoch + 1:>3}/{self.epochs}"
        self.left, self.first = self.epochs - epoch - 1, 0

    def on_train_batch_end(self, batch, logs=None):
        now, step, steps = time.monotonic(), self.keeper.step, self.keeper.steps
        if not self.first:  # the first step of all takes longer than others
            self.first, self.began, self.last = step, now, now
            return
        if now - self.last < self.pause:
            return
        self.last = now
        done, loss = (step - 1) % steps + 1, (logs or {}).get("loss", np.nan)
        a_step, history = (now - self.began) / (step - self.first), self.keeper.history
        left = (steps - done) * a_step + self.left * (history[-1]["seconds"] if history else steps * a_step)
        self._show(f"{self.head}  {done}/{steps} steps  loss {loss:.4f}{self._best()}  {_time(left)}")

    def on_epoch_end(self, epoch, logs=None):
        seconds = self.keeper.history[-1]["seconds"]
        figures = "  ".join(f"{key} {value:.4f}" for key, value in (logs or {}).items())
        if self.terminal:
            print(_CLEAR, end="")
        self.write(f"{self.head}  {figures}  {seconds:.1f} s, {_time(self.left * seconds)}")

    def _best(self) -> str:
        monitor, history = self.keeper.settings.monitor, self.keeper.history
        if monitor == "epoch" or not history:
            return ""
        best = self.keeper.best_epoch
        return f"  best {monitor} {history[best][monitor]:.4f} in epoch {best + 1}"

    def _show(self, text: str) -> None:
        if self.terminal:
            print(_CLEAR + text[: shutil.get_terminal_size().columns - 1], end="", flush=True)
        else:
            self.write(text)


def _time(seconds: float) -> str:
    amount = f"{seconds:.0f} s" if seconds < 300 else f"{seconds / 60:.0f} min"
    return f"at most {amount if seconds < 18000 else f'{seconds / 3600:.1f} h'} left"


def _figures(labels: np.ndarray, log_probabilities: np.ndarray) -> dict[str, float]:
    if np.isfinite(log_probabilities[np.arange(len(labels)), labels]).all():
        return scores(labels, np.exp(log_probabilities))
    return dict.fromkeys(("accuracy", "auroc"), np.nan)

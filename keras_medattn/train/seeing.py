"""What is shown of a training, where it is asked for: maps in TensorBoard, figures in MLflow or W&B."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_medattn.explain import heatmaps, overlays

LOGS = ("mlflow", "wandb")
_PROJECT = "keras_medattn"


class Maps(keras.callbacks.Callback):
    """Shows a few images in TensorBoard after each epoch, each beside what argues for its predicted class.

    The map is the model's own attention where it has one, else the gradient-times-input heatmap; see
    `explain.heatmaps.evidence`.

    Args:
        whole: the system; what is fitted may be a part of it.
        images: `(N, H, W, 3)` uint8, the same ones each epoch.
        folder: TensorBoard's. The pictures are of patients: keep it as the images.
    """

    def __init__(self, whole: Any, images: np.ndarray, folder: Path):
        super().__init__()
        self.whole, self.images = whole, images
        self.writer = tf.summary.create_file_writer(str(folder / "maps"))

    def on_epoch_end(self, epoch, logs=None):
        found = heatmaps.evidence(self.whole, tf.constant(self.images))
        heats = heatmaps.attention(found["contributions"]).numpy()
        drawn = [overlays.overlay(*pair) for pair in zip(self.images, heats, strict=True)]
        pairs = np.concatenate([self.images, np.stack(drawn)], axis=2)  # (N, H, 2 W, 3)
        with self.writer.as_default():
            tf.summary.image("validation images, attention", pairs, step=epoch, max_outputs=len(pairs))
        self.writer.flush()


def shown(labels: np.ndarray, count: int) -> np.ndarray:
    """Places of at most `count` images, of all classes in turn.

    Example:
        >>> shown(np.array([0, 0, 0, 1]), 3).tolist()
        [0, 3, 1]
    """
    turns = [np.flatnonzero(labels == one) for one in np.unique(labels)]
    longest = max(map(len, turns), default=0)
    order = [turn[round_] for round_ in range(longest) for turn in turns if round_ < len(turn)]
    return np.array(order[:count], int)


class WeightsAndBiases(keras.callbacks.Callback):
    """Sends each epoch's figures to the open W&B run. W&B's own callback fails on a `MultiOptimizer`."""

    def __init__(self, run: Any):
        super().__init__()
        self.run = run

    def on_epoch_end(self, epoch, logs=None):
        self.run.log({"epoch": epoch + 1} | {key: float(value) for key, value in (logs or {}).items()})


def check(to: str | None) -> None:
    """Refuse a tracker that is none, or whose package is not installed, with what to do."""
    if to is not None and to not in LOGS:
        raise ValueError(f"log must be one of {', '.join(LOGS)}. Received: {to!r}")
    if to is not None and importlib.util.find_spec(to) is None:
        raise ValueError(f'logging to {to} needs its package: pip install "keras-medattn[{to}]"')


@contextmanager
def logged(
    to: str | None, name: str, settings: dict[str, Any], folder: Path, write: Callable[[str], None]
) -> Iterator[list[keras.callbacks.Callback]]:
    """Callbacks that send the settings and each epoch's figures of one model to a tracker, while it is open.

    Where it goes is the tracker's own matter: `MLFLOW_TRACKING_URI`, `WANDB_MODE` and the like. Images, their
    names and the command line are not sent.

    Args:
        to: `"mlflow"`, `"wandb"`, or None: no callbacks.
        name: of the run.
        settings: of the recipe.
        folder: of the model: W&B keeps its files in it.
        write: prints the warning.

    Raises:
        ValueError: as `check`.
    """
    if to is None:
        yield []
        return
    check(to)
    flat = {
        f"{part}.{key}": one for part in ("data", "model", "train") for key, one in settings[part].items()
    }
    flat["augment"] = settings["augment"]
    write(
        f"warning: the settings, the figures and the name {name!r} go to {to}. Paths among the settings, and "
        "folders named after patients, go with them"
    )
    if to == "mlflow":
        import mlflow
        from mlflow.keras import MlflowCallback

        mlflow.set_experiment(_PROJECT)
        with mlflow.start_run(run_name=name):
            mlflow.log_params(flat)
            yield [MlflowCallback()]
        return
    import wandb

    quiet = wandb.Settings(
        x_disable_meta=True,
        disable_git=True,
        save_code=False,
        console="off",
        silent=not os.environ.get("WANDB_DEBUG"),
    )
    run = wandb.init(project=_PROJECT, name=name, config=flat, dir=str(folder), settings=quiet)
    try:
        yield [WeightsAndBiases(run)]
    finally:
        run.finish()

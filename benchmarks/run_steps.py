"""Seconds a training step and an answer of trained runs side by side, and the memory that a step takes.

Run from the project's folder: `python benchmarks/run_steps.py RUN RUN ... [--turns 7] [--batch N]`. Each
run's recipe is built anew and fed pixels drawn at random: what is timed is the model's work, without
reading images, and whole where the run itself went on from cached features. The steps take turns. Memory
is that of a first step above the model built, in a process of its own.
"""

import argparse
from pathlib import Path
from typing import Any

import measure  # first: it quietens TensorFlow
import numpy as np


def step(run: str, batch: int, training: bool) -> measure.Step:
    """A training step, or one answer to a batch of one image."""
    import keras
    import tensorflow as tf

    from keras_medattn.train import experiment, trainer
    from keras_medattn.train.optimizers import optimizer

    part = experiment.load(Path(run))[0]
    settings = part.recipe.train
    classes, size = len(part.manifest.class_names), part.recipe.data.image_size
    count = (batch or settings.batch_size) if training else 1
    rng = np.random.default_rng(0)
    images = tf.constant(rng.integers(0, 256, (count, *size, 3), "uint8"))
    model: Any = trainer.build(part.recipe, classes, [images.numpy()])
    if not training:
        answer = tf.function(lambda x: model(x, training=False), reduce_retracing=True)
        return lambda: answer(images).numpy()
    truth = tf.one_hot(np.arange(count) % classes, classes)
    loss = keras.losses.CategoricalCrossentropy(from_logits=True)
    model.compile(optimizer(settings, model, 100), loss, jit_compile=False)
    return lambda: model.train_on_batch(images, truth)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--batch", type=int, default=0, help="images a training step (default: the recipe's)")
    options = parser.parse_args()
    names = {Path(run).name: run for run in options.runs}
    rows: dict[str, list[Any]] = {name: [name] for name in names}
    for training in (True, False):
        steps = {name: step(run, options.batch, training) for name, run in names.items()}
        taken = measure.times(steps, options.turns)
        first = taken[next(iter(names))]
        for name, run in names.items():
            milliseconds, times = float(np.median(taken[name])), measure.ratio(taken[name], first)
            mebibytes = measure.memory(step, run, options.batch, training)
            rows[name] += [milliseconds / 1e3, times, mebibytes]
    columns = ["", "s a step", "x first", "MiB", "s an image", "x first", "MiB"]
    images = options.batch or "as many images as the recipe says"
    title = f"training steps of {images}, then answers to one, {options.turns} turns"
    measure.table(title, columns, list(rows.values()))


if __name__ == "__main__":
    main()

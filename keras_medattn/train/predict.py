"""What a run's model answers to images: class scores, drawn answers, and what an image costs."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import softmax

from keras_medattn.data import pipeline
from keras_medattn.data.manifest import Manifest
from keras_medattn.train import inputs
from keras_medattn.train.experiment import Part, RunError

_BATCH, _BATCH_PIXELS = 8, 2**23  # large images are predicted one by one: memory should not grow with both


@dataclass(frozen=True)
class Prediction:
    """Answers to some images.

    Attributes:
        scores: `(N, C)`, before the softmax.
        drawn: `(N, draws, C)`, those of drawn answers, of which there may be none.
        seconds: that the model takes for an image, once warm, in batches as they were predicted.
        reading: seconds that reading and resizing an image takes.
    """

    scores: np.ndarray
    drawn: np.ndarray
    seconds: float
    reading: float

    def probabilities(self, temperature: float = 1.0) -> np.ndarray:
        """Class probabilities `(N, C)`."""
        return softmax(self.scores / temperature, axis=-1)

    def monte_carlo(self, temperature: float = 1.0) -> np.ndarray:
        """The mean softmax `(N, C)` over drawn answers."""
        return softmax(self.drawn / temperature, axis=-1).mean(axis=1)


def predict(
    part: Part, manifest: Manifest, progress: inputs.Progress = lambda items, *_: items
) -> np.ndarray:
    """Class probabilities `(N, C)` of images by a run's model, at temperature 1."""
    return predictions(part, manifest, 0, progress).probabilities()


def predict_parts(
    parts: Sequence[Part],
    chosen: Sequence[Manifest],
    cache: Path | str | None,
    draws: int,
    progress: inputs.Progress,
) -> list[Prediction]:
    """The answers of a run's models, each to its own images; `cache` and `draws` as in `evaluate`.

    Raises:
        RunError: as `predictions` and `predictions_on_features`.
    """
    table = parts[0].manifest
    images = None if cache is None or draws else inputs.images(parts[0].recipe, table, progress, Path(cache))
    found = []
    for part, own in zip(parts, chosen, strict=True):
        if images is None or cache is None or set(own.names) - set(table.names):
            found.append(predictions(part, own, draws, progress))
        else:
            found.append(predictions_on_features(part, own, images, Path(cache), progress))
    return found


def predictions(part: Part, manifest: Manifest, draws: int, progress: inputs.Progress) -> Prediction:
    """The answers of a run's model, and with `draws` the Monte-Carlo ones beside them.

    Raises:
        RunError: the model draws nothing.
    """
    import tensorflow as tf

    data, model, name = part.recipe.data, part.model(), part.folder.name
    if draws and not hasattr(model, "sample"):
        raise RunError(f"{part.folder}: a {type(model).__name__} draws nothing, so leave --draws out")
    fetch = inputs.streamed(data, manifest)
    pixels = data.image_size[0] * data.image_size[1] * (data.central or 16 if data.slices else 1)
    size = max(1, min(_BATCH, _BATCH_PIXELS // pixels))
    over = functools.partial(_over_batches, fetch=fetch, count=len(manifest), size=size, progress=progress)
    # a partial: of a lambda TensorFlow adds up the traces of all models, and warns where images are few
    forward = tf.function(functools.partial(model, training=False), reduce_retracing=True)
    scores = over(lambda batch, _: forward(batch), text=f"predicting, {name}")
    cost = _cost(forward, fetch, len(manifest), size)
    if not draws:
        return Prediction(scores, _no_draws(scores), *cost)
    sample = tf.function(functools.partial(model.sample, draws=draws))
    drawn = over(lambda batch, number: sample(batch, seed=tf.constant(number)), text=f"{draws} draws, {name}")
    return Prediction(scores, drawn, *cost)


def predictions_on_features(
    part: Part, manifest: Manifest, images: pipeline.Fetch, cache: Path, progress: inputs.Progress
) -> Prediction:
    """As `predictions`, from the cached features of the model's frozen layers, which cost nothing here."""
    import tensorflow as tf

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
    forward = tf.function(functools.partial(tail, training=False), reduce_retracing=True)
    scores = _over_batches(
        lambda batch, _: forward(batch),
        lambda rows, _: features[places[rows]],
        len(manifest),
        _BATCH,
        progress,
        f"predicting, {part.folder.name}",
    )
    return Prediction(scores, _no_draws(scores), np.nan, np.nan)


def _no_draws(scores: np.ndarray) -> np.ndarray:
    return np.empty((len(scores), 0, scores.shape[1]))


def _over_batches(
    function: Callable[[Any, int], Any], fetch: pipeline.Fetch, count: int, size: int, progress, text: str
) -> np.ndarray:
    data = progress(pipeline.batches(fetch, count, size), -(-count // size), text)
    answers = [function(batch, number).numpy() for number, batch in enumerate(data)]
    return np.concatenate(answers).astype(np.float64)


def _cost(forward: Callable[[Any], Any], fetch: pipeline.Fetch, count: int, size: int) -> tuple[float, float]:
    """Seconds an image, of the model and of reading: of the first batch once more, now that it is warm."""
    rows = np.arange(min(size, count))
    began = time.perf_counter()
    fetch(rows, 0)
    reading = time.perf_counter() - began
    [batch] = pipeline.batches(fetch, len(rows), size)
    began = time.perf_counter()
    forward(batch).numpy()
    return (time.perf_counter() - began) / len(rows), reading / len(rows)

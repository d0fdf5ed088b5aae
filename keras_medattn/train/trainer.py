"""One run: build the model, freeze what the recipe freezes, fit the rest, keep the best."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_medattn import models
from keras_medattn.data import augment, pipeline
from keras_medattn.data.manifest import Manifest
from keras_medattn.models.precision import precision
from keras_medattn.train import inputs, loop, seeing
from keras_medattn.train import strategy as strategies
from keras_medattn.train.callbacks import Line, Validate, Watch
from keras_medattn.train.checkpoint import Keeper
from keras_medattn.train.fitted import backbones_of, fitted_itself, fitted_part, freeze, parts, saver
from keras_medattn.train.optimizers import optimizer, penalise
from keras_medattn.train.recipe import Recipe, RecipeError


@dataclass(frozen=True)
class Feed:
    """What is fitted on: what training draws, what validation reads, and the augmentation of the former."""

    drawn: pipeline.Fetch
    plain: pipeline.Fetch
    change: pipeline.Augment | None


def build(recipe: Recipe, num_classes: int, seen: Iterable[np.ndarray] | None = None) -> keras.Model:
    """Build the recipe's model and freeze what it freezes; its weights are a function of the seed.

    Args:
        recipe: the settings.
        num_classes: that the data have.
        seen: batches of the training images, for a system that is made from them; None: such a system is
            checked and left unbuilt.

    Raises:
        RecipeError: the recipe freezes or caches what this system cannot, or ends before its answer learns.
    """
    keras.utils.set_random_seed(recipe.train.seed)
    settings = {key: value for key, value in recipe.model.items() if key != "system"}
    with precision(recipe.train.precision):
        model = models.system(recipe.model["system"])(num_classes, **settings)
    freeze(model, recipe.train.frozen_stride)
    _check(recipe, model)
    if seen is not None and hasattr(model, "adapt"):
        model.adapt(seen)
    if seen is not None or not hasattr(model, "adapt"):
        model.build((None, *recipe.data.image_size, 3))
    return model


def _check(recipe: Recipe, model: keras.Model) -> None:
    train, name = recipe.train, type(model).__name__
    ready = getattr(model, "ready_epoch", 0)
    if train.epochs <= ready:
        raise RecipeError(
            f"train.epochs must be above {ready}: before that, the answer of this {name} does not learn. "
            f"Received: {train.epochs}"
        )
    moving = sorted({str(one["layer"]) for one in recipe.augment} & (augment.MOVING | augment.MIXING))
    if moving and getattr(model, "aligned", False):
        raise RecipeError(
            f"augment: {', '.join(moving)} must be left out: {name} has a mask, made of images as they lie "
            f"on each other, under which they may be neither moved nor mixed. Received: {moving}"
        )
    if not train.cached_views:
        return
    if hasattr(model, "settled_epoch"):
        moves = any(one.trainable_variables for one in backbones_of(model))
        if moves or train.cached_views > 1:
            raise RecipeError(
                f"train.cached_views of {name} must be 0; or 1, where train.frozen_stride freezes the whole "
                f"backbone. Received: {train.cached_views}, with frozen_stride={train.frozen_stride}"
            )
    elif fitted_itself(model) or getattr(model, "pyramid", False):
        raise RecipeError(
            f"train.cached_views must be 0: {name} reads the image itself, so its frozen layers have no "
            f"features that stay. train.frozen_stride works without. Received: {train.cached_views}"
        )


def fit(
    recipe: Recipe,
    manifest: Manifest,
    images: pipeline.Fetch,
    folder: Path,
    cache: Path,
    progress: inputs.Progress,
    write: Callable[[str], None],
    name: str = "",
    save_every: int = 0,
    strategy: tf.distribute.Strategy | None = None,
    further: Sequence[keras.callbacks.Callback] = (),
) -> None:
    """Train one model on the manifest's `train` side and keep its best epoch in `folder/best.keras`.

    A folder with a checkpoint goes on from it.

    Args:
        recipe: the settings.
        manifest: all images, each with its side.
        images: fetches them by their places in the manifest.
        folder: of the run; it exists.
        cache: where features of frozen layers are kept.
        progress: wraps long loops.
        write: prints a line.
        name: begins each line.
        save_every: steps between two checkpoints within epochs; 0: after each epoch alone.
        strategy: from `strategy.get`; None: one device.
        further: callbacks that come last.
    """
    train, val, test = (
        [i for i, side in enumerate(manifest.splits or ()) if side == want]
        for want in ("train", "val", "test")
    )
    settings, size = recipe.train, recipe.data.image_size
    seen = pipeline.batches(_subset(images, train), len(train), settings.batch_size).as_numpy_iterator()
    if strategy:
        loop.check(strategy, recipe, len(train))
    with strategies.scope(strategy):
        model = build(recipe, len(manifest.class_names), seen)
    slices = recipe.data.slices
    drawn = pipeline.drawn_slices(images, slices, settings.seed) if slices else images
    feed, stem, rest, settled = Feed(drawn, images, augment.augmenter(recipe.augment)), None, None, None
    if settings.cached_views:
        settled = getattr(model, "settled_epoch", None)
    if settings.cached_views and settled is None:
        stem, rest = parts(model, settings.frozen_stride)
        with strategies.chief_first():
            views = inputs.cached_features(stem, images, len(manifest), recipe, cache, progress)
        drawn = inputs.one_view_an_epoch(views, settings.seed)
        feed = Feed(drawn, inputs.one_view_an_epoch(views[:1], 0), None)
    fitted = model if slices else fitted_part(model, stem, rest, size)
    steps = pipeline.steps_an_epoch(len(train), settings.batch_size)
    with strategies.scope(strategy):
        penalise(fitted, settings.l2)
        fitted.compile(
            optimizer(settings, model, steps),
            keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=settings.label_smoothing),
            jit_compile=False,  # type: ignore[arg-type]
        )
        fitted.optimizer.build(fitted.trainable_variables)
    ready = getattr(model, "ready_epoch", 0)
    chief = strategies.chief()
    keeper = Keeper(saver(model, fitted, size), folder, settings, steps, ready, save_every, chief)
    keeper.set_model(fitted)
    start = keeper.restore()
    if strategies.mean(start) != start:
        raise ValueError(f"{folder}: not the same on all workers. Put the run where all of them see it")

    labels, classes = manifest.labels, len(manifest.class_names)
    forward = tf.function(lambda x: fitted(x, training=False), reduce_retracing=True)

    def watch(kind: type[Watch], rows: list[int]) -> Watch:
        batches = pipeline.batches(_subset(feed.plain, rows), len(rows), settings.batch_size)
        return kind(lambda: np.concatenate([forward(batch).numpy() for batch in batches]), labels[rows])

    if settings.show_images and chief:
        rows = np.asarray(val)[seeing.shown(labels[val], settings.show_images)]
        further = [*further, seeing.Maps(model, images(rows, 0), folder / "tensorboard")]
    turn = settings.epochs if settled is None else min(settled, settings.epochs)
    for part in _stretches(start, steps, (turn, settings.epochs)):
        if keeper.done:
            break
        if part.start >= turn * steps:
            maps = _settled(model, images, len(manifest), progress, name)
            feed = Feed(maps, maps, None)

        def batches(shards: pipeline.Shards = (0, 1, 1), feed=feed, part=part) -> tf.data.Dataset:
            data = pipeline.training_batches(
                _subset(feed.drawn, train),
                labels[train],
                settings.batch_size,
                settings.seed,
                part,
                feed.change,
                settings.balance,
                augment.mixer(recipe.augment, classes),
                shards,
            )
            if not settings.class_weights:
                return data
            weights = tf.constant(_class_weights(labels[train], classes), tf.float32)
            return data.map(lambda x, y: (x, y, tf.linalg.matvec(y, weights)))  # of mixed labels, by shares

        epochs, some = range(part.start // steps, part.stop // steps), min(len(part), steps)
        calls = [watch(Validate, val), keeper]
        if settings.watch_test and test:
            calls.insert(1, watch(Watch, test))
        if chief:
            logs = keras.callbacks.TensorBoard(
                str(folder / "tensorboard"), write_graph=False, profile_batch=0
            )
            calls += [Line(keeper, settings.epochs, name, write), logs, *further]
        if strategy:
            loop.fit(fitted, batches, epochs, some, calls)
            continue
        fitted.fit(
            batches(),
            initial_epoch=epochs.start,
            epochs=epochs.stop,
            steps_per_epoch=some,
            shuffle=False,  # the batches come in their own order
            verbose=0,  # type: ignore[arg-type]
            callbacks=calls,
        )


def _stretches(start: int, steps: int, turns: tuple[int, ...]) -> list[range]:
    """The steps to do from `start` on, cut at the end of an epoch that was broken off, and of each turn.

    Each is of whole epochs, or of the rest of one; it ends with an epoch.
    """
    ends = {-(-start // steps) * steps, *(epoch * steps for epoch in turns)}
    marks = [start, *sorted(end for end in ends if end > start)]
    return [range(*pair) for pair in pairwise(marks)]


def _settled(model, images: pipeline.Fetch, count: int, progress: inputs.Progress, name: str) -> Any:
    """What a model with a settled mask and a frozen backbone goes on from, in memory."""
    forward = tf.function(lambda batch: model.features(batch, training=False), reduce_retracing=True)
    batches = progress(pipeline.batches(images, count, 8), -(-count // 8), f"{name}settled features")
    maps = np.concatenate([forward(batch).numpy() for batch in batches])
    return lambda rows, epoch: {"maps": maps[rows]}


def _subset(fetch: pipeline.Fetch, places: list[int]) -> pipeline.Fetch:
    chosen = np.asarray(places)
    return lambda rows, epoch: fetch(chosen[rows], epoch)


def _class_weights(labels: np.ndarray, classes: int) -> np.ndarray:
    return len(labels) / (classes * np.maximum(1, np.bincount(labels, minlength=classes)))

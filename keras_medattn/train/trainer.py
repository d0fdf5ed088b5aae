"""One run: build the model, freeze what the recipe freezes, fit the rest, keep the best."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from keras_medattn import models
from keras_medattn.data import augment, pipeline
from keras_medattn.data.manifest import Manifest
from keras_medattn.train import inputs
from keras_medattn.train.callbacks import Keeper, Line, Validate, Watch
from keras_medattn.train.fitted import fitted_itself, fitted_part, freeze, parts, saver
from keras_medattn.train.optimizers import optimizer, penalise
from keras_medattn.train.recipe import Recipe, RecipeError


def build(recipe: Recipe, num_classes: int, seen: Iterable[np.ndarray] | None = None) -> keras.Model:
    """Build the recipe's model and freeze what it freezes; its weights are a function of the seed.

    Args:
        recipe: the settings.
        num_classes: that the data have.
        seen: batches of the training images, for a system that is made from them; None: two black ones
            stand in, to see whether such a model can be built at all.

    Raises:
        RecipeError: the recipe freezes or caches what this system cannot, or ends before its answer learns.
    """
    keras.utils.set_random_seed(recipe.train.seed)
    settings = {key: value for key, value in recipe.model.items() if key != "system"}
    model = models.system(recipe.model["system"])(num_classes, **settings)
    if hasattr(model, "adapt"):
        model.adapt([np.zeros((2, *recipe.data.image_size, 3), np.uint8)] if seen is None else seen)
    model.build((None, *recipe.data.image_size, 3))
    train, name = recipe.train, recipe.model["system"]
    freeze(model, train.frozen_stride)
    if train.cached_views and fitted_itself(model):
        raise RecipeError(
            f"train.cached_views must be 0: {name} reads the image itself, so its frozen layers have no "
            f"features that stay. train.frozen_stride works without. Received: {train.cached_views}"
        )
    ready = getattr(model, "ready_epoch", 0)
    if train.epochs <= ready:
        raise RecipeError(
            f"train.epochs must be above {ready}: before that, the answer of this {name} does not learn. "
            f"Received: {train.epochs}"
        )
    return model


def fit(
    recipe: Recipe,
    manifest: Manifest,
    images: pipeline.Fetch,
    folder: Path,
    cache: Path,
    progress: inputs.Progress,
    write: Callable[[str], None],
    name: str = "",
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
    """
    train, val, test = (
        [i for i, side in enumerate(manifest.splits or ()) if side == want]
        for want in ("train", "val", "test")
    )
    settings, size = recipe.train, recipe.data.image_size
    seen = pipeline.batches(_subset(images, train), len(train), settings.batch_size).as_numpy_iterator()
    model = build(recipe, len(manifest.class_names), seen)
    stem, rest = parts(model, settings.frozen_stride) if settings.cached_views else (None, None)
    if stem is None:
        change, drawn, plain = augment.augmenter(recipe.augment), images, images
    else:
        views = inputs.cached_features(stem, images, len(manifest), recipe, cache, progress)
        change, drawn = None, inputs.one_view_an_epoch(views, settings.seed)
        plain = inputs.one_view_an_epoch(views[:1], 0)
    fitted = fitted_part(model, stem, rest, size)
    steps = pipeline.steps_an_epoch(len(train), settings.batch_size)
    penalise(fitted, settings.l2)
    fitted.compile(
        optimizer(settings, model, steps),
        keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=settings.label_smoothing),
        jit_compile=False,  # type: ignore[arg-type]
    )
    fitted.optimizer.build(fitted.trainable_variables)
    keeper = Keeper(
        saver(model, size),
        folder,
        settings.monitor,
        settings.patience,
        settings.seed,
        getattr(model, "ready_epoch", 0),
    )
    keeper.set_model(fitted)
    start = keeper.restore()
    if start >= settings.epochs or keeper.done:
        return

    labels, classes = manifest.labels, len(manifest.class_names)
    data = pipeline.training_batches(
        _subset(drawn, train),
        labels[train],
        settings.batch_size,
        settings.seed,
        range(start, settings.epochs),
        change,
    ).map(lambda x, y: (x, tf.one_hot(y, classes)))
    forward = tf.function(lambda x: fitted(x, training=False), reduce_retracing=True)

    def watch(kind: type[Watch], rows: list[int]) -> Watch:
        batches = pipeline.batches(_subset(plain, rows), len(rows), settings.batch_size)
        return kind(lambda: np.concatenate([forward(batch).numpy() for batch in batches]), labels[rows])

    fitted.fit(
        data,
        initial_epoch=start,
        epochs=settings.epochs,
        steps_per_epoch=steps,
        class_weight=_class_weights(labels[train], classes) if settings.class_weights else None,
        shuffle=False,  # the batches come in their own order
        verbose=0,  # type: ignore[arg-type]
        callbacks=[
            watch(Validate, val),
            *([watch(Watch, test)] if settings.watch_test and test else []),
            keeper,
            Line(settings.epochs, name, write),
            keras.callbacks.TensorBoard(str(folder / "tensorboard"), write_graph=False, profile_batch=0),
        ],
    )


def _subset(fetch: pipeline.Fetch, places: list[int]) -> pipeline.Fetch:
    chosen = np.asarray(places)
    return lambda rows, epoch: fetch(chosen[rows], epoch)


def _class_weights(labels: np.ndarray, classes: int) -> dict[int, float]:
    counts = np.bincount(labels, minlength=classes)
    return {place: len(labels) / (classes * max(1, count)) for place, count in enumerate(counts)}

"""One run: build the model, freeze what the recipe freezes, fit the rest, keep the best."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from keras_medattn import models
from keras_medattn.data import augment, pipeline
from keras_medattn.data.manifest import Manifest
from keras_medattn.models import backbones
from keras_medattn.train import inputs
from keras_medattn.train.callbacks import Keeper, Line, Validate
from keras_medattn.train.recipe import Recipe, RecipeError


def build(recipe: Recipe, num_classes: int) -> keras.Model:
    """Build the recipe's model; its weights are a function of the seed.

    Raises:
        RecipeError: the recipe freezes or caches what this system cannot.
    """
    keras.utils.set_random_seed(recipe.train.seed)
    settings = {key: value for key, value in recipe.model.items() if key != "system"}
    model = models.system(recipe.model["system"])(num_classes, **settings)
    model.build((None, *recipe.data.image_size, 3))
    train, name = recipe.train, recipe.model["system"]
    if train.frozen_stride and not hasattr(model, "backbone"):
        raise RecipeError(
            f"train.frozen_stride must be 0: {name} has no backbone. Received: {train.frozen_stride}"
        )
    if train.cached_views and _has_own_loss(model):
        raise RecipeError(
            f"train.cached_views must be 0: {name} reads the image itself. Received: {train.cached_views}"
        )
    return model


def parts(model, frozen_stride: int) -> tuple[keras.Model | None, keras.Model | None]:
    """Freeze a model's backbone up to a stride.

    Returns:
        `stem`, the frozen layers, and `rest`, the backbone's others; either may be None.
    """
    if not frozen_stride:
        return None, getattr(model, "backbone", None)
    if frozen_stride >= model.stride:
        model.backbone.trainable = False
        return model.backbone, None
    stem, rest = backbones.split(model.backbone, frozen_stride)
    stem.trainable = False
    return stem, rest


def fitted_part(model, stem: keras.Model | None, rest: keras.Model | None, image_size) -> keras.Model:
    """What is compiled and fitted: the model from images on, or from a stem's maps on.

    It shares the model's weights; the model itself is not compiled, so that it is saved bare. A system with
    a loss of its own has no such part: it is fitted itself, and `Bare` saves it.
    """
    if _has_own_loss(model):
        return model
    if stem is None:
        images = keras.Input((*image_size, 3), name="images")
        return keras.Model(images, model.score(model.features(images)))
    maps = keras.Input(stem.compute_output_shape((None, *image_size, 3))[1:], name="maps")
    return keras.Model(maps, model.score(maps if rest is None else rest(maps)))


class Bare:
    """Saves a compiled model as if it were not: Keras does not save two optimizers of one model.

    Args:
        model: the system that is fitted.
    """

    def __init__(self, model: keras.Model, image_size):
        self.model = model
        self.twin = type(model).from_config(model.get_config())
        self.twin.build((None, *image_size, 3))

    def save(self, path: Path) -> None:
        """Write the model's weights, now, in a `.keras` file."""
        self.twin.set_weights(self.model.get_weights())
        self.twin.save(path)


def optimizer(recipe: Recipe, model, steps: int) -> keras.Optimizer:
    """AdamW with cosine decay; the backbone at its own share of the learning rate."""
    train = recipe.train

    def adamw(rate: float) -> keras.Optimizer:
        schedule = keras.optimizers.schedules.CosineDecay(rate, max(1, train.epochs * steps))
        one = keras.optimizers.AdamW(schedule, weight_decay=train.weight_decay)  # type: ignore[arg-type]
        one.exclude_from_weight_decay(var_names=["bias", "beta", "gamma", "sw", "logits"])
        return one

    top, below = adamw(train.learning_rate), adamw(train.learning_rate * train.backbone_rate)
    backbone = getattr(model, "backbone", None)
    own = set() if backbone is None else {id(variable) for variable in backbone.trainable_variables}
    if not own:
        return top
    # gradients scaled by a half would not do: Adam divides the factor out again
    return keras.optimizers.MultiOptimizer(lambda variable: below if id(variable) in own else top)


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
    train, val = (
        [i for i, side in enumerate(manifest.splits or ()) if side == want] for want in ("train", "val")
    )
    settings = recipe.train
    model = build(recipe, len(manifest.class_names))
    stem, rest = parts(model, settings.frozen_stride)
    if settings.cached_views and stem is not None:
        views = inputs.cached_features(stem, images, len(manifest), recipe, cache, progress)
        fitted, change = fitted_part(model, stem, rest, recipe.data.image_size), None
        drawn = inputs.one_view_an_epoch(views, settings.seed)
        plain = inputs.one_view_an_epoch(views[:1], 0)
    else:
        fitted = fitted_part(model, None, None, recipe.data.image_size)
        change, drawn, plain = augment.augmenter(recipe.augment), images, images

    steps = pipeline.steps_an_epoch(len(train), settings.batch_size)
    fitted.compile(
        optimizer(recipe, model, steps),
        keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=settings.label_smoothing),
        jit_compile=False,  # type: ignore[arg-type]
    )
    fitted.optimizer.build(fitted.trainable_variables)
    whole = Bare(model, recipe.data.image_size) if fitted is model else model
    keeper = Keeper(whole, folder, settings.monitor, settings.patience, settings.seed)
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
    held_out = pipeline.batches(_subset(plain, val), len(val), settings.batch_size)
    forward = tf.function(lambda x: fitted(x, training=False), reduce_retracing=True)
    fitted.fit(
        data,
        initial_epoch=start,
        epochs=settings.epochs,
        steps_per_epoch=steps,
        class_weight=_class_weights(labels[train], classes) if settings.class_weights else None,
        shuffle=False,  # the batches come in their own order
        verbose=0,  # type: ignore[arg-type]
        callbacks=[
            Validate(lambda: np.concatenate([forward(batch).numpy() for batch in held_out]), labels[val]),
            keeper,
            Line(settings.epochs, name, write),
            keras.callbacks.TensorBoard(str(folder / "tensorboard"), write_graph=False, profile_batch=0),
        ],
    )


def _has_own_loss(model: keras.Model) -> bool:
    return type(model).compute_loss is not keras.Model.compute_loss


def _subset(fetch: pipeline.Fetch, places: list[int]) -> pipeline.Fetch:
    chosen = np.asarray(places)
    return lambda rows, epoch: fetch(chosen[rows], epoch)


def _class_weights(labels: np.ndarray, classes: int) -> dict[int, float]:
    counts = np.bincount(labels, minlength=classes)
    return {place: len(labels) / (classes * max(1, count)) for place, count in enumerate(counts)}

"""What of a system is frozen, what of it is fitted, and how it is saved."""

from __future__ import annotations

from pathlib import Path

import keras
import numpy as np

from keras_medattn.models import backbones
from keras_medattn.train.recipe import RecipeError

_PROBE = 1024  # side of the image whose maps tell a backbone's stride


def backbones_of(model) -> list[keras.Model]:
    """The backbones of a system: its `backbones`, or its one `backbone`; it may have none."""
    one = getattr(model, "backbone", None)
    return list(getattr(model, "backbones", [] if one is None else [one]))


def freeze(model, stride: int) -> None:
    """Keep the weights of a system's backbones up to a stride, batch normalisation too; 0: of none.

    Raises:
        RecipeError: the system has no backbone, or something in it that is not trained yet would be frozen.
    """
    frozen = backbones_of(model) if stride else []
    if stride and not frozen:
        raise RecipeError(
            f"train.frozen_stride must be 0: {type(model).__name__} has no backbone. Received: {stride}"
        )
    before = 1
    for backbone in frozen:
        before = before if backbone.inputs[0].shape[-1] != 3 else 1  # one that reads maps follows the last
        if stride > before:
            _keep(model, _split(backbone, stride // before)[0], stride)
        before *= _stride(backbone)


def parts(model, frozen_stride: int) -> tuple[keras.Model | None, keras.Model | None]:
    """Freeze a model's only backbone up to a stride.

    Returns:
        `stem`, the frozen layers, and `rest`, the backbone's others; either may be None.
    """
    freeze(model, frozen_stride)
    if not frozen_stride:
        return None, getattr(model, "backbone", None)
    return _split(model.backbone, frozen_stride)


def fitted_itself(model) -> bool:
    """Whether a system must be fitted itself, since it has a loss or a `fit` of its own."""
    return any(
        getattr(type(model), name) is not getattr(keras.Model, name) for name in ("compute_loss", "fit")
    )


def fitted_part(model, stem: keras.Model | None, rest: keras.Model | None, image_size) -> keras.Model:
    """What is compiled and fitted: the model from images on, or from a stem's maps on.

    It shares the model's weights; the model itself is not compiled, so that it is saved bare. A system with
    a loss or a `fit` of its own has no such part: it is fitted itself.
    """
    if fitted_itself(model):
        return model
    if stem is None:
        images = keras.Input((*image_size, 3), name="images")
        return keras.Model(images, model(images))
    maps = keras.Input(stem.compute_output_shape((None, *image_size, 3))[1:], name="maps")
    return keras.Model(maps, model.score(maps if rest is None else rest(maps)))


def saver(model, fitted: keras.Model, image_size):
    """What writes a system into a `.keras` file, by `save(path)`: it itself, unless it is compiled."""
    if hasattr(model, "snapshot"):
        return Snapshot(model)
    return Bare(model, image_size) if fitted is model else model


class Snapshot:
    """Saves what a model's `snapshot()` answers: the model as it is now, without what only training needs."""

    def __init__(self, model):
        self.model, self.last = model, None

    def save(self, path: Path) -> None:
        """Write it in a `.keras` file."""
        self.last = self.model.snapshot(self.last)
        self.last.save(path)


class Bare:
    """Saves a compiled model as if it were not: Keras does not save two optimizers of one model.

    Args:
        model: the system that is fitted.
        image_size: rows and columns that it is built for.
    """

    def __init__(self, model: keras.Model, image_size):
        self.model = model
        self.twin = type(model).from_config(model.get_config())
        self.twin.build((None, *image_size, 3))

    def save(self, path: Path) -> None:
        """Write the model's weights, now, in a `.keras` file."""
        self.twin.set_weights(self.model.get_weights())
        self.twin.save(path)


def _keep(model, stem: keras.Model, stride: int) -> None:
    fresh = [one.name for one in stem.layers if backbones.is_own(one)]
    if fresh:
        raise RecipeError(
            f"train.frozen_stride must be less: {', '.join(fresh)} of {type(model).__name__} would be frozen "
            f"untrained. Received: {stride}"
        )
    stem.trainable = False


def _split(backbone: keras.Model, stride: int) -> tuple[keras.Model, keras.Model | None]:
    """The layers up to a stride, and the others; a module at the end of the last stride is one of these."""
    if stride >= _stride(backbone) and not backbones.is_own(backbone.operations[-1]):
        return backbone, None
    return backbones.split(backbone, stride)


def _stride(backbone: keras.Model) -> int:
    shape = backbone.compute_output_shape((1, _PROBE, _PROBE, backbone.inputs[0].shape[-1]))
    return 2 ** round(np.log2(_PROBE / shape[1])) if len(shape) == 4 else _PROBE

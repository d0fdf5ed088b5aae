"""Keras's augmentation layers, driven by a seed for each example or batch, not by a generator's state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_medattn.data.pipeline import Augment, Mix
from keras_medattn.data.stain import RandomStain

_OWN = {"RandomStain": RandomStain}
_REFUSED = {
    "AugMix": "draws from a state of its own, so a run could not be repeated",
    "RandAugment": "draws from a state of its own, so a run could not be repeated",
    "CenterCrop": "changes the size of the image",
    "RandomCrop": "changes the size of the image",
    "Resizing": "changes the size of the image",
    "MaxNumBoundingBoxes": "changes no pixels",
}

MOVING = {  # these move pixels to other places
    "RandomElasticTransform",
    "RandomFlip",
    "RandomPerspective",
    "RandomRotation",
    "RandomShear",
    "RandomTranslation",
    "RandomZoom",
}
MIXING = {"CutMix", "MixUp"}  # these mix the images of a batch, and their labels


class _Fixed(keras.random.SeedGenerator):
    """Answers draws from one seed pair, so that a transformation is a function of it."""

    def at(self, pair: tf.Tensor) -> _Fixed:
        """Begin again, at this seed pair."""
        self._pair, self._draws = pair, 0
        return self

    def next(self, ordered=True):
        self._draws += 1
        return self._pair + tf.constant([0, 7919], tf.int32) * self._draws


def layer(settings: dict[str, Any]) -> keras.Layer:
    """Build one augmentation layer, say `{"layer": "RandomFlip", "mode": "horizontal"}`.

    It is one of Keras's, or `RandomStain`.

    Raises:
        ValueError: for a name that is no image augmentation, or arguments that it refuses.

    Example:
        >>> layer({"layer": "RandomFlip", "mode": "horizontal"}).mode
        'horizontal'
    """
    settings = dict(settings)
    name = settings.pop("layer", None)
    kind = _OWN.get(str(name)) or getattr(keras.layers, str(name), None)
    if kind is None or not hasattr(kind, "get_random_transformation"):
        raise ValueError(
            f"augment: layer must name an image augmentation of keras.layers, such as RandomFlip, "
            f"RandomRotation, RandomBrightness, or be RandomStain. Received: {name!r}"
        )
    if name in _REFUSED:
        raise ValueError(f"augment: {name} {_REFUSED[name]}; leave it out. Received: {name!r}")
    try:
        return kind(**settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"augment: {name} refuses {settings} ({error})") from error


def augmenter(settings: Sequence[dict[str, Any]]) -> Augment | None:
    """Chain augmentation layers into a function of images and one seed pair an image.

    Args:
        settings: one table a layer, as in a recipe's `[[augment]]`; `mixer` makes those that mix a batch.

    Returns:
        `f(images (B, H, W, 3) in 0..255, seeds (B, 2) int32) -> images`, float32, clipped to 0..255; None
        where there are none.
    """
    layers = [layer(one) for one in settings if one.get("layer") not in MIXING]
    if not layers:
        return None
    generators = [_Fixed(0) for _ in layers]  # made here: they own a variable, which a graph may not make

    def one(pair):
        image, seed = pair[0][None], pair[1]  # some layers want a batch
        for place, (change, generator) in enumerate(zip(layers, generators, strict=True)):
            own = generator.at(seed + tf.constant([104729 * place, 0], tf.int32))
            drawn = change.get_random_transformation(image, training=True, seed=own)
            image = change.transform_images(image, drawn, training=True)
        return tf.clip_by_value(image[0], 0.0, 255.0)

    def augment(images, seeds):
        return tf.map_fn(one, (tf.cast(images, tf.float32), seeds), fn_output_signature=tf.float32)

    return augment


def mixer(settings: Sequence[dict[str, Any]], classes: int) -> Mix:
    """Chain the layers that mix a batch into a function of it and one seed pair; they come after all others.

    MixUp (Zhang et al., 2018): `x = w x_i + (1 - w) x_j` and `y = w y_i + (1 - w) y_j`, w from a Beta
    distribution; CutMix (Yun et al., 2019): a box of x_j in x_i, labels by its share of the area.

    Args:
        settings: as of `augmenter`.
        classes: how many there are.

    Returns:
        `f(images (B, H, W, 3), labels (B,) int, seed (2,) int32) -> images, labels (B, classes)`, float32.
        Without a layer that mixes: the images as they are, and one-hot labels.
    """
    layers = [(place, layer(one)) for place, one in enumerate(settings) if one.get("layer") in MIXING]
    generators = [_Fixed(0) for _ in layers]

    def mix(images, labels, seed):
        labels = tf.one_hot(labels, classes)
        for (place, change), generator in zip(layers, generators, strict=True):
            own = generator.at(seed + tf.constant([104729 * place, 0], tf.int32))
            drawn = change.get_random_transformation(images, training=True, seed=own)
            images = change.transform_images(images, drawn, training=True)
            labels = change.transform_labels(labels, drawn, training=True)
        return images, labels

    return mix

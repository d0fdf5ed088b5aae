"""Keras's augmentation layers, driven by a seed for each example instead of a generator's state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_medattn.data.pipeline import Augment
from keras_medattn.data.stain import RandomStain

_OWN = {"RandomStain": RandomStain}
_REFUSED = {
    "AugMix": "draws from a state of its own, so a run could not be repeated",
    "RandAugment": "draws from a state of its own, so a run could not be repeated",
    "CutMix": "mixes images and labels of a batch",
    "MixUp": "mixes images and labels of a batch",
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
        settings: one table a layer, as in a recipe's `[[augment]]`.

    Returns:
        `f(images (B, H, W, 3) in 0..255, seeds (B, 2) int32) -> images`, float32, clipped to 0..255; None for
        an empty list.
    """
    layers = [layer(one) for one in settings]
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

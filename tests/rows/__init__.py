"""What a row of the conformance table says of its layer, and small helpers to write one."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np

Inputs = tuple[Any, dict[str, Any]]  # the first argument of the call, and the named ones


def small_cnn(layer: keras.layers.Layer) -> keras.Model:
    """A convolution, the layer on its maps, average pooling and a dense head."""
    images = keras.Input((16, 20, 3))
    maps = keras.layers.Conv2D(8, 3, strides=2, padding="same", activation="relu")(images)
    pooled = keras.layers.GlobalAveragePooling2D()(layer(maps))
    return keras.Model([images], [keras.layers.Dense(3)(pooled)])


@dataclass(frozen=True)
class Row:
    """One layer: all arrays are NumPy, floats are float64 so that the reference gets them unrounded."""

    layer: type[keras.layers.Layer]
    arguments: dict[str, Any]
    examples: dict[str, Callable[[int], Inputs]]  # name -> batch size -> inputs
    equation: Callable[
        ..., list[np.ndarray]
    ]  # (weights, first argument, training=, named ones) -> flat outputs
    padded: Callable[[], tuple[Inputs, Inputs, Inputs]] | None = None  # unpadded, padded with NaN, all masked
    kept: Callable[[Any], list[np.ndarray]] = keras.tree.flatten  # the outputs that padding must not change
    vanishing: dict[str, str] = field(
        default_factory=dict
    )  # start of a weight's path -> why its gradient is 0
    network: Callable[[keras.layers.Layer], keras.Model] = small_cnn  # the layer in a small CNN
    ready: Callable[[keras.layers.Layer], Any] = lambda layer: None  # what a new layer needs before its call
    deployed: Callable[[keras.layers.Layer], Any] = lambda layer: None  # what it needs before it is saved
    skipped: dict[str, str] = field(
        default_factory=dict
    )  # a test's name, or `name[part of its id]` -> why it does not apply

    def make(self, **kwargs: Any) -> keras.layers.Layer:
        layer = self.layer(**self.arguments, name="layer", **kwargs)
        self.ready(layer)
        return layer


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    """Normal numbers that float32 holds exactly, so that every precision starts from the same ones."""
    return np.random.default_rng(seed).normal(size=shape).astype("float32").astype("float64")

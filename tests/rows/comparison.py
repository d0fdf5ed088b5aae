"""The papers' comparison modules."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import reference.comparison

from keras_medattn import layers
from rows import Inputs, Row, normal

NO_MASK = dict.fromkeys(
    ("test_padding_changes_nothing_and_is_not_read", "test_all_masked_stays_finite"),
    "it takes maps of one size, without a mask",
)
NO_WEIGHTS = dict.fromkeys(
    ("test_gradients_reach_every_weight_but_those_listed", "test_training_lowers_a_loss"), "it has no weights"
)
_RESIDUAL = {"units": (0, 1, 1), "depth": 1}


def _maps(batch: int) -> Inputs:
    return normal(batch, 5, 6, 4), {}


def _maps_and_vectors(batch: int) -> Inputs:
    return [normal(batch, 5, 6, 4), normal(batch, 7, seed=1)], {}


def _features(function: Callable[..., dict]) -> Callable[..., list[np.ndarray]]:
    return lambda weights, x, training: [function(weights, x)["features"]]


def _attention_gate(weights: dict, inputs: list, training: bool) -> list[np.ndarray]:
    return [reference.comparison.attention_gate(weights, *inputs)["features"]]


def _residual_attention(weights: dict, x: np.ndarray, training: bool) -> list[np.ndarray]:
    return [reference.comparison.residual_attention(weights, x, training, **_RESIDUAL)["features"]]


def _gate_network(layer: keras.layers.Layer) -> keras.Model:
    """The gate on an early layer's maps, with the pooled last ones as the global vector."""
    images = keras.Input((16, 20, 3))
    early = keras.layers.Conv2D(8, 3, strides=2, padding="same", activation="relu")(images)
    late = keras.layers.Conv2D(7, 3, strides=2, padding="same", activation="relu")(early)
    vector = keras.layers.GlobalAveragePooling2D()(late)
    return keras.Model([images], [keras.layers.Dense(3)(layer([early, vector]))])


def _weighted_images(layer: keras.layers.Layer) -> keras.Model:
    images = keras.Input((5, 6, 4))
    maps = keras.layers.Conv2D(8, 3, padding="same", activation="relu")(layer(images))
    pooled = keras.layers.GlobalAveragePooling2D()(maps)
    return keras.Model([images], [keras.layers.Dense(3)(pooled)])


def _row(
    layer: type[keras.layers.Layer], arguments: dict[str, Any], function: Callable[..., dict], **fields: Any
) -> Row:
    """A layer of maps alone, without a mask."""
    fields = {"skipped": NO_MASK} | fields
    return Row(layer, arguments, {"maps": _maps}, _features(function), **fields)


ROWS = [
    _row(layers.NonLocal, {"ratio": 2}, reference.comparison.non_local),
    _row(
        layers.ChannelSelfAttention,
        {"form": "trilinear"},
        reference.comparison.trilinear,
        skipped=NO_MASK | NO_WEIGHTS,
    ),
    _row(layers.DualAttention, {"ratio": 2}, reference.comparison.dual_attention),
    _row(layers.SqueezeExcite, {"ratio": 2}, reference.comparison.squeeze_excite),
    _row(layers.GlobalContext, {"ratio": 2}, reference.comparison.global_context),
    Row(
        layers.AttentionGate,
        {"compatibility": "dot"},
        {"maps and vectors": _maps_and_vectors},
        _attention_gate,
        network=_gate_network,
        skipped=NO_MASK,
    ),
    Row(
        layers.ResidualAttention,
        _RESIDUAL,
        {"maps": lambda batch: (normal(batch, 5, 6, 8), {})},
        _residual_attention,
        skipped=NO_MASK,
    ),
    _row(
        layers.PixelWeights,
        {"l1": 0.5},
        reference.comparison.pixel_weights,
        ready=lambda layer: layer.build((None, 5, 6, 4)),  # a weight for each pixel: the size is fixed
        network=_weighted_images,
    ),
]

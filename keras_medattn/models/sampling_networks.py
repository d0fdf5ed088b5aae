"""The two small networks of attention sampling (Sinigaglia)."""

from __future__ import annotations

from typing import Any

import keras

from keras_medattn.ops.patches import masked_softmax

ops: Any = keras.ops  # a type checker would infer its types from one backend

_WIDTH, _DEPTH = 8, 3


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

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.convolutions = [_convolution(_WIDTH, f"conv_{index}") for index in range(_DEPTH)]
        self.normalizations = [keras.layers.BatchNormalization(name=f"bn_{index}") for index in range(_DEPTH)]
        self.logits = keras.layers.Conv2D(1, 3, padding="same", name="logits")

    def build(self, input_shape):
        channels = input_shape[-1]
        for convolution, normalization in zip(self.convolutions, self.normalizations, strict=True):
            convolution.build((None, None, None, channels))
            channels = _WIDTH
            normalization.build((None, None, None, channels))
        self.logits.build((None, None, None, channels))
        self.built = True

    def call(self, overview, mask=None, training=None):
        x = _inside(overview, mask)
        for convolution, normalization in zip(self.convolutions, self.normalizations, strict=True):
            x = _inside(normalization(convolution(x), training=training, mask=mask), mask)
        return masked_softmax(ops.squeeze(self.logits(x), -1), mask)

    def compute_output_shape(self, input_shape):
        return input_shape[:-1]

    def compute_mask(self, inputs, previous_mask=None):
        return None  # the map itself is 0 where the mask is false


def attention_network(channels: int = 3) -> AttentionNetwork:
    """Make the attention network; for three channels it has exactly 1,513 trainable parameters.

    Args:
        channels: of the overview.

    Example:
        >>> sum(weight.value.numpy().size for weight in attention_network().trainable_weights)
        1513
    """
    network = AttentionNetwork(name="attention_network")
    network.build((None, None, None, channels))
    return network


def feature_network(num_classes: int = 3, channels: int = 3) -> keras.Sequential:
    """Make the feature network; for three classes and channels it has exactly 7,459 parameters.

    Four 3 x 3 convolutions to 16 channels with leaky ReLU (slope 0.2) and same padding, the maximum over the
    patch, a dense layer, L2 normalisation: `f = z / |z|`, `z = W max_p x_4(p) + b` (Sinigaglia, section VI.C,
    where the "global max pooling" is explained as an average; the author's notebook takes the maximum).

    Args:
        num_classes: scores to answer, of unit norm together.
        channels: of the patches.

    Example:
        >>> feature_network().count_params()
        7459
    """
    layers = [
        keras.Input((None, None, channels)),
        *[_convolution(16, f"conv_{index}") for index in range(4)],
        keras.layers.GlobalMaxPooling2D(name="pool"),
        keras.layers.Dense(num_classes, name="head"),
        keras.layers.UnitNormalization(name="normalise"),
    ]
    return keras.Sequential(layers, name="feature_network")


def _convolution(channels: int, name: str) -> keras.layers.Conv2D:
    return keras.layers.Conv2D(channels, 3, padding="same", activation="leaky_relu", name=name)


def _inside(x: Any, mask: Any) -> Any:
    """Zero outside of the image, as the convolutions pad."""
    return x if mask is None else ops.where(ops.expand_dims(mask, -1), x, 0)

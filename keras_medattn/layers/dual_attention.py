"""Attention among positions and attention among channels, summed."""

from typing import Any

import keras

from keras_medattn.layers.channel_self_attention import ChannelSelfAttention
from keras_medattn.ops.attention import spatial_attention, spatial_scores
from keras_medattn.ops.comparison import channel_mean, flatten, reduced

ops: Any = keras.ops  # a type checker would infer its types from one backend


@keras.saving.register_keras_serializable("keras_medattn")
class DualAttention(keras.layers.Layer):
    """Dual attention of DANet: position attention and channel attention side by side.

    `X' = P + Q` with `P_i = X_i + alpha sum_j softmax_j(<W_q X_i, W_k X_j>) W_v X_j` over the positions and
    `Q = X + beta softmax(max(X X^T) - X X^T) X` over the channels, where X is `(C, HW)` (Fu et al., "Dual
    Attention Network for Scene Segmentation"; the maximum is explained at `ChannelSelfAttention`). alpha and
    beta are learnable and start at 0, where the sum is 2 X. The W are 1x1 convolutions without biases. The
    3x3 convolutions that the paper has in front of and behind each half belong to its segmentation head and
    are left out.

    Args:
        ratio: Queries and keys have `C // ratio` channels.

    Call arguments:
        inputs: Feature maps.
        return_attention_scores: Whether to answer the maps, too.

    Input shape:
        `(B, H, W, C)`. Height and width may be unknown.

    Output shape:
        `(B, H, W, C)`. With `return_attention_scores=True` also a dict of `attention (B, H, W)`, the mean of
        the refined features over the channels, `positions (B, HW, HW)` and `channels (B, C, C)`: the shares
        of all positions and channels (last axis) in each one's mixture.

    Raises:
        ValueError: If the ratio leaves no channel, or the input is no map.

    Example:

    >>> maps = keras.random.normal((2, 7, 7, 16))
    >>> features, scores = DualAttention()(maps, return_attention_scores=True)
    >>> {name: tuple(score.shape) for name, score in scores.items()}
    {'attention': (2, 7, 7), 'positions': (2, 49, 49), 'channels': (2, 16, 16)}
    """

    def __init__(self, ratio: int = 8, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.ratio = ratio
        self.input_spec = keras.layers.InputSpec(ndim=4)

    def build(self, input_shape: tuple) -> None:
        """Makes the convolutions and the scales."""
        channels = input_shape[-1]
        width = reduced(channels, self.ratio)

        def convolution(filters: int, name: str) -> keras.layers.Layer:
            layer = keras.layers.Conv2D(
                filters, 1, use_bias=False, data_format="channels_last", dtype=self.dtype_policy, name=name
            )
            layer.build(input_shape)
            return layer

        self.query, self.key = convolution(width, "query"), convolution(width, "key")
        self.value = convolution(channels, "value")
        self.scale = self.add_weight((), initializer="zeros", name="scale")
        self.channel_attention = ChannelSelfAttention("danet", dtype=self.dtype_policy, name="channels")
        self.channel_attention.build(input_shape)

    def call(self, inputs: Any, return_attention_scores: bool = False) -> Any:
        """Answers the refined features, and on request the maps."""
        query, key, value = (flatten(layer(inputs)) for layer in (self.query, self.key, self.value))
        mixed = ops.reshape(spatial_attention(query, key, value), ops.shape(inputs))
        features, scores = self.channel_attention(inputs, return_attention_scores=True)
        features = inputs + self.scale * mixed + features
        if not return_attention_scores:
            return features
        return features, {
            "attention": channel_mean(features),
            "positions": ops.cast(spatial_scores(query, key), self.compute_dtype),
            "channels": scores["affinity"],
        }

    def compute_output_shape(self, input_shape: tuple) -> tuple:
        """The input's."""
        return tuple(input_shape)

    def compute_output_spec(self, inputs: Any, return_attention_scores: bool = False) -> Any:
        """The shapes and dtypes of the answer."""
        features = keras.KerasTensor(inputs.shape, dtype=self.compute_dtype)
        if not return_attention_scores:
            return features
        batch, height, width, channels = inputs.shape
        cells = None if None in (height, width) else height * width
        return features, {
            "attention": keras.KerasTensor((batch, height, width), dtype=self.compute_dtype),
            "positions": keras.KerasTensor((batch, cells, cells), dtype=self.compute_dtype),
            "channels": keras.KerasTensor((batch, channels, channels), dtype=self.compute_dtype),
        }

    def get_config(self) -> dict[str, Any]:
        """The arguments."""
        return {**super().get_config(), "ratio": self.ratio}

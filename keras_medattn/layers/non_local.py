"""Non-local spatial attention: each position refined by all others."""

from typing import Any

import keras

from keras_medattn.ops.attention import spatial_attention, spatial_scores
from keras_medattn.ops.comparison import channel_mean, flatten, reduced

ops: Any = keras.ops  # a type checker would infer its types from one backend


@keras.saving.register_keras_serializable("keras_medattn")
class NonLocal(keras.layers.Layer):
    """Non-local block: adds to each position a mixture of all positions, by how alike they are.

    `X'_i = X_i + W_z sum_j softmax_j(<W_theta X_i, W_phi X_j>) W_g X_j` (Wang et al., "Non-local Neural
    Networks", the embedded Gaussian). The W are 1x1 convolutions without biases; W_z starts at 0, so that the
    block can be put into a trained network without changing it.

    The mixture is computed exactly in memory linear in the number of positions (`ops.spatial_attention`); the
    affinity, if asked for, is not.

    Args:
        ratio: The embeddings have `C // ratio` channels.

    Call arguments:
        inputs: Feature maps.
        return_attention_scores: Whether to answer the maps, too.

    Input shape:
        `(B, H, W, C)`. Height and width may be unknown.

    Output shape:
        `(B, H, W, C)`. With `return_attention_scores=True` also a dict of `attention (B, H, W)`, the mean of
        the refined features over the channels, and `affinity (B, HW, HW)`: the shares of all positions (last
        axis) in each one's mixture.

    Raises:
        ValueError: If the ratio leaves no channel, or the input is no map.

    Example:

    >>> maps = keras.random.normal((2, 7, 7, 16))
    >>> features, scores = NonLocal()(maps, return_attention_scores=True)
    >>> tuple(features.shape), tuple(scores["affinity"].shape)
    ((2, 7, 7, 16), (2, 49, 49))
    """

    def __init__(self, ratio: int = 2, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.ratio = ratio
        self.input_spec = keras.layers.InputSpec(ndim=4)

    def build(self, input_shape: tuple) -> None:
        """Makes the four convolutions."""
        channels = input_shape[-1]
        width = reduced(channels, self.ratio)

        def convolution(filters: int, name: str, start: str = "glorot_uniform") -> keras.layers.Layer:
            return keras.layers.Conv2D(
                filters,
                1,
                use_bias=False,
                kernel_initializer=start,
                data_format="channels_last",
                dtype=self.dtype_policy,
                name=name,
            )

        self.query, self.key, self.value = (convolution(width, name) for name in ("query", "key", "value"))
        self.output_convolution = convolution(channels, "output", "zeros")
        for layer in (self.query, self.key, self.value):
            layer.build(input_shape)
        self.output_convolution.build((*input_shape[:-1], width))

    def call(self, inputs: Any, return_attention_scores: bool = False) -> Any:
        """Answers the refined features, and on request the maps."""
        batch, height, width, _ = ops.shape(inputs)
        query, key, value = (flatten(layer(inputs)) for layer in (self.query, self.key, self.value))
        mixed = ops.reshape(spatial_attention(query, key, value), (batch, height, width, value.shape[-1]))
        features = inputs + self.output_convolution(mixed)
        if not return_attention_scores:
            return features
        affinity = ops.cast(spatial_scores(query, key), self.compute_dtype)
        return features, {"attention": channel_mean(features), "affinity": affinity}

    def compute_output_shape(self, input_shape: tuple) -> tuple:
        """The input's."""
        return tuple(input_shape)

    def compute_output_spec(self, inputs: Any, return_attention_scores: bool = False) -> Any:
        """The shapes and dtypes of the answer."""
        features = keras.KerasTensor(inputs.shape, dtype=self.compute_dtype)
        if not return_attention_scores:
            return features
        batch, height, width, _ = inputs.shape
        cells = None if None in (height, width) else height * width
        return features, {
            "attention": keras.KerasTensor((batch, height, width), dtype=self.compute_dtype),
            "affinity": keras.KerasTensor((batch, cells, cells), dtype=self.compute_dtype),
        }

    def get_config(self) -> dict[str, Any]:
        """The arguments."""
        return {**super().get_config(), "ratio": self.ratio}

"""One context for all positions, from where the network looks."""

from typing import Any

import keras

from keras_medattn.ops.comparison import channel_mean, reduced, softmax_pool

ops: Any = keras.ops  # a type checker would infer its types from one backend


@keras.saving.register_keras_serializable("keras_medattn")
class GlobalContext(keras.layers.Layer):
    """Global context block: adds to each position one vector that an attention map pools from all.

    `X'_i = X_i + W_2 relu(LN(W_1 sum_j softmax_j(w^T X_j) X_j))` (Cao et al., "GCNet: Non-local Networks Meet
    Squeeze-Excitation Networks and Beyond"). LN is a layer normalisation. There are no biases, as in the
    equation; W_2 starts at 0, as in the authors' code, so that the block can be put into a trained network
    without changing it.

    Args:
        ratio: The bottleneck has `C // ratio` units: at least 2, since the normalisation of a single one is
            constant.

    Call arguments:
        inputs: Feature maps.
        return_attention_scores: Whether to answer the maps, too.

    Input shape:
        `(B, H, W, C)`. Height and width may be unknown.

    Output shape:
        `(B, H, W, C)`. With `return_attention_scores=True` also a dict of `attention (B, H, W)`, the mean of
        the refined features over the channels, and `context (B, H, W)`: the shares of the positions in the
        pooled vector.

    Raises:
        ValueError: If the ratio leaves fewer than two units, or the input is no map.

    Example:

    >>> maps = keras.random.normal((2, 7, 7, 32))
    >>> features, scores = GlobalContext()(maps, return_attention_scores=True)
    >>> tuple(features.shape), tuple(scores["context"].shape)
    ((2, 7, 7, 32), (2, 7, 7))
    """

    def __init__(self, ratio: int = 16, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.ratio = ratio
        self.input_spec = keras.layers.InputSpec(ndim=4)

    def build(self, input_shape: tuple) -> None:
        """Makes the map's convolution and the transform."""
        batch, _, _, channels = input_shape
        units, dtype = reduced(channels, self.ratio, least=2), self.dtype_policy
        self.convolution = keras.layers.Conv2D(
            1, 1, use_bias=False, data_format="channels_last", dtype=dtype, name="logits"
        )
        self.squeeze = keras.layers.Dense(units, use_bias=False, dtype=dtype, name="squeeze")
        self.normalization = keras.layers.LayerNormalization(epsilon=1e-5, dtype=dtype, name="norm")
        self.expand = keras.layers.Dense(
            channels, use_bias=False, kernel_initializer="zeros", dtype=dtype, name="expand"
        )
        self.convolution.build(input_shape)
        self.squeeze.build((batch, channels))
        self.normalization.build((batch, units))
        self.expand.build((batch, units))

    def call(self, inputs: Any, return_attention_scores: bool = False) -> Any:
        """Answers the refined features, and on request the maps."""
        pooled, context = softmax_pool(inputs, self.convolution(inputs))
        added = self.expand(ops.relu(self.normalization(self.squeeze(pooled))))  # (B, C)
        features = inputs + ops.expand_dims(added, (1, 2))
        if not return_attention_scores:
            return features
        return features, {"attention": channel_mean(features), "context": context}

    def compute_output_shape(self, input_shape: tuple) -> tuple:
        """The input's."""
        return tuple(input_shape)

    def compute_output_spec(self, inputs: Any, return_attention_scores: bool = False) -> Any:
        """The shapes and dtypes of the answer."""
        features = keras.KerasTensor(inputs.shape, dtype=self.compute_dtype)
        if not return_attention_scores:
            return features
        return features, {
            name: keras.KerasTensor(inputs.shape[:3], dtype=self.compute_dtype)
            for name in ("attention", "context")
        }

    def get_config(self) -> dict[str, Any]:
        """The arguments."""
        return {**super().get_config(), "ratio": self.ratio}

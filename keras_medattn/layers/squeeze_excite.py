"""Gates for the channels, from their means."""

from typing import Any

import keras

from keras_medattn.ops.comparison import channel_mean, reduced

ops: Any = keras.ops  # a type checker would infer its types from one backend


@keras.saving.register_keras_serializable("keras_medattn")
class SqueezeExcite(keras.layers.Layer):
    """Squeeze-and-excitation: each channel times a gate that the means of all channels decide.

    `X' = X g, g = sigmoid(W_2 relu(W_1 z))`, with z the channels' means over the positions (Hu et al.,
    "Squeeze-and-Excitation Networks"). W_1 goes to `C // ratio` numbers and W_2 back; there are no biases, as
    in the paper's residual networks.

    Args:
        ratio: The bottleneck has `C // ratio` units.

    Call arguments:
        inputs: Feature maps.
        return_attention_scores: Whether to answer the maps, too.

    Input shape:
        `(B, H, W, C)`. Height and width may be unknown.

    Output shape:
        `(B, H, W, C)`. With `return_attention_scores=True` also a dict of `attention (B, H, W)`, the mean of
        the refined features over the channels, and `gates (B, C)`, from 0 to 1.

    Raises:
        ValueError: If the ratio leaves no unit, or the input is no map.

    Example:

    >>> maps = keras.random.normal((2, 7, 7, 32))
    >>> features, scores = SqueezeExcite()(maps, return_attention_scores=True)
    >>> tuple(features.shape), tuple(scores["gates"].shape)
    ((2, 7, 7, 32), (2, 32))
    """

    def __init__(self, ratio: int = 16, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.ratio = ratio
        self.input_spec = keras.layers.InputSpec(ndim=4)

    def build(self, input_shape: tuple) -> None:
        """Makes the two matrices."""
        batch, _, _, channels = input_shape
        units = reduced(channels, self.ratio)
        self.squeeze = keras.layers.Dense(
            units, "relu", use_bias=False, dtype=self.dtype_policy, name="squeeze"
        )
        self.excite = keras.layers.Dense(
            channels, "sigmoid", use_bias=False, dtype=self.dtype_policy, name="excite"
        )
        self.squeeze.build((batch, channels))
        self.excite.build((batch, units))

    def call(self, inputs: Any, return_attention_scores: bool = False) -> Any:
        """Answers the refined features, and on request the maps."""
        gates = self.excite(self.squeeze(ops.mean(inputs, axis=(1, 2))))  # (B, C)
        features = inputs * ops.expand_dims(gates, (1, 2))
        if not return_attention_scores:
            return features
        return features, {"attention": channel_mean(features), "gates": gates}

    def compute_output_shape(self, input_shape: tuple) -> tuple:
        """The input's."""
        return tuple(input_shape)

    def compute_output_spec(self, inputs: Any, return_attention_scores: bool = False) -> Any:
        """The shapes and dtypes of the answer."""
        features = keras.KerasTensor(inputs.shape, dtype=self.compute_dtype)
        if not return_attention_scores:
            return features
        batch, height, width, channels = inputs.shape
        return features, {
            "attention": keras.KerasTensor((batch, height, width), dtype=self.compute_dtype),
            "gates": keras.KerasTensor((batch, channels), dtype=self.compute_dtype),
        }

    def get_config(self) -> dict[str, Any]:
        """The arguments."""
        return {**super().get_config(), "ratio": self.ratio}

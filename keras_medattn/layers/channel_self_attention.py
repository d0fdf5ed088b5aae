"""Attention among channels, by the products of their maps."""

from typing import Any

import keras

from keras_medattn.ops.comparison import channel_attention, channel_mean

FORMS = ("trilinear", "danet")


@keras.saving.register_keras_serializable("keras_medattn")
class ChannelSelfAttention(keras.layers.Layer):
    """Mixes the channels by how alike their maps are, `X X^T`.

    With X the features as `(C, HW)` and N a softmax over the last axis, the form `"trilinear"` answers
    `X' = N(N(X) X^T) X` (Zheng et al., "Looking for the Devil in the Details: Learning Trilinear Attention
    Sampling Network"); it has no weights. The form `"danet"` answers `X' = X + beta N(max(X X^T) - X X^T) X`
    with a learnable beta that starts at 0 (Fu et al., "Dual Attention Network for Scene Segmentation"). The
    maximum is in the authors' code and not in their equation: with it a channel attends to those least like
    it, where `N(X X^T)` is all but the identity, since a channel's product with itself is the largest.

    Args:
        form: `"trilinear"` or `"danet"`.

    Call arguments:
        inputs: Feature maps.
        return_attention_scores: Whether to answer the maps, too.

    Input shape:
        `(B, H, W, C)`. Height and width may be unknown.

    Output shape:
        `(B, H, W, C)`. With `return_attention_scores=True` also a dict of `attention (B, H, W)`, the mean of
        the refined features over the channels, and `affinity (B, C, C)`: the shares of all channels (last
        axis) in each one's mixture.

    Raises:
        ValueError: If the form is unknown, or the input is no map.

    Example:

    >>> maps = keras.random.normal((2, 7, 7, 16))
    >>> features, scores = ChannelSelfAttention()(maps, return_attention_scores=True)
    >>> tuple(features.shape), tuple(scores["affinity"].shape)
    ((2, 7, 7, 16), (2, 16, 16))
    """

    def __init__(self, form: str = "trilinear", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if form not in FORMS:
            raise ValueError(f"`form` must be one of {FORMS}. Received: form={form!r}")
        self.form = form
        self.input_spec = keras.layers.InputSpec(ndim=4)

    def build(self, input_shape: tuple) -> None:
        """Makes the scale beta, where the form has it."""
        if self.form == "danet":
            self.scale = self.add_weight((), initializer="zeros", name="scale")

    def call(self, inputs: Any, return_attention_scores: bool = False) -> Any:
        """Answers the refined features, and on request the maps."""
        features, affinity = channel_attention(inputs, self.form)
        if self.form == "danet":
            features = inputs + self.scale * features
        if not return_attention_scores:
            return features
        return features, {"attention": channel_mean(features), "affinity": affinity}

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
            "affinity": keras.KerasTensor((batch, channels, channels), dtype=self.compute_dtype),
        }

    def get_config(self) -> dict[str, Any]:
        """The arguments."""
        return {**super().get_config(), "form": self.form}

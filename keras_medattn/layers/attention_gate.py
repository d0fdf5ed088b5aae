"""Pooling of local features by how well they agree with a global one."""

from typing import Any

import keras

from keras_medattn.ops.comparison import softmax_pool, wide

ops: Any = keras.ops  # a type checker would infer its types from one backend

COMPATIBILITIES = ("dot", "parametrised")


@keras.saving.register_keras_serializable("keras_medattn")
class AttentionGate(keras.layers.Layer):
    """Learn-to-pay-attention: pools local features by their compatibility with a global vector.

    `v = sum_i a_i l_i, a = softmax(c)` over the positions i, with the compatibility `c_i = <l_i, g>`
    (`"dot"`) or `c_i = <u, l_i + g>` (`"parametrised"`, u learnable), and l_i the local features, g the
    global vector (Jetley et al., "Learn to Pay Attention"). The classifier then works on the v of several
    layers in place of g. Where g has another width than l, it is first mapped to that of l by a matrix.

    In the parametrised form `<u, g>` is the same at all positions, and the softmax takes it off: neither map
    nor answer depend on g, and its matrix learns nothing. This lies in the paper's equations.

    Args:
        compatibility: `"dot"` or `"parametrised"`.

    Call arguments:
        inputs: The list `[local, global]`.
        return_attention_scores: Whether to answer the map, too.

    Input shape:
        Local features `(B, H, W, C)`, a global vector `(B, D)`. Height and width may be unknown.

    Output shape:
        `(B, C)`. With `return_attention_scores=True` also a dict of `attention (B, H, W)`, the a_i.

    Raises:
        ValueError: If the compatibility is unknown, or the inputs are no such pair.

    Example:

    >>> maps, vector = keras.random.normal((2, 7, 7, 16)), keras.random.normal((2, 32))
    >>> pooled, scores = AttentionGate()([maps, vector], return_attention_scores=True)
    >>> tuple(pooled.shape), tuple(scores["attention"].shape)
    ((2, 16), (2, 7, 7))
    """

    def __init__(self, compatibility: str = "dot", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if compatibility not in COMPATIBILITIES:
            raise ValueError(
                f"`compatibility` must be one of {COMPATIBILITIES}. Received: compatibility={compatibility!r}"
            )
        self.compatibility = compatibility
        self.input_spec = [keras.layers.InputSpec(ndim=4), keras.layers.InputSpec(ndim=2)]

    def build(self, input_shape: Any) -> None:
        """Makes the global vector's matrix, where the widths differ, and u."""
        (*_, channels), vector = input_shape
        self.projection = None
        if vector[-1] != channels:
            self.projection = keras.layers.Dense(
                channels, use_bias=False, dtype=self.dtype_policy, name="projection"
            )
            self.projection.build(vector)
        if self.compatibility == "parametrised":
            self.u = self.add_weight((channels,), initializer="random_normal", name="u")

    def call(self, inputs: Any, return_attention_scores: bool = False) -> Any:
        """Answers the pooled vector, and on request the map."""
        features, vector = inputs
        if self.projection is not None:
            vector = self.projection(vector)
        vector = ops.expand_dims(vector, (1, 2))  # (B, 1, 1, C)
        products = features * vector if self.compatibility == "dot" else (features + vector) * self.u
        pooled, attention = softmax_pool(features, ops.sum(wide(products), axis=-1))
        return (pooled, {"attention": attention}) if return_attention_scores else pooled

    def compute_output_shape(self, input_shape: Any) -> tuple:
        """Those of a vector with the local features' channels."""
        (batch, _, _, channels), _ = input_shape
        return batch, channels

    def compute_output_spec(self, inputs: Any, return_attention_scores: bool = False) -> Any:
        """The shapes and dtypes of the answer."""
        batch, height, width, channels = inputs[0].shape
        pooled = keras.KerasTensor((batch, channels), dtype=self.compute_dtype)
        attention = keras.KerasTensor((batch, height, width), dtype=self.compute_dtype)
        return (pooled, {"attention": attention}) if return_attention_scores else pooled

    def get_config(self) -> dict[str, Any]:
        """The arguments."""
        return {**super().get_config(), "compatibility": self.compatibility}

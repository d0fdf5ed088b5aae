"""Attention of every position of a feature map to every other."""

from typing import Any

import keras

from keras_medattn.ops.attention import spatial_attention, spatial_scores

ops: Any = keras.ops  # a type checker would infer its types from one backend


@keras.saving.register_keras_serializable("keras_medattn")
class SpatialAttn(keras.layers.Layer):
    """Adds to each position what all positions hold, weighted by how much they have in common (S-Attn).

    `E_ij = S_Q(F)_i . S_K(F)_j`, `E' = softmax(E)` over i, `out_j = F_j + sum_i E'_ij S_V(F)_i`, with i and j
    the N = HW positions, S_Q and S_K 1x1 convolutions to C / r channels and S_V one to C, all without bias;
    no scaling and no learnable weight of the sum (Wu et al., Deep Attentive Feature Learning for
    Histopathology Image Classification, Eq. 7-12).

    Where the N x N weights are many, they are computed in blocks, exactly, forward and backward, in memory
    linear in N (`keras_medattn.ops.spatial_attention`).

    Args:
        ratio: The ratio r by which queries and keys have fewer channels than the maps; they have at least
            one.

    Call arguments:
        inputs: Feature maps.
        return_attention_scores: Whether to answer the weights, too. They are then held as a whole: 4 B N^2
            bytes, 39 MB an image at 56x56.

    Input shape:
        `(B, H, W, C)`. Height and width may be unknown.

    Output shape:
        As the input. With `return_attention_scores=True` also the weights `(B, N, N)`, float32: row j holds
        how much position j takes of each position i, rows of the map one after another, and sums to 1.

    Raises:
        ValueError: If `ratio` is below 1 or the input is no feature map.

    Example:

    >>> layer = SpatialAttn(ratio=8)
    >>> answer, scores = layer(keras.random.normal((2, 7, 5, 64)), return_attention_scores=True)
    >>> tuple(answer.shape), tuple(scores.shape)
    ((2, 7, 5, 64), (2, 35, 35))
    """

    def __init__(self, ratio: int = 8, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if ratio < 1:
            raise ValueError(f"`ratio` must be at least 1. Received: ratio={ratio}")
        self.ratio = ratio

    def build(self, input_shape: tuple) -> None:
        """Makes the three 1x1 convolutions."""
        self._check_maps(input_shape)
        channels = input_shape[-1]
        reduced = max(channels // self.ratio, 1)
        self.query = self.add_weight((channels, reduced), initializer="glorot_uniform", name="query")
        self.key = self.add_weight((channels, reduced), initializer="glorot_uniform", name="key")
        self.value = self.add_weight((channels, channels), initializer="glorot_uniform", name="value")

    def call(self, inputs: Any, return_attention_scores: bool = False) -> Any:
        """Answers the maps with the attention added, and on request its weights."""
        self._check_maps(inputs.shape)
        batch, height, width, channels = ops.shape(inputs)
        flat = ops.reshape(inputs, (batch, height * width, channels))  # (B, N, C)
        # row j of the paper's transposed E' asks with S_K
        asking, asked, value = (ops.matmul(flat, kernel) for kernel in (self.key, self.query, self.value))
        scores = None
        if return_attention_scores:
            scores = spatial_scores(asking, asked)
            attended = ops.cast(ops.matmul(scores, ops.cast(value, scores.dtype)), value.dtype)
        else:
            attended = spatial_attention(asking, asked, value)
        answer = inputs + ops.reshape(attended, (batch, height, width, channels))
        return answer if scores is None else (answer, scores)

    def compute_output_shape(self, input_shape: tuple) -> tuple:
        """The shape of the input."""
        self._check_maps(input_shape)
        return tuple(input_shape)

    def compute_output_spec(self, inputs: Any, return_attention_scores: bool = False) -> Any:
        """The shapes and dtypes of the answer."""
        shape = self.compute_output_shape(inputs.shape)
        answer = keras.KerasTensor(shape, dtype=self.compute_dtype)
        if not return_attention_scores:
            return answer
        positions = None if None in shape[1:3] else shape[1] * shape[2]
        dtype = keras.backend.result_type(self.compute_dtype, "float32")
        return answer, keras.KerasTensor((shape[0], positions, positions), dtype=dtype)

    def get_config(self) -> dict[str, Any]:
        """The arguments."""
        return {**super().get_config(), "ratio": self.ratio}

    def _check_maps(self, shape: tuple) -> None:
        if len(shape) != 4 or shape[-1] is None:
            raise ValueError(
                f"{self.name} takes maps (B, H, W, C) with C known. Received: shape={tuple(shape)}"
            )

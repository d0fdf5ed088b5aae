"""Attention of every channel of a feature map to every other."""

from typing import Any

import keras

from keras_medattn.ops.attention import channel_scores

ops: Any = keras.ops  # a type checker would infer its types from one backend


@keras.saving.register_keras_serializable("keras_medattn")
class ChannelAttn(keras.layers.Layer):
    """Adds to each channel a weighted mean of all channels, with weights from the whole map (C-Attn).

    `D = M_Q(F)^T M_K(F)`, `D' = softmax(D)` over the first channel index, so that each column sums to 1, and
    `out_d = F_d + sum_c D'_cd M_V(F)_c`. M_Q and M_K are full convolutions C -> C with kernel = stride = 4,
    M_V a 1x1 convolution C -> C, all without bias; no scaling and no learnable weight of the sum (Wu et al.,
    Deep Attentive Feature Learning for Histopathology Image Classification, Eq. 1-6).

    A map whose size the stride does not divide is padded with zeros for M_Q and M_K, half on each side, an
    odd one at the bottom and on the right. The 1x1 convolution is applied to the C x C weights and not to the
    map, `F (W_V D')` in place of `(F W_V) D'`: the same answer with one product over the positions less.

    Args:
        kernel_size: Size of the kernels of M_Q and M_K.
        strides: Their stride.

    Call arguments:
        inputs: Feature maps.
        return_attention_scores: Whether to answer the weights, too.

    Input shape:
        `(B, H, W, C)`. Height and width may be unknown.

    Output shape:
        As the input. With `return_attention_scores=True` also the weights D' `(B, C, C)`, float32: entry
        (c, d) is how much of channel c goes into channel d.

    Raises:
        ValueError: If an argument is below 1 or the input is no feature map.

    Example:

    >>> answer, scores = ChannelAttn()(keras.random.normal((2, 9, 14, 8)), return_attention_scores=True)
    >>> tuple(answer.shape), tuple(scores.shape)
    ((2, 9, 14, 8), (2, 8, 8))
    """

    def __init__(self, kernel_size: int = 4, strides: int = 4, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if min(kernel_size, strides) < 1:
            raise ValueError(
                "`kernel_size` and `strides` must be at least 1. "
                f"Received: kernel_size={kernel_size}, strides={strides}"
            )
        self.kernel_size = kernel_size
        self.strides = strides

    def build(self, input_shape: tuple) -> None:
        """Makes the three convolutions."""
        self._check_maps(input_shape)
        channels = input_shape[-1]
        full = (self.kernel_size, self.kernel_size, channels, channels)
        self.query = self.add_weight(full, initializer="glorot_uniform", name="query")
        self.key = self.add_weight(full, initializer="glorot_uniform", name="key")
        self.value = self.add_weight((channels, channels), initializer="glorot_uniform", name="value")

    def call(self, inputs: Any, return_attention_scores: bool = False) -> Any:
        """Answers the maps with the attention added, and on request its weights."""
        self._check_maps(inputs.shape)
        batch, height, width, channels = ops.shape(inputs)
        scores = channel_scores(self._vectors(inputs, self.query), self._vectors(inputs, self.key))
        mixing = ops.matmul(ops.expand_dims(ops.cast(self.value, scores.dtype), 0), scores)  # (B, C, C)
        flat = ops.reshape(inputs, (batch, height * width, channels))  # (B, N, C)
        attended = ops.matmul(flat, ops.cast(mixing, inputs.dtype))  # (B, N, C)
        answer = inputs + ops.reshape(attended, (batch, height, width, channels))
        return (answer, scores) if return_attention_scores else answer

    def _vectors(self, inputs: Any, kernel: Any) -> Any:
        """The convolution's answer as `(B, N', C)`."""
        maps = ops.conv(inputs, kernel, self.strides, padding="same", data_format="channels_last")
        batch, height, width, channels = ops.shape(maps)
        return ops.reshape(maps, (batch, height * width, channels))

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
        dtype = keras.backend.result_type(self.compute_dtype, "float32")
        return answer, keras.KerasTensor((shape[0], shape[3], shape[3]), dtype=dtype)

    def get_config(self) -> dict[str, Any]:
        """The arguments."""
        return {**super().get_config(), "kernel_size": self.kernel_size, "strides": self.strides}

    def _check_maps(self, shape: tuple) -> None:
        if len(shape) != 4 or shape[-1] is None:
            raise ValueError(
                f"{self.name} takes maps (B, H, W, C) with C known. Received: shape={tuple(shape)}"
            )

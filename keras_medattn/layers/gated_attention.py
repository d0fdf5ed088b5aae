"""Channels gated by how strongly they answer where a semantic map lies."""

import math
from collections.abc import Sequence
from typing import Any

import keras

from keras_medattn.ops.gating import dilated_convolution, gated_attention

ops: Any = keras.ops  # a type checker would infer its types from one backend


@keras.saving.register_keras_serializable("keras_medattn")
class GatedAttention(keras.layers.Layer):
    """Gated attention: features times a gate for each channel, with an attention map on request.

    `M = t mean_c(sum_d Z_d)` with dilated blocks `Z_d = relu(BN(conv_d(X)))`; `S = softmax(M)` over all
    positions; `g = relu(tanh(sum_ij X_ij S_ij))`, one gate a channel; the answer is `X g`, and its mean over
    the channels the attention map Omega (Fan et al., Microscopic Fine-Grained Instance Classification Through
    Deep Attention, Eqs 1 and 2).

    The paper sums M over the channels, which makes S almost one-hot at the start; here it is a mean times a
    learnable temperature t. It starts at `10 filters^(1/4) / sqrt(d)`, d the number of maps that are summed:
    with it the entropy of S is about half its maximum ln(h w) on random features. Put the gated features in
    the path to the loss: a threshold on Omega alone gives the dilated blocks no gradient.

    X may also be the features from before the backbone's last ReLU: then the gates of some channels close.

    Args:
        filters: Channels of each dilated block; those of the input by default.
        dilations: Dilation rate of each 3 x 3 block.
        sequential: Whether each block takes the answer of the one before it, and M is that of the last,
            rather than all blocks taking X and being summed.
        reduce: "mean", with the temperature, or "sum", as the paper has it: a temperature fixed at `filters`.

    Call arguments:
        inputs: Feature maps X.
        training: Whether the blocks normalise by the statistics of the batch.
        return_attention_scores: Whether to answer the maps, too.

    Input shape:
        `(B, h, w, C)`. Height and width may be unknown.

    Output shape:
        `(B, h, w, C)`. With `return_attention_scores=True` also a dict of `semantic (B, h, w)`, the map S,
        `gates (B, C)` and `attention (B, h, w)`, the map Omega.

    Raises:
        ValueError: If the input is no map, or an argument is not valid.

    Example:

    >>> maps = keras.ops.relu(keras.random.normal((2, 7, 7, 16)))
    >>> gated, scores = GatedAttention()(maps, return_attention_scores=True)
    >>> tuple(gated.shape), {name: tuple(value.shape) for name, value in scores.items()}
    ((2, 7, 7, 16), {'semantic': (2, 7, 7), 'gates': (2, 16), 'attention': (2, 7, 7)})
    """

    def __init__(
        self,
        filters: int | None = None,
        dilations: Sequence[int] = (2, 4),
        sequential: bool = False,
        reduce: str = "mean",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if filters is not None and filters < 1:
            raise ValueError(f"`filters` must be at least 1. Received: filters={filters}")
        if not dilations or min(dilations) < 1:
            raise ValueError(f"`dilations` must be rates of at least 1. Received: dilations={dilations}")
        if reduce not in ("mean", "sum"):
            raise ValueError(f'`reduce` must be "mean" or "sum". Received: reduce={reduce!r}')
        self.filters = filters
        self.dilations = tuple(int(rate) for rate in dilations)
        self.sequential = sequential
        self.reduce = reduce

    def build(self, input_shape: tuple) -> None:
        """Makes the dilated blocks and the temperature."""
        self._check_maps(input_shape)
        channels = input_shape[-1]
        filters = self.filters or channels
        self.kernels, self.normalizations = [], []  # no biases: the batch norm takes off any constant
        for index in range(len(self.dilations)):
            given = filters if index and self.sequential else channels
            kernel = self.add_weight(
                (3, 3, given, filters), initializer="glorot_uniform", name=f"kernel_{index}"
            )
            normalization = keras.layers.BatchNormalization(dtype=self.dtype_policy, name=f"bn_{index}")
            normalization.build((None, None, None, filters))
            self.kernels.append(kernel)
            self.normalizations.append(normalization)
        if self.reduce == "mean":
            start = 10 * filters**0.25 / math.sqrt(1 if self.sequential else len(self.dilations))
            self.temperature = self.add_weight(
                (), initializer=keras.initializers.Constant(start), name="temperature", autocast=False
            )

    def call(self, inputs: Any, training: bool | None = None, return_attention_scores: bool = False) -> Any:
        """Answers the gated features, and on request the maps."""
        self._check_maps(inputs.shape)
        gated, maps = gated_attention(inputs, self._semantic_logits(inputs, training))
        return (gated, maps) if return_attention_scores else gated

    def _semantic_logits(self, inputs: Any, training: bool | None) -> Any:
        """The map M `(B, h, w)`."""
        dtype = keras.backend.result_type(self.compute_dtype, "float32")
        logits, features = 0, inputs
        for rate, kernel, normalization in zip(
            self.dilations, self.kernels, self.normalizations, strict=True
        ):
            block = dilated_convolution(features, ops.convert_to_tensor(kernel), rate)
            block = ops.relu(normalization(block, training=training))
            reduced = getattr(ops, self.reduce)(ops.cast(block, dtype), axis=-1)
            logits, features = (reduced, block) if self.sequential else (logits + reduced, inputs)
        return logits * ops.cast(self.temperature, dtype) if self.reduce == "mean" else logits

    def compute_output_shape(self, input_shape: tuple) -> tuple:
        """The shape of the gated features."""
        self._check_maps(input_shape)
        return tuple(input_shape)

    def compute_output_spec(
        self, inputs: Any, training: bool | None = None, return_attention_scores: bool = False
    ) -> Any:
        """The shapes and dtypes of the answer."""
        batch, height, width, channels = self.compute_output_shape(inputs.shape)
        gated = keras.KerasTensor((batch, height, width, channels), dtype=self.compute_dtype)
        if not return_attention_scores:
            return gated
        shapes = {
            "semantic": (batch, height, width),
            "gates": (batch, channels),
            "attention": (batch, height, width),
        }
        return gated, {
            name: keras.KerasTensor(shape, dtype=self.compute_dtype) for name, shape in shapes.items()
        }

    def get_config(self) -> dict[str, Any]:
        """The arguments."""
        return {
            **super().get_config(),
            "filters": self.filters,
            "dilations": self.dilations,
            "sequential": self.sequential,
            "reduce": self.reduce,
        }

    def _check_maps(self, shape: tuple) -> None:
        if len(shape) != 4:
            raise ValueError(f"{self.name} takes maps (B, h, w, C). Received: shape={tuple(shape)}")

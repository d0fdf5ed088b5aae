"""Pooling to a learnable weighted sum of each channel's highest values."""

import math
from typing import Any

import keras

from keras_medattn.ops.pooling import top_k_pool

ops: Any = keras.ops  # a type checker would infer its types from one backend


@keras.saving.register_keras_serializable("keras_medattn")
class TopKPool(keras.layers.Layer):
    """Pools each channel of a bag to a weighted sum of its k highest values.

    `pooled_j = sum_r w_r a_jr`, with a_jr the r-th highest value of channel j over all positions, slices and
    scales, and w on the simplex: `w = softmax(logits)`, learnable, at the start `logits_r = r ln 0.6`, so
    that the weights decay exponentially (Li et al., Multi-Instance Multi-Scale CNN for Medical Image
    Classification).

    Where a bag has fewer than k valid positions, the weights are renormalised over those it has. Where it has
    none the answer is 0, with zero gradients.

    Args:
        k: Number of values.
        per_channel: Whether each channel learns weights of its own, rather than one set for all.

    Call arguments:
        inputs: A bag, a list of bags, or a list of pairs of a bag and its mask, as `MSConv` answers.
        mask: Boolean tensor `(B, L)` for a single bag, or a list of one for each bag: true where a position
            counts.
        return_attention_scores: Whether to answer what was chosen, too.

    Input shape:
        Bags `(B, L, n)`, masks `(B, L)`. L may be unknown.

    Output shape:
        `(B, N)`, with N the channels of all bags, laid one after another. With `return_attention_scores=True`
        also a dict of `indices (B, N, k)` int32, positions in the channel's own bag, `values (B, N, k)` and
        `weights (B, N, k)`: the renormalised weights, 0 at ranks that a bag does not fill.

    Raises:
        ValueError: If a bag is known to have fewer than k positions, or an input is no bag.

    Example:

    >>> bag = keras.ops.reshape(keras.ops.arange(6, dtype="float32"), (1, 6, 1))
    >>> pooled, scores = TopKPool(k=2)(bag, return_attention_scores=True)
    >>> round(float(pooled[0, 0]), 3), [int(i) for i in scores["indices"][0, 0]]
    (4.625, [5, 4])
    """

    def __init__(self, k: int = 5, per_channel: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if k < 1:
            raise ValueError(f"`k` must be at least 1. Received: k={k}")
        self.k = k
        self.per_channel = per_channel

    def build(self, input_shape: Any) -> None:
        """Makes the logits of the weights."""
        shapes = self._bag_shapes(input_shape)
        shape = (sum(shape[-1] for shape in shapes), self.k) if self.per_channel else (self.k,)

        def decaying(shape: tuple, dtype: Any = None) -> Any:
            return ops.broadcast_to(ops.arange(self.k, dtype=dtype) * math.log(0.6), shape)

        # a single weight is 1: nothing to learn
        self.logits = self.add_weight(
            shape, initializer=decaying, name="logits", autocast=False, trainable=self.k > 1
        )

    def call(self, inputs: Any, mask: Any = None, return_attention_scores: bool = False) -> Any:
        """Answers the pooled channels, and on request what was chosen."""
        pairs = _pairs(inputs, mask)
        self._bag_shapes([bag.shape for bag, _ in pairs])
        logits = ops.cast(self.logits, keras.backend.result_type(self.variable_dtype, "float32"))
        weights = ops.softmax(logits) if self.k > 1 else ops.ones_like(logits)  # of one, Keras would warn
        pooled, scores, first = [], [], 0
        for bag, valid in pairs:
            last = first + bag.shape[-1]
            valid = None if valid is None else ops.cast(valid, "bool")
            answer, score = top_k_pool(bag, weights[first:last] if self.per_channel else weights, valid)
            pooled.append(answer)
            scores.append(score)
            first = last
        answer = ops.concatenate(pooled, axis=1)  # (B, N)
        if not return_attention_scores:
            return answer
        return answer, {
            name: ops.concatenate([score[name] for score in scores], axis=1) for name in scores[0]
        }

    def compute_output_shape(self, input_shape: Any) -> tuple:
        """The shape of the pooled channels."""
        shapes = self._bag_shapes(input_shape)
        return shapes[0][0], sum(shape[-1] for shape in shapes)

    def compute_output_spec(
        self, inputs: Any, mask: Any = None, return_attention_scores: bool = False
    ) -> Any:
        """The shapes and dtypes of the answer."""
        shape = self.compute_output_shape([bag.shape for bag, _ in _pairs(inputs, mask)])
        pooled = keras.KerasTensor(shape, dtype=self.compute_dtype)
        if not return_attention_scores:
            return pooled
        dtypes = {"indices": "int32", "values": self.compute_dtype, "weights": self.compute_dtype}
        return pooled, {
            name: keras.KerasTensor((*shape, self.k), dtype=dtype) for name, dtype in dtypes.items()
        }

    def compute_mask(self, inputs: Any, previous_mask: Any = None) -> None:
        """None: no positions are left to mask."""
        return None

    def get_config(self) -> dict[str, Any]:
        """The arguments."""
        return {**super().get_config(), "k": self.k, "per_channel": self.per_channel}

    def _bag_shapes(self, shape: Any) -> list[tuple]:
        """The shapes of the bags in the shape of an input."""
        shapes = [shape] if _is_shape(shape) else [item if _is_shape(item) else item[0] for item in shape]
        for bag in shapes:
            if len(bag) != 3:
                raise ValueError(f"{self.name} takes bags (B, L, n). Received: shape={tuple(bag)}")
            if bag[1] is not None and bag[1] < self.k:
                raise ValueError(
                    f"A bag has fewer than {self.k} positions: give a larger map or a smaller k. "
                    f"Received: k={self.k}, shape={tuple(bag)}"
                )
        return shapes


def _is_shape(item: Any) -> bool:
    return all(size is None or isinstance(size, int) for size in item)


def _pairs(inputs: Any, mask: Any) -> list[tuple[Any, Any]]:
    """Each bag with its mask, or None."""
    if not isinstance(inputs, list | tuple):
        return [(inputs, mask)]
    masks = mask if isinstance(mask, list | tuple) else [None] * len(inputs)
    return [
        (item[0], item[1]) if isinstance(item, list | tuple) else (item, valid)
        for item, valid in zip(inputs, masks, strict=True)
    ]

"""What MIMS does with the slices of a volume: one network for all, and answers over them."""

from __future__ import annotations

from typing import Any

import keras

ops: Any = keras.ops  # a type checker would infer its types from one backend

_NEVER = -1e30  # a logarithm that adds nothing and gives no NaN


def through(network: keras.Model, x: Any, mask: Any = None, training: bool | None = None) -> Any:
    """A network's answers for images, or for each slice of volumes.

    Args:
        network: from `(B, H, W, C)` to `(B, h, w, D)`.
        x: `(B, H, W, C)` or `(B, S, H, W, C)`.
        mask: boolean `(B, S)`, true for slices that exist. The others are read as zeros, and enter no batch
            statistics.
        training: as the network takes it.

    Returns:
        `(B, h, w, D)` or `(B, S, h, w, D)`.
    """
    shape = ops.shape(x)
    if len(shape) == 4:
        return network(x, training=training)
    flat = ops.reshape(x, (shape[0] * shape[1], *shape[2:]))  # (B S, H, W, C)
    if mask is None:
        answers = network(flat, training=training)
    else:
        real = ops.reshape(mask, (-1,))  # (B S,)
        # in float: LiteRT selects no uint8
        flat = ops.where(ops.reshape(real, (-1, 1, 1, 1)), ops.cast(flat, "float32"), 0.0)
        if training and _has_batch_statistics(network):
            places = ops.nonzero(real)[0]
            there = network(ops.take(flat, places, axis=0), training=True)
            size = (shape[0] * shape[1], *ops.shape(there)[1:])
            answers = ops.reshape(ops.scatter(ops.expand_dims(places, -1), there, size), size)
        else:  # of a size that is known before the run
            answers = network(flat, training=training)
    return ops.reshape(answers, (shape[0], shape[1], *ops.shape(answers)[1:]))


def alone(maps: Any, mask: Any) -> Any:
    """Each slice of `(B, S, h, w, C)` as an image `(B S, h, w, C)`; with a mask, a volume of one slice."""
    shape = ops.shape(maps)
    single = () if mask is None else (1,)
    return ops.reshape(maps, (shape[0] * shape[1], *single, *shape[2:]))


def mean(bag: Any, mask: Any) -> Any:
    """The mean `(B, n)` of a bag `(B, L, n)` over the positions that its mask `(B, L)` keeps; 0 of none."""
    if mask is None:
        return ops.mean(bag, axis=1)
    kept = ops.expand_dims(mask, -1)
    count = ops.cast(ops.sum(ops.cast(kept, "int32"), axis=1), bag.dtype)
    return ops.sum(ops.where(kept, bag, ops.zeros_like(bag)), axis=1) / ops.maximum(count, 1)


def slice_mean(scores: Any, mask: Any) -> tuple[Any, Any]:
    """The mean of the slices' probabilities, as scores: `log (1 / n sum_s softmax(scores_s))`.

    Args:
        scores: `(B, S, num_classes)`.
        mask: boolean `(B, S)` or None.

    Returns:
        `(B, num_classes)`, 0 where no slice exists; and each slice's share `(B, S)`, 1 / n.

    Example:
        >>> scores = ops.log(ops.convert_to_tensor([[[0.2, 0.8], [0.6, 0.4]]]))
        >>> [round(float(value), 3) for value in ops.exp(slice_mean(scores, None)[0][0])]
        [0.4, 0.6]
    """
    logs = ops.log_softmax(scores, axis=-1)
    real = ops.ones_like(scores[..., 0]) if mask is None else ops.cast(mask, scores.dtype)  # (B, S)
    count = ops.sum(real, axis=1, keepdims=True)
    shares = real / ops.maximum(count, 1)
    logs = ops.where(ops.expand_dims(real > 0, -1), logs, _NEVER)
    answers = ops.logsumexp(logs, axis=1) - ops.log(ops.maximum(count, 1))
    return ops.where(count > 0, answers, ops.zeros_like(answers)), shares


def slice_max(scores: Any, mask: Any) -> tuple[Any, Any]:
    """The scores of the slice that has the lowest probability of the first class, the negative one.

    Of two classes, the answer's probability is the highest of the slices' probabilities of the second.

    Args:
        scores: `(B, S, num_classes)`.
        mask: boolean `(B, S)` or None.

    Returns:
        `(B, num_classes)`, 0 where no slice exists; and each slice's share `(B, S)`: 1 of that slice.

    Example:
        >>> scores = ops.convert_to_tensor([[[2.0, 0.0], [0.0, 1.0], [0.0, 0.5]]])
        >>> [float(value) for value in slice_max(scores, None)[0][0]]
        [0.0, 1.0]
    """
    against = -ops.log_softmax(scores, axis=-1)[..., 0]  # (B, S), 0 and more
    if mask is not None:
        against = ops.where(mask, against, -1.0)
    highest, place = ops.top_k(against, 1)
    shares = ops.one_hot(place[:, 0], ops.shape(scores)[1], dtype=scores.dtype)  # (B, S)
    shares = ops.where(highest >= 0, shares, ops.zeros_like(shares))
    picked = ops.expand_dims(shares > 0, -1)
    return ops.sum(ops.where(picked, scores, ops.zeros_like(scores)), axis=1), shares


OVER = {"slice_mean": slice_mean, "slice_max": slice_max}


def _has_batch_statistics(network: keras.Model) -> bool:
    return any(
        _has_batch_statistics(layer)
        if isinstance(layer, keras.Model)
        else isinstance(layer, keras.layers.BatchNormalization) and layer.trainable
        for layer in network.layers
    )

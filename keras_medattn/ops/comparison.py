"""What the papers' comparison modules share: their map, pooling by a softmax, attention among channels."""

from typing import Any

import keras

ops: Any = keras.ops  # a type checker would infer its types from one backend


def channel_mean(features: Any) -> Any:
    """The attention map of any module: the mean of its refined features over the channels.

    `Omega = (1/C) sum_k X'_k` (Fan et al.: with X' the gated features it is their equation 2).

    Args:
        features: Float tensor `(B, H, W, C)`.

    Returns:
        Tensor `(B, H, W)` of the features' dtype.

    Example:

    >>> features = ops.reshape(ops.convert_to_tensor([1.0, 3.0, 4.0, 8.0]), (1, 1, 2, 2))
    >>> [float(value) for value in channel_mean(features)[0, 0]]
    [2.0, 6.0]
    """
    return ops.cast(ops.mean(wide(features), axis=-1), features.dtype)


def softmax_pool(features: Any, logits: Any) -> tuple[Any, Any]:
    """The mean of all positions, weighted by a softmax over them: `sum_i softmax(logits)_i x_i`.

    Args:
        features: Float tensor `(B, H, W, C)`.
        logits: Float tensor of the numbers `(B, H, W)`, of any shape that holds them in this order.

    Returns:
        `pooled (B, C)` and the weights `(B, H, W)`, in the features' dtype.

    Example:

    >>> features = ops.reshape(ops.convert_to_tensor([1.0, 3.0]), (1, 1, 2, 1))
    >>> pooled, weights = softmax_pool(features, ops.zeros((1, 1, 2)))
    >>> float(pooled[0, 0]), [float(weight) for weight in weights[0, 0]]
    (2.0, [0.5, 0.5])
    """
    batch, height, width, _ = ops.shape(features)
    weights = ops.softmax(ops.reshape(wide(logits), (batch, 1, height * width)))  # (B, 1, HW)
    pooled = ops.squeeze(ops.matmul(weights, wide(flatten(features))), axis=1)  # (B, C)
    weights = ops.reshape(weights, (batch, height, width))
    return ops.cast(pooled, features.dtype), ops.cast(weights, features.dtype)


def channel_attention(features: Any, form: str = "trilinear") -> tuple[Any, Any]:
    """Each channel as a mixture of all, by how alike they are.

    With X the features as `(C, HW)`, the answer is `A X`. `"trilinear"` (Zheng et al., "Looking for the Devil
    in the Details"): `A = softmax(softmax(X) X^T)`, both over the last axis. `"danet"` (Fu et al., "Dual
    Attention Network for Scene Segmentation", as their code has it): `A = softmax(max(X X^T) - X X^T)`, which
    is `softmax(-X X^T)`: a channel attends to those most unlike it.

    Args:
        features: Float tensor `(B, H, W, C)`.
        form: `"trilinear"` or `"danet"`.

    Returns:
        The mixtures `(B, H, W, C)` and the affinity A `(B, C, C)`, in the features' dtype.

    Example:

    >>> features = ops.reshape(ops.convert_to_tensor([3.0, 3.0, 1.0, 1.0]), (1, 2, 1, 2))
    >>> mixed, affinity = channel_attention(features)  # two equal channels
    >>> [float(value) for value in affinity[0, 0]], float(mixed[0, 0, 0, 0])
    ([0.5, 0.5], 3.0)
    """
    flat = wide(flatten(features))  # (B, HW, C)
    rows = ops.softmax(flat, axis=1) if form == "trilinear" else -flat
    affinity = ops.softmax(ops.matmul(ops.transpose(rows, (0, 2, 1)), flat))  # (B, C, C)
    mixed = ops.matmul(flat, ops.transpose(affinity, (0, 2, 1)))  # (B, HW, C)
    mixed = ops.reshape(mixed, ops.shape(features))
    return ops.cast(mixed, features.dtype), ops.cast(affinity, features.dtype)


def flatten(features: Any) -> Any:
    """Maps `(B, H, W, C)` as a row of positions `(B, HW, C)`."""
    batch, height, width, channels = ops.shape(features)
    return ops.reshape(features, (batch, height * width, channels))


def reduced(channels: int, ratio: int, least: int = 1) -> int:
    """The width `channels // ratio` of a bottleneck, checked.

    Raises:
        ValueError: If it is below `least`.
    """
    if ratio < 1 or channels // ratio < least:
        raise ValueError(
            f"`ratio` must be at least 1 and leave {least} or more of the channels. "
            f"Received: ratio={ratio}, channels={channels}"
        )
    return channels // ratio


def wide(x: Any) -> Any:
    """In float32, or better: softmax and sums lose too much in half precision."""
    return ops.cast(x, keras.backend.result_type(x.dtype, "float32"))

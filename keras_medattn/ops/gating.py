"""Gated attention: a semantic map, a gate for each channel, and the attention map."""

from typing import Any

import keras

ops: Any = keras.ops  # a type checker would infer its types from one backend


def gated_attention(x: Any, logits: Any) -> tuple[Any, dict[str, Any]]:
    """Gates the channels of maps by how strongly they answer where the semantic map lies.

    `S = softmax(M)` over all positions, `c_k = sum_ij X_ijk S_ij`, `g = relu(tanh(c))`, and
    `Omega = (1/C) sum_k g_k X_k`, the mean of the gated features `X g` over the channels (Fan et al.,
    Microscopic Fine-Grained Instance Classification Through Deep Attention, Eqs 1 and 2).

    Args:
        x: Float tensor `(B, h, w, C)`, the features X. Of features that are never negative no gate closes
            wholly; features from before a ReLU close the gates of channels with `c_k <= 0`.
        logits: Float tensor `(B, h, w)`, the map M.

    Returns:
        The gated features `(B, h, w, C)` in `x`'s dtype, and a dict of `semantic (B, h, w)`, `gates (B, C)`
        and `attention (B, h, w)`.

    Example:

    >>> x = ops.reshape(ops.convert_to_tensor([0.0, 2.0, 1.0, 1.0]), (1, 1, 2, 2))
    >>> gated, maps = gated_attention(x, ops.zeros((1, 1, 2)))
    >>> [round(float(gate), 3) for gate in maps["gates"][0]]
    [0.462, 0.905]
    """
    dtype = keras.backend.result_type(x.dtype, "float32")
    batch, height, width, channels = ops.shape(x)
    features = ops.reshape(ops.cast(x, dtype), (batch, height * width, channels))  # (B, h w, C)
    semantic = ops.softmax(ops.reshape(ops.cast(logits, dtype), (batch, 1, height * width)))  # (B, 1, h w)
    gates = ops.relu(ops.tanh(ops.matmul(semantic, features)))  # (B, 1, C)
    gated = features * gates
    maps = {
        "semantic": ops.reshape(semantic, (batch, height, width)),
        "gates": ops.reshape(gates, (batch, channels)),
        "attention": ops.reshape(ops.mean(gated, axis=-1), (batch, height, width)),
    }
    maps = {name: ops.cast(values, x.dtype) for name, values in maps.items()}
    return ops.cast(ops.reshape(gated, (batch, height, width, channels)), x.dtype), maps

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


def dilated_convolution(x: Any, kernel: Any, rate: int) -> Any:
    """The convolution "same" of maps by a 3 x 3 kernel with dilation: `y_p = sum_o x_(p + rate o) K_o`.

    It is taken as nine products of matrices. On a CPU TensorFlow is several times slower at its own one's
    gradient where maps are small and channels many, as at the end of a CNN.

    Args:
        x: Float tensor `(B, h, w, C)`.
        kernel: Float tensor `(3, 3, C, F)`.
        rate: Cells from one tap of the kernel to the next.

    Returns:
        Tensor `(B, h, w, F)`.

    Example:

    >>> x = ops.reshape(ops.convert_to_tensor([1.0, 2.0, 4.0, 8.0]), (1, 1, 4, 1))
    >>> [float(value) for value in dilated_convolution(x, ops.ones((3, 3, 1, 1)), rate=2)[0, 0, :, 0]]
    [5.0, 10.0, 5.0, 10.0]
    """
    _, height, width, _ = ops.shape(x)
    channels, filters = kernel.shape[2:]
    padded = ops.pad(x, ((0, 0), (rate, rate), (rate, rate), (0, 0)))
    taps = ops.unstack(ops.reshape(kernel, (9, channels, filters)), 9)
    places = [(row * rate, column * rate) for row in range(3) for column in range(3)]
    return sum(
        ops.matmul(padded[:, row : row + height, column : column + width], tap)
        for (row, column), tap in zip(places, taps, strict=True)
    )

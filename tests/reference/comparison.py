"""The papers' comparison modules: refined features and maps, by name."""

import numpy as np

from reference import Array, Weights, resize_bilinear

Answer = dict[str, Array]


def softmax(x: Array) -> Array:
    """Over the last axis."""
    shares = np.exp(x - x.max(axis=-1, keepdims=True))
    return shares / shares.sum(axis=-1, keepdims=True)


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def _rows(x: Array) -> Array:
    """`(B, H, W, C)` to `(B, HW, C)`."""
    return x.reshape(len(x), -1, x.shape[-1])


def _columns(x: Array) -> Array:
    """`(B, H, W, C)` to `(B, C, HW)`."""
    return _rows(x).swapaxes(1, 2)


def _answer(features: Array, **maps: Array) -> Answer:
    return {"features": features, "attention": features.mean(axis=-1), **maps}


def _positions(weights: Weights, x: Array) -> tuple[Array, Array]:
    """The mixtures of values and the affinity, by embedded queries and keys."""
    query, key, value = (_rows(x) @ weights[f"{name}/kernel"][0, 0] for name in ("query", "key", "value"))
    affinity = softmax(query @ key.swapaxes(1, 2))
    return (affinity @ value).reshape(*x.shape[:3], -1), affinity


def non_local(weights: Weights, x: Array) -> Answer:
    """Wang et al. 2018: z = W_z y + x, y = softmax(x^T W_theta^T W_phi x) g(x)."""
    mixed, affinity = _positions(weights, x)
    return _answer(x + mixed @ weights["output/kernel"][0, 0], affinity=affinity)


def trilinear(weights: Weights, x: Array) -> Answer:
    """Zheng et al. 2019: N(N(X) X^T) X."""
    columns = _columns(x)
    affinity = softmax(softmax(columns) @ columns.swapaxes(1, 2))
    return _answer((affinity @ columns).swapaxes(1, 2).reshape(x.shape), affinity=affinity)


def danet_channels(weights: Weights, x: Array) -> Answer:
    """Fu et al. 2019: the energy is taken from its row's maximum."""
    columns = _columns(x)
    energy = columns @ columns.swapaxes(1, 2)
    affinity = softmax(energy.max(axis=-1, keepdims=True) - energy)
    mixed = (affinity @ columns).swapaxes(1, 2).reshape(x.shape)
    return _answer(weights["scale"] * mixed + x, affinity=affinity)


def dual_attention(weights: Weights, x: Array) -> Answer:
    """Fu et al. 2019: E_position + E_channel."""
    mixed, positions = _positions(weights, x)
    channels = danet_channels({"scale": weights["channels/scale"]}, x)
    features = (weights["scale"] * mixed + x) + channels["features"]
    return _answer(features, positions=positions, channels=channels["affinity"])


def squeeze_excite(weights: Weights, x: Array) -> Answer:
    """Hu et al.: s = sigmoid(W_2 relu(W_1 z))."""
    squeezed = x.mean(axis=(1, 2)) @ weights["squeeze/kernel"]
    gates = sigmoid(np.maximum(squeezed, 0) @ weights["excite/kernel"])
    return _answer(x * gates[:, None, None], gates=gates)


def global_context(weights: Weights, x: Array) -> Answer:
    """Cao et al.: z_i = x_i + W_v2 relu(LN(W_v1 sum_j alpha_j x_j))."""
    shares = softmax((_rows(x) @ weights["logits/kernel"][0, 0])[..., 0])  # (B, HW)
    hidden = np.einsum("bn,bnc->bc", shares, _rows(x)) @ weights["squeeze/kernel"]
    mean, variance = hidden.mean(axis=-1, keepdims=True), hidden.var(axis=-1, keepdims=True)
    hidden = (hidden - mean) / np.sqrt(variance + 1e-5) * weights["norm/gamma"] + weights["norm/beta"]
    added = np.maximum(hidden, 0) @ weights["expand/kernel"]
    return _answer(x + added[:, None, None], context=shares.reshape(x.shape[:3]))


def attention_gate(weights: Weights, x: Array, vector: Array) -> Answer:
    """Jetley et al.: the sum of a_i l_i, a = softmax of <l_i, g>, or of <u, l_i + g>."""
    if "projection/kernel" in weights:
        vector = vector @ weights["projection/kernel"]
    local = _rows(x)
    if "u" in weights:
        compatibility = (local + vector[:, None]) @ weights["u"]
    else:
        compatibility = np.einsum("bnc,bc->bn", local, vector)
    shares = softmax(compatibility)
    return {
        "features": np.einsum("bn,bnc->bc", shares, local),
        "attention": shares.reshape(x.shape[:3]),
    }


def residual_attention(
    weights: Weights, x: Array, training: bool, units: tuple[int, int, int], depth: int
) -> Answer:
    """Wang et al. 2017: H = (1 + M) T between residual units."""
    p, t, r = units

    def chain(x: Array, name: str) -> Array:
        for i in range(sum(path.startswith(f"{name}/conv_") for path in weights)):
            x = np.maximum(_batch_norm(weights, x, f"{name}/bn_{i}", training), 0)
            x = _convolve_same(x, weights[f"{name}/conv_{i}/kernel"])
        return x

    def residual(x: Array, name: str, first: int, count: int) -> Array:
        for i in range(first, first + count):
            x = x + chain(x, f"{name}_{i}")
        return x

    def branch(x: Array, level: int) -> Array:
        below = residual(_max_pool(x), "down", level * r, r)
        if level < depth - 1:
            below = residual(below, "skip", level, 1) + branch(below, level + 1)
        return resize_bilinear(residual(below, "up", level * r, r), *x.shape[1:3])

    x = residual(x, "before", 0, p)
    mask = sigmoid(chain(branch(x, 0), "gate_0"))
    return _answer(residual((1 + mask) * residual(x, "trunk", 0, t), "after", 0, p), mask=mask)


def pixel_weights(weights: Weights, x: Array) -> Answer:
    """Xu et al., the baseline: each pixel times its weight."""
    return _answer(x * weights["pixels"], weights=weights["pixels"])


def _batch_norm(weights: Weights, x: Array, name: str, training: bool) -> Array:
    mean, variance = weights[f"{name}/moving_mean"], weights[f"{name}/moving_variance"]
    if training:
        mean, variance = x.mean(axis=(0, 1, 2)), x.var(axis=(0, 1, 2))
    return (x - mean) / np.sqrt(variance + 1e-3) * weights[f"{name}/gamma"] + weights[f"{name}/beta"]


def _convolve_same(x: Array, kernel: Array) -> Array:
    """Cross-correlation with an odd kernel and as many positions as before."""
    margin, (height, width) = len(kernel) // 2, x.shape[1:3]
    padded = np.pad(x, ((0, 0), (margin, margin), (margin, margin), (0, 0)))
    return sum(
        padded[:, row : row + height, column : column + width] @ kernel[row, column]
        for row in range(len(kernel))
        for column in range(len(kernel))
    )


def _max_pool(x: Array) -> Array:
    """3x3 windows at every second position, spread evenly over the map; an odd cell over goes last."""
    height, width = x.shape[1:3]
    padded = np.pad(
        x,
        ((0, 0), (height % 2, 1), (width % 2, 1), (0, 0)),
        constant_values=-np.inf,
    )
    rows, columns = (height + 1) // 2, (width + 1) // 2
    answer = np.empty((len(x), rows, columns, x.shape[-1]))
    for row in range(rows):
        for column in range(columns):
            window = padded[:, 2 * row : 2 * row + 3, 2 * column : 2 * column + 3]
            answer[:, row, column] = window.max(axis=(1, 2))
    return answer

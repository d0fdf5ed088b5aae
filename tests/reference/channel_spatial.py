"""C-Attn and S-Attn (Wu et al.), channels first as in the paper."""

import numpy as np

from reference import Array, Weights


def channel_attn(
    weights: Weights, x: Array, *, kernel_size: int = 4, strides: int = 4
) -> tuple[Array, Array]:
    """The answer (Eq. 6) and `D'` (Eq. 4), image by image."""
    answers, maps = [], []
    for image in x:
        query, key = (_strided(image, weights[name], kernel_size, strides) for name in ("query", "key"))
        features = image.reshape(-1, image.shape[-1]).T  # (C, N)
        value = weights["value"].T @ features
        scores = _softmax(query @ key.T, axis=0)  # D_cd = sum_n Q_cn K_dn, softmax over c
        answers.append((features + scores.T @ value).T.reshape(image.shape))
        maps.append(scores)
    return np.stack(answers), np.stack(maps)


def spatial_attn(weights: Weights, x: Array) -> tuple[Array, Array]:
    """The answer (Eq. 12) and the transposed `E'` (Eq. 10), image by image."""
    answers, maps = [], []
    for image in x:
        features = image.reshape(-1, image.shape[-1]).T  # (C, N)
        query, key, value = (weights[name].T @ features for name in ("query", "key", "value"))
        scores = _softmax(query.T @ key, axis=0)  # E_ij = Q_i . K_j, softmax over i
        answers.append((features + value @ scores).T.reshape(image.shape))  # sum_i E'_ij V_i
        maps.append(scores.T)
    return np.stack(answers), np.stack(maps)


def _softmax(x: Array, axis: int) -> Array:
    exponentials = np.exp(x - x.max(axis=axis, keepdims=True))
    return exponentials / exponentials.sum(axis=axis, keepdims=True)


def _strided(image: Array, kernel: Array, size: int, strides: int) -> Array:
    """The convolution's answer `(C, N')`, each cell from its window on the image padded with zeros."""
    cells = [-(-length // strides) for length in image.shape[:2]]
    missing = [
        max((count - 1) * strides + size - length, 0)
        for count, length in zip(cells, image.shape[:2], strict=True)
    ]
    image = np.pad(image, [(pad // 2, pad - pad // 2) for pad in missing] + [(0, 0)])
    columns = []
    for row in range(cells[0]):
        for column in range(cells[1]):
            window = image[row * strides :, column * strides :][:size, :size]
            columns.append(np.einsum("hwc,hwcd->d", window, kernel))
    return np.stack(columns, axis=1)

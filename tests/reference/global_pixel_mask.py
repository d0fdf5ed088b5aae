"""The global pixel mask (Xu et al.)."""

import numpy as np

from reference import Array, Weights, convolve_valid


def convolve_same(x: Array, kernel: Array, bias: Array) -> Array:
    """Cross-correlation with zeros around, odd kernels."""
    reach = len(kernel) // 2
    return convolve_valid(np.pad(x, ((0, 0), (reach, reach), (reach, reach), (0, 0))), kernel, bias)


def mask(weights: Weights, images: Array, dense: bool = False) -> Array:
    """`(1, H, W, 1)` from the training images `(N, H, W, C)`."""
    count = sum(name.startswith("kernel_") for name in weights)
    maps = [np.concatenate(list(images), axis=-1)[None]]  # (1, H, W, N C)
    for index in range(count):
        seen = np.concatenate(maps[1:], axis=-1) if dense and index else maps[-1]
        answer = convolve_same(seen, weights[f"kernel_{index}"], weights[f"bias_{index}"])
        maps.append(np.maximum(answer, 0) if index < count - 1 else answer)
    return 1 / (1 + np.exp(-maps[-1]))

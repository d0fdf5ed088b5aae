"""The layers' equations in float64 NumPy, written from the papers' text, plain and slow."""

import numpy as np

Array = np.ndarray
Weights = dict[str, Array]  # a weight's path below its layer -> its value


def resize_bilinear(x: Array, height: int, width: int) -> Array:
    """`(B, H, W, C)` to `(B, height, width, C)`: half-pixel centres, no antialiasing."""
    for axis, size in ((1, height), (2, width)):
        x = np.moveaxis(x, axis, 0)
        length, cells = x.shape[0], []
        for i in range(size):
            place = min(max((i + 0.5) * length / size - 0.5, 0), length - 1)
            low = int(np.floor(place))
            high = min(low + 1, length - 1)
            cells.append(x[low] * (1 - (place - low)) + x[high] * (place - low))
        x = np.moveaxis(np.stack(cells) if cells else x[:0], 0, axis)
    return x


def convolve_valid(x: Array, kernel: Array, bias: Array) -> Array:
    """Cross-correlation `(B, H, W, C) * (k, k, C, n)` with valid padding."""
    size, rows, columns = len(kernel), x.shape[1] - len(kernel) + 1, x.shape[2] - len(kernel) + 1
    answer = np.zeros((len(x), max(rows, 0), max(columns, 0), kernel.shape[-1])) + bias
    for row in range(size):
        for column in range(size):
            answer = answer + x[:, row : row + rows, column : column + columns] @ kernel[row, column]
    return answer

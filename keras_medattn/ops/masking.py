"""One mask for all images of a set: a small CNN whose channels are the set's images.

The first convolution has as many input channels as the set has colour planes. Its images never change, so
they are laid out once, by `pixel_tiles`, for a convolution that multiplies half as often.
"""

import functools
from typing import Any

import keras
import numpy as np

ops: Any = keras.ops  # a type checker would infer its types from one backend

HOST = "cpu:0"  # where tiles stay; one block at a time goes to the device
_POINTS = (0, 1, -1, 2, -2, 0.5, -0.5)
_ROWS = {3: 4, 5: 2, 7: 2}  # kernel size -> rows of a tile's answer: at most 8 points, for float32's sake
_POSITIONS, _NUMBERS = 1792, 2**24  # of a block, at most, where a row of tiles allows; fastest of 224 to 3584


@functools.cache
def tile_transforms(kernel_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The matrices of a convolution along one axis that multiplies less often (Toom and Cook; Winograd).

    For m answers of a kernel with r taps, `n = m + r - 1` inputs d and the taps w:
    `conv(d, w) = outputs ((taps w) * (inputs d))`, exactly: n products in place of `m r`. The kernel sizes 3,
    5 and 7 have m = 4, 2 and 2, so 2, 1.67 and 1.75 times fewer (Lavin and Gray, Fast Algorithms for
    Convolutional Neural Networks).

    Args:
        kernel_size: r: 3, 5 or 7.

    Returns:
        `inputs (n, n)`, `taps (n, r)` and `outputs (m, n)`, float64.

    Example:

    >>> inputs, taps, outputs = tile_transforms(3)
    >>> pixels, kernel = np.array([1.0, 2, 3, 4, 5, 7]), np.array([1.0, 0, -1])
    >>> (outputs @ ((taps @ kernel) * (inputs @ pixels))).round(6).tolist()
    [-2.0, -2.0, -2.0, -3.0]
    """
    rows = _ROWS[kernel_size]
    count = rows + kernel_size - 1
    points = np.array(_POINTS[: count - 1])  # and infinity, the last row or column of each
    others = [np.delete(points, i) for i in range(count - 1)]
    inputs = [np.append(np.poly(rest)[::-1], 0) for rest in others] + [np.poly(points)[::-1]]
    scales = np.array([np.prod(point - rest) for point, rest in zip(points, others, strict=True)])
    taps = np.vander(points, kernel_size, increasing=True) / scales[:, None]
    outputs = np.vander(points, rows, increasing=True).T
    return (
        np.stack(inputs),
        np.vstack([taps, np.eye(kernel_size)[-1]]),
        np.hstack([outputs, np.eye(rows)[:, -1:]]),
    )


def tiles_shape(height: int, width: int, features: int, kernel_size: int) -> tuple[int, ...]:
    """`(blocks, n, g, W, F)`: a block has g tiles of n transformed rows each."""
    rows, count = tile_transforms(kernel_size)[2].shape
    tiles = -(-height // rows)
    group = min(_POSITIONS // width, _NUMBERS // (count * width * features), tiles)
    group = max(group, 1)
    return -(-tiles // group), count, group, width, features


def pixel_tiles(pixels: np.ndarray, kernel_size: int, out: np.ndarray | None = None) -> np.ndarray:
    """Lays pixels out for `convolve_tiles`, on the host.

    Args:
        pixels: Array `(H, W, F)`.
        kernel_size: Size of the kernel that will go over them: 3, 5 or 7.
        out: Where to write, an array of `tiles_shape`; a new one of `pixels`' dtype by default.

    Returns:
        Array `(blocks, n, g, W, F)`: `n / m` times the numbers, 1.5 for a kernel of size 3.

    Example:

    >>> pixel_tiles(np.ones((224, 224, 6), "float32"), kernel_size=3).shape
    (7, 6, 8, 224, 6)
    """
    height, width, features = pixels.shape
    inputs, _, outputs = tile_transforms(kernel_size)
    rows, count = outputs.shape
    if out is None:
        out = np.empty(tiles_shape(height, width, features, kernel_size), pixels.dtype)
    blocks, _, group = out.shape[:3]
    before = kernel_size // 2
    after = blocks * group * rows + before - height
    padded = np.pad(pixels, ((before, after), (0, 0), (0, 0)))
    inputs = inputs.astype(keras.backend.result_type(str(pixels.dtype), "float32"))
    for tile in range(blocks * group):
        first = tile * rows
        out[tile // group, :, tile % group] = np.tensordot(inputs, padded[first : first + count], 1)
    return out


def convolve_tiles(tiles: Any, kernel: Any, height: int) -> Any:
    """The convolution "same" of the pixels behind `tiles`, block by block, forward and backward.

    `A[y, x, k] = sum_(i, j, f) P[y + i - p, x + j - p, f] W[i, j, f, k]` with `p = (r - 1) / 2` and zeros
    around P. The tiles stay where they are, on the host; on TensorFlow and PyTorch only a few blocks are on
    the device at a time. The gradient is passed back to A once; then each block adds its part of the
    kernel's.

    Args:
        tiles: Float tensor `(blocks, n, g, W, F)` of `pixel_tiles`. It gets no gradient.
        kernel: Float tensor `(r, r, F, K)`. Products are taken in the dtype of `tiles`.
        height: H, the rows of the pixels.

    Returns:
        Tensor `(1, H, W, K)` in float32, or float64 where the tiles are.

    Example:

    >>> tiles = ops.convert_to_tensor(pixel_tiles(np.ones((3, 4, 2), "float32"), kernel_size=3))
    >>> maps = convolve_tiles(tiles, ops.ones((3, 3, 2, 1)), height=3)
    >>> ops.convert_to_numpy(maps)[0, :, :, 0].round(4).tolist()
    [[8.0, 12.0, 12.0, 8.0], [12.0, 18.0, 18.0, 12.0], [8.0, 12.0, 12.0, 8.0]]
    """
    size, features, channels = kernel.shape[1:]
    blocks, count, group, width, _ = tiles.shape
    dtype = keras.backend.standardize_dtype(tiles.dtype)
    wide = keras.backend.result_type(dtype, "float32")
    _, taps, outputs = tile_transforms(size)
    taps, outputs = ops.convert_to_tensor(taps, wide), ops.convert_to_tensor(outputs, wide)
    rows, reach = outputs.shape[0], size // 2
    missing = blocks * group * rows - height  # rows that fill up the last block

    def block(index: Any) -> Any:
        with keras.device(HOST):
            here = tiles[index]
        return ops.reshape(ops.convert_to_tensor(here), (count, group * width, features))

    @ops.custom_gradient
    def convolve(weights: Any) -> Any:
        narrow = ops.cast(weights, dtype)

        def forward(index: Any) -> Any:
            products = ops.matmul(block(index), narrow)  # (n, g W, r K)
            products = ops.reshape(products, (count, group, width, size, channels))
            moved = [_moved(products[:, :, :, tap], reach - tap) for tap in range(size)]
            maps = sum(ops.cast(maps, wide) for maps in moved)  # (n, g, W, K)
            maps = ops.matmul(outputs, ops.reshape(maps, (count, -1)))  # (m, g W K)
            return ops.transpose(ops.reshape(maps, (rows, group, width, channels)), (1, 0, 2, 3))

        maps = ops.map(forward, ops.arange(blocks, dtype="int32"))  # (blocks, g, m, W, K)
        maps = ops.reshape(maps, (1, height + missing, width, channels))
        maps = maps[:, :height] if missing else maps

        def gradient(*args: Any, upstream: Any = None) -> Any:
            upstream = args[0] if upstream is None else upstream
            if missing:
                upstream = ops.pad(upstream, ((0, 0), (0, missing), (0, 0), (0, 0)))
            upstream = ops.reshape(upstream, (blocks, group, rows, width, channels))

            def backward(index: Any, total: Any) -> Any:
                maps = ops.reshape(ops.transpose(upstream[index], (1, 0, 2, 3)), (rows, -1))
                maps = ops.cast(ops.matmul(ops.transpose(outputs), maps), dtype)
                maps = ops.reshape(maps, (count, group, width, channels))
                maps = ops.concatenate([_moved(maps, tap - reach) for tap in range(size)], axis=-1)
                maps = ops.reshape(maps, (count, group * width, size * channels))
                pixels = ops.transpose(block(index), (0, 2, 1))
                return total + ops.cast(ops.matmul(pixels, maps), wide)

            return ops.fori_loop(0, blocks, backward, ops.zeros_like(weights))

        return maps, gradient

    weights = ops.tensordot(taps, ops.cast(kernel, wide), 1)  # (n, r, F, K)
    weights = ops.transpose(weights, (0, 2, 1, 3))
    return convolve(ops.reshape(weights, (count, features, size * channels)))


def _moved(maps: Any, columns: int) -> Any:
    """`(n, g, W, K)` moved to the right, with zeros for what comes in."""
    if columns == 0:
        return maps
    left, right = max(columns, 0), max(-columns, 0)
    padded = ops.pad(maps, ((0, 0), (0, 0), (left, right), (0, 0)))
    return padded[:, :, right : right + maps.shape[2]]


def pixel_mask(maps: Any, biases: Any, kernels: Any, dense: bool = False) -> Any:
    """The rest of the pixel CNN, after its first convolution (Xu et al., Eq. 1 and Fig. 3).

    `M = sigmoid(W_l * ReLU(... ReLU(A + b_0)) + b_l)`, convolutions "same".

    Args:
        maps: A, the first convolution of the pixels: `(1, H, W, K)`.
        biases: A bias for each convolution, the first one's at the start.
        kernels: The kernels `(r, r, channels, K')` of the convolutions after the first.
        dense: Whether each convolution reads the maps of all before it.

    Returns:
        The mask `(1, H, W, 1)`.

    Example:

    >>> maps = ops.reshape(ops.convert_to_tensor([2.0, -3.0]), (1, 1, 2, 1))
    >>> mask = pixel_mask(maps, [ops.zeros(1), ops.zeros(1)], [ops.ones((1, 1, 1, 1))])
    >>> [round(float(value), 3) for value in ops.reshape(mask, (-1,))]
    [0.881, 0.5]
    """
    features = maps = ops.relu(maps + biases[0])
    for index, (kernel, bias) in enumerate(zip(kernels, biases[1:], strict=True)):
        maps = ops.conv(features, kernel, padding="same", data_format="channels_last") + bias
        if index < len(kernels) - 1:
            maps = ops.relu(maps)
            features = ops.concatenate([features, maps], axis=-1) if dense else maps
    return ops.sigmoid(maps)


def reducing_matrix(pixels: np.ndarray, method: str, count: int, channels: int, seed: int = 0) -> np.ndarray:
    """Columns onto which the F features of the pixels are projected, orthonormal, on the host.

    A kernel over `P V` is a kernel `V w` over P: the layer keeps its meaning, with fewer kernels to choose
    from. `"subsample"` picks whole images, `"projection"` random directions, `"pca"` the principal axes of
    the features over the pixels, by subspace iteration (Halko et al., Finding Structure with Randomness).

    Args:
        pixels: P, array `(positions, F)` of F = N C features.
        method: "subsample", "projection" or "pca".
        count: Number of images to pick, or of directions.
        channels: C, the features of one image.
        seed: Of the choice, the directions, the iteration's start.

    Returns:
        V, array `(F, q)` in `pixels`' dtype: q = `count`, or `count C` for a subsample.

    Example:

    >>> reducing_matrix(np.ones((5, 6), "float32"), "subsample", 1, channels=3).sum(axis=0).tolist()
    [1.0, 1.0, 1.0]
    """
    rng, features = np.random.default_rng(seed), pixels.shape[1]
    if method == "subsample":
        images = np.sort(rng.choice(features // channels, count, replace=False))
        chosen = (images[:, None] * channels + np.arange(channels)).ravel()
        return np.eye(features, dtype=pixels.dtype)[:, chosen]
    if method == "projection":
        return np.linalg.qr(rng.normal(size=(features, count)))[0].astype(pixels.dtype)
    mean = pixels.mean(axis=0, dtype="float64").astype(pixels.dtype)
    axes = rng.normal(size=(features, min(count + 10, features))).astype(pixels.dtype)
    best = axes
    for _ in range(6):
        axes = np.linalg.qr(axes)[0]
        scores = pixels @ axes - mean @ axes
        turn = np.linalg.eigh((scores.T @ scores).astype("float64"))[1]  # the best last
        best = axes @ turn[:, ::-1][:, :count].astype(pixels.dtype)
        axes = pixels.T @ scores - np.outer(mean, scores.sum(axis=0))
    signs = np.sign(best[np.abs(best).argmax(axis=0), np.arange(count)])
    return best * signs


def share_of_variance(pixels: np.ndarray, matrix: np.ndarray) -> float:
    """The share of the features' variance over the positions that lies in orthonormal columns.

    Args:
        pixels: Array `(positions, F)`.
        matrix: Array `(F, q)`.

    Example:

    >>> pixels = np.array([[1.0, 3.0], [-1.0, -3.0]])
    >>> round(share_of_variance(pixels, np.array([[0.0], [1.0]])), 6)
    0.9
    """
    kept = (pixels @ matrix).var(axis=0, dtype="float64").sum()
    return float(kept / max(pixels.var(axis=0, dtype="float64").sum(), np.finfo("float64").tiny))

"""Bilinear resize to sizes that may be known only at run time."""

from fractions import Fraction
from typing import Any

import keras

ops: Any = keras.ops  # a type checker would infer its types from one backend


def scaled_size(size: Any, scale: float) -> Any:
    """The size of an axis after scaling, `floor(size * scale)`.

    The product is taken in whole numbers, so that an int and a tensor give the same answer and `0.1 * 30` is
    3.

    Args:
        size: An int, or an integer tensor where the size is known only at run time.
        scale: A positive factor; it is read as the nearest fraction with a denominator up to 1000.

    Returns:
        The scaled size, of the kind that was given.

    Raises:
        ValueError: If `scale` is not positive.

    Example:

    >>> scaled_size(7, 0.75)
    5
    """
    ratio = Fraction(scale).limit_denominator(1000)
    if ratio <= 0:
        raise ValueError(f"`scale` must be at least 0.001. Received: scale={scale}")
    return size * ratio.numerator // ratio.denominator


def resize_bilinear(x: Any, height: Any, width: Any) -> Any:
    """Resizes maps bilinearly, with half-pixel centres and no antialiasing.

    Cell `i` of the result reads the input at `(i + 0.5) * H / height - 0.5`, cut to `[0, H - 1]`, from the
    two cells around it; rows first, then columns. It equals `tf.image.resize(..., antialias=False)`. It is
    written as index arithmetic and gathers, so that sizes may be tensors and exported graphs need no resize
    operator.

    Args:
        x: Float tensor `(B, H, W, C)`. `H` and `W` must be below 32,768, as must `height` and `width`.
        height: The new number of rows, an int or an integer tensor.
        width: The new number of columns, an int or an integer tensor.

    Returns:
        Tensor `(B, height, width, C)` of `x`'s dtype.

    Raises:
        ValueError: If `x` is not of rank 4.

    Example:

    >>> x = ops.reshape(ops.arange(4, dtype="float32"), (1, 1, 4, 1))
    >>> [float(v) for v in ops.reshape(resize_bilinear(x, 1, 2), (-1,))]
    [0.5, 2.5]
    """
    if len(x.shape) != 4:
        raise ValueError(f"`x` must have the shape (B, H, W, C). Received: x.shape={tuple(x.shape)}")
    return _resize_axis(_resize_axis(x, 1, height), 2, width)


def _resize_axis(x: Any, axis: int, size: Any) -> Any:
    """Linear interpolation along one axis."""
    length = ops.shape(x)[axis]
    if isinstance(length, int) and isinstance(size, int) and length == size:
        return x
    # The position is the fraction `numerator / (2 * size)`: in whole numbers it has no rounding.
    numerator = ops.maximum((2 * ops.arange(size, dtype="int32") + 1) * length - size, 0)
    low = numerator // (2 * size)
    high = ops.minimum(low + 1, length - 1)
    fraction = ops.cast(numerator - low * (2 * size), x.dtype) / ops.cast(2 * size, x.dtype)
    shape = [1, 1, 1, 1]
    shape[axis] = -1
    before, after = ops.take(x, low, axis=axis), ops.take(x, high, axis=axis)
    return before + (after - before) * ops.reshape(fraction, shape)

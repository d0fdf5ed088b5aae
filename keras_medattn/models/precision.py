"""The dtype policy of layers that others make: Keras gives them the global one, not that of their model."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import keras


@contextmanager
def precision(policy: Any) -> Iterator[None]:
    """Gives layers that are made inside a dtype policy, unless they are told one; None: the global one.

    Example:
        >>> with precision("mixed_bfloat16"):
        ...     print(keras.layers.Dense(2).compute_dtype)
        bfloat16
        >>> keras.layers.Dense(2).compute_dtype
        'float32'
    """
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(before if policy is None else keras.dtype_policies.get(policy))
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


def exact() -> str:
    """The dtype for scores and probabilities of a layer that is made now: float32, or better.

    Example:
        >>> with precision("mixed_float16"):
        ...     exact()
        'float32'
    """
    return keras.backend.result_type(keras.config.dtype_policy().compute_dtype, "float32")


def at_own_precision(init: Callable[..., None]) -> Callable[..., None]:
    """A model's `__init__` whose layers get the policy of its `dtype`: reloaded, it is as it was saved.

    Example:
        >>> class Twice(keras.Model):
        ...     @at_own_precision
        ...     def __init__(self, **kwargs):
        ...         super().__init__(**kwargs)
        ...         self.dense = keras.layers.Dense(2)
        >>> Twice(dtype="mixed_float16").dense.compute_dtype
        'float16'
    """

    @functools.wraps(init)
    def inside(self: Any, *args: Any, **kwargs: Any) -> None:
        with precision(kwargs.get("dtype")):
            init(self, *args, **kwargs)

    inside.__signature__ = inspect.signature(init)  # type: ignore[attr-defined]  Keras looks at it
    return inside

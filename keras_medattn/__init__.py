"""Attention and multiple-instance learning for medical images in Keras.

Names are loaded when they are first used, so that `medattn --help` needs neither Keras nor TensorFlow.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["data", "explain", "export", "layers", "load_model", "metrics", "models", "ops", "serve", "train"]

if TYPE_CHECKING:
    from keras_medattn import data, explain, export, layers, metrics, models, ops, serve, train


def load_model(path: Any, **kwargs: Any) -> Any:
    """Load a model saved by Keras, with this package's layers and models registered.

    Code stored in a file is never run: Keras's `safe_mode` stays on.

    Args:
        path: a `.keras` file.
        **kwargs: passed on to `keras.models.load_model`.
    """
    import keras

    for name in ("layers", "models"):
        importlib.import_module(f"keras_medattn.{name}")
    return keras.models.load_model(path, **{"safe_mode": True, **kwargs})


def __getattr__(name: str) -> Any:
    if name in __all__:
        return importlib.import_module(f"keras_medattn.{name}")
    raise AttributeError(f"module 'keras_medattn' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

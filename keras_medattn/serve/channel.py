"""A way to a server, by gRPC or by REST: what both answer, and how often they are asked."""

import random
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np

T = TypeVar("T")
# Longest pauses before another try, in seconds.
_PAUSES = (0.2, 0.4, 0.8, 1.6)
# A server that is shutting down cancels what it has not picked up; one that has too much to do says so.
_PASSING = ("UNAVAILABLE", "CANCELLED", "RESOURCE_EXHAUSTED")
# A request that is too large stays so.
_TOO_LARGE = re.compile("larger than max|bytes at most")


class ServerError(RuntimeError):
    """The server could not be asked, or refused. `code` is the gRPC status's name."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class VersionStatus:
    """State of one version of the model (`AVAILABLE` when it answers) and, when it failed to load, why."""

    version: int
    state: str
    error: str | None = None


@dataclass(frozen=True)
class TensorInfo:
    """Type and shape of an input or output of a signature; -1 is any size."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class SignatureInfo:
    """Inputs and outputs of a signature by their names."""

    inputs: dict[str, TensorInfo]
    outputs: dict[str, TensorInfo]


class Channel(Protocol):
    """Asks one server once. What goes wrong is a `ServerError`; byte strings are arrays of objects."""

    def predict(
        self, model: str, signature: str, inputs: Mapping[str, np.ndarray], timeout: float
    ) -> dict[str, np.ndarray]:
        """Answers a signature's outputs."""
        ...

    def metadata(self, model: str, timeout: float) -> dict[str, SignatureInfo]:
        """Answers the model's signatures, TensorFlow's own for loading among them."""
        ...

    def status(self, model: str, timeout: float) -> list[VersionStatus]:
        """Answers the versions of the model that the server knows."""
        ...

    def close(self) -> None:
        """Closes the connection."""
        ...


def open_channel(target: str) -> Channel:
    """Answers the channel to "HOST:PORT" (gRPC) or "http://HOST:PORT" (REST).

    Raises:
        ValueError: the target is neither.
    """
    if re.fullmatch(r"https?://([^/\s?#:@]+|\[[0-9a-fA-F:]+\])(:[0-9]{1,5})?(/[^\s?#]*)?", target):
        from keras_medattn.serve.rest_channel import RestChannel

        return RestChannel(target)
    if re.fullmatch(r"[^/\s]+:[0-9]{1,5}", target):
        from keras_medattn.serve.grpc_channel import GrpcChannel

        return GrpcChannel(target)
    raise ValueError(
        "The server must be given as HOST:PORT for gRPC, as in 127.0.0.1:8500, or http://HOST:PORT for REST. "
        f"Received: {target!r}"
    )


def persistently(ask: Callable[[float], T], timeout: float) -> T:
    """Asks up to five times within `timeout` seconds, as long as what goes wrong may pass.

    Asking changes nothing at a server, so that asking twice does no harm. The pauses double, and are
    shortened at random, or clients that were refused together would come back together.

    Args:
        ask: takes the seconds that are left.
        timeout: seconds for all tries.

    Raises:
        ServerError: what the last try raised.
    """
    end = time.monotonic() + timeout
    for longest in _PAUSES:
        try:
            return ask(end - time.monotonic())
        except ServerError as error:
            pause = longest * random.uniform(0.5, 1.0)
            if error.code not in _PASSING or _TOO_LARGE.search(str(error)) or time.monotonic() + pause > end:
                raise
        time.sleep(pause)
    return ask(end - time.monotonic())

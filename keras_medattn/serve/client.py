"""A client for the local server and for TensorFlow Serving alike; it starts without TensorFlow."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from keras_medattn.data.headers import ImageError, check_header
from keras_medattn.serve.channel import (
    Channel,
    ServerError,
    SignatureInfo,
    VersionStatus,
    open_channel,
    persistently,
)

T = TypeVar("T")
# What another image may not meet; any other status ends the whole call.
_OF_ONE_IMAGE = ("INVALID_ARGUMENT", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED", "INTERNAL")


@dataclass(frozen=True)
class Prediction:
    """What the model says of one image; or, in `error`, why it says nothing.

    `attention` (h, w), `boxes` (K, 4) in pixels (x0, y0, x1, y1) of the image that was sent, and `weights`
    (K,) are there when the signature answers them, as `explain` does.

    Example:

    >>> Prediction("eye.png", "healthy", 0, np.array([0.75, 0.25])).as_dict()
    {'name': 'eye.png', 'class_name': 'healthy', 'label': 0, 'probabilities': [0.75, 0.25]}
    """

    name: str
    class_name: str | None = None
    label: int | None = None
    probabilities: np.ndarray | None = None
    attention: np.ndarray | None = None
    boxes: np.ndarray | None = None
    weights: np.ndarray | None = None
    error: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Answers what is there, ready for JSON."""
        return {
            key: value.tolist() if isinstance(value, np.ndarray) else value
            for key, value in vars(self).items()
            if value is not None
        }


class Client:
    """Asks a server about images, one request an image.

    What may pass is asked again, up to five times with pauses that double: a server that is not there yet or
    has too much to do. `timeout` bounds all of it. Over REST a client is for one thread at a time.

    Args:
        target: the server: "HOST:PORT" for gRPC, "http://HOST:PORT" for REST ("https://" where a proxy stands
            in front).
        model: the model's name. "default" is the name under which TensorFlow Serving serves a model that was
            given none; the local server takes it for its only model.
        timeout: seconds for each image, retries included.

    Raises:
        ValueError: the target is neither.

    Example:

    >>> client = Client("127.0.0.1:8500", "fundus")
    >>> [result] = client.predict([b""])
    >>> result.name, result.error
    ('image 0', 'image 0: the file is empty (0 bytes). Copy it again from its source')
    """

    def __init__(self, target: str, model: str = "default", timeout: float = 30.0) -> None:
        self.target = target
        self.model = model
        self.timeout = timeout
        self._channel = open_channel(target)

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection."""
        self._channel.close()

    def predict(
        self,
        images: Sequence[str | Path | bytes],
        signature: str = "serving_default",
        window: tuple[float, float] | None = None,
    ) -> list[Prediction]:
        """Answers one result an image, in their order. An image that fails carries its `error`.

        Args:
            images: paths, or the bytes of files. JPEG, PNG and BMP are sent as they are; other kinds are read
                here and sent as PNG, which keeps their pixels, so that the model itself resizes them.
            signature: one that takes `image_bytes`: `serving_default`, or `explain` for the evidence.
            window: the intensities (low, high) to show of images of 16 bits that are read here.

        Raises:
            ServerError: the server is not there, or does not have the model or the signature.
        """
        results = []
        for index, image in enumerate(images):
            name = f"image {index}" if isinstance(image, bytes) else str(image)
            try:
                results.append(self._predict(name, _sendable(image, name, window), signature))
            except ImageError as error:
                results.append(Prediction(name, error=str(error)))
            except ServerError as error:
                if error.code not in _OF_ONE_IMAGE:
                    raise
                results.append(Prediction(name, error=f"{name}: {error}"))
        return results

    def outputs(self, signature: str, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Answers a signature's outputs to inputs as they are; byte strings are arrays of objects.

        Raises:
            ServerError: the server is not there, or refuses.
        """
        return self._ask(lambda channel, left: channel.predict(self.model, signature, inputs, left))

    def metadata(self) -> dict[str, SignatureInfo]:
        """Answers the model's signatures by their names."""
        found = self._ask(lambda channel, left: channel.metadata(self.model, left))
        # TensorFlow's own, for loading.
        return {name: signature for name, signature in found.items() if not name.startswith("__")}

    def status(self) -> list[VersionStatus]:
        """Answers the state of each version of the model that the server knows."""
        return self._ask(lambda channel, left: channel.status(self.model, left))

    def _predict(self, name: str, data: bytes, signature: str) -> Prediction:
        out = self.outputs(signature, {"image_bytes": np.array([data], object)})
        if missing := {"probabilities", "label", "class_name"} - set(out):
            raise ServerError(
                "FAILED_PRECONDITION",
                f"Signature {signature!r} of {self.model!r} answers no {', '.join(sorted(missing))}: ask "
                f"a model that `medattn export` wrote. Received: {', '.join(sorted(out))}",
            )
        out = {key: array[0] for key, array in out.items()}
        evidence = {key: out.get(key) for key in ("attention", "boxes", "weights")}
        return Prediction(
            name, out["class_name"].decode(), int(out["label"]), out["probabilities"], **evidence
        )

    def _ask(self, ask: Callable[[Channel, float], T]) -> T:
        try:
            return persistently(lambda left: ask(self._channel, left), self.timeout)
        except ServerError as error:
            code, details = error.code, str(error)
        sentences = {
            "UNAVAILABLE": f"No server answers at {self.target}; is it started, and ready? ({details})",
            "DEADLINE_EXCEEDED": f"{self.target} gave no answer in {self.timeout:g} s: allow a longer one.",
            "NOT_FOUND": f"{self.target} serves no model {self.model!r}: give another name. ({details})",
            "INVALID_ARGUMENT": f"the model cannot take it: {details}",
            "RESOURCE_EXHAUSTED": f"too large, or too much at once, for {self.target}. ({details})",
        }
        raise ServerError(code, sentences.get(code, f"{self.target} answers {code}: {details}"))


def _sendable(image: str | Path | bytes, name: str, window: tuple[float, float] | None) -> bytes:
    """Answers bytes that the model decodes, after a look at the header for bombs and broken files."""
    if check_header(image if isinstance(image, bytes) else Path(image), name).kind in ("jpeg", "png", "bmp"):
        return image if isinstance(image, bytes) else Path(image).read_bytes()
    if isinstance(image, bytes):
        raise ImageError(
            f"{name}: bytes must be those of a JPEG, PNG or BMP file. Give the path of other kinds"
        )
    from PIL import Image

    from keras_medattn.data.readers import read

    png = io.BytesIO()
    Image.fromarray(read(image, window)).save(png, "PNG", compress_level=1)
    return png.getvalue()

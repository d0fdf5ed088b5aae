"""A client for the local server and for TensorFlow Serving alike; it starts without TensorFlow."""

import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from keras_medattn.data.headers import ImageError, check_header
from keras_medattn.serve.protos import (
    get_model_metadata_pb2,
    get_model_status_pb2,
    grpc,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_service_pb2_grpc,
    string_tensor,
    to_array,
    types_pb2,
)

_MAX_MESSAGE_BYTES = 1 << 30
# gRPC retries by itself: a Predict changes nothing, so asking twice does no harm.
_RETRY = {
    "maxAttempts": 5,
    "initialBackoff": "0.2s",
    "maxBackoff": "2s",
    "backoffMultiplier": 2,
    # A server that is shutting down cancels what it has not picked up.
    "retryableStatusCodes": ["UNAVAILABLE", "CANCELLED"],
}
# What another image may not meet; any other status ends the whole call.
_OF_ONE_IMAGE = ("INVALID_ARGUMENT", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED", "INTERNAL")


class ServerError(RuntimeError):
    """The server could not be asked, or refused. `code` is the gRPC status's name."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


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


class Client:
    """Asks a server about images, one request an image.

    Args:
        target: the server, as "HOST:PORT".
        model: the model's name. "default" is the name under which TensorFlow Serving serves a model that was
            given none; the local server takes it for its only model.
        timeout: seconds for each request, retries included.

    Raises:
        ValueError: the target is not HOST:PORT.

    Example:

    >>> client = Client("127.0.0.1:8500", "fundus")
    >>> [result] = client.predict([b""])
    >>> result.name, result.error
    ('image 0', 'image 0: the file is empty (0 bytes). Copy it again from its source')
    """

    def __init__(self, target: str, model: str = "default", timeout: float = 30.0) -> None:
        if not re.fullmatch(r"[^/\s]+:[0-9]{1,5}", target):
            raise ValueError(
                f"The server must be given as HOST:PORT, as in 127.0.0.1:8500. Received: {target!r}"
            )
        self.target = target
        self.model = model
        self.timeout = timeout
        self._channel = grpc.insecure_channel(
            target,
            options=[
                ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
                ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
                (
                    "grpc.service_config",
                    json.dumps({"methodConfig": [{"name": [{}], "retryPolicy": _RETRY}]}),
                ),
                # Larger requests would not be retried.
                ("grpc.per_rpc_retry_buffer_size", _MAX_MESSAGE_BYTES),
                ("grpc.initial_reconnect_backoff_ms", 200),
                ("grpc.min_reconnect_backoff_ms", 200),
            ],
        )
        self._predictions = prediction_service_pb2_grpc.PredictionServiceStub(self._channel)
        self._models = model_service_pb2_grpc.ModelServiceStub(self._channel)

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

    def metadata(self) -> dict[str, SignatureInfo]:
        """Answers the model's signatures by their names."""
        request = get_model_metadata_pb2.GetModelMetadataRequest(metadata_field=["signature_def"])
        request.model_spec.name = self.model
        response = self._ask(self._predictions.GetModelMetadata, request)
        signatures = get_model_metadata_pb2.SignatureDefMap()
        response.metadata["signature_def"].Unpack(signatures)
        return {
            name: SignatureInfo(_tensors(signature.inputs), _tensors(signature.outputs))
            for name, signature in signatures.signature_def.items()
            # TensorFlow's own, for loading.
            if not name.startswith("__")
        }

    def status(self) -> list[VersionStatus]:
        """Answers the state of each version of the model that the server knows."""
        request = get_model_status_pb2.GetModelStatusRequest()
        request.model_spec.name = self.model
        states = get_model_status_pb2.ModelVersionStatus.State
        return [
            VersionStatus(s.version, states.Name(s.state), s.status.error_message or None)
            for s in self._ask(self._models.GetModelStatus, request).model_version_status
        ]

    def _predict(self, name: str, data: bytes, signature: str) -> Prediction:
        request = predict_pb2.PredictRequest()
        request.model_spec.name = self.model
        request.model_spec.signature_name = signature
        request.inputs["image_bytes"].CopyFrom(string_tensor([data]))
        response = self._ask(self._predictions.Predict, request)
        out = {key: to_array(tensor)[0] for key, tensor in response.outputs.items()}
        if missing := {"probabilities", "label", "class_name"} - set(out):
            raise ServerError(
                "FAILED_PRECONDITION",
                f"Signature {signature!r} of {self.model!r} answers no {', '.join(sorted(missing))}: ask "
                f"a model that `medattn export` wrote. Received: {', '.join(sorted(out))}",
            )
        evidence = {key: out.get(key) for key in ("attention", "boxes", "weights")}
        return Prediction(
            name, out["class_name"].decode(), int(out["label"]), out["probabilities"], **evidence
        )

    def _ask(self, method: Any, request: Any) -> Any:
        try:
            return method(request, timeout=self.timeout)
        except grpc.RpcError as error:
            code, details = error.code().name, error.details()  # type: ignore[attr-defined]
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


def _tensors(infos: Any) -> dict[str, TensorInfo]:
    return {
        name: TensorInfo(
            types_pb2.DataType.Name(info.dtype).removeprefix("DT_").lower(),
            tuple(d.size for d in info.tensor_shape.dim),
        )
        for name, info in infos.items()
    }

"""TensorFlow Serving's REST, from the client's side: the standard library and NumPy alone."""

import base64
import http.client
import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any
from urllib.parse import quote, urlsplit

import numpy as np

from keras_medattn.serve.channel import ServerError, SignatureInfo, TensorInfo, VersionStatus

# TensorFlow Serving's, and what proxies add; 400 is INVALID_ARGUMENT and FAILED_PRECONDITION alike.
_CODES = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    413: "RESOURCE_EXHAUSTED",
    429: "RESOURCE_EXHAUSTED",
    499: "CANCELLED",
    501: "UNIMPLEMENTED",
    502: "UNAVAILABLE",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}


class RestChannel:
    """A `Channel` to "http://HOST:PORT" or "https://HOST/PREFIX", for one thread at a time."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._connection = kind(parts.netloc)
        self._models = f"{parts.path.rstrip('/')}/v1/models/"

    def close(self) -> None:
        """As in `Channel`, like all here."""
        self._connection.close()

    def predict(
        self, model: str, signature: str, inputs: Mapping[str, np.ndarray], timeout: float
    ) -> dict[str, np.ndarray]:
        columns = {name: _plain(array) for name, array in inputs.items()}
        body = json.dumps({"signature_name": signature, "inputs": columns}).encode()
        outputs = self._ask(f"{model}:predict", "outputs", timeout, body)
        if not isinstance(outputs, dict):  # of a single output TensorFlow Serving does not say the name
            [name] = self.metadata(model, timeout)[signature].outputs
            outputs = {name: outputs}
        return _arrays(outputs)

    def metadata(self, model: str, timeout: float) -> dict[str, SignatureInfo]:
        signatures = self._ask(f"{model}/metadata", "metadata", timeout)["signature_def"]["signature_def"]
        return {
            name: SignatureInfo(_tensors(signature["inputs"]), _tensors(signature["outputs"]))
            for name, signature in signatures.items()
        }

    def status(self, model: str, timeout: float) -> list[VersionStatus]:
        return [
            VersionStatus(int(one["version"]), one["state"], one["status"]["error_message"] or None)
            for one in self._ask(model, "model_version_status", timeout)
        ]

    def _ask(self, what: str, key: str, timeout: float, body: bytes | None = None) -> Any:
        """Answers what stands under `key` in the answer."""
        connection = self._connection
        connection.timeout = max(timeout, 0.001)
        if connection.sock:
            connection.sock.settimeout(connection.timeout)
        path = self._models + quote(what, safe=":/")
        try:
            with suppress(BrokenPipeError):  # who refuses a request unread has answered all the same
                connection.request("POST" if body else "GET", path, body)
            response = connection.getresponse()
            text = response.read().decode("utf-8", "replace")
        except TimeoutError:
            connection.close()
            raise ServerError("DEADLINE_EXCEEDED", "") from None
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise ServerError("UNAVAILABLE", str(error) or type(error).__name__) from None
        try:
            answer = json.loads(text)
            if response.status == 200:
                return answer[key]
            reason = answer["error"]
        except (ValueError, KeyError, TypeError):  # a proxy's page, or no HTTP server of this kind
            reason = f"HTTP {response.status} {response.reason}: {text[:200]!r}"
        raise ServerError(_CODES.get(response.status, "UNKNOWN"), reason)


def _plain(array: np.ndarray) -> Any:
    if array.dtype == object:
        return [{"b64": base64.b64encode(data).decode()} for data in array]
    return array.tolist()


def _arrays(outputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """NumPy's arrays, of gRPC's types as far as JSON tells: numbers with a point are float32."""
    found = {}
    for name, value in outputs.items():
        array = np.array(value)
        if array.dtype.kind == "U":
            array = np.array([text.encode() for text in array.ravel()], object).reshape(array.shape)
        found[name] = array.astype(np.float32) if array.dtype.kind == "f" else array
    return found


def _tensors(infos: Mapping[str, Any]) -> dict[str, TensorInfo]:
    return {
        name: TensorInfo(
            info["dtype"].removeprefix("DT_").lower(),
            tuple(int(d["size"]) for d in info["tensor_shape"]["dim"]),
        )
        for name, info in infos.items()
    }

"""A loaded model, and what a request to it answers. No network here."""

import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2

from keras_medattn.data.headers import MAX_PIXELS, ImageError, check_header
from keras_medattn.serve.protos import grpc, predict_pb2, prediction_log_pb2

# A TensorProto may say its shape in a few bytes: 1 GiB bounds what one request can make the server allocate.
MAX_TENSOR_BYTES = 1 << 30
# As TensorFlow Serving.
_MAX_WARMUP = 1000
# The signature of a request that names none.
DEFAULT_SIGNATURE = "serving_default"


class RequestError(Exception):
    """A request that cannot be answered: a gRPC status code, and a message for the one who asked."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code


def invalid(message: str) -> RequestError:
    """Answers a `RequestError` with code INVALID_ARGUMENT."""
    return RequestError(grpc.StatusCode.INVALID_ARGUMENT, message)


class _Signature(NamedTuple):
    function: Any
    inputs: dict[str, tf.TensorSpec]
    outputs: frozenset[str]


class Servable:
    """One version of one exported model, loaded and warmed up.

    Args:
        name: the model's name.
        version: its version number.
        path: the SavedModel's folder.

    Raises:
        OSError, ValueError, tf.errors.OpError, RequestError: the model does not load, or does not answer its
            own warmup requests (assets.extra/tf_serving_warmup_requests, a TFRecord of `PredictionLog`s).
    """

    def __init__(self, name: str, version: int, path: Path) -> None:
        self.name = name
        self.version = version
        # Held for life: the signatures refer to its variables weakly.
        self._model = tf.saved_model.load(str(path))
        # TensorFlow takes .1 ms to answer what a signature's inputs and outputs are: asked once.
        self._signatures = {
            key: _Signature(
                function, function.structured_input_signature[1], frozenset(function.structured_outputs)
            )
            for key, function in self._model.signatures.items()
        }
        saved = saved_model_pb2.SavedModel.FromString((path / "saved_model.pb").read_bytes())
        self.signature_defs = dict(saved.meta_graphs[0].signature_def)
        about = path / "assets.extra" / "medattn.json"
        settings = json.loads(about.read_text("utf-8")) if about.exists() else {}
        self._max_pixels = int(settings.get("max_pixels", MAX_PIXELS))
        warmup = path / "assets.extra" / "tf_serving_warmup_requests"
        if warmup.exists():
            for count, record in enumerate(tf.data.TFRecordDataset(str(warmup)).as_numpy_iterator(), 1):
                if count > _MAX_WARMUP:
                    raise ValueError(
                        f"Number of warmup records exceeds the maximum ({_MAX_WARMUP}) at {warmup}"
                    )
                entry = prediction_log_pb2.PredictionLog.FromString(record)
                if entry.WhichOneof("log_type") != "predict_log":
                    raise ValueError(f"Unsupported log_type for warmup: {entry.WhichOneof('log_type')}")
                self.predict(entry.predict_log.request)

    def predict(self, request: Any) -> Any:
        """Answers the `PredictResponse` to a `PredictRequest`.

        Raises:
            RequestError: the signature is unknown, or the inputs do not fit it or cannot be decoded.
        """
        key = request.model_spec.signature_name or DEFAULT_SIGNATURE
        specs = self.inputs(key)
        _check_names(specs, request.inputs)
        arrays = {name: _array(name, proto, specs[name]) for name, proto in request.inputs.items()}
        response = predict_pb2.PredictResponse()
        response.model_spec.name = self.name
        response.model_spec.version.value = self.version
        response.model_spec.signature_name = key
        for name, array in self.run(key, arrays, request.output_filter).items():
            response.outputs[name].CopyFrom(tf.make_tensor_proto(array))
        return response

    def inputs(self, key: str) -> dict[str, tf.TensorSpec]:
        """Answers what a signature takes.

        Raises:
            RequestError: the signature is unknown.
        """
        if key not in self._signatures:
            raise RequestError(
                grpc.StatusCode.FAILED_PRECONDITION,
                f'Serving signature name: "{key}" not found in signature def',
            )
        return self._signatures[key].inputs

    def run(
        self, key: str, arrays: dict[str, np.ndarray], wanted: Iterable[str] = ()
    ) -> dict[str, np.ndarray]:
        """Answers a signature's outputs, all or the wanted ones.

        Raises:
            RequestError: an output is unknown, or an input does not fit or cannot be decoded.
        """
        signature = self._signatures[key]
        wanted = frozenset(wanted) or signature.outputs
        if unknown := wanted - signature.outputs:
            raise invalid(
                f"output tensor alias not found in signature: {_names(unknown)} "
                f"Outputs expected to be in the set {{{_names(signature.outputs)}}}."
            )
        for name, array in arrays.items():
            _check(name, signature.inputs[name], signature.inputs[name].dtype.as_datatype_enum, array.shape)
        if "image_bytes" in arrays:
            self._check_headers(arrays["image_bytes"])
        inputs = {name: tf.constant(array, signature.inputs[name].dtype) for name, array in arrays.items()}
        try:
            outputs = signature.function(**inputs)
        except tf.errors.OpError as error:
            raise RequestError(_code(error), trimmed(error.message)) from error
        return {name: outputs[name].numpy() for name in wanted}

    def _check_headers(self, images: np.ndarray) -> None:
        """Refuses a bomb before anything decodes it."""
        for index, data in enumerate(images.ravel()):
            try:
                check_header(data, f"image_bytes[{index}]", self._max_pixels)
            except ImageError as error:
                raise invalid(str(error)) from error


def _names(names: Any) -> str:
    return ",".join(sorted(names))


def _check_names(specs: dict[str, tf.TensorSpec], sent: Any) -> None:
    if set(sent) != set(specs):
        raise invalid(
            f"input size does not match signature: {len(sent)}!={len(specs)} "
            f"len({{{_names(sent)}}}) != len({{{_names(specs)}}}). "
            f"Sent extra: {{{_names(set(sent) - set(specs))}}}. "
            f"Missing but required: {{{_names(set(specs) - set(sent))}}}."
        )


def _check(name: str, spec: tf.TensorSpec, dtype: int, shape: Sequence[int]) -> None:
    """Refuses what a signature does not take."""
    if (
        dtype != spec.dtype.as_datatype_enum
        or min(shape, default=0) < 0
        or not spec.shape.is_compatible_with(shape)
    ):
        raise invalid(
            f'input "{name}" must be {spec.dtype.name} of shape {spec.shape}. '
            f"Received: {_dtype_name(dtype)} of shape {list(shape)}"
        )


def _array(name: str, proto: Any, spec: tf.TensorSpec) -> np.ndarray:
    """Answers the array of one input."""
    shape = [d.size for d in proto.tensor_shape.dim]
    _check(name, spec, proto.dtype, [-1] if proto.tensor_shape.unknown_rank else shape)
    size = math.prod(shape)
    if size * spec.dtype.size > MAX_TENSOR_BYTES:
        raise invalid(f'input "{name}" may have {MAX_TENSOR_BYTES} bytes at most. Received: shape {shape}')
    # make_ndarray repeats the last of too few values: right for a constant, wrong for images.
    if spec.dtype == tf.string and len(proto.string_val) != size:
        raise invalid(
            f'input "{name}" of shape {shape} needs {size} values. Received: {len(proto.string_val)}'
        )
    try:
        if proto.tensor_content and spec.dtype != tf.string:
            # make_ndarray would copy it.
            return np.frombuffer(proto.tensor_content, spec.dtype.as_numpy_dtype).reshape(shape)
        return tf.make_ndarray(proto)
    except (ValueError, TypeError) as error:
        raise invalid(f'input "{name}": the content does not fit shape {shape} ({error})') from error


def _dtype_name(number: int) -> str:
    try:
        return tf.dtypes.as_dtype(number).name
    except TypeError:
        return f"dtype {number}"


def _code(error: tf.errors.OpError) -> grpc.StatusCode:
    # TensorFlow's error codes are gRPC's.
    return next(code for code in grpc.StatusCode if code.value[0] == error.error_code)


def trimmed(message: str) -> str:
    """Answers TensorFlow's own words, without the nodes and places that only its developers can use."""
    message = re.sub(r"^.*?<stack traces unavailable>\n|^Graph execution error:\s*", "", message, flags=re.S)
    message = re.split(r"\s*\[\[\{\{node|\s*\[Op:", message)[0]
    return " ".join(message.split())

"""TensorFlow Serving's gRPC, from the client's side."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from keras_medattn.serve.channel import ServerError, SignatureInfo, TensorInfo, VersionStatus
from keras_medattn.serve.protos import (
    get_model_metadata_pb2,
    get_model_status_pb2,
    grpc,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_service_pb2_grpc,
    to_array,
    to_tensor,
    types_pb2,
)

_MAX_MESSAGE_BYTES = 1 << 30


class GrpcChannel:
    """A `Channel` to "HOST:PORT"; threads may share it."""

    def __init__(self, target: str) -> None:
        self._channel = grpc.insecure_channel(
            target,
            options=[
                ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
                ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
                # As often as `persistently` asks: until it has tried again, a channel refuses by itself.
                ("grpc.initial_reconnect_backoff_ms", 200),
                ("grpc.max_reconnect_backoff_ms", 1000),
            ],
        )
        self._predictions = prediction_service_pb2_grpc.PredictionServiceStub(self._channel)
        self._models = model_service_pb2_grpc.ModelServiceStub(self._channel)

    def close(self) -> None:
        """As in `Channel`, like all here."""
        self._channel.close()

    def predict(
        self, model: str, signature: str, inputs: Mapping[str, np.ndarray], timeout: float
    ) -> dict[str, np.ndarray]:
        request = predict_pb2.PredictRequest()
        request.model_spec.name = model
        request.model_spec.signature_name = signature
        for name, array in inputs.items():
            request.inputs[name].CopyFrom(to_tensor(array))
        response = _ask(self._predictions.Predict, request, timeout)
        return {name: to_array(tensor) for name, tensor in response.outputs.items()}

    def metadata(self, model: str, timeout: float) -> dict[str, SignatureInfo]:
        request = get_model_metadata_pb2.GetModelMetadataRequest(metadata_field=["signature_def"])
        request.model_spec.name = model
        response = _ask(self._predictions.GetModelMetadata, request, timeout)
        signatures = get_model_metadata_pb2.SignatureDefMap()
        response.metadata["signature_def"].Unpack(signatures)
        return {
            name: SignatureInfo(_tensors(signature.inputs), _tensors(signature.outputs))
            for name, signature in signatures.signature_def.items()
        }

    def status(self, model: str, timeout: float) -> list[VersionStatus]:
        request = get_model_status_pb2.GetModelStatusRequest()
        request.model_spec.name = model
        states = get_model_status_pb2.ModelVersionStatus.State
        return [
            VersionStatus(s.version, states.Name(s.state), s.status.error_message or None)
            for s in _ask(self._models.GetModelStatus, request, timeout).model_version_status
        ]


def _ask(method: Any, request: Any, timeout: float) -> Any:
    try:
        return method(request, timeout=timeout)
    except grpc.RpcError as error:
        raise ServerError(error.code().name, error.details()) from None  # type: ignore[attr-defined]


def _tensors(infos: Any) -> dict[str, TensorInfo]:
    return {
        name: TensorInfo(
            types_pb2.DataType.Name(info.dtype).removeprefix("DT_").lower(),
            tuple(d.size for d in info.tensor_shape.dim),
        )
        for name, info in infos.items()
    }

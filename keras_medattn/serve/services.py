"""The gRPC services: TensorFlow Serving's two, and health."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from keras_medattn.serve.protos import (
    get_model_metadata_pb2,
    get_model_status_pb2,
    grpc,
    health,
    model_service_pb2_grpc,
    prediction_service_pb2_grpc,
)
from keras_medattn.serve.servables import Repository, RequestError, invalid

log = logging.getLogger("keras_medattn.serve")

# gRPC sends an error's text in a header of at most 8 KiB, where a character may take 12 bytes.
_MAX_ERROR_TEXT = 600


@contextmanager
def _answering(context: grpc.ServicerContext, model: str) -> Iterator[None]:
    """Turns what goes wrong into a gRPC status and a line of the log."""
    try:
        yield
    except RequestError as error:
        text = str(error)[:_MAX_ERROR_TEXT]
        log.warning("model %r: %s %r", model[:100], error.code.name, text)
        context.abort(error.code, text)
    except Exception:
        log.exception("model %r: INTERNAL", model[:100])
        context.abort(grpc.StatusCode.INTERNAL, "The server failed to answer; its log says why.")


class Prediction(prediction_service_pb2_grpc.PredictionServiceServicer):
    """`PredictionService`: Predict and GetModelMetadata; what else it has answers UNIMPLEMENTED."""

    def __init__(self, models: Repository) -> None:
        self._models = models

    def Predict(self, request: Any, context: grpc.ServicerContext) -> Any:
        """Runs a signature, unless the asker gave up while waiting for a worker."""
        if not context.is_active():
            return None
        with _answering(context, request.model_spec.name):
            return self._models.find(request.model_spec).predict(request)

    def GetModelMetadata(self, request: Any, context: grpc.ServicerContext) -> Any:
        """Answers the model's signatures."""
        with _answering(context, request.model_spec.name):
            if not request.metadata_field:
                raise invalid("GetModelMetadataRequest must specify at least one metadata_field")
            if unknown := set(request.metadata_field) - {"signature_def"}:
                raise invalid(f"Metadata field {sorted(unknown)[0]} is not supported")
            model = self._models.find(request.model_spec)
            signatures = get_model_metadata_pb2.SignatureDefMap()
            for name, signature in model.signature_defs.items():
                signatures.signature_def[name].CopyFrom(signature)
            response = get_model_metadata_pb2.GetModelMetadataResponse()
            response.model_spec.name = model.name
            response.model_spec.version.value = model.version
            response.metadata["signature_def"].Pack(signatures)
            return response


class Status(model_service_pb2_grpc.ModelServiceServicer):
    """`ModelService`: GetModelStatus."""

    def __init__(self, models: Repository) -> None:
        self._models = models

    def GetModelStatus(self, request: Any, context: grpc.ServicerContext) -> Any:
        """Answers the state of the version that is served, or was to be."""
        spec = request.model_spec
        with _answering(context, spec.name):
            name = self._models.resolve(spec.name)
            version = self._models.versions.get(name)
            if version is None:
                text = f"Could not find any versions of model {spec.name}"
                raise RequestError(grpc.StatusCode.NOT_FOUND, text)
            if spec.HasField("version") and spec.version.value != version:
                text = f"Could not find version {spec.version.value} of model {spec.name}"
                raise RequestError(grpc.StatusCode.NOT_FOUND, text)
            response = get_model_status_pb2.GetModelStatusResponse()
            status = response.model_version_status.add(version=version)
            if name in self._models.loaded:
                status.state = get_model_status_pb2.ModelVersionStatus.AVAILABLE
            else:
                status.state = get_model_status_pb2.ModelVersionStatus.END
                status.status.error_code = grpc.StatusCode.UNKNOWN.value[0]
                status.status.error_message = self._models.errors[name][:_MAX_ERROR_TEXT]
            return response


class Health(health.HealthServicer):
    """gRPC health whose streams end when the server leaves: they would keep it for its whole grace."""

    def __init__(self) -> None:
        super().__init__()
        self._ends: set[Callable[[None], None]] = set()

    def Watch(self, request: Any, context: grpc.ServicerContext, send_response_callback: Any = None) -> Any:
        """Sends the status, and each change of it."""
        self._ends.add(send_response_callback)
        context.add_callback(lambda: self._ends.discard(send_response_callback))
        return super().Watch(request, context, send_response_callback)

    def leave(self) -> None:
        """Says NOT_SERVING to all who watch, and ends their streams."""
        self.enter_graceful_shutdown()
        for end in list(self._ends):
            end(None)

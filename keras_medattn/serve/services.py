"""The gRPC services: TensorFlow Serving's two, and health."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from keras_medattn.serve.calls import MAX_ERROR_TEXT, Calls
from keras_medattn.serve.protos import (
    get_model_metadata_pb2,
    get_model_status_pb2,
    grpc,
    health,
    model_management_pb2,
    model_service_pb2_grpc,
    prediction_service_pb2_grpc,
)
from keras_medattn.serve.repository import Repository
from keras_medattn.serve.servables import DEFAULT_SIGNATURE, RequestError, invalid


def metadata(models: Repository, request: Any) -> Any:
    """Answers a `GetModelMetadataResponse`: the signatures of a model.

    Raises:
        RequestError: no such model or field.
    """
    if not request.metadata_field:
        raise invalid("GetModelMetadataRequest must specify at least one metadata_field")
    if unknown := set(request.metadata_field) - {"signature_def"}:
        raise invalid(f"Metadata field {sorted(unknown)[0]} is not supported")
    model = models.find(request.model_spec)
    signatures = get_model_metadata_pb2.SignatureDefMap()
    for name, signature in model.signature_defs.items():
        signatures.signature_def[name].CopyFrom(signature)
    response = get_model_metadata_pb2.GetModelMetadataResponse()
    response.model_spec.name = model.name
    response.model_spec.version.value = model.version
    response.metadata["signature_def"].Pack(signatures)
    return response


def status(models: Repository, request: Any) -> Any:
    """Answers a `GetModelStatusResponse`: the state of each version, or of the one that is asked for.

    Raises:
        RequestError: no such model or version.
    """
    spec = request.model_spec
    versions = models.versions.get(models.resolve(spec.name), {})
    if not versions:
        text = f"Could not find any versions of model {spec.name}"
        raise RequestError(grpc.StatusCode.NOT_FOUND, text)
    if spec.HasField("version") or spec.HasField("version_label"):
        number = models.number(spec)
        if number not in versions:
            text = f"Could not find version {number} of model {spec.name}"
            raise RequestError(grpc.StatusCode.NOT_FOUND, text)
        versions = {number: versions[number]}
    response = get_model_status_pb2.GetModelStatusResponse()
    for number, version in sorted(versions.items(), reverse=True):
        status = response.model_version_status.add(version=number)
        status.state = get_model_status_pb2.ModelVersionStatus.State.Value(version.state)
        # Set even when it is OK, as TensorFlow Serving does.
        code = grpc.StatusCode.UNKNOWN if version.error else grpc.StatusCode.OK
        status.status.error_code = code.value[0]
        status.status.error_message = version.error[:MAX_ERROR_TEXT]
    return response


def refuse_method(models: Repository, spec: Any, kind: str) -> None:
    """Raises TensorFlow Serving's answer when a signature is asked to classify or to regress.

    Our signatures all predict, and so would it answer.

    Args:
        models: where the model is looked for.
        spec: the `ModelSpec` that was sent.
        kind: "classification" or "regression".
    """
    model = models.find(spec)
    key = spec.signature_name or DEFAULT_SIGNATURE
    if key not in model.signature_defs:
        raise invalid(f"No signature was found with the name: {key}")
    wanted = {"classification": "classify", "regression": "regress"}[kind]
    raise invalid(
        f"Expected {kind} signature method_name to be tensorflow/serving/{wanted}. "
        f"Was: {model.signature_defs[key].method_name}"
    )


@contextmanager
def _answering(calls: Calls, context: grpc.ServicerContext, model: str, method: str) -> Iterator[None]:
    """Turns what goes wrong into a gRPC status."""
    try:
        with calls.answering(model, method, "GRPC"):
            yield
    except RequestError as error:
        context.abort(error.code, str(error))


class Prediction(prediction_service_pb2_grpc.PredictionServiceServicer):
    """`PredictionService`: Predict and GetModelMetadata; the rest refuses signatures that predict."""

    def __init__(self, models: Repository, calls: Calls) -> None:
        self._models = models
        self._calls = calls

    def Predict(self, request: Any, context: grpc.ServicerContext) -> Any:
        """Runs a signature, unless the asker gave up while waiting for a worker."""
        with _answering(self._calls, context, request.model_spec.name, "Predict"), self._calls.place():
            return self._models.find(request.model_spec).predict(request) if context.is_active() else None

    def GetModelMetadata(self, request: Any, context: grpc.ServicerContext) -> Any:
        """Answers the model's signatures."""
        with _answering(self._calls, context, request.model_spec.name, "GetModelMetadata"):
            return metadata(self._models, request)

    def Classify(self, request: Any, context: grpc.ServicerContext) -> Any:
        """Refuses: no signature classifies."""
        with _answering(self._calls, context, request.model_spec.name, "Classify"):
            if not request.HasField("model_spec"):
                raise invalid("Missing ModelSpec")
            refuse_method(self._models, request.model_spec, "classification")

    def Regress(self, request: Any, context: grpc.ServicerContext) -> Any:
        """Refuses: no signature regresses."""
        with _answering(self._calls, context, request.model_spec.name, "Regress"):
            if not request.HasField("model_spec"):
                raise invalid("Missing ModelSpec")
            refuse_method(self._models, request.model_spec, "regression")

    def MultiInference(self, request: Any, context: grpc.ServicerContext) -> Any:
        """Refuses: no signature classifies or regresses."""
        name = request.tasks[0].model_spec.name if request.tasks else ""
        with _answering(self._calls, context, name, "MultiInference"):
            if not request.tasks:
                raise invalid("MultiInferenceRequest must have at least one task. Received: none")
            task = request.tasks[0]
            kinds = {
                "tensorflow/serving/classify": "classification",
                "tensorflow/serving/regress": "regression",
            }
            if task.method_name not in kinds:
                text = f"Unsupported signature method_name: {task.method_name}"
                raise RequestError(grpc.StatusCode.UNIMPLEMENTED, text)
            refuse_method(self._models, task.model_spec, kinds[task.method_name])


class Models(model_service_pb2_grpc.ModelServiceServicer):
    """`ModelService`: GetModelStatus and HandleReloadConfigRequest."""

    def __init__(self, models: Repository, calls: Calls) -> None:
        self._models = models
        self._calls = calls

    def GetModelStatus(self, request: Any, context: grpc.ServicerContext) -> Any:
        """Answers the state of the model's versions."""
        with _answering(self._calls, context, request.model_spec.name, "GetModelStatus"):
            return status(self._models, request)

    def HandleReloadConfigRequest(self, request: Any, context: grpc.ServicerContext) -> Any:
        """Serves what the request says from now on; answers when it is loaded."""
        with _answering(self._calls, context, "", "HandleReloadConfigRequest"):
            self._models.reload(request.config)
            return model_management_pb2.ReloadConfigResponse()


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

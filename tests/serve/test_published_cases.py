"""Our versions of TensorFlow Serving's published server cases; serving/README.md names those left out.

They are those of `tensorflow_serving/model_servers/tensorflow_model_server_test.py` in the tensorflow/serving
repository, under their names there: models that halve a number and add two or three, in version 123.
"""

from contextlib import contextmanager

import grpc
import pytest
import tensorflow as tf
from serve.test_rest import ask
from tensorflow_serving.apis import (
    get_model_status_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_service_pb2_grpc,
)

from keras_medattn.serve import Server, StartError


def half_plus(path, number: float) -> None:
    module = tf.Module()
    spec = [tf.TensorSpec([None], tf.float32, "x")]
    module.serve = tf.function(lambda x: {"y": 0.5 * x + number}, input_signature=spec)
    tf.saved_model.save(module, str(path), signatures=module.serve.get_concrete_function())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    for name, number in (("half_plus_two", 2.0), ("half_plus_three", 3.0)):
        half_plus(folder / name / "123", number)
    return folder


@pytest.fixture(scope="module")
def server(folder):
    """Of one model, that is asked for as "default"."""
    path = folder / "one.config"
    path.write_text(
        f'model_config_list {{ config {{ name: "default" base_path: "{folder}/half_plus_two" }} }}'
    )
    with serving(path) as server:
        yield server


@contextmanager
def serving(config):
    server = Server(None, port=0, rest_port=0, config=config, poll=0)
    server.start()
    yield server
    assert server.stop()


def predict(server, model: str, filtered: bool):
    """As `VerifyPredictRequest` there: 2.0 as a typed value, the answer read as one."""
    request = predict_pb2.PredictRequest()
    request.model_spec.name = model
    request.inputs["x"].dtype = tf.float32.as_datatype_enum
    request.inputs["x"].float_val.append(2.0)
    request.inputs["x"].tensor_shape.dim.add().size = 1
    if filtered:
        request.output_filter.append("y")
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        answer = prediction_service_pb2_grpc.PredictionServiceStub(channel).Predict(request, timeout=20)
    spec = answer.model_spec
    assert (spec.name, spec.signature_name, spec.version.value) == (model, "serving_default", 123)
    assert answer.outputs["y"].dtype == tf.float32.as_datatype_enum
    return list(answer.outputs["y"].float_val)


def test_get_model_status(server):
    request = get_model_status_pb2.GetModelStatusRequest()
    request.model_spec.name = "default"
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        answer = model_service_pb2_grpc.ModelServiceStub(channel).GetModelStatus(request, timeout=20)
    [version] = answer.model_version_status
    assert (version.version, version.status.error_code) == (123, 0)


@pytest.mark.parametrize("filtered", [True, False])
def test_predict_saved_model(server, filtered):
    assert predict(server, "default", filtered) == [3.0]


@pytest.mark.parametrize(("sent", "answered"), [("instances", "predictions"), ("inputs", "outputs")])
def test_predict_rest_and_predict_columnar_rest(server, sent, answered):
    reply = ask(f"127.0.0.1:{server.rest_port}", "/v1/models/default:predict", {sent: [2.0, 3.0, 4.0]})
    assert reply == (200, {answered: [3.0, 3.5, 4.0]})


def test_get_status_rest(server):
    good = {"version": "123", "state": "AVAILABLE", "status": {"error_code": "OK", "error_message": ""}}
    reply = ask(f"127.0.0.1:{server.rest_port}", "/v1/models/default")
    assert reply == (200, {"model_version_status": [good]})


def test_good_model_config(folder):
    path = folder / "two.config"
    configs = "".join(
        f'config {{ name: "{name}" base_path: "{folder}/{name}" model_platform: "tensorflow" }}\n'
        for name in ("half_plus_two", "half_plus_three")
    )
    path.write_text(f"model_config_list {{\n{configs}}}\n")
    with serving(path) as server:
        for filtered in (True, False):
            assert predict(server, "half_plus_two", filtered) == [3.0]
            assert predict(server, "half_plus_three", filtered) == [4.0]


def test_bad_model_config(tmp_path):
    path = tmp_path / "bad_model_config.txt"
    path.write_text("improper model config file")
    with pytest.raises(StartError, match=r"bad_model_config\.txt: not a models\.config"):
        Server(None, port=0, config=path).start()


def test_bad_model(tmp_path):
    """There the server starts and refuses; here one without a model does not start, and says why."""
    (tmp_path / "bad_half_plus_two" / "123").mkdir(parents=True)
    (tmp_path / "bad_half_plus_two" / "123" / "saved_model.pb").write_bytes(b"\x0a\xff")
    with pytest.raises(StartError, match=r"None of the models loads.*bad_half_plus_two version 123"):
        Server(tmp_path, port=0).start()

"""The server over real gRPC, asked through TensorFlow Serving's own stubs."""

import http.client
import json
import re
import shutil
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
import tensorflow as tf
from grpc_health.v1 import health_pb2, health_pb2_grpc
from serve.conftest import expected, export, picture, start
from tensorflow_serving.apis import (
    classification_pb2,
    get_model_metadata_pb2,
    get_model_status_pb2,
    inference_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_service_pb2_grpc,
    regression_pb2,
)

from keras_medattn.serve import Server, StartError, serve
from keras_medattn.serve.config import in_folder
from keras_medattn.serve.protos import tensor_pb2
from keras_medattn.serve.repository import Repository

Code = grpc.StatusCode


@pytest.fixture(scope="module")
def channel(server):
    with grpc.insecure_channel(server[0], options=[("grpc.max_send_message_length", -1)]) as channel:
        yield channel


@pytest.fixture(scope="module")
def predictions(channel):
    return prediction_service_pb2_grpc.PredictionServiceStub(channel)


def request(model="toy", signature="", version=None, **inputs):
    request = predict_pb2.PredictRequest()
    request.model_spec.name = model
    request.model_spec.signature_name = signature
    if version is not None:
        request.model_spec.version.value = version
    for name, value in inputs.items():
        proto = value if isinstance(value, tensor_pb2.TensorProto) else tf.make_tensor_proto(value)
        request.inputs[name].CopyFrom(proto)
    return request


def refusal(method, request) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        method(request, timeout=20)
    return caught.value.code(), caught.value.details()


def test_answers_the_highest_complete_version(predictions):
    data = [picture(1), picture(2), picture(3, "BMP")]
    response = predictions.Predict(request(image_bytes=data))
    out = {name: tf.make_ndarray(proto) for name, proto in response.outputs.items()}
    reference = np.stack([expected(d, version=2) for d in data])
    np.testing.assert_allclose(out["probabilities"], reference, atol=1e-6)
    assert out["label"].dtype == np.int64
    assert out["label"].tolist() == reference.argmax(1).tolist()
    assert [n.decode() for n in out["class_name"]] == [
        ["red", "green", "blue"][i] for i in reference.argmax(1)
    ]
    spec = response.model_spec
    assert (spec.name, spec.version.value, spec.signature_name) == ("toy", 2, "serving_default")


def test_tensor_signature_takes_pixels_as_content_and_as_values(predictions):
    pixels = np.random.default_rng(0).integers(0, 255, (2, 16, 24, 3), np.uint8)
    content = request(signature="tensor", image=pixels)
    values = request(signature="tensor", image=pixels)
    values.inputs["image"].ClearField("tensor_content")
    values.inputs["image"].int_val.extend(pixels.ravel().tolist())
    scores = np.exp(2 * pixels.astype(np.float64).mean((1, 2)) / 255)
    for sent in (content, values):
        answer = tf.make_ndarray(predictions.Predict(sent).outputs["probabilities"])
        np.testing.assert_allclose(answer, scores / scores.sum(1, keepdims=True), atol=1e-6)


def test_output_filter(predictions):
    wanted = request(image_bytes=[picture(1)])
    wanted.output_filter.append("label")
    assert list(predictions.Predict(wanted).outputs) == ["label"]
    wanted.output_filter.append("heat")
    code, text = refusal(predictions.Predict, wanted)
    assert code == Code.INVALID_ARGUMENT
    assert "heat Outputs expected to be in the set {class_name,label,probabilities}" in text


def test_an_empty_batch_has_an_empty_answer(predictions):
    empty = np.array([], object)
    answer = predictions.Predict(request(image_bytes=tf.make_tensor_proto(empty, tf.string, [0])))
    assert tf.make_ndarray(answer.outputs["probabilities"]).shape == (0, 3)


@pytest.mark.parametrize(
    ("model", "version", "text"),
    [
        ("nobody", None, "Servable not found for request: Latest(nobody)"),
        ("toy", 1, "Servable not found for request: Specific(toy, 1)"),
        ("nobody", 3, "Servable not found for request: Specific(nobody, 3)"),
        ("broken", None, "Servable not found for request: Latest(broken)"),
        ("cold", None, "Servable not found for request: Latest(cold)"),
        ("default", None, "Servable not found for request: Latest(default)"),
        ("tmp-new", None, "Servable not found for request: Latest(tmp-new)"),
        ("", None, "Servable not found for request: Latest()"),
        ("../toy", None, "Servable not found for request: Latest(../toy)"),
        ("Auge \u00e4\n\u773c", None, "Servable not found for request: Latest(Auge \u00e4\n\u773c)"),
        ("x" * 100_000, None, "Servable not found for request: Latest(xxx"),
        ("\U0001f441" * 100_000, None, "Servable not found for request: Latest(\U0001f441"),
    ],
)
def test_unknown_models(predictions, model, version, text):
    sent = request(model, version=version, image_bytes=[picture(1)])
    code, details = refusal(predictions.Predict, sent)
    assert code == Code.NOT_FOUND
    assert details.startswith(text)


def test_the_served_version_may_be_named_but_no_label(predictions):
    assert predictions.Predict(request(version=2, image_bytes=[picture(1)])).model_spec.version.value == 2
    labelled = request(image_bytes=[picture(1)])
    labelled.model_spec.version_label = "stable"
    assert refusal(predictions.Predict, labelled) == (
        Code.INVALID_ARGUMENT,
        "Unrecognized servable version label: stable",
    )


def test_unknown_signature(predictions):
    assert refusal(predictions.Predict, request(signature="heat", image_bytes=[b""])) == (
        Code.FAILED_PRECONDITION,
        'Serving signature name: "heat" not found in signature def',
    )


def test_inputs_that_do_not_fit_name_extra_and_missing_keys(predictions):
    code, text = refusal(predictions.Predict, request(image=[b"x"], size=[1.0]))
    assert code == Code.INVALID_ARGUMENT
    assert text == (
        "input size does not match signature: 2!=1 len({image,size}) != len({image_bytes}). "
        "Sent extra: {image,size}. Missing but required: {image_bytes}."
    )


def _proto(dtype, shape, **values):
    proto = tf.make_tensor_proto(0.0)
    proto.Clear()
    proto.dtype = dtype
    for size in shape:
        proto.tensor_shape.dim.add(size=size)
    for name, value in values.items():
        if name == "tensor_content":
            proto.tensor_content = value
        else:
            getattr(proto, name).extend(value)
    return proto


FLOAT, UINT8, STRING = (t.as_datatype_enum for t in (tf.float32, tf.uint8, tf.string))


@pytest.mark.parametrize(
    ("signature", "name", "proto", "text"),
    [
        (
            "",
            "image_bytes",
            _proto(FLOAT, [1], float_val=[1]),
            "must be string of shape (None,). Received: float32",
        ),
        ("", "image_bytes", _proto(STRING, [], string_val=[b""]), "Received: string of shape []"),
        ("", "image_bytes", _proto(STRING, [-1], string_val=[b""]), "Received: string of shape [-1]"),
        ("", "image_bytes", _proto(STRING, [9], string_val=[b""]), "needs 9 values. Received: 1"),
        ("", "image_bytes", _proto(STRING, [1 << 62], string_val=[b""]), "needs 4611686018427387904 values"),
        ("", "image_bytes", _proto(999, [1]), "Received: dtype 999"),
        (
            "tensor",
            "image",
            _proto(UINT8, [1, 16, 25, 3]),
            "uint8 of shape (None, 16, 24, 3). Received: uint8",
        ),
        ("tensor", "image", _proto(UINT8, [1, 16, 24, 3], tensor_content=b"12"), "does not fit"),
        ("slow", "seconds", _proto(FLOAT, [1 << 40], float_val=[0]), "may have 1073741824 bytes at most"),
    ],
)
def test_wrong_tensors_are_invalid_arguments(predictions, signature, name, proto, text):
    code, details = refusal(predictions.Predict, request(signature=signature, **{name: proto}))
    assert code == Code.INVALID_ARGUMENT
    assert text in details


def _cut(data: bytes) -> bytes:
    return data[: len(data) * 4 // 5]


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "image_bytes[1]: the file is empty"),
        (b"GIF89a", "image_bytes[1]: not an image of a known kind"),
        (_cut(picture(5, "JPEG")), "image_bytes[1]: damaged JPEG header"),
        (_cut(picture(5, "PNG")), "PNG"),
        # A JPEG whose header is whole: TensorFlow finds out, and only its own words come back.
        (picture(5, "JPEG")[:-20], "jpeg::Uncompress failed. Invalid JPEG data or crop window."),
        # Twice the pixels that this model's medattn.json allows.
        (picture(5, size=(200, 100)), "20,000 pixels; allowed are"),
    ],
)
def test_bad_images_are_invalid_arguments(predictions, data, text):
    code, details = refusal(predictions.Predict, request(image_bytes=[picture(1), data]))
    assert code == Code.INVALID_ARGUMENT
    assert text in details
    for noise in ("{{node", "[Op:", "stack traces", "Detected at"):
        assert noise not in details


def test_a_message_over_the_limit_is_refused(predictions):
    code, _ = refusal(predictions.Predict, request(image_bytes=[bytes(65 << 20)]))
    assert code == Code.RESOURCE_EXHAUSTED


def test_signatures_neither_classify_nor_regress(predictions):
    classify = classification_pb2.ClassificationRequest()
    assert refusal(predictions.Classify, classify) == (Code.INVALID_ARGUMENT, "Missing ModelSpec")
    classify.model_spec.name = "toy"
    assert refusal(predictions.Classify, classify) == (
        Code.INVALID_ARGUMENT,
        "Expected classification signature method_name to be tensorflow/serving/classify. "
        "Was: tensorflow/serving/predict",
    )
    classify.model_spec.signature_name = "heat"
    assert refusal(predictions.Classify, classify)[1] == "No signature was found with the name: heat"
    regress = regression_pb2.RegressionRequest()
    regress.model_spec.name = "toy"
    code, text = refusal(predictions.Regress, regress)
    assert (code, text[:46]) == (Code.INVALID_ARGUMENT, "Expected regression signature method_name to b")
    both = inference_pb2.MultiInferenceRequest()
    task = both.tasks.add(method_name="tensorflow/serving/classify")
    task.model_spec.name = "toy"
    code, text = refusal(predictions.MultiInference, both)
    assert (code, text[-31:]) == (Code.INVALID_ARGUMENT, "Was: tensorflow/serving/predict")
    task.method_name = "tensorflow/serving/predict"
    assert refusal(predictions.MultiInference, both) == (
        Code.UNIMPLEMENTED,
        "Unsupported signature method_name: tensorflow/serving/predict",
    )
    task.model_spec.name = "nobody"
    task.method_name = "tensorflow/serving/regress"
    assert refusal(predictions.MultiInference, both)[0] == Code.NOT_FOUND


def test_more_than_may_wait_are_refused_and_health_answers_meanwhile(models):
    server = Server(models, port=0, workers=2, waiting=3)
    server.start()
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
        asked = [stub.Predict.future(request(signature="slow", seconds=[0.8])) for _ in range(12)]
        time.sleep(0.4)
        began = time.monotonic()
        status = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest()).status
        assert status == health_pb2.HealthCheckResponse.SERVING
        assert not any(call.done() and call.code() == Code.OK for call in asked)
        assert time.monotonic() - began < 0.4
        outcomes = [(call.code().name, call.details()) for call in asked]
        assert server.stop()
    assert sorted(code for code, _ in outcomes) == ["OK"] * 5 + ["RESOURCE_EXHAUSTED"] * 7
    assert "The server has 5 predictions to answer and takes no more" in max(outcomes)[1]


def test_metadata(predictions):
    ask = get_model_metadata_pb2.GetModelMetadataRequest(metadata_field=["signature_def"])
    ask.model_spec.name = "toy"
    response = predictions.GetModelMetadata(ask)
    signatures = get_model_metadata_pb2.SignatureDefMap()
    assert response.metadata["signature_def"].Unpack(signatures)
    assert response.model_spec.version.value == 2
    assert set(signatures.signature_def) >= {"serving_default", "tensor", "explain", "slow"}
    image = signatures.signature_def["tensor"].inputs["image"]
    assert image.dtype == UINT8
    assert [d.size for d in image.tensor_shape.dim] == [-1, 16, 24, 3]
    for fields, text in (([], "at least one metadata_field"), (["graph"], "graph is not supported")):
        del ask.metadata_field[:]
        ask.metadata_field.extend(fields)
        code, details = refusal(predictions.GetModelMetadata, ask)
        assert code == Code.INVALID_ARGUMENT
        assert text in details


def test_status(channel):
    models = model_service_pb2_grpc.ModelServiceStub(channel)
    ask = get_model_status_pb2.GetModelStatusRequest()
    ask.model_spec.name = "toy"
    [good] = models.GetModelStatus(ask).model_version_status
    state = get_model_status_pb2.ModelVersionStatus
    assert (good.version, good.state, good.status.error_code) == (2, state.AVAILABLE, 0)
    for name, version, text in (("broken", 7, "saved_model.pb"), ("cold", 1, "not an image of a known kind")):
        ask.model_spec.name = name
        [bad] = models.GetModelStatus(ask).model_version_status
        assert (bad.version, bad.state) == (version, state.END)
        assert bad.status.error_code != 0
        assert text in bad.status.error_message
    ask.model_spec.version.value = 99
    assert refusal(models.GetModelStatus, ask) == (Code.NOT_FOUND, "Could not find version 99 of model cold")
    ask.model_spec.name = "nobody"
    code, text = refusal(models.GetModelStatus, ask)
    assert (code, text) == (Code.NOT_FOUND, "Could not find any versions of model nobody")


def test_health_and_log(channel, server):
    health = health_pb2_grpc.HealthStub(channel)
    assert health.Check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.SERVING
    log = server[1].read_text()
    assert "loaded toy version 2" in log
    assert "could not load broken version 7" in log


def test_eight_clients_at_once_each_get_their_own_answer(server):
    def ask(seed):
        with grpc.insecure_channel(server[0], options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
            stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
            for turn in range(10):
                data = picture(100 * seed + turn)
                answer = tf.make_ndarray(stub.Predict(request(image_bytes=[data])).outputs["probabilities"])
                np.testing.assert_allclose(answer[0], expected(data), atol=1e-6)
        return True

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(8))) == [True] * 8


def test_sigterm_lets_requests_in_flight_finish(models, tmp_path):
    process, port = start(models, tmp_path / "log")
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        states = []
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        watcher = threading.Thread(target=lambda: states.extend(answer.status for answer in watch))
        watcher.start()
        while not states:
            time.sleep(0.01)
        stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
        # More than the server has workers: those that wait for one are in flight too.
        asked = [stub.Predict.future(request(signature="slow", seconds=[0.6]), timeout=60) for _ in range(10)]
        time.sleep(0.3)
        done_before = [call.done() for call in asked]
        process.send_signal(signal.SIGTERM)
        outcomes = [(call.code().name, call.details()) for call in asked]
        watcher.join(60)
    code = process.wait(60)
    log = (tmp_path / "log").read_text()
    assert not all(done_before)
    assert outcomes == [("OK", "")] * 10, log
    assert code == 0
    response = health_pb2.HealthCheckResponse
    assert states == [response.SERVING, response.NOT_SERVING]
    assert log.endswith("INFO stopped\n")


def test_sigterm_under_load_loses_nothing_that_was_accepted(models, tmp_path):
    """Eight clients ask without a pause, by gRPC and REST, more than two workers answer, while it stops."""
    shutil.copytree(models / "toy", tmp_path / "models" / "toy")
    process, port = start(tmp_path / "models", tmp_path / "log", workers=2, rest_port=0)
    rest = re.search(r"REST at (\S+)", (tmp_path / "log").read_text())[1]
    outcomes, enough = [], threading.Semaphore(0)

    def by_grpc(ask_until_gone):
        with grpc.insecure_channel(f"127.0.0.1:{port}", [("grpc.use_local_subchannel_pool", 1)]) as channel:
            stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)

            def ask():
                try:
                    answer = stub.Predict(request(signature="slow", seconds=[0.02]), timeout=60)
                    return "OK" if tf.make_ndarray(answer.outputs["turns"]).shape == (1,) else "wrong"
                except grpc.RpcError as error:
                    return error.code().name

            ask_until_gone(ask)

    def by_rest(ask_until_gone):
        connection = http.client.HTTPConnection(rest, timeout=60)
        body = json.dumps({"signature_name": "slow", "inputs": [0.02]})

        def ask():
            try:
                connection.request("POST", "/v1/models/toy:predict", body)
                response = connection.getresponse()
                return "OK" if response.status == 200 and json.load(response)["outputs"] else "wrong"
            except (ConnectionRefusedError, ConnectionResetError, http.client.RemoteDisconnected) as error:
                connection.close()
                return type(error).__name__

        ask_until_gone(ask)

    def ask_until_gone(ask):
        while True:
            sent = time.monotonic()
            outcome = ask()
            outcomes.append((sent, outcome))
            enough.release()
            if outcome != "OK":
                return

    with ThreadPoolExecutor(8) as pool:
        clients = [pool.submit(door, ask_until_gone) for door in (by_grpc, by_rest) * 4]
        for _ in range(80):
            assert enough.acquire(timeout=60)
        signalled = time.monotonic()
        process.terminate()
        for client in clients:
            client.result(60)
    assert process.wait(60) == 0
    before = [outcome for sent, outcome in outcomes if sent < signalled]
    after = [outcome for sent, outcome in outcomes if sent >= signalled]
    assert len(before) >= 80
    assert set(before) == {"OK"}
    # It goes on for half a second: no client meets a server that is gone before that.
    assert after.count("OK") > 8
    gone = {
        "UNAVAILABLE",
        "CANCELLED",
        "ConnectionRefusedError",
        "ConnectionResetError",
        "RemoteDisconnected",
    }
    assert len([outcome for outcome in after if outcome in gone]) == 8
    assert set(after) <= {"OK"} | gone


def test_requests_sent_just_before_the_stop_are_answered(models):
    server = Server(models, port=0)
    server.start()
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        grpc.channel_ready_future(channel).result(10)
        stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
        asked = [stub.Predict.future(request(signature="slow", seconds=[0.1])) for _ in range(20)]
        assert server.stop()
        assert [call.code() for call in asked] == [Code.OK] * 20


def test_grace_ends(models):
    server = Server(models, port=0)
    server.start()
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
        call = stub.Predict.future(request(signature="slow", seconds=[3.0]))
        time.sleep(0.5)
        assert server.stop(grace=0.2) is False
        assert call.code() in (Code.CANCELLED, Code.UNAVAILABLE)
    server.wait()


def test_a_taken_port_is_an_error(models, server):
    port = int(server[0].rpartition(":")[2])
    with pytest.raises(StartError, match=f"Cannot listen at 127.0.0.1:{port}"):
        Server(models, port=port).start()


def test_without_a_model_the_exit_code_is_2(models, tmp_path, caplog):
    assert serve(tmp_path) == 2
    assert "No exported model" in caplog.text
    assert serve(models / "toy") == 2
    assert "give the folder above it" in caplog.text
    assert serve(tmp_path / "nowhere") == 2
    assert "must exist" in caplog.text
    (tmp_path / "bad" / "1").mkdir(parents=True)
    (tmp_path / "bad" / "1" / "saved_model.pb").touch()
    assert serve(tmp_path) == 2
    assert "None of the models loads" in caplog.text


def test_default_finds_a_model_that_is_alone(tmp_path):
    export(tmp_path / "eyes" / "1", 1)
    spec = predict_pb2.PredictRequest().model_spec
    spec.name = "default"
    assert Repository(lambda: in_folder(tmp_path)).find(spec).name == "eyes"

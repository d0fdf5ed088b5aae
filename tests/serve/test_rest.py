"""The server over real HTTP."""

import base64
import http.client
import json
import math
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tensorflow as tf
from serve.conftest import expected, picture

from keras_medattn.serve import Server, StartError
from keras_medattn.serve.rest_json import answer, inputs, parse
from keras_medattn.serve.servables import RequestError


def ask(rest: str, path: str, body=None, headers=None):
    """(status, JSON) of a GET, or of a POST of `body`."""
    connection = http.client.HTTPConnection(rest, timeout=20)
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    connection.request("GET" if body is None else "POST", path, data, headers or {})
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    is_json = response.headers["Content-Type"] == "application/json"
    return response.status, json.loads(text) if is_json else text


def b64(data: bytes) -> dict[str, str]:
    return {"b64": base64.b64encode(data).decode()}


@pytest.mark.parametrize("path", ["/v1/models/toy", "/v1/models/toy/versions/2", "/V1/Models/toy"])
@pytest.mark.parametrize("named", [False, True])
def test_rows(rest, path, named):
    data = [picture(1), picture(2)]
    rows = [{"image_bytes": b64(d)} if named else b64(d) for d in data]
    status, reply = ask(rest, f"{path}:predict", {"instances": rows})
    assert (status, list(reply)) == (200, ["predictions"])
    for row, image in zip(reply["predictions"], data, strict=True):
        np.testing.assert_allclose(row["probabilities"], expected(image), atol=1e-6)
        assert row["label"] == expected(image).argmax()
        assert row["class_name"] == ["red", "green", "blue"][row["label"]]


@pytest.mark.parametrize("named", [False, True])
def test_columns(rest, named):
    data = [picture(1), picture(2)]
    column = [b64(d) for d in data]
    status, reply = ask(
        rest, "/v1/models/toy:predict", {"inputs": {"image_bytes": column} if named else column}
    )
    assert (status, list(reply)) == (200, ["outputs"])
    reference = [expected(d) for d in data]
    np.testing.assert_allclose(reply["outputs"]["probabilities"], reference, atol=1e-6)
    assert reply["outputs"]["label"] == [int(p.argmax()) for p in reference]


def test_pixels_and_a_signature_of_one_output(rest):
    pixels = np.random.default_rng(0).integers(0, 255, (2, 16, 24, 3))
    scores = np.exp(2 * pixels.mean((1, 2)) / 255)
    request = {"signature_name": "tensor", "instances": pixels.tolist()}
    status, reply = ask(rest, "/v1/models/toy:predict", request)
    assert status == 200
    np.testing.assert_allclose(
        [row["probabilities"] for row in reply["predictions"]],
        scores / scores.sum(1, keepdims=True),
        atol=1e-6,
    )
    request = {"signature_name": "slow", "inputs": [0.0, 0.0]}
    status, reply = ask(rest, "/v1/models/toy:predict", request)
    assert (status, reply) == (200, {"outputs": [0, 0]})


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b"", "JSON Parse error: The document is empty"),
        (b"{", "JSON Parse error: Expecting property name enclosed in double quotes at offset: 1"),
        (b"[" * 100_000, "JSON Parse error: "),
        (b"\xff\xfe", "JSON Parse error: "),
        (b"[1]", "JSON Value: [1] Is not object"),
        (b"{}", "Missing 'inputs' or 'instances' key"),
        ({"instances": [1], "inputs": [1]}, "expecting only one of 'inputs' or 'instances' keys to exist"),
        ({"instances": 1}, "Excepting 'instances' to be an list/array"),
        ({"instances": []}, "No values in 'instances' array"),
        ({"instances": [1]}, "JSON Value: 1 Type: Number is not of expected type: string"),
        ({"instances": [{"b64": "%"}]}, "Unable to base64 decode"),
        ({"instances": [{"image": 1}]}, "keys must be equal to: image_bytes"),
        ({"instances": ["a", {"image_bytes": "b"}]}, "Expecting value/list but got object at item 1"),
        ({"instances": [{"image_bytes": "a"}, "b"]}, "Expecting object but got list at item 1"),
        ({"inputs": {"image": ["a"]}}, "Missing named input: image_bytes in 'inputs' object."),
        ({"inputs": [["a"], "b"]}, "found at incorrect level: 2 in the JSON DOM. Expected at level: 2"),
        ({"inputs": ["a", ["b"]]}, "Encountered list at unexpected level: 1 expected < 1"),
        ({"inputs": [["a"], ["b", "c"]]}, "Encountered list at unexpected size: 2 at level: 1 expected size"),
        ({"inputs": [["a"]]}, "must be string of shape (None,). Received: string of shape [1, 1]"),
        ({"inputs": [b64(b"GIF89a")]}, "image_bytes[0]: not an image of a known kind"),
        ({"inputs": [""]}, "image_bytes[0]: the file is empty"),
        ({"signature_name": 1, "inputs": []}, "'signature_name' key must be a string value"),
        ({"signature_name": "heat", "inputs": []}, 'Serving signature name: "heat" not found in signature'),
        ({"signature_name": "tensor", "inputs": [[1.5]]}, "Type: Number is not of expected type: uint8"),
        ({"signature_name": "tensor", "inputs": [[300]]}, "Cannot convert JSON value: 300 to uint8"),
        ({"signature_name": "tensor", "inputs": [[1]]}, "Received: uint8 of shape [1, 1]"),
        ({"signature_name": "slow", "inputs": ["1"]}, "Type: String is not of expected type: float32"),
        ({"signature_name": "slow", "inputs": [1e39]}, "1e+39 to float32 without loss of precision"),
        ({"signature_name": "slow", "inputs": [10**400]}, "JSON Value: 1000"),
        ({"signature_name": "slow", "inputs": [[0.0], [0.0, 1.0]]}, "unexpected size: 2 at level: 1"),
    ],
)
def test_bad_requests(rest, body, text):
    status, reply = ask(rest, "/v1/models/toy:predict", body)
    assert (status, list(reply)) == (400, ["error"])
    assert text in reply["error"]


@pytest.mark.parametrize(
    ("path", "body", "status", "text"),
    [
        ("/v1/models/nobody:predict", {}, 404, "Servable not found for request: Latest(nobody)"),
        ("/v1/models/toy/versions/1:predict", {}, 404, "Servable not found for request: Specific(toy, 1)"),
        ("/v1/models/toy/versions/" + "9" * 30 + ":predict", {}, 400, "Failed to convert version: 999"),
        ("/v1/models/toy/labels/stable:predict", {}, 400, "Unrecognized servable version label: stable"),
        ("/v1/models/toy:classify", {}, 400, "to be tensorflow/serving/classify. Was: tensorflow/serving/pr"),
        ("/v1/models/toy:regress", {}, 400, "to be tensorflow/serving/regress. Was: tensorflow/serving/pr"),
        ("/v1/models/toy:explode", {}, 400, "Malformed request: POST /v1/models/toy:explode"),
        ("/v1/models/toy", {}, 400, "Malformed request: POST /v1/models/toy"),
        ("/v1/models/toy:predict", None, 400, "Malformed request: GET /v1/models/toy:predict"),
        ("/v1/models", None, 400, "Missing model name in request."),
        ("/v1/models/nobody", None, 404, "Could not find any versions of model nobody"),
        ("/v1/models/nobody/metadata", None, 404, "Servable not found for request: Latest(nobody)"),
        ("/elsewhere", None, 404, "Not found: /elsewhere"),
    ],
)
def test_wrong_addresses(rest, path, body, status, text):
    code, reply = ask(rest, path, {"instances": ["a"]} if body == {} else body)
    assert (code, list(reply)) == (status, ["error"])
    assert text in reply["error"]


def test_status(rest):
    good = {"version": "2", "state": "AVAILABLE", "status": {"error_code": "OK", "error_message": ""}}
    assert ask(rest, "/v1/models/toy") == (200, {"model_version_status": [good]})
    assert ask(rest, "/v1/models/toy/versions/2") == (200, {"model_version_status": [good]})
    status, reply = ask(rest, "/v1/models/broken")
    [bad] = reply["model_version_status"]
    assert (status, bad["version"], bad["state"], bad["status"]["error_code"]) == (200, "7", "END", "UNKNOWN")
    assert "saved_model.pb" in bad["status"]["error_message"]


def test_metadata(rest):
    status, reply = ask(rest, "/v1/models/toy/metadata")
    assert status == 200
    assert reply["model_spec"] == {"name": "toy", "signature_name": "", "version": "2"}
    image = reply["metadata"]["signature_def"]["signature_def"]["tensor"]["inputs"]["image"]
    assert image["dtype"] == "DT_UINT8"
    assert [d["size"] for d in image["tensor_shape"]["dim"]] == ["-1", "16", "24", "3"]


def test_sizes_and_lengths(rest):
    limit = 64 << 20
    status, reply = ask(rest, "/v1/models/toy:predict", b"", {"Content-Length": str(limit + 1)})
    assert (status, reply["error"]) == (
        429,
        f"A request may have {limit} bytes at most. Received: {limit + 1}",
    )
    # Who asks first is refused before he sends.
    with socket.create_connection(rest.split(":"), timeout=20) as connection:
        head = f"POST /v1/models/toy:predict HTTP/1.1\r\nContent-Length: {limit + 1}\r\n"
        connection.sendall(head.encode() + b"Expect: 100-continue\r\n\r\n")
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 429 ")
    for headers in ({"Content-Length": "many"}, {"Transfer-Encoding": "chunked"}):
        status, reply = ask(rest, "/v1/models/toy:predict", b"", headers)
        assert (status, "Content-Length" in reply["error"]) == (400, True)


def test_a_connection_takes_many_requests(rest):
    connection = http.client.HTTPConnection(rest, timeout=20)
    for seed in range(3):
        body = json.dumps({"instances": [b64(picture(seed))]})
        connection.request("POST", "/v1/models/toy:predict", body)
        [row] = json.loads(connection.getresponse().read())["predictions"]
        np.testing.assert_allclose(row["probabilities"], expected(picture(seed)), atol=1e-6)
    connection.close()


def test_numbers_that_are_none_go_in_and_out():
    spec = {"x": tf.TensorSpec([None], tf.float32)}
    arrays, rows = inputs(parse(b'{"instances": [NaN, Infinity, -Infinity, 0.1]}'), spec)
    np.testing.assert_array_equal(arrays["x"], np.float32([math.nan, math.inf, -math.inf, 0.1]))
    assert rows
    text = json.dumps(answer({"y": arrays["x"]}, rows=True))
    assert text == '{"predictions": [NaN, Infinity, -Infinity, 0.1]}'


def test_byte_strings_go_out_as_text_or_as_base64_by_their_name():
    data = np.array([b"a\xff", b"b"], object)
    assert answer({"name": data}, rows=False) == {"outputs": ["a\ufffd", "b"]}
    assert answer({"png_bytes": data}, rows=True) == {"predictions": [{"b64": "Yf8="}, {"b64": "Yg=="}]}


@pytest.mark.parametrize(
    ("outputs", "text"),
    [
        ({"a": np.zeros(2), "b": np.zeros(3)}, "Tensor name: b has inconsistent batch size: 3 expecting: 2"),
        ({"a": np.zeros(())}, "Tensor name: a has no shape information"),
    ],
)
def test_outputs_that_have_no_rows(outputs, text):
    with pytest.raises(RequestError, match=text):
        answer(outputs, rows=True)


def test_booleans_and_types_without_json():
    spec = {"x": tf.TensorSpec([None], tf.bool)}
    assert inputs({"inputs": [True, False]}, spec)[0]["x"].tolist() == [True, False]
    with pytest.raises(RequestError, match="Type: Number is not of expected type: bool"):
        inputs({"inputs": [1]}, spec)
    with pytest.raises(RequestError, match="Conversion of JSON Value"):
        inputs({"inputs": [1]}, {"x": tf.TensorSpec([None], tf.complex64)})


def test_prometheus(rest):
    for _ in range(2):
        ask(rest, "/v1/models/toy:predict", {"instances": [b64(picture(1))]})
    ask(rest, "/v1/models/nobody:predict", {"instances": ["a"]})
    status, page = ask(rest, "/monitoring/prometheus/metrics")
    assert status == 200
    values = dict(line.rsplit(" ", 1) for line in page.splitlines() if not line.startswith("#"))
    assert int(values[':tensorflow:serving:request_count{model_name="toy",status="OK"}']) >= 2
    assert int(values[':tensorflow:serving:request_count{model_name="",status="NOT_FOUND"}']) >= 1
    labels = 'model_name="toy",API="Predict",entrypoint="REST"'
    buckets = [
        int(v)
        for k, v in values.items()
        if k.startswith(f":tensorflow:serving:request_latency_bucket{{{labels}")
    ]
    assert len(buckets) == 18
    assert buckets == sorted(buckets)
    assert buckets[-1] == int(values[f":tensorflow:serving:request_latency_count{{{labels}}}"]) >= 2
    assert float(values[f":tensorflow:serving:request_latency_sum{{{labels}}}"]) > 0
    assert values['medattn_loaded_version{model_name="toy",version="2"}'] == "1"
    assert not any("nobody" in key for key in values)


def test_stopping_answers_what_came_before(models):
    server = Server(models, port=0, rest_port=0)
    server.start()
    request = {"signature_name": "slow", "inputs": [0.3]}
    with ThreadPoolExecutor(4) as pool:
        target = f"127.0.0.1:{server.rest_port}"
        asked = [pool.submit(ask, target, "/v1/models/toy:predict", request) for _ in range(4)]
        assert server.stop()
        assert [call.result()[0] for call in asked] == [200] * 4
    with pytest.raises(ConnectionRefusedError):
        ask(target, "/v1/models/toy")


def test_rest_waits_in_the_same_line(models):
    server = Server(models, port=0, rest_port=0, workers=1, waiting=1)
    server.start()
    replies = []
    request = {"signature_name": "slow", "inputs": [0.5]}

    def post():
        replies.append(ask(f"127.0.0.1:{server.rest_port}", "/v1/models/toy:predict", request)[0])

    threads = [threading.Thread(target=post) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with pytest.raises(StartError, match=f"{server.rest_port}: try another --rest-port"):
        Server(models, port=0, rest_port=server.rest_port).start()
    assert server.stop()
    assert sorted(replies) == [200, 200, 429, 429]

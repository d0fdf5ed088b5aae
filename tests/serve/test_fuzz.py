"""Broken input of every kind against a real server: a clear refusal or an answer, and the server lives."""

import io
import json
import re
import socket
from pathlib import Path

import grpc
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from serve.conftest import expected, picture, start
from serve.test_rest import ask, b64
from serve.test_server import request
from tensorflow_serving.apis import prediction_service_pb2_grpc


def _saved(mode: str, kind: str) -> bytes:
    file = io.BytesIO()
    Image.new(mode, (24, 16)).save(file, kind)
    return file.getvalue()


def _image(rng: np.random.Generator) -> bytes:
    """A damaged image, or none."""
    data = bytearray(picture(int(rng.integers(1000)), str(rng.choice(["PNG", "JPEG", "BMP"]))))
    match rng.integers(6):
        case 0:
            return bytes(data[: rng.integers(len(data))])
        case 1:
            for place in rng.integers(len(data), size=8):
                data[place] = rng.integers(256)
            return bytes(data)
        case 2:
            return rng.bytes(int(rng.integers(2000)))
        case 3:
            return _saved("CMYK", "JPEG")
        case 4:
            return _saved("P", "GIF")
        case _:
            # A header that promises 4 billion pixels.
            return bytes(data[:16]) + b"\xff" * 8 + bytes(data[24:])


def _tensor(rng: np.random.Generator) -> np.ndarray:
    shape = rng.integers(0, 4, size=rng.integers(0, 6))
    return np.zeros(shape, rng.choice(["uint8", "float32", "float64", "int64", "bool", "complex64"]))


def _json(rng: np.random.Generator) -> bytes:
    text = json.dumps({"instances": [b64(_image(rng))], "signature_name": "serving_default"}).encode()
    place = int(rng.integers(len(text)))
    return text[:place] + rng.choice([b"", b"[", b"}", b"NaN", b"\xff", b'"', b"1e999"]) + text[place + 1 :]


@pytest.fixture(scope="module")
def process(models, tmp_path_factory):
    log = tmp_path_factory.mktemp("fuzz") / "log"
    process, port = start(models, log, rest_port=0)
    yield process, f"127.0.0.1:{port}", re.search(r"REST at (\S+)", log.read_text())[1]
    process.terminate()
    assert process.wait(30) == 0
    assert "Traceback" not in log.read_text()


def _resident(process) -> int:
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())[1])


@pytest.mark.parametrize("total", [600, pytest.param(10_000, marks=pytest.mark.slow)])
def test_broken_input_gets_a_refusal_or_an_answer_and_memory_returns(process, total):
    server, target, rest = process
    rng = np.random.default_rng(0)
    codes = {"OK": 0, "INVALID_ARGUMENT": 0}
    before, texts = 0, []
    with grpc.insecure_channel(target) as channel:
        stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
        for turn in range(total):
            if turn == total // 3:
                before = _resident(server)
            if turn % 3:
                sent = request(image_bytes=[_image(rng)])
            else:
                sent = request(signature="tensor", image=tf.make_tensor_proto(_tensor(rng)))
            try:
                stub.Predict(sent, timeout=20)
                codes["OK"] += 1
            except grpc.RpcError as error:
                codes[error.code().name] += 1
                texts.append(error.details())
        for _ in range(total // 4):
            status, reply = ask(rest, "/v1/models/toy:predict", _json(rng))
            assert status in (200, 400), reply
            assert list(reply) == [{200: "predictions", 400: "error"}[status]]
        good = picture(1)
        answer = tf.make_ndarray(stub.Predict(request(image_bytes=[good])).outputs["probabilities"])
        np.testing.assert_allclose(answer[0], expected(good), atol=1e-6)
    assert set(codes) == {"OK", "INVALID_ARGUMENT"}
    assert min(map(len, texts)) > 20
    assert codes["INVALID_ARGUMENT"] > total // 2
    assert codes["OK"] > total // 20
    assert _resident(server) < 1.1 * before


@pytest.mark.parametrize(
    "sent",
    [
        b"\x00" * 100,
        b"GET\r\n\r\n",
        b"POST /v1/models/toy:predict HTTP/1.1\r\nContent-Length: 10\r\n\r\n{",
        b"BREW /pot HTTP/1.1\r\n\r\n",
    ],
)
def test_broken_http_ends_its_own_connection_only(process, sent):
    host, port = process[2].split(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(sent)
        connection.shutdown(socket.SHUT_WR)
        reply = b"".join(iter(lambda: connection.recv(4096), b""))
    assert re.search(rb"\b(400|501)\b", reply)
    assert ask(process[2], "/v1/models/toy")[0] == 200

"""The client against the real server, and against what TensorFlow Serving sends."""

import http.client
import io
import json
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np
import pytest
from PIL import Image
from serve.conftest import expected, picture

from keras_medattn.serve import Client, Server, ServerError
from keras_medattn.serve.channel import SignatureInfo, TensorInfo, VersionStatus
from keras_medattn.serve.protos import tensor_pb2, to_array, types_pb2


@pytest.fixture(scope="module", params=["gRPC", "REST"])
def client(request, server, rest):
    with Client({"gRPC": server[0], "REST": f"http://{rest}"}[request.param], "toy") as client:
        yield client


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def test_one_bad_image_does_not_stop_the_others(client, tmp_path):
    files = {
        "good.png": picture(1),
        "good.jpg": picture(2, "JPEG"),
        "empty.jpg": b"",
        "text.png": b"hello",
        "cut.jpg": picture(3, "JPEG")[:-20],
        "good.bmp": picture(4, "BMP"),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    paths = [*(tmp_path / name for name in files), tmp_path / "missing.png"]
    results = client.predict(paths)
    assert [r.name for r in results] == [str(p) for p in paths]
    assert [p.name for p, r in zip(paths, results, strict=True) if r.error] == [
        "empty.jpg",
        "text.png",
        "cut.jpg",
        "missing.png",
    ]
    for path, result in zip(paths, results, strict=True):
        if result.error:
            assert str(path) in result.error
            assert result.probabilities is None
        elif path.suffix != ".jpg":
            probabilities = expected(files[path.name])
            np.testing.assert_allclose(result.probabilities, probabilities, atol=1e-6)
            assert result.label == probabilities.argmax()
            assert result.class_name == ["red", "green", "blue"][result.label]
    assert "Invalid JPEG data" in results[4].error


def test_explain_carries_the_evidence(client):
    [result] = client.predict([picture(1)], signature="explain")
    mean = np.asarray(Image.open(io.BytesIO(picture(1))), np.float64).mean((0, 1)) / 255
    np.testing.assert_allclose(result.attention, np.stack([mean, mean]), atol=1e-6)
    np.testing.assert_array_equal(result.boxes, [[1, 2, 9, 8]])
    np.testing.assert_array_equal(result.weights, [1])
    assert json.loads(json.dumps(result.as_dict()))["boxes"] == [[1, 2, 9, 8]]


@pytest.mark.parametrize("deep", [False, True])
def test_tiff_is_read_here_and_keeps_its_pixels(client, tmp_path, deep):
    pixels = np.asarray(Image.open(io.BytesIO(picture(6))))
    path = tmp_path / "slide.tif"
    if deep:
        import tifffile

        tifffile.imwrite(path, pixels.astype(np.uint16) * 257, photometric="rgb")
        [refused] = client.predict([path])
        assert "intensity window" in refused.error
        [result] = client.predict([path], window=(0, 65535))
    else:
        Image.fromarray(pixels).save(path)
        [result] = client.predict([path])
    np.testing.assert_allclose(result.probabilities, expected(picture(6)), atol=1e-6)
    [refused] = client.predict([path.read_bytes()])
    assert "Give the path" in refused.error


def test_an_image_over_the_message_limit_is_its_own_error(client):
    large, small = client.predict([picture(1) + bytes(65 << 20), picture(1)])
    assert "too large" in large.error
    assert small.error is None


def test_metadata_and_status(client):
    signatures = client.metadata()
    assert set(signatures) == {"serving_default", "tensor", "explain", "slow"}
    assert signatures["slow"] == SignatureInfo(
        {"seconds": TensorInfo("float", (-1,))}, {"turns": TensorInfo("int64", (-1,))}
    )
    assert client.status() == [VersionStatus(2, "AVAILABLE")]
    [broken] = Client(client.target, "broken").status()
    assert (broken.version, broken.state) == (7, "END")
    assert "saved_model.pb" in broken.error


def test_refusals_of_the_whole_call_are_readable(client):
    with pytest.raises(ServerError, match=r"serves no model 'nobody'") as caught:
        Client(client.target, "nobody").predict([picture(1)])
    assert caught.value.code == "NOT_FOUND"
    if client.target.startswith("http"):  # 400, as for an image that is refused
        [result] = client.predict([picture(1)], signature="heat")
        assert 'signature name: "heat"' in result.error
    else:
        with pytest.raises(ServerError, match=r'signature name: "heat"') as caught:
            client.predict([picture(1)], signature="heat")
        assert caught.value.code == "FAILED_PRECONDITION"
    [result] = Client(client.target, "toy").predict([picture(1)])
    assert result.error is None


@pytest.mark.parametrize("scheme", ["", "http://"])
def test_nobody_there(scheme):
    with pytest.raises(ServerError, match=r"No server answers at .*127\.0\.0\.1") as caught:
        Client(f"{scheme}127.0.0.1:{free_port()}", "toy", timeout=0.5).predict([picture(1)])
    assert caught.value.code == "UNAVAILABLE"


@pytest.mark.parametrize(
    "target", ["localhost", "ftp://localhost:1", "http://", "http://a:b", "http://a:1?q"]
)
def test_an_address_that_is_none(target):
    with pytest.raises(ValueError, match=r"HOST:PORT.*Received: '"):
        Client(target)


@pytest.mark.parametrize("scheme", ["", "http://"])
def test_a_deadline_is_kept(scheme):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        began = time.monotonic()
        target = f"{scheme}127.0.0.1:{silent.getsockname()[1]}"
        [result] = Client(target, "toy", timeout=0.3).predict([picture(1)])
    assert "gave no answer in 0.3 s" in result.error
    assert time.monotonic() - began < 3


@pytest.mark.parametrize("scheme", ["", "http://"])
def test_a_server_that_comes_up_late_is_asked_again(server, rest, scheme):
    port = free_port()

    def late():
        time.sleep(0.3)
        with socket.create_server(("127.0.0.1", port)) as listening:
            connection, _ = listening.accept()
        host, behind = {"": server[0], "http://": rest}[scheme].split(":")
        with connection, socket.create_connection((host, int(behind))) as forward:
            pump = threading.Thread(target=copy, args=(connection, forward))
            pump.start()
            copy(forward, connection)
            pump.join()

    def copy(source, sink):
        while data := source.recv(1 << 16):
            sink.sendall(data)
        with suppress(OSError):  # it may be closed already
            sink.shutdown(socket.SHUT_WR)

    thread = threading.Thread(target=late)
    thread.start()
    with Client(f"{scheme}127.0.0.1:{port}", "toy") as client:
        [result] = client.predict([picture(1) + bytes(1 << 20)])
    thread.join(10)
    assert not thread.is_alive()
    np.testing.assert_allclose(result.probabilities, expected(picture(1)), atol=1e-6)


def test_a_server_that_is_busy_is_asked_again(models):
    server = Server(models, port=0, rest_port=0, workers=1, waiting=0)
    server.start()
    targets = f"127.0.0.1:{server.port}", f"http://127.0.0.1:{server.rest_port}"
    clients = [Client(target, "toy") for target in targets]
    with ThreadPoolExecutor(2) as pool:
        slow = [pool.submit(one.outputs, "slow", {"seconds": np.float32([0.4])}) for one in clients]
        assert all(one.result()["turns"][0] > 0 for one in slow)
    page = http.client.HTTPConnection("127.0.0.1", server.rest_port, timeout=20)
    page.request("GET", "/monitoring/prometheus/metrics")
    assert b'status="RESOURCE_EXHAUSTED"' in page.getresponse().read()
    page.close()
    assert server.stop()


def test_a_page_of_a_proxy_and_a_connection_that_was_closed(rest):
    """A stand-in for what lies between: it answers 502 once, then hangs up, then forwards."""
    host, port = rest.split(":")
    with socket.create_server(("127.0.0.1", 0)) as proxy:

        def between():
            page = b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 4\r\n\r\n<h1>"
            for answer in (page, b"", None):
                connection, _ = proxy.accept()
                with connection:
                    asked = connection.recv(1 << 16).replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
                    if answer is None:
                        with socket.create_connection((host, int(port))) as server:
                            server.sendall(asked)
                            answer = server.makefile("rb").read()
                    connection.sendall(answer)

        thread = threading.Thread(target=between)
        thread.start()
        url = f"http://127.0.0.1:{proxy.getsockname()[1]}"
        assert Client(url, "toy").status() == [VersionStatus(2, "AVAILABLE")]
        thread.join()


@pytest.mark.parametrize(
    ("dtype", "field", "values"),
    [
        (types_pb2.DT_FLOAT, "float_val", [0.5, 0.25]),
        (types_pb2.DT_INT64, "int64_val", [3, 1 << 40]),
        (types_pb2.DT_STRING, "string_val", [b"a", b"b"]),
        (types_pb2.DT_UINT8, "int_val", [0, 255]),
    ],
)
def test_typed_values_are_read_as_tensorflow_serving_sends_them(dtype, field, values):
    import tensorflow as tf

    proto = tensor_pb2.TensorProto(dtype=dtype, **{field: values})
    proto.tensor_shape.dim.add(size=2)
    proto.tensor_shape.dim.add(size=1)
    assert to_array(proto).tolist() == [[v] for v in values] == tf.make_ndarray(proto).tolist()
    constant = tensor_pb2.TensorProto(dtype=dtype, **{field: values[:1]})
    constant.tensor_shape.dim.add(size=3)
    assert to_array(constant).tolist() == values[:1] * 3 == tf.make_ndarray(constant).tolist()


def test_the_client_does_without_tensorflow_and_leaves_it_whole(server):
    code = """
import sys
from keras_medattn.serve import Client
result, = Client(sys.argv[1], "toy").predict([sys.stdin.buffer.read()])
assert not any(name.partition(".")[0] in ("tensorflow", "keras") for name in sys.modules)
import tensorflow as tf
from tensorflow.core.framework import tensor_pb2
from keras_medattn.serve import protos
assert tensor_pb2.TensorProto is protos.tensor_pb2.TensorProto
request = protos.predict_pb2.PredictRequest()
request.inputs["x"].CopyFrom(tf.make_tensor_proto([1.0, 2.0]))
print(result.class_name, float(tf.reduce_sum(tf.make_ndarray(request.inputs["x"]))))
"""
    command = [sys.executable, "-c", code, server[0]]
    done = subprocess.run(command, input=picture(1), capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.split() == [b"red", b"3.0"]

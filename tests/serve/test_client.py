"""The client against the real server, and against what TensorFlow Serving sends."""

import io
import json
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from PIL import Image
from serve.conftest import expected, picture

from keras_medattn.serve import Client, Server, ServerError
from keras_medattn.serve.client import SignatureInfo, TensorInfo, VersionStatus
from keras_medattn.serve.protos import tensor_pb2, to_array, types_pb2


@pytest.fixture(scope="module")
def client(server):
    with Client(server[0], "toy") as client:
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


def test_metadata_and_status(client, server):
    signatures = client.metadata()
    assert set(signatures) == {"serving_default", "tensor", "explain", "slow"}
    assert signatures["slow"] == SignatureInfo(
        {"seconds": TensorInfo("float", (-1,))}, {"turns": TensorInfo("int64", (-1,))}
    )
    assert client.status() == [VersionStatus(2, "AVAILABLE")]
    [broken] = Client(server[0], "broken").status()
    assert (broken.version, broken.state) == (7, "END")
    assert "saved_model.pb" in broken.error


def test_refusals_of_the_whole_call_are_readable(server):
    with pytest.raises(ServerError, match=r"serves no model 'nobody'") as caught:
        Client(server[0], "nobody").predict([picture(1)])
    assert caught.value.code == "NOT_FOUND"
    with pytest.raises(ServerError, match=r'signature name: "heat"') as caught:
        Client(server[0], "toy").predict([picture(1)], signature="heat")
    assert caught.value.code == "FAILED_PRECONDITION"
    with pytest.raises(ServerError, match=r"No server answers at 127\.0\.0\.1") as caught:
        Client(f"127.0.0.1:{free_port()}", "toy").predict([picture(1)])
    assert caught.value.code == "UNAVAILABLE"
    with pytest.raises(ValueError, match=r"HOST:PORT.*Received: 'http://localhost:8500'"):
        Client("http://localhost:8500")


def test_a_deadline_is_kept():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        began = time.monotonic()
        [result] = Client(f"127.0.0.1:{silent.getsockname()[1]}", "toy", timeout=0.3).predict([picture(1)])
    assert "gave no answer in 0.3 s" in result.error
    assert time.monotonic() - began < 3


def test_a_server_that_comes_up_late_is_asked_again(models):
    port = free_port()
    server = Server(models, port=port)
    late = threading.Timer(0.3, server.start)
    late.start()
    # Larger than gRPC keeps for another try unless told to.
    [result] = Client(f"127.0.0.1:{port}", "toy").predict([picture(1) + bytes(1 << 20)])
    late.join()
    assert server.stop()
    np.testing.assert_allclose(result.probabilities, expected(picture(1)), atol=1e-6)


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

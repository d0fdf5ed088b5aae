"""A folder of exported models, and a server of it in a second process."""

import io
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

CLASSES = ["red", "green", "blue"]
SERVE = "import sys, json; from keras_medattn.serve import serve; sys.exit(serve(**json.loads(sys.argv[1])))"


def picture(seed: int, kind: str = "PNG", size: tuple[int, int] = (24, 16)) -> bytes:
    """An image of one noisy colour, so that each seed has its own answer."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 30, (size[1], size[0], 3)) + rng.integers(0, 200, 3)
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, kind)
    return file.getvalue()


def expected(data: bytes, version: int = 2) -> np.ndarray:
    """The toy model in float64 NumPy: softmax of version times the mean colour."""
    mean = np.asarray(Image.open(io.BytesIO(data)), np.float64).mean((0, 1)) / 255
    scores = np.exp(version * mean)
    return scores / scores.sum()


def export(path: Path, version: int) -> None:
    import tensorflow as tf

    from keras_medattn.data.decode import decode

    class Toy(tf.Module):
        def answer(self, mean):
            probabilities = tf.nn.softmax(version * mean)
            label = tf.argmax(probabilities, -1)
            return {"probabilities": probabilities, "label": label, "class_name": tf.gather(CLASSES, label)}

        def means(self, image_bytes):
            def one(data):
                return tf.reduce_mean(tf.cast(decode(data), tf.float32), (0, 1)) / 255.0

            return tf.map_fn(one, image_bytes, fn_output_signature=tf.TensorSpec([3], tf.float32))

        @tf.function(input_signature=[tf.TensorSpec([None], tf.string, "image_bytes")])
        def serving_default(self, image_bytes):
            return self.answer(self.means(image_bytes))

        @tf.function(input_signature=[tf.TensorSpec([None, 16, 24, 3], tf.uint8, "image")])
        def tensor(self, image):
            return self.answer(tf.reduce_mean(tf.cast(image, tf.float32), (1, 2)) / 255.0)

        @tf.function(input_signature=[tf.TensorSpec([None], tf.string, "image_bytes")])
        def explain(self, image_bytes):
            means = self.means(image_bytes)
            evidence = {
                "attention": tf.tile(means[:, None], [1, 2, 1]),
                "boxes": tf.tile(tf.constant([[[1.0, 2.0, 9.0, 8.0]]]), [tf.shape(means)[0], 1, 1]),
                "weights": tf.ones((tf.shape(means)[0], 1)),
            }
            return self.answer(means) | evidence

        @tf.function(input_signature=[tf.TensorSpec([None], tf.float32, "seconds")])
        def slow(self, seconds):
            end = tf.timestamp() + tf.cast(tf.reduce_max(seconds), tf.float64)
            turns = tf.while_loop(
                lambda _: tf.timestamp() < end, lambda i: [i + 1], [tf.constant(0, tf.int64)]
            )
            return {"turns": tf.fill(tf.shape(seconds), turns[0])}

    toy = Toy()
    names = ("serving_default", "tensor", "explain", "slow")
    tf.saved_model.save(toy, str(path), signatures={name: getattr(toy, name) for name in names})


def warm_up(path: Path, data: bytes) -> None:
    """Writes the model one warmup request, in TensorFlow Serving's file."""
    import tensorflow as tf

    from keras_medattn.serve.protos import prediction_log_pb2, string_tensor

    log = prediction_log_pb2.PredictionLog()
    log.predict_log.request.model_spec.name = path.parent.name
    log.predict_log.request.inputs["image_bytes"].CopyFrom(string_tensor([data]))
    (path / "assets.extra").mkdir(exist_ok=True)
    with tf.io.TFRecordWriter(str(path / "assets.extra" / "tf_serving_warmup_requests")) as writer:
        writer.write(log.SerializeToString())


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved_models")
    export(folder / "toy" / "1", 1)
    export(folder / "toy" / "2", 2)
    warm_up(folder / "toy" / "2", picture(0))
    (folder / "toy" / "2" / "assets.extra" / "medattn.json").write_text(json.dumps({"max_pixels": 10_000}))
    # What publishing leaves for a moment, and what a failed copy leaves for good.
    (folder / "toy" / "3").mkdir()
    (folder / "toy" / ".4").symlink_to(folder / "toy" / "1")
    (folder / "tmp-new").symlink_to(folder / "toy")
    (folder / "broken" / "7").mkdir(parents=True)
    (folder / "broken" / "7" / "saved_model.pb").write_bytes(b"not a model")
    # A warmup request that the model cannot answer: what it would do with the first real one.
    export(folder / "cold" / "1", 1)
    warm_up(folder / "cold" / "1", b"not an image")
    return folder


def start(folder: Path | None, log: Path, port: int = 0, **options) -> tuple[subprocess.Popen, int]:
    """Starts a server process, and answers it and its port once it serves."""
    options |= {"folder": folder and str(folder), "port": port}
    with log.open("wb") as file:
        process = subprocess.Popen([sys.executable, "-c", SERVE, json.dumps(options)], stderr=file)
    while not (found := re.search(r"serving .* at 127\.0\.0\.1:(\d+)", log.read_text())):
        try:
            process.wait(0.1)
        except subprocess.TimeoutExpired:
            continue
        raise AssertionError(f"the server ended: {log.read_text()}")
    return process, int(found[1])


@pytest.fixture(scope="session")
def server(models, tmp_path_factory):
    """(target, log file) of a server that all tests here ask."""
    log = tmp_path_factory.mktemp("log") / "stderr"
    process, port = start(models, log, rest_port=0)
    yield f"127.0.0.1:{port}", log
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0


@pytest.fixture(scope="session")
def rest(server) -> str:
    """HOST:PORT of its REST."""
    return re.search(r"REST at (\S+)", server[1].read_text())[1]

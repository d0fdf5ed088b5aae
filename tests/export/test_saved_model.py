"""The exported model: from file to answer as Keras, evidence in the sent pixels, never half a version."""

import io
import json
import shutil
import subprocess
import sys
from dataclasses import replace

import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from scipy.special import softmax

from keras_medattn.cli import main
from keras_medattn.data import pipeline
from keras_medattn.explain import heatmaps
from keras_medattn.export import saved_model
from keras_medattn.export.saved_model import ExportError
from keras_medattn.models import MIMS
from keras_medattn.train import calibrate
from keras_medattn.train.calibrate import Calibration, Threshold


@pytest.fixture(scope="module")
def small():
    """A model that is soon exported."""
    image = keras.Input((None, None, 3))
    maps = keras.layers.Conv2D(4, 8, strides=8)(keras.layers.Rescaling(1 / 255)(image))
    model = MIMS(2, keras.Model(image, maps), 8, kernels=((1, 3),), k=3)
    model.build((None, 64, 80, 3))
    return model


@pytest.fixture(scope="module")
def served(tiny_export):
    return tf.saved_model.load(str(tiny_export[0]))


def test_published_model_equals_keras(tiny_export):
    folder, differences = tiny_export
    assert folder.name == "4"  # one above the highest that was there
    assert set(differences) == {"serving_default", "tensor", "explain"}
    assert max(differences.values()) <= 1e-5
    about = json.loads((folder / "assets.extra" / "medattn.json").read_text())
    assert about["class_names"] == ["none", "spot"]
    assert about["image_size"] == [64, 80]


@pytest.mark.parametrize("batch", [1, 5])
def test_every_signature_answers_as_keras(served, tiny_run, batch):
    model, test = tiny_run.model(), tiny_run.manifest.split("test")
    paths = test.paths[:batch]
    sized = np.stack([pipeline.read_sized(path, (64, 80)) for path in paths])
    expected = tf.nn.softmax(model(sized)).numpy()
    data = tf.constant([path.read_bytes() for path in paths])
    pixels = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths])
    for name, value in (("serving_default", data), ("explain", data), ("tensor", tf.constant(pixels))):
        answer = served.signatures[name](value)
        np.testing.assert_allclose(answer["probabilities"], expected, atol=1e-5)
        np.testing.assert_array_equal(answer["label"], expected.argmax(axis=-1))
        names = [("none", "spot")[place].encode() for place in expected.argmax(axis=-1)]
        assert answer["class_name"].numpy().tolist() == names
        assert all(value.shape[0] == batch for value in answer.values())


def test_scaled_decoding_is_that_of_training(small, tiny_run, tmp_path):
    """Of photographs five times as large as the model's image, with the evidence in their own pixels."""
    data = replace(tiny_run.recipe.data, scaled_decoding=True)
    noise = np.random.default_rng(0).integers(0, 256, (2, 400, 330, 3), np.uint8)
    for number, pixels in enumerate(noise):
        Image.fromarray(pixels).save(tmp_path / f"{number}.jpg")
    samples = replace(tiny_run.manifest.take([0, 1]), root=tmp_path, names=("0.jpg", "1.jpg"))
    settings, names = replace(tiny_run.recipe, data=data), tiny_run.manifest.class_names
    folder, found = saved_model.export(small, settings, names, tmp_path / "m", samples)
    assert max(found.values()) <= 1e-5
    whole, scaled = (pipeline.read_sized(samples.paths[0], (64, 80), scaled=one) for one in (False, True))
    assert (whole != scaled).any()
    assert json.loads((folder / "assets.extra" / "medattn.json").read_text())["scaled_decoding"]
    served = tf.saved_model.load(str(folder)).signatures["explain"](
        tf.constant([samples.paths[0].read_bytes()])
    )
    ratio = np.array([330 / 80, 400 / 64] * 2)
    named = small.explain(scaled[None])
    np.testing.assert_allclose(
        served["boxes"][0], np.asarray(named["boxes"])[0] * ratio, rtol=1e-4, atol=1e-2
    )


def test_temperature_and_threshold_are_inside(tiny_run, tiny_set, tmp_path):
    """From the run's calibration; a threshold between the answers of two images, which labels follow."""
    part = replace(tiny_run, folder=tmp_path / "run")
    shutil.copytree(tiny_run.folder, part.folder)
    about = json.loads((part.folder / "run.json").read_text()) | {"root": str(tiny_set.parent)}
    (part.folder / "run.json").write_text(json.dumps(about))
    test = part.manifest.split("test")
    scores = part.model()(np.stack([pipeline.read_sized(path, (64, 80)) for path in test.paths])).numpy()
    expected = softmax(scores / 2.5, axis=-1)
    threshold = float(np.sort(expected[:, 1])[3:5].mean())
    chosen = Threshold(threshold, "sensitivity", 0.9, 1.0, 3)
    calibrate.keep(part, Calibration(2.5, True, 6, 5, (1.0, 0.5), (0.2, 0.1), chosen))
    assert main(["export", str(part.folder), "--to", str(tmp_path / "m"), "--samples", "2"]) == 0
    served = tf.saved_model.load(str(tmp_path / "m" / "1"))
    answer = served.signatures["serving_default"](tf.constant([path.read_bytes() for path in test.paths]))
    np.testing.assert_allclose(answer["probabilities"], expected, atol=1e-5)
    assert answer["label"].numpy().tolist() == (expected[:, 1] >= threshold).astype(int).tolist()
    assert answer["label"].numpy().sum() == 4  # of eight
    assert (answer["label"].numpy() != scores.argmax(axis=-1)).any()
    about = json.loads((tmp_path / "m" / "1" / "assets.extra" / "medattn.json").read_text())
    assert (about["temperature"], about["threshold"]) == (2.5, threshold)


def test_evidence_is_in_pixels_of_the_sent_image(served, tiny_run):
    """The same picture at twice the width and three times the height: boxes grow with it."""
    model, path = tiny_run.model(), tiny_run.manifest.split("test").paths[1]
    small = Image.open(path).convert("RGB").resize((80, 64), Image.Resampling.BILINEAR)
    large = small.resize((160, 192), Image.Resampling.NEAREST)
    boxes = []
    for image in (small, large):
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        answer = served.signatures["explain"](tf.constant([buffer.getvalue()]))
        boxes.append(answer["boxes"].numpy()[0])
    named = model.explain(np.asarray(small)[None])
    np.testing.assert_allclose(boxes[0], named["boxes"][0], atol=1e-3)
    heat = heatmaps.attention(heatmaps.contributions(model, np.asarray(small)[None])["contributions"])
    answer = served.signatures["explain"](tf.constant([_png(small)]))
    np.testing.assert_allclose(answer["attention"], heat, atol=1e-4)
    assert boxes[1][:, [0, 2]].max() > 80
    top = boxes[1][0] / np.array([2, 3, 2, 3])
    assert any(np.allclose(top, box, atol=0.5) for box in boxes[0])


def test_answers_in_a_fresh_process(tiny_export, tiny_run):
    """TensorFlow alone, without this package, gives the same numbers: nothing of ours is needed to serve."""
    path = tiny_run.manifest.split("test").paths[0]
    code = (
        "import sys, tensorflow as tf\n"
        "model = tf.saved_model.load(sys.argv[1])\n"
        "answer = model.signatures['serving_default'](tf.constant([open(sys.argv[2], 'rb').read()]))\n"
        "assert not any(name.startswith('keras_medattn') for name in sys.modules)\n"
        "print(*answer['probabilities'].numpy()[0])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tiny_export[0], path], capture_output=True, encoding="utf-8", check=False
    )
    assert done.returncode == 0, done.stderr
    expected = tf.nn.softmax(tiny_run.model()(pipeline.read_sized(path, (64, 80))[None])).numpy()[0]
    np.testing.assert_allclose([float(value) for value in done.stdout.split()], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "not a JPEG, PNG or BMP"),
        (b"GIF89a" + bytes(30), "not a JPEG, PNG or BMP"),
        (b"\xff\xd8\xff" + bytes(100), "Invalid JPEG"),
        (b"BM" + bytes(10), "out of bounds|substr|pos|DecodeRaw"),  # whichever part fails first
    ],
)
def test_bytes_that_are_no_image_are_an_invalid_argument(served, data, words):
    with pytest.raises(tf.errors.InvalidArgumentError, match=words):
        served.signatures["serving_default"](tf.constant([data]))


def test_sixteen_bits_need_a_window(served):
    deep = Image.fromarray(np.arange(64 * 80, dtype=np.uint16).reshape(64, 80))
    with pytest.raises(tf.errors.InvalidArgumentError, match="needs an intensity window"):
        served.signatures["serving_default"](tf.constant([_png(deep)]))


def test_failed_export_leaves_nothing(small, tiny_run, tmp_path, monkeypatch):
    samples = tiny_run.manifest.split("test").take([0])
    names = tiny_run.manifest.class_names
    monkeypatch.setattr(saved_model, "TOLERANCE", -1.0)
    with pytest.raises(ExportError, match="it was not published"):
        saved_model.export(small, tiny_run.recipe, names, tmp_path / "m", samples)
    assert not list((tmp_path / "m").iterdir())
    with pytest.raises(ExportError, match="needs a name"):
        saved_model.export(small, tiny_run.recipe, names, tmp_path / "12", samples)


def test_warmup_requests_hold_no_patient(tiny_export):
    from tensorflow_serving.apis import prediction_log_pb2

    path = tiny_export[0] / "assets.extra" / "tf_serving_warmup_requests"
    logs = [
        prediction_log_pb2.PredictionLog.FromString(one.numpy()) for one in tf.data.TFRecordDataset(str(path))
    ]
    names = [log.predict_log.request.model_spec.signature_name for log in logs]
    assert names == ["serving_default", "explain"]
    for log in logs:
        [data] = log.predict_log.request.inputs["image_bytes"].string_val
        assert np.ptp(tf.io.decode_jpeg(data).numpy()) == 0


def _png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()

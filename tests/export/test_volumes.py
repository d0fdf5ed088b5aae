"""An exported model of volumes: as Keras, from the files to the answer, and its evidence in sent pixels."""

import json

import keras
import numpy as np
import pytest
import tensorflow as tf
import trees

from keras_medattn.data import manifest
from keras_medattn.explain import heatmaps
from keras_medattn.export import saved_model
from keras_medattn.models import MIMS
from keras_medattn.serve import Server
from keras_medattn.serve.verify import verify
from keras_medattn.train import recipe


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The model, its folder, and the differences found on volumes of three to five slices."""
    folder = tmp_path_factory.mktemp("volumes")
    table = manifest.load(trees.TREES["volumes"](folder))
    image = keras.Input((None, None, 3))
    maps = keras.layers.Conv2D(4, 8, strides=8, kernel_initializer="glorot_normal")(image)
    model = MIMS(2, keras.Model(image, keras.layers.Rescaling(1 / 64)(maps)), 8, kernels=((1, 3),), k=3)
    model.build((None, 32, 48, 3))
    settings = recipe.from_dict({"data": {"image_size": [32, 48], "slices": [2, 3], "central": 4}})
    return model, *saved_model.export(
        model, settings, table.class_names, folder / "served", table.take([0, 1, 2])
    )


def test_published_model_equals_keras(exported):
    _, folder, differences = exported
    assert set(differences) == {"tensor", "explain"}
    assert max(differences.values()) <= 1e-5
    assert json.loads((folder / "assets.extra" / "medattn.json").read_text())["central"] == 4
    served = tf.saved_model.load(str(folder))
    records = tf.data.TFRecordDataset(str(folder / "assets.extra" / "tf_serving_warmup_requests"))
    from tensorflow_serving.apis import prediction_log_pb2

    for record in records:
        request = prediction_log_pb2.PredictionLog.FromString(record.numpy()).predict_log.request
        inputs = {name: tf.constant(tf.make_ndarray(value)) for name, value in request.inputs.items()}
        answer = served.signatures[request.model_spec.signature_name](**inputs)
        assert np.isfinite(answer["probabilities"]).all()


def test_a_server_of_it_gives_keras_numbers(exported):
    models = exported[1].parent.parent
    server = Server(models, port=0, rest_port=0, poll=0)
    server.start()
    rest = f"http://127.0.0.1:{server.rest_port}"
    checks = verify(models, f"127.0.0.1:{server.port}", rest)
    assert server.stop()
    doors = {(one.signature, one.door): (one.difference <= 1e-5, one.error) for one in checks}
    assert doors == {(name, door): (True, "") for name in ("tensor", "explain") for door in ("gRPC", "REST")}


def test_evidence_is_in_pixels_of_the_sent_slices(exported):
    model, folder, _ = exported
    served = tf.saved_model.load(str(folder))
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (2, 3, 32, 48, 3), np.uint8)
    mask = np.array([[True, True, False], [True, True, True]])
    large = small.repeat(2, axis=2).repeat(3, axis=3)
    named = model.explain({"image": small, "mask": mask})
    answer = served.signatures["explain"](image=tf.constant(small), mask=tf.constant(mask))
    np.testing.assert_allclose(answer["probabilities"], tf.nn.softmax(named["scores"]), atol=1e-5)
    for name in ("boxes", "weights", "slices", "slice_scores"):
        np.testing.assert_allclose(answer[name], named[name], atol=1e-3)
    twice = served.signatures["explain"](image=tf.constant(large), mask=tf.constant(mask))
    assert twice["boxes"].numpy()[..., 2].max() > 2 * 48
    argued = heatmaps.contributions(model, small[1], tf.repeat(answer["label"][1], 3))["contributions"]
    kept = np.maximum(argued, 0)
    np.testing.assert_allclose(answer["attention"][1], kept / kept.max(), atol=1e-4)
    assert not np.any(answer["attention"][0, 2])
    padding = small.copy()
    padding[0, 2] = 255 - padding[0, 2]
    again = served.signatures["explain"](image=tf.constant(padding), mask=tf.constant(mask))
    for name in ("probabilities", "boxes", "weights", "attention"):
        np.testing.assert_array_equal(again[name], answer[name])

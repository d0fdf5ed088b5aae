"""LiteRT and ONNX files: as Keras, of built-in operators, with all that a client must know beside them."""

import json
import re
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import onnx
import pytest
from ai_edge_litert.interpreter import Interpreter

from keras_medattn.data import manifest, pipeline
from keras_medattn.export import formats
from keras_medattn.export.saved_model import ExportError
from keras_medattn.models import GlobalMask
from keras_medattn.models.cnns import small_cnn
from keras_medattn.train import recipe

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def small(tiny_set):
    """A model, its recipe, and its images."""
    keras.utils.set_random_seed(1)
    model = GlobalMask(2, small_cnn(), mask="none")
    model.build((None, 64, 80, 3))
    return model, recipe.from_dict({"data": {"image_size": [64, 80]}}), manifest.load(tiny_set)


@pytest.fixture(scope="module")
def exported(small, tmp_path_factory):
    """The folder of the model's files, at a temperature of .05, and their differences to Keras."""
    to = tmp_path_factory.mktemp("exported") / "small"
    (to / "files" / "3").mkdir(parents=True)
    model, settings, table = small
    sides = table.split("test").take(range(5)), table.split("train")
    kinds = ("litert", "litert_batch1", "litert_int8", "onnx")
    return formats.export(model, settings, table.class_names, to, *sides, kinds, 0.05, 0.3)


def test_files_answer_as_keras(exported, small):
    (folder, differences), (model, _, table) = exported, small
    assert folder.parts[-2:] == ("files", "4")  # one above the highest that was there
    assert max(differences[name] for name in ("litert", "litert_batch1", "onnx")) <= 1e-4
    paths = table.split("test").paths[:5]
    sized = np.stack([pipeline.read_sized(path, (64, 80)) for path in paths])
    powers = np.exp(np.asarray(model(sized), float) / 0.05)
    expected = powers / powers.sum(axis=1, keepdims=True)
    assert np.ptp(expected[:, 1]) > 1e-3  # ten times the tolerance
    for name in ("model.tflite", "model.onnx"):
        answer = formats.reader(folder / name)
        np.testing.assert_allclose(answer({"image": sized}), expected, atol=1e-4)
        np.testing.assert_allclose(answer({"image": sized[:1]}), expected[:1], atol=1e-4)
    sizes = {name: (folder / name).stat().st_size for name in ("model.tflite", "model_int8.tflite")}
    assert sizes["model_int8.tflite"] < 0.5 * sizes["model.tflite"]


def test_facts_stand_beside_the_files(exported):
    folder, _ = exported
    about = json.loads((folder / "medattn.json").read_text())
    assert about["class_names"] == ["none", "spot"]
    assert (about["image_size"], about["temperature"], about["threshold"]) == ([64, 80], 0.05, 0.3)
    assert set(about["files"].values()) | {"medattn.json"} == {path.name for path in folder.iterdir()}
    assert about["not_in_tensorrt"] == []
    model = onnx.load(folder / "model.onnx")
    assert {node.op_type for node in model.graph.node} <= set(about["onnx_operators"])
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    [image], [answer] = inferred.graph.input, inferred.graph.output
    dims = [[d.dim_param or d.dim_value for d in one.type.tensor_type.shape.dim] for one in (image, answer)]
    assert dims == [["batch", 64, 80, 3], ["batch", 2]]


def test_batch_of_one_has_no_open_dimension(exported):
    [image] = Interpreter(str(exported[0] / "model_batch1.tflite")).get_input_details()
    assert list(image["shape_signature"]) == [1, 64, 80, 3]
    assert image["dtype"] is np.uint8


def test_example_program_answers(exported, small):
    paths = small[2].split("test").paths[:4]
    program = ROOT / "serving" / "tflite" / "classify.py"
    done = subprocess.run(
        [sys.executable, program, exported[0] / "model.tflite", *paths],
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0, done.stderr
    sized = np.stack([pipeline.read_sized(path, (64, 80)) for path in paths])
    expected = formats.reader(exported[0] / "model.onnx")({"image": sized})
    for line, path, probabilities in zip(done.stdout.splitlines(), paths, expected, strict=True):
        name, place, value = re.fullmatch(r"(.+): (\w+) \((.+)\)", line).groups()
        assert Path(name) == path
        assert abs(float(value) - probabilities[("none", "spot").index(place)]) < 0.02
        assert place == ("spot" if probabilities[1] >= 0.3 else "none")


def test_failed_export_leaves_nothing(small, tmp_path, monkeypatch):
    model, settings, table = small
    samples = table.split("test").take([0])
    what = model, settings, table.class_names, tmp_path, samples, samples
    with pytest.raises(ExportError, match=r"`formats` must be of .* Received: flite"):
        formats.export(*what, ["flite"])
    monkeypatch.setattr(formats, "TOLERANCE", -1.0)
    with pytest.raises(ExportError, match=r"model.tflite differs .* nothing was published"):
        formats.export(*what, ["litert"])
    assert not list((tmp_path / "files").iterdir())


def test_engine_without_tensorrt_says_what_to_install(exported, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ExportError, match=r"pip install tensorrt.*optShapes=image:8x64x80x3"):
        formats.tensorrt.build(exported[0] / "model.onnx", tmp_path / "model.engine")


class Resized(keras.Model):
    """Answers by an operator that LiteRT has no built-in form of."""

    def call(self, images, training=None):
        small = keras.ops.image.resize(keras.ops.cast(images, "float32"), (8, 10), antialias=True)
        return keras.ops.mean(small, axis=(1, 2))[:, :2]


def test_what_a_converter_cannot_do_is_one_line(small, tmp_path):
    _, settings, table = small
    samples = table.split("test").take([0])
    with pytest.raises(ExportError, match=r"^model.tflite cannot be made .*ops: .*Leave litert out.*$"):
        formats.export(Resized(), settings, table.class_names, tmp_path, samples, samples, ["litert"])
    assert not list((tmp_path / "files").iterdir())


def test_engine_wants_batches_in_order(exported, tmp_path):
    with pytest.raises(ExportError, match=r"least, the best and the largest. Received: \(8, 4, 32\)"):
        formats.tensorrt.build(exported[0] / "model.onnx", tmp_path / "model.engine", (8, 4, 32))

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
from keras_medattn.train import recipe

ROOT = Path(__file__).parents[2]


def backbone() -> keras.Model:
    """Convolutions of every kind, behind batch norms as training leaves them, with negative scales too."""
    rng = np.random.default_rng(0)
    image = keras.Input((None, None, 3))
    x = keras.layers.Rescaling(1 / 127.5, -1)(image)
    for layer in (
        keras.layers.Conv2D(24, 3, 2, "same", use_bias=False, name="whole"),
        keras.layers.DepthwiseConv2D(3, 2, "same", use_bias=False, name="depthwise"),
        keras.layers.Conv2D(96, 1, use_bias=False, name="point"),
        keras.layers.Conv2D(32, 3, 2, "same", use_bias=False, name="wide"),
    ):
        norm = keras.layers.BatchNormalization(name=f"{layer.name}_norm")
        x = keras.layers.ReLU(6.0)(norm(layer(x)))
        channels = x.shape[-1]
        scale = rng.uniform(0.5, 2, channels) * np.where(np.arange(channels) % 3, 1, -1)
        norm.set_weights([scale, *rng.normal(0, 0.1, (2, channels)), rng.uniform(0.1, 0.3, channels)])
    return keras.Model(image, x)


@pytest.fixture(scope="module")
def small(tiny_set):
    """A model, its recipe, and its images."""
    keras.utils.set_random_seed(1)
    model = GlobalMask(2, backbone(), mask="none")
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
    return formats.export(model, settings, table.class_names, to, *sides, kinds, 0.5, 0.3)


def test_files_answer_as_keras(exported, small):
    (folder, differences), (model, _, table) = exported, small
    assert folder.parts[-2:] == ("files", "4")  # one above the highest that was there
    assert max(differences[name] for name in ("litert", "litert_batch1", "onnx")) <= 1e-4
    paths = table.split("test").paths[:5]
    sized = np.stack([pipeline.read_sized(path, (64, 80)) for path in paths])
    powers = np.exp(np.asarray(model(sized), float) / 0.5)
    expected = powers / powers.sum(axis=1, keepdims=True)
    assert np.ptp(expected[:, 1]) > 1e-3  # ten times the tolerance
    for name in ("model.tflite", "model.onnx"):
        answer = formats.reader(folder / name)
        np.testing.assert_allclose(answer({"image": sized}), expected, atol=1e-4)
        np.testing.assert_allclose(answer({"image": sized[:1]}), expected[:1], atol=1e-4)
    sizes = {name: (folder / name).stat().st_size for name in ("model.tflite", "model_int8.tflite")}
    assert sizes["model_int8.tflite"] < 0.5 * sizes["model.tflite"]


def test_int8_keeps_the_sum_of_each_window(exported, small):
    """Of the weights in the file, to half a step; rounded one by one they would not."""
    file = Interpreter(str(exported[0] / "model_int8.tflite"))
    file.allocate_tensors()
    stored = {
        tuple(one["shape"]): file.get_tensor(one["index"]).astype(int)
        for one in file.get_tensor_details()
        if len(one["shape"]) == 4 and len(one["quantization_parameters"]["scales"]) > 1
    }
    for name in ("whole", "depthwise", "point", "wide"):
        kernel = np.asarray(small[0].backbone.get_layer(name).kernel, "float64")
        kernel *= np.sign(small[0].backbone.get_layer(f"{name}_norm").gamma).reshape(
            (-1, 1) if name == "depthwise" else -1
        )
        if name == "depthwise":  # (1, h, w, C) in the file
            largest, found = np.abs(kernel).max(axis=(0, 1)), stored.pop((1, *kernel.shape[:3]))[0][..., None]
        else:  # (D, h, w, C)
            largest, found = (
                np.abs(kernel).max(axis=(0, 1, 2)),
                np.moveaxis(stored.pop((kernel.shape[3], *kernel.shape[:3])), 0, -1),
            )
        exact = kernel / largest * 127
        assert np.abs(found - exact).max() < 1, name
        assert np.abs((found - exact).sum(axis=(0, 1))).max() <= 0.5 + 1e-4, name
        if kernel.shape[0] > 1:
            assert np.abs((np.round(exact) - exact).sum(axis=(0, 1))).max() > 1, name
    assert not stored


def test_facts_stand_beside_the_files(exported):
    folder, _ = exported
    about = json.loads((folder / "medattn.json").read_text())
    assert about["class_names"] == ["none", "spot"]
    assert (about["image_size"], about["temperature"], about["threshold"]) == ([64, 80], 0.5, 0.3)
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


def test_engine_without_tensorrt_says_what_to_install(exported, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ExportError, match=r"pip install tensorrt.*optShapes=image:8x64x80x3"):
        formats.tensorrt.build(exported[0] / "model.onnx", tmp_path / "model.engine")


class Means(keras.Model):
    """Answers by one operator."""

    def call(self, images, training=None):
        return keras.ops.mean(keras.ops.cast(images, "float32"), axis=(1, 2))


def test_failed_export_leaves_nothing(small, tmp_path, monkeypatch):
    _, settings, table = small
    samples = table.split("test").take([0])
    what = Means(), settings, table.class_names, tmp_path, samples, samples
    with pytest.raises(ExportError, match=r"`formats` must be of .* Received: flite"):
        formats.export(*what, ["flite"])
    monkeypatch.setattr(formats, "TOLERANCE", -1.0)
    with pytest.raises(ExportError, match=r"model.tflite differs .* nothing was published"):
        formats.export(*what, ["litert"])
    assert not list((tmp_path / "files").iterdir())


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

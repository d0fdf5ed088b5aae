"""`medattn benchmark`: real files, each format in a process of its own, figures against Keras and sklearn."""

import csv
import json
import shutil

import keras
import numpy as np
import pytest
from PIL import Image
from scipy.special import softmax
from sklearn.metrics import roc_auc_score
from tensorflow.core.protobuf import saved_model_pb2

from keras_medattn.cli import main
from keras_medattn.data import manifest, pipeline
from keras_medattn.export import benchmark, formats, saved_model
from keras_medattn.export.saved_model import ExportError
from keras_medattn.models import GlobalMask
from keras_medattn.models.cnns import small_cnn
from keras_medattn.train import recipe

NAMES = ["saved_model tensor", "saved_model serving_default", "litert", "onnx"]


@pytest.fixture(scope="module")
def exported(tiny_set, tmp_path_factory):
    """A model's folder with a SavedModel, a LiteRT and an ONNX file; its probabilities of the test side."""
    keras.utils.set_random_seed(1)
    model = GlobalMask(2, small_cnn(), mask="none")
    model.build((None, 64, 80, 3))
    settings, table = recipe.from_dict({"data": {"image_size": [64, 80]}}), manifest.load(tiny_set)
    few, to = table.split("test").take([0]), tmp_path_factory.mktemp("exported") / "small"
    version, _ = saved_model.export(model, settings, table.class_names, to, few, 0.05)
    saved = saved_model_pb2.SavedModel.FromString((version / "saved_model.pb").read_bytes())
    del saved.meta_graphs[0].signature_def["explain"]  # measured as `serving_default`, seconds a process
    (version / "saved_model.pb").write_bytes(saved.SerializeToString())
    formats.export(model, settings, table.class_names, to, few, few, ("litert", "onnx"), 0.05)
    sized = np.stack([pipeline.read_sized(path, (64, 80)) for path in table.split("test").paths])
    return to, softmax(np.asarray(model(sized), float) / 0.05, axis=-1)


def test_every_format_is_measured(exported, tiny_set, tmp_path, capsys):
    folder, expected = exported
    (folder / "files" / "9").mkdir()
    shutil.copy(folder / "files" / "1" / "medattn.json", folder / "files" / "9")
    (folder / "files" / "9" / "model_float16.tflite").write_bytes(b"no model")
    arguments = ["benchmark", str(folder), "--data", str(tiny_set), "--runs", "12", "--out", str(tmp_path)]
    assert main(arguments) == 1  # one of them does not run
    shown = capsys.readouterr().out
    assert "litert_float16: does not run here: ValueError" in shown
    rows = {row["name"]: row for row in csv.DictReader((tmp_path / "benchmark.csv").open())}
    assert list(rows) == [*NAMES[:3], "litert_float16", "onnx"]
    assert rows["litert_float16"]["p50"] == ""
    labels = manifest.load(tiny_set).split("test").labels
    auroc = roc_auc_score(labels, expected[:, 1])
    for name in NAMES:
        row = rows[name]
        assert name in shown
        assert float(row["auroc"]) == pytest.approx(auroc, abs=1e-9)
        assert float(row["difference"]) <= 1e-4
        assert 0 < float(row["p50"]) <= float(row["p99"])
        assert float(row["load"]) > 0
    assert float(rows["onnx"]["mb"]) == (folder / rows["onnx"]["file"]).stat().st_size / 1e6
    # LiteRT and ONNX are run without TensorFlow
    alone = max(float(rows[name]["memory"]) for name in ("litert", "onnx"))
    assert alone < 0.5 * float(rows["saved_model tensor"]["memory"])
    picture = np.asarray(Image.open(tmp_path / "benchmark.png").convert("RGB"))
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 10


def test_nothing_exported_or_of_two_models(exported, tmp_path):
    with pytest.raises(ExportError, match=r"holds no N/saved_model.pb and no files/N, as `medattn export"):
        benchmark.benchmark(tmp_path)
    folder = tmp_path / "two"
    shutil.copytree(exported[0], folder)
    facts = folder / "files" / "1" / "medattn.json"
    about = json.loads(facts.read_text())
    facts.write_text(json.dumps(about | {"image_size": [32, 40]}))
    with pytest.raises(ExportError, match=r"are of different models: image_size .*export all formats"):
        benchmark.benchmark(folder)

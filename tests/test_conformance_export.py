"""Every public layer saved and reloaded elsewhere, and exported to SavedModel, LiteRT and ONNX."""

import subprocess
import sys

import conformance
import keras
import numpy as np
import onnxruntime
import pytest
import tensorflow as tf
from ai_edge_litert.interpreter import Interpreter
from conformance import CASE_IDS, CASES, ROW_IDS, ROWS

each_case = pytest.mark.parametrize(("row", "example"), CASES, ids=CASE_IDS)
each_row = pytest.mark.parametrize("row", ROWS, ids=ROW_IDS)

RELOAD = """
import sys
from pathlib import Path
import keras
import numpy as np
import keras_medattn.layers
for path in sorted(Path(sys.argv[1]).glob("*.keras")):
    saved = np.load(path.with_suffix(".npz"))
    model = keras.models.load_model(path)
    arrays = model([saved[f"input_{i}"] for i in range(len(model.inputs))])
    np.savez(path.with_suffix(".again.npz"), *map(keras.ops.convert_to_numpy, keras.tree.flatten(arrays)))
"""


def _arrays(row, example, batch) -> list[np.ndarray]:
    return keras.tree.flatten(conformance.cast(row.examples[example](batch)))


@pytest.fixture(scope="module")
def reloaded(tmp_path_factory):
    """Each case's outputs here, and those of its saved file in a process that was started for it."""
    folder = tmp_path_factory.mktemp("saved")
    outputs = {}
    for name, (row, example) in zip(CASE_IDS, CASES, strict=True):
        model, layer = conformance.functional(row, row.examples[example](2))
        row.deployed(layer)
        arrays = _arrays(row, example, 3)
        outputs[name] = conformance.arrays(model(arrays))
        model.save(folder / f"{name}.keras")
        np.savez(folder / f"{name}.npz", **{f"input_{i}": array for i, array in enumerate(arrays)})
    subprocess.run([sys.executable, "-c", RELOAD, str(folder)], check=True, timeout=300)
    return folder, outputs


@each_case
def test_reloaded_in_a_fresh_process_bit_for_bit(reloaded, row, example):
    folder, outputs = reloaded
    name = CASE_IDS[CASES.index((row, example))]
    again = np.load(folder / f"{name}.again.npz")
    assert len(again.files) == len(outputs[name])
    for output, file in zip(outputs[name], again.files, strict=True):
        np.testing.assert_array_equal(again[file], output)


def _saved_model(model, folder):
    model.export(folder / "model", verbose=False)
    served = tf.saved_model.load(folder / "model")
    return lambda arrays: keras.tree.flatten(served.serve(arrays))


def _onnx(model, folder):
    model.export(folder / "model.onnx", format="onnx", verbose=False)
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]
    return lambda arrays: session.run(None, dict(zip(names, arrays, strict=True)))


def _litert(model, folder):
    model.export(folder / "model.tflite", format="litert", verbose=False)
    interpreter = Interpreter(str(folder / "model.tflite"))
    assert not [op["op_name"] for op in interpreter._get_ops_details() if op["op_name"].startswith("Flex")]
    signature = interpreter.get_signature_list()["serving_default"]

    def run(arrays):
        runner = interpreter.get_signature_runner("serving_default")
        answers = runner(**dict(zip(signature["inputs"], arrays, strict=True)))
        return [answers[name] for name in signature["outputs"]]

    return run


each_format = pytest.mark.parametrize(
    "export", [_saved_model, _onnx, _litert], ids=["saved-model", "onnx", "litert"]
)


@pytest.mark.parametrize("unknown", [False, True], ids=["known", "unknown"])
@each_format
@each_case
def test_exported_answers_as_the_layer(row, example, export, unknown, tmp_path):
    model, layer = conformance.functional(row, row.examples[example](2), unknown)
    row.deployed(layer)
    examples = {batch: _arrays(row, example, batch) for batch in (1, 5)}
    answers = {batch: conformance.arrays(model(arrays)) for batch, arrays in examples.items()}
    run = export(model, tmp_path)
    for batch, expected in answers.items():
        for output, reference in zip(run(examples[batch]), expected, strict=True):
            np.testing.assert_allclose(output, reference, rtol=1e-4, atol=1e-4)


@each_format
@each_row
def test_small_cnn_exported_answers_as_keras(row, export, tmp_path):
    layer = row.make()
    model = row.network(layer)
    conformance.randomise(layer)
    row.deployed(layer)
    rng = np.random.default_rng(5)
    examples = {
        batch: [rng.normal(size=(batch, *each.shape[1:])).astype("float32") for each in model.inputs]
        for batch in (1, 5)
    }
    answers = {batch: conformance.arrays(model(arrays)) for batch, arrays in examples.items()}
    run = export(model, tmp_path)
    for batch, expected in answers.items():
        assert np.ptp(expected[0], axis=-1).min() > 1e-3  # the answers tell something
        for output, reference in zip(run(examples[batch]), expected, strict=True):
            np.testing.assert_allclose(output, reference, rtol=1e-4, atol=1e-4)

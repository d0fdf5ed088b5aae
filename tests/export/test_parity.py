"""The parity matrix: every system in every format as Keras, of operators that TensorRT takes."""

import json

import numpy as np
import onnx
import pytest

from keras_medattn.export import formats, parity
from keras_medattn.export import onnx as onnx_files

# int8's own is for trained models: these answer smoothly
LIMITS = formats.TOLERANCES | {"litert_int8": 0.05}
# what `make test` has time for; a slow test has every cell
QUICK = {  # test_formats has LiteRT, int8 and ONNX of GlobalMask
    "GlobalMask in mixed_bfloat16": ("tensor", "litert"),
    "MIMS of volumes": ("litert",),
}


@pytest.mark.parametrize(("name", "columns"), QUICK.items(), ids=QUICK)
def test_quick_cells(name, columns, tmp_path):
    _check(parity.row(name, tmp_path / "model", columns), set(columns), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", parity.ROWS)
def test_every_cell(name, tmp_path):
    absent = {column for row, column in parity.ABSENT if row == name}
    absent |= {"serving_default"} if name.endswith("volumes") else set()
    _check(parity.row(name, tmp_path / "model"), set(parity.COLUMNS) - absent, tmp_path)


def _check(found, columns, folder):
    assert set(found) == columns
    for column, value in found.items():
        assert value <= LIMITS.get(column, 1e-4), column
    if "onnx" in columns:
        about = json.loads((folder / "model" / "files" / "1" / "medattn.json").read_text())
        assert "Softmax" in about["onnx_operators"]
        assert about["not_in_tensorrt"] == []


def test_padded_pool_of_negative_numbers_in_onnx(tmp_path):
    """A border of 0 stays 0 beside negative numbers; onnxruntime's optimiser would ignore it."""
    import keras

    image = keras.Input((4, 4, 3), dtype="uint8", name="image")
    convolution = keras.layers.Conv2D(3, 1)
    shifted = convolution(keras.ops.cast(image, "float32"))
    convolution.set_weights([np.eye(3)[None, None], np.full(3, -300.0)])
    padded = keras.layers.ZeroPadding2D(1)(shifted)
    pooled = keras.layers.MaxPooling2D(3, 2)(padded)
    model = keras.Model(image, {"probabilities": keras.ops.mean(pooled, axis=(1, 2))})
    onnx_files.write(model, tmp_path / "pool.onnx")
    kinds = [node.op_type for node in onnx.load(tmp_path / "pool.onnx").graph.node]
    assert {"Pad", "MaxPool"} <= set(kinds)
    pixels = np.random.default_rng(0).integers(0, 255, (2, 4, 4, 3)).astype("uint8")
    bordered = np.pad(pixels - 300.0, ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = [bordered[:, row : row + 3, column : column + 3] for row in (0, 2) for column in (0, 2)]
    expected = np.mean([window.max(axis=(1, 2)) for window in windows], axis=0)
    found = onnx_files.reader(tmp_path / "pool.onnx")({"image": pixels})
    np.testing.assert_allclose(found, expected, atol=1e-4)

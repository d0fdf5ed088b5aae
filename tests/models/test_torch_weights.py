import collections
import os
import pickle

import numpy as np
import pytest
from torch_files import Global, Storage, dump, legacy, tensor, zipped

from keras_medattn.models import torch_weights

_WRITERS = pytest.mark.parametrize("write", [legacy, zipped])


@pytest.fixture
def storages():
    floats = np.random.default_rng(0).normal(size=10).astype("float32")
    return [Storage("FloatStorage", "11", floats), Storage("LongStorage", "22", np.array([7], "int64"))]


@_WRITERS
def test_values_shapes_strides_and_offsets(tmp_path, storages, write):
    path, (floats, longs) = tmp_path / "a.pth", storages
    state = collections.OrderedDict()
    state["whole"] = tensor(floats, 0, (2, 5), (5, 1))
    state["transposed"] = tensor(floats, 2, (3, 2), (1, 4))
    state["scalar"] = tensor(longs, 0, (), ())
    state["empty"] = tensor(floats, 0, (0, 3), (3, 1))
    path.write_bytes(write(state, storages))
    read = torch_weights.read(path)
    assert list(read) == ["whole", "transposed", "scalar", "empty"]
    np.testing.assert_array_equal(read["whole"], floats.values.reshape(2, 5))
    np.testing.assert_array_equal(read["transposed"], floats.values[2:10].reshape(2, 4)[:, :3].T)
    assert read["scalar"].dtype == np.int64
    assert read["scalar"] == 7
    assert read["empty"].shape == (0, 3)


@_WRITERS
@pytest.mark.parametrize(
    ("module", "name"), [("os", "system"), ("builtins", "eval"), ("numpy", "load"), ("torch", "load")]
)
def test_hostile_global_is_named_and_never_called(tmp_path, storages, write, module, name):
    path, mark = tmp_path / "hostile.pth", tmp_path / "called"
    state = {"a": Global(module, name, (f"touch {mark}",))}
    path.write_bytes(write(state, storages))
    with pytest.raises(ValueError, match=rf"hostile\.pth.*`{module}\.{name}`.*Received: "):
        torch_weights.read(path)
    assert not mark.exists()


def test_the_hostile_file_would_have_run_under_plain_pickle(tmp_path):
    mark = tmp_path / "called"
    pickle.loads(dump(Global(os.system.__module__, "system", (f"touch {mark}",))))
    assert mark.exists()


@_WRITERS
@pytest.mark.parametrize("kept", [0, 10, 0.3, 0.9, -1])
def test_truncated(tmp_path, storages, write, kept):
    path = tmp_path / "short.pth"
    state = {"a": tensor(storages[0], 0, (10,), (1,)), "b": tensor(storages[1], 0, (1,), (1,))}
    whole = write(state, storages)
    path.write_bytes(whole[: int(kept * len(whole)) if isinstance(kept, float) else kept])
    with pytest.raises(ValueError, match=r"short\.pth is not a PyTorch state dict"):
        torch_weights.read(path)


@_WRITERS
@pytest.mark.parametrize(
    ("offset", "shape", "strides"),
    [
        (0, (11,), (1,)),
        (-1, (2,), (1,)),
        (0, (2, 2), (9, 1)),
        (5, (2,), (-1,)),
        (0, (-2, -2), (1, 1)),
    ],
)
def test_tensor_outside_its_storage(tmp_path, storages, write, offset, shape, strides):
    path = tmp_path / "outside.pth"
    path.write_bytes(write({"a": tensor(storages[0], offset, shape, strides)}, storages[:1]))
    with pytest.raises(ValueError, match="outside"):
        torch_weights.read(path)


@_WRITERS
@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, {"optimizer": {}}, "text"])
def test_not_a_state_dict(tmp_path, write, content):
    path = tmp_path / "other.pth"
    path.write_bytes(write(content, []))
    with pytest.raises(ValueError, match=r"other\.pth"):
        torch_weights.read(path)


def test_big_endian_is_refused(tmp_path, storages):
    path = tmp_path / "big.pth"
    raw = legacy({"a": tensor(storages[0], 0, (10,), (1,))}, storages[:1])
    little = dump({"protocol_version": 1001, "little_endian": True, "type_sizes": {}})
    big = dump({"protocol_version": 1001, "little_endian": False, "type_sizes": {}})
    path.write_bytes(raw.replace(little, big))
    with pytest.raises(ValueError, match="big-endian"):
        torch_weights.read(path)


def test_missing_file_keeps_its_own_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        torch_weights.read(tmp_path / "none.pth")

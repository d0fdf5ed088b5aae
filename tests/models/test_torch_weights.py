import collections
import io
import os
import pickle
import struct
import zipfile

import numpy as np
import pytest

from keras_medattn.models import torch_weights


class _Global:
    """Pickles as a call of any name, whether or not it can be imported here."""

    def __init__(self, module, name, arguments):
        self.module, self.name, self.arguments = module, name, arguments


class _Storage:
    def __init__(self, kind, key, values):
        self.kind, self.key, self.values = kind, key, values


def _tensor(storage, offset, shape, strides):
    return _Global(
        "torch._utils",
        "_rebuild_tensor_v2",
        (storage, offset, shape, strides, False, collections.OrderedDict()),
    )


class _Name:
    def __init__(self, module, name):
        self.module, self.name = module, name


class _Pickler(pickle._Pickler):
    """Python's own pickler, writing `_Name` as the GLOBAL opcode that PyTorch's files hold."""

    dispatch = pickle._Pickler.dispatch.copy()

    def save_name(self, item):
        self.write(f"c{item.module}\n{item.name}\n".encode())

    def save_call(self, item):
        self.save_name(item)
        self.save(item.arguments)
        self.write(b"R")

    dispatch[_Name] = save_name
    dispatch[_Global] = save_call

    def persistent_id(self, item):
        if isinstance(item, _Storage):
            return ("storage", _Name("torch", item.kind), item.key, "cpu", len(item.values), *self.view)
        return None


def _dump(item, view=()):
    stream = io.BytesIO()
    pickler = _Pickler(stream, protocol=2)
    pickler.view = view
    pickler.dump(item)
    return stream.getvalue()


def _legacy(state, storages):
    head = [0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}]
    keys = [storage.key for storage in storages]
    data = b"".join(struct.pack("<q", len(s.values)) + s.values.tobytes() for s in storages)
    return b"".join(map(_dump, head)) + _dump(state, (None,)) + _dump(keys) + data


def _zip(state, storages):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("model/data.pkl", _dump(state))
        archive.writestr("model/byteorder", "little")
        for storage in storages:
            archive.writestr(f"model/data/{storage.key}", storage.values.tobytes())
    return stream.getvalue()


_WRITERS = pytest.mark.parametrize("write", [_legacy, _zip])


@pytest.fixture
def storages():
    floats = np.random.default_rng(0).normal(size=10).astype("float32")
    return [_Storage("FloatStorage", "11", floats), _Storage("LongStorage", "22", np.array([7], "int64"))]


@_WRITERS
def test_values_shapes_strides_and_offsets(tmp_path, storages, write):
    path, (floats, longs) = tmp_path / "a.pth", storages
    state = collections.OrderedDict()
    state["whole"] = _tensor(floats, 0, (2, 5), (5, 1))
    state["transposed"] = _tensor(floats, 2, (3, 2), (1, 4))
    state["scalar"] = _tensor(longs, 0, (), ())
    state["empty"] = _tensor(floats, 0, (0, 3), (3, 1))
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
    state = {"a": _Global(module, name, (f"touch {mark}",))}
    path.write_bytes(write(state, storages))
    with pytest.raises(ValueError, match=rf"hostile\.pth.*`{module}\.{name}`.*Received: "):
        torch_weights.read(path)
    assert not mark.exists()


def test_the_hostile_file_would_have_run_under_plain_pickle(tmp_path):
    mark = tmp_path / "called"
    pickle.loads(_dump(_Global(os.system.__module__, "system", (f"touch {mark}",))))
    assert mark.exists()


@_WRITERS
@pytest.mark.parametrize("kept", [0, 10, 0.3, 0.9, -1])
def test_truncated(tmp_path, storages, write, kept):
    path = tmp_path / "short.pth"
    state = {"a": _tensor(storages[0], 0, (10,), (1,)), "b": _tensor(storages[1], 0, (1,), (1,))}
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
    path.write_bytes(write({"a": _tensor(storages[0], offset, shape, strides)}, storages[:1]))
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
    raw = _legacy({"a": _tensor(storages[0], 0, (10,), (1,))}, storages[:1])
    little = _dump({"protocol_version": 1001, "little_endian": True, "type_sizes": {}})
    big = _dump({"protocol_version": 1001, "little_endian": False, "type_sizes": {}})
    path.write_bytes(raw.replace(little, big))
    with pytest.raises(ValueError, match="big-endian"):
        torch_weights.read(path)


def test_missing_file_keeps_its_own_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        torch_weights.read(tmp_path / "none.pth")

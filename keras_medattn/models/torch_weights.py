"""Read the tensors of a PyTorch weight file without PyTorch, and without running what a pickle asks for.

A `.pth` file is a pickle, and a pickle may name any Python function and have it called. The unpickler here
resolves four kinds of names, all of them to its own stand-ins: `collections.OrderedDict`,
`torch._utils._rebuild_tensor_v2` and the typed storages of `torch`. Any other name is refused.
"""

import collections
import io
import math
import os
import pickle
import zipfile
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO, NamedTuple

import keras
import numpy as np

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_STORAGES = {
    "DoubleStorage": "<f8",
    "FloatStorage": "<f4",
    "HalfStorage": "<f2",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "<i1",
    "ByteStorage": "<u1",
    "BoolStorage": "?",
}


class _Storage(NamedTuple):
    key: str
    dtype: str
    count: int


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _rebuild_tensor(storage, offset, shape, strides, *_) -> _Tensor:
    return _Tensor(_Storage(*storage), int(offset), tuple(map(int, shape)), tuple(map(int, strides)))


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild_tensor
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        raise pickle.UnpicklingError(
            f"it asks for `{module}.{name}`, which no plain state dict needs, so it is refused. Save the "
            "tensors alone, with `torch.save(model.state_dict(), path)`"
        )

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, count, *view = pid
        if kind != "storage" or dtype not in _STORAGES.values() or any(view):
            raise pickle.UnpicklingError(f"it holds a storage of an unknown kind: {pid!r}")
        return _Storage(str(key), dtype, int(count))


def _read_zip(file: BinaryIO) -> tuple[Any, dict[str, bytes]]:
    with zipfile.ZipFile(file) as archive:
        names = {name.partition("/")[2]: name for name in archive.namelist()}  # without the archive's folder
        if "byteorder" in names and archive.read(names["byteorder"]) != b"little":
            raise pickle.UnpicklingError("its numbers are big-endian")
        state = _Unpickler(io.BytesIO(archive.read(names["data.pkl"]))).load()
        return state, {key[5:]: archive.read(name) for key, name in names.items() if key.startswith("data/")}


def _read_legacy(file: BinaryIO) -> tuple[Any, dict[str, bytes]]:
    if _Unpickler(file).load() != _LEGACY_MAGIC:
        raise pickle.UnpicklingError("it does not begin as a PyTorch file does")
    _Unpickler(file).load()  # protocol version
    system = _Unpickler(file).load()
    if not system["little_endian"]:
        raise pickle.UnpicklingError("its numbers are big-endian")
    state = _Unpickler(file).load()
    item_sizes = {t.storage.key: np.dtype(t.storage.dtype).itemsize for t in state.values()}
    data = {}
    for key in _Unpickler(file).load():
        count = int.from_bytes(file.read(8), "little", signed=True)
        size = count * item_sizes[key]
        data[key] = file.read(size) if count >= 0 else b""
        if len(data[key]) != size:
            raise EOFError(f"it ends inside storage {key}")
    return state, data


def _array(tensor: _Tensor, data: dict[str, bytes]) -> np.ndarray:
    values = np.frombuffer(data[tensor.storage.key], tensor.storage.dtype)
    last = tensor.offset + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.strides, strict=True))
    smallest = min((tensor.offset, *tensor.shape, *tensor.strides))
    if smallest < 0 or (math.prod(tensor.shape) and last >= len(values)):  # as_strided itself checks nothing
        raise pickle.UnpicklingError("a tensor reaches outside its storage")
    strides = tuple(s * values.itemsize for s in tensor.strides)
    return np.lib.stride_tricks.as_strided(values[tensor.offset :], tensor.shape, strides).copy()


def read(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Read a PyTorch state dict (legacy or zip `.pth`) as NumPy arrays, without PyTorch.

    Args:
        path: a file written by `torch.save(model.state_dict(), path)`.

    Returns:
        The tensors by name, in the file's order.

    Raises:
        ValueError: the file is no state dict, is cut short, or names anything but tensors; nothing that it
            names has been imported or called.
        OSError: the file can't be opened.

    Example:
        >>> from keras_medattn.models import torch_weights
        >>> torch_weights.read(__file__)
        Traceback (most recent call last):
        ...
        ValueError: ...torch_weights.py is not a PyTorch state dict that can be read safely: ...
    """
    with open(path, "rb") as file:
        try:
            zipped = zipfile.is_zipfile(file)
            file.seek(0)
            state, data = _read_zip(file) if zipped else _read_legacy(file)
            if not all(isinstance(k, str) and isinstance(t, _Tensor) for k, t in state.items()):
                raise pickle.UnpicklingError("it holds more than named tensors")
            return {name: _array(tensor, data) for name, tensor in state.items()}
        # A damaged or hostile pickle can raise almost anything: each is the same answer for the caller.
        except Exception as error:
            raise ValueError(
                f"{os.fspath(path)} is not a PyTorch state dict that can be read safely: "
                f"{type(error).__name__}: {error}. Received: path={os.fspath(path)!r}"
            ) from error


def assign(
    model: keras.Model,
    path: str | os.PathLike[str],
    network: str,
    weights_of: Callable[[keras.Layer], Sequence[np.ndarray]],
) -> None:
    """Put a file's tensors into every layer of `model` that has weights.

    Args:
        model: the network.
        path: the file, for errors.
        network: what to call it in errors.
        weights_of: what the file holds for a layer, in the order of its weights; raises KeyError for none.

    Raises:
        ValueError: the file lacks a layer's weights, or has them in another shape.
    """
    for layer in model.layers:
        if not layer.weights:
            continue
        try:
            layer.set_weights(weights_of(layer))
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"{os.fspath(path)} has no {network} weights for layer {layer.name}: {error}. Pass the "
                f"state dict of that network. Received: path={os.fspath(path)!r}"
            ) from error

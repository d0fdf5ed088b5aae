"""TensorFlow Serving's messages and stubs, imported without TensorFlow.

The official stubs import generated messages out of the `tensorflow` package, and with them the whole of
TensorFlow: seconds, for a client that needs none of it. So an empty package of that name stands in while
they are imported. It is removed again: a later `import tensorflow` gets the real one, and the same message
classes, since protobuf keeps one class for each message of its pool.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import PathFinder
from types import ModuleType
from typing import Any

import numpy as np


@contextmanager
def _without_tensorflow() -> Iterator[None]:
    spec = PathFinder.find_spec("tensorflow")
    if "tensorflow" in sys.modules or spec is None:
        yield
        return
    stand_in = ModuleType("tensorflow")
    stand_in.__path__ = list(spec.submodule_search_locations or ())
    sys.modules["tensorflow"] = stand_in
    try:
        yield
    finally:
        for name in [n for n in sys.modules if n == "tensorflow" or n.startswith("tensorflow.")]:
            del sys.modules[name]


try:
    with _without_tensorflow():
        import grpc
        from grpc_health.v1 import health, health_pb2_grpc
        from tensorflow.core.framework import tensor_pb2, types_pb2
        from tensorflow_serving.apis import (
            get_model_metadata_pb2,
            get_model_status_pb2,
            model_management_pb2,
            model_service_pb2_grpc,
            predict_pb2,
            prediction_log_pb2,
            prediction_service_pb2_grpc,
        )
        from tensorflow_serving.config import model_server_config_pb2
except ImportError as error:
    raise ImportError(
        f"Serving needs packages that are not installed ({error.name}). "
        'Install them with: pip install "keras-medattn[serve]"'
    ) from error

__all__ = [
    "get_model_metadata_pb2",
    "get_model_status_pb2",
    "grpc",
    "health",
    "health_pb2_grpc",
    "model_management_pb2",
    "model_server_config_pb2",
    "model_service_pb2_grpc",
    "predict_pb2",
    "prediction_log_pb2",
    "prediction_service_pb2_grpc",
    "string_tensor",
    "to_array",
    "to_tensor",
    "types_pb2",
]

_FIELDS: dict[int, tuple[type, str]] = {
    types_pb2.DT_FLOAT: (np.float32, "float_val"),
    types_pb2.DT_DOUBLE: (np.float64, "double_val"),
    types_pb2.DT_UINT8: (np.uint8, "int_val"),
    types_pb2.DT_INT32: (np.int32, "int_val"),
    types_pb2.DT_INT64: (np.int64, "int64_val"),
    types_pb2.DT_BOOL: (np.bool_, "bool_val"),
    types_pb2.DT_STRING: (np.object_, "string_val"),
}


def string_tensor(values: list[bytes]) -> Any:
    """Answers a `TensorProto` of byte strings, of shape (B,).

    Example:

    >>> to_array(string_tensor([b"a", b"b"])).tolist()
    [b'a', b'b']
    """
    tensor = tensor_pb2.TensorProto(dtype=types_pb2.DT_STRING, string_val=values)
    tensor.tensor_shape.dim.add(size=len(values))
    return tensor


def to_tensor(array: np.ndarray) -> Any:
    """Answers the `TensorProto` of an array of numbers, or of byte strings as objects of shape (B,).

    Example:

    >>> to_array(to_tensor(np.float32([[1, 2]])))
    array([[1., 2.]], dtype=float32)
    """
    if array.dtype == object:
        return string_tensor(array.tolist())
    number = next(number for number, (dtype, _) in _FIELDS.items() if dtype == array.dtype)
    tensor = tensor_pb2.TensorProto(dtype=number, tensor_content=array.tobytes())
    for size in array.shape:
        tensor.tensor_shape.dim.add(size=size)
    return tensor


def to_array(tensor: Any) -> np.ndarray:
    """Answers the NumPy array of a `TensorProto`, from its raw bytes or its typed values.

    Raises:
        ValueError: for a dtype that the exported signatures don't use.

    Example:

    >>> proto = tensor_pb2.TensorProto(dtype=types_pb2.DT_FLOAT, float_val=[1.0, 2.0])
    >>> _ = proto.tensor_shape.dim.add(size=2)
    >>> to_array(proto)
    array([1., 2.], dtype=float32)
    """
    if tensor.dtype not in _FIELDS:
        raise ValueError(
            f"Expected a tensor of {', '.join(types_pb2.DataType.Name(d) for d in _FIELDS)}. "
            f"Received: {types_pb2.DataType.Name(tensor.dtype)}"
        )
    dtype, field = _FIELDS[tensor.dtype]
    shape = tuple(d.size for d in tensor.tensor_shape.dim)
    if tensor.tensor_content:
        return np.frombuffer(tensor.tensor_content, dtype).reshape(shape)
    values = np.array(list(getattr(tensor, field)), dtype)
    # One value may stand for a whole constant tensor.
    return np.full(shape, values[0], dtype) if values.size == 1 else values.reshape(shape)

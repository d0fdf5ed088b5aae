"""TensorFlow Serving's JSON: from the body of a `:predict` to arrays, and from arrays to its answer.

The shapes and messages are those of https://www.tensorflow.org/tfx/serving/api_rest and of the server's
`json_tensor.cc`. Numbers may be NaN, Infinity and -Infinity, as there.
"""

import base64
import binascii
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from keras_medattn.serve.servables import RequestError, grpc, invalid

_TYPES = {type(None): "Null", bool: "Bool", dict: "Object", str: "String", int: "Number", float: "Number"}
# What NumPy makes of JSON's values that a type takes; a boolean is no number here.
_KINDS = {"float": "iuf", "int": "iu", "uint": "iu", "bool": "b"}


def parse(body: bytes) -> dict[str, Any]:
    """Answers the JSON object of a request.

    Raises:
        RequestError: it is none.

    Example:

    >>> parse(b'{"instances": [NaN]}')
    {'instances': [nan]}
    """
    if not body:
        raise invalid("JSON Parse error: The document is empty")
    try:
        document = json.loads(body)
    except json.JSONDecodeError as error:
        raise invalid(f"JSON Parse error: {error.msg} at offset: {error.pos}") from error
    # Not UTF-8, a number of thousands of digits, thousands of brackets.
    except (ValueError, RecursionError) as error:
        raise invalid(f"JSON Parse error: {error}") from error
    if not isinstance(document, dict):
        raise invalid(f"JSON Value: {_shown(document)} Is not object")
    if not isinstance(document.get("signature_name", ""), str):
        raise invalid(
            f"JSON Value: {_shown(document)} not formatted correctly. "
            "'signature_name' key must be a string value."
        )
    return document


def inputs(document: dict[str, Any], specs: dict[str, tf.TensorSpec]) -> tuple[dict[str, np.ndarray], bool]:
    """Answers the inputs of a signature, and whether they came in rows ("instances").

    Raises:
        RequestError: they do not fit the signature's `specs`.

    Example:

    >>> inputs({"instances": [[1, 2]]}, {"x": tf.TensorSpec([None, 2])})
    ({'x': array([[1., 2.]], dtype=float32)}, True)
    """
    if "instances" in document and "inputs" in document:
        raise invalid(
            f"JSON Value: {_shown(document)} Not formatted correctly expecting only one of 'inputs' or "
            "'instances' keys to exist"
        )
    if "instances" in document:
        return _of_rows(document, specs), True
    if "inputs" in document:
        return _of_columns(document["inputs"], specs), False
    raise invalid("Missing 'inputs' or 'instances' key")


def answer(outputs: dict[str, np.ndarray], rows: bool) -> dict[str, Any]:
    """Answers the JSON object of outputs: `predictions` for rows, `outputs` else.

    Byte strings are text, or `{"b64": ...}` when the output's name ends in `_bytes`.

    Example:

    >>> answer({"y": np.float32([0.1, 0.2])}, rows=True)
    {'predictions': [0.1, 0.2]}
    """
    if not rows:
        values = {name: _values(name, array) for name, array in outputs.items()}
        return {"outputs": next(iter(values.values())) if len(values) == 1 else values}
    sizes = {name: array.shape[0] if array.ndim else None for name, array in outputs.items()}
    expected = next(iter(sizes.values()))
    for name, size in sizes.items():
        if size is None:
            raise invalid(f"Tensor name: {name} has no shape information")
        if size != expected:
            raise invalid(f"Tensor name: {name} has inconsistent batch size: {size} expecting: {expected}")
    values = {name: _values(name, array) for name, array in outputs.items()}
    if len(values) == 1:
        return {"predictions": next(iter(values.values()))}
    return {
        "predictions": [dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)]
    }


def _of_rows(document: dict[str, Any], specs: dict[str, tf.TensorSpec]) -> dict[str, np.ndarray]:
    rows = document["instances"]
    if not isinstance(rows, list):
        raise invalid(f"JSON Value: {_shown(document)} Excepting 'instances' to be an list/array")
    if not rows:
        raise invalid(f"JSON Value: {_shown(document)} No values in 'instances' array")
    if not _is_named(rows[0]):
        if len(specs) > 1:
            raise invalid(
                "instances is a plain list, but expecting list of objects as multiple input tensors required "
                "as per tensorinfo_map"
            )
        for index, row in enumerate(rows):
            if _is_named(row):
                raise invalid(f"Expecting value/list but got object at item {index} of input list")
        [(name, spec)] = specs.items()
        return {name: _array(rows, spec.dtype)}
    for index, row in enumerate(rows):
        if not _is_named(row):
            raise invalid(f"Expecting object but got list at item {index} of input list")
        if set(row) != set(specs):
            raise invalid(
                f"Failed to process element: {index} of 'instances' list. JSON object: {_shown(row)} "
                f"keys must be equal to: {','.join(sorted(specs))}"
            )
    return {name: _array([row[name] for row in rows], spec.dtype) for name, spec in specs.items()}


def _of_columns(sent: Any, specs: dict[str, tf.TensorSpec]) -> dict[str, np.ndarray]:
    if not _is_named(sent):
        if len(specs) > 1:
            raise invalid(
                "inputs is a plain value/list, but expecting an object as multiple input tensors required as "
                "per tensorinfo_map"
            )
        sent = {next(iter(specs)): sent}
    for name in specs:
        if name not in sent:
            raise invalid(f"Missing named input: {name} in 'inputs' object.")
    return {name: _array(sent[name], spec.dtype) for name, spec in specs.items()}


def _is_named(value: Any) -> bool:
    return isinstance(value, dict) and not _is_base64(value)


def _is_base64(value: Any) -> bool:
    return isinstance(value, dict) and list(value) == ["b64"] and isinstance(value["b64"], str)


def _array(value: Any, dtype: tf.DType) -> np.ndarray:
    shape = []
    first = value
    while isinstance(first, list):
        shape.append(len(first))
        first = first[0] if first else None
    if dtype == tf.string:
        array = np.empty(int(np.prod(shape)), object)
        for index, leaf in enumerate(_leaves(value, shape)):
            array[index] = _bytes(leaf)
        return array.reshape(shape)
    kinds = _KINDS.get(dtype.name.rstrip("0123456789"))
    if kinds is None:
        raise RequestError(
            grpc.StatusCode.UNIMPLEMENTED, f"Conversion of JSON Value: {_shown(value)} to type: {dtype.name}"
        )
    try:
        array = np.array(value)
    except (ValueError, OverflowError):
        array = np.array(None)
    if array.size and (list(array.shape) != shape or array.dtype.kind not in kinds):
        for leaf in _leaves(value, shape):
            if np.array(leaf).dtype.kind not in kinds:
                raise _type_error(leaf, dtype)
    if dtype != tf.bool and array.size:
        finite = array[np.isfinite(array)] if array.dtype.kind in "iuf" else array
        if finite.size and not (dtype.min <= finite.min() and finite.max() <= dtype.max):
            worst = finite[(finite < dtype.min) | (finite > dtype.max)][0]
            raise invalid(f"Cannot convert JSON value: {worst} to {dtype.name} without loss of precision.")
    return array.astype(dtype.as_numpy_dtype)


def _leaves(value: Any, shape: list[int], level: int = 0) -> Iterator[Any]:
    """Yields the values of nested lists, refusing what does not have the shape."""
    if not isinstance(value, list):
        if level != len(shape):
            raise invalid(
                f"JSON Value: {_shown(value)} found at incorrect level: {level + 1} in the JSON DOM. "
                f"Expected at level: {len(shape)}"
            )
        yield value
        return
    if level >= len(shape):
        raise invalid(f"Encountered list at unexpected level: {level} expected < {len(shape)}")
    if len(value) != shape[level]:
        raise invalid(
            f"Encountered list at unexpected size: {len(value)} at level: {level} "
            f"expected size: {shape[level]}"
        )
    for item in value:
        yield from _leaves(item, shape, level + 1)


def _bytes(leaf: Any) -> bytes:
    if isinstance(leaf, str):
        return leaf.encode("utf-8", "surrogatepass")
    if isinstance(leaf, dict):
        if not _is_base64(leaf):
            raise invalid(f"JSON Value: {_shown(leaf)} not formatted correctly for base64 data")
        try:
            text = leaf["b64"]
            return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
        except (binascii.Error, ValueError) as error:
            raise invalid("Unable to base64 decode") from error
    raise _type_error(leaf, tf.string)


def _type_error(leaf: Any, dtype: tf.DType) -> RequestError:
    return invalid(
        f"JSON Value: {_shown(leaf)} Type: {_TYPES[type(leaf)]} is not of expected type: {dtype.name}"
    )


def _values(name: str, array: np.ndarray) -> Any:
    if array.dtype == object:

        def one(data: bytes) -> Any:
            if name.endswith("_bytes"):
                return {"b64": base64.b64encode(data).decode()}
            return data.decode("utf-8", "replace")

        return (
            np.array([one(data) for data in array.ravel()] or [None], object)[: array.size]
            .reshape(array.shape)
            .tolist()
        )
    # The shortest digits that give the same float32: through float64 .1 would be 0.10000000149011612.
    return (array.astype(str).astype(np.float64) if array.dtype.kind == "f" else array).tolist()


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 200 else f"{text[:200]}..."

"""ONNX files with a named, dynamic batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Answer = Callable[[dict[str, np.ndarray]], np.ndarray]  # inputs by name -> probabilities (B, C)


def write(model: Any, path: Path) -> None:
    """Write a functional model whose shapes ONNX's own inference confirms.

    Args:
        model: with named inputs and the output `probabilities`; dimension 0 is the batch.
        path: ends in `.onnx`.
    """
    import onnx

    # Keras exports to ONNX only what has been called
    model({one.name: np.zeros([size or 1 for size in one.shape], one.dtype) for one in model.inputs})
    model.export(str(path), format="onnx", verbose=False)
    made = onnx.load(str(path))
    names = ("batch", "slices")  # of the dimensions that are open: an image's first, a volume's first two
    for value in (*made.graph.input, *made.graph.output):
        opened = [dimension for dimension in value.type.tensor_type.shape.dim if not dimension.dim_value]
        for dimension, name in zip(opened, names, strict=False):
            dimension.dim_param = name
    onnx.checker.check_model(made, full_check=True)
    onnx.save(made, str(path))


def operators(path: Path) -> set[str]:
    """The operators in a file, those in the bodies of loops and branches too."""
    import onnx

    def used(graph: Any) -> set[str]:
        found = {node.op_type for node in graph.node}
        inner = (
            attribute.g for node in graph.node for attribute in node.attribute if attribute.HasField("g")
        )
        return found.union(*(used(body) for body in inner))

    return used(onnx.load(str(path), load_external_data=False).graph)


def reader(path: Path) -> Answer:
    """What answers by a file, through onnxruntime on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda inputs: np.asarray(session.run(["probabilities"], inputs)[0])

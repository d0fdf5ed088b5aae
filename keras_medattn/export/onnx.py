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
    _part_pads_from_pools(made.graph)
    onnx.checker.check_model(made, full_check=True)
    onnx.save(made, str(path))


def _part_pads_from_pools(graph: Any) -> None:
    """Put a Clip without limits between each Pad and the MaxPool that reads it.

    onnxruntime makes one MaxPool with a border of both (`PadFusion`), though it ignores its border, and the
    Pad's is 0: another answer where what is pooled is negative (seen in 1.31).
    """
    import onnx

    pooled = {node.input[0] for node in graph.node if node.op_type == "MaxPool"}
    for place, node in reversed(list(enumerate(graph.node))):
        if node.op_type == "Pad" and node.output[0] in pooled:
            [name] = node.output
            node.output[0] = f"{name}_padded"
            graph.node.insert(place + 1, onnx.helper.make_node("Clip", [node.output[0]], [name]))


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


def reader(path: Path, threads: int | None = None) -> Answer:
    """What answers by a file, through onnxruntime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda inputs: np.asarray(session.run(["probabilities"], inputs)[0])

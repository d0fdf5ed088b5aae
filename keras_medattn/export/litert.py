"""LiteRT (TFLite) files, of built-in operators only."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

Answer = Callable[[dict[str, np.ndarray]], np.ndarray]  # inputs by name -> probabilities (B, C)


def write(
    model: Any, path: Path, kind: str = "litert", samples: Iterable[dict[str, np.ndarray]] = ()
) -> None:
    """Write a functional model.

    Args:
        model: with named inputs and the output `probabilities`.
        path: ends in `.tflite`.
        kind: `litert`, float32; `litert_float16`: weights in float16; or `litert_int8`: weights in int8,
            and with samples the activations, too; what has no int8 form stays in float32.
        samples: inputs of batch 1 from which int8 takes the ranges of the activations.

    Raises:
        Exception: of TensorFlow's converter, where an operator is no built-in one.
    """
    import tensorflow as tf  # not above: who only reads a file needs none of it

    spec: dict[str, Any] = {"supported_ops": [tf.lite.OpsSet.TFLITE_BUILTINS]}
    options: dict[str, Any] = {}
    if kind == "litert_float16":
        spec["supported_types"] = [tf.float16]
    ranges = list(samples)
    if ranges:
        options["representative_dataset"] = lambda: iter(ranges)
    if kind in ("litert_float16", "litert_int8"):
        options["optimizations"] = [tf.lite.Optimize.DEFAULT]
    # named, or Keras opens the batch again
    specs = {one.name: tf.TensorSpec(one.shape, one.dtype, one.name) for one in model.inputs}
    options["input_signature"] = [specs]
    model.export(str(path), format="litert", verbose=False, target_spec=spec, **options)


def reader(path: Path, threads: int | None = None) -> Answer:
    """What answers by a file, with operators that LiteRT brings."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(path), num_threads=threads)
    run = interpreter.get_signature_runner("serving_default")
    return lambda inputs: run(**inputs)["probabilities"]

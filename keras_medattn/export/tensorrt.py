"""TensorRT engines from ONNX files."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from pathlib import Path

from keras_medattn.export.saved_model import ExportError


def build(onnx: Path, to: Path, batches: tuple[int, int, int] = (1, 8, 32), float16: bool = True) -> None:
    """Build an engine for the GPU of this machine, by the package `tensorrt` or the program `trtexec`.

    Args:
        onnx: a file whose input is `image (batch, H, W, 3)`.
        to: the engine.
        batches: the least, the one to tune for, and the largest.
        float16: let layers compute in float16.

    Raises:
        ExportError: there is neither, or it cannot build the engine.
    """
    shapes = [(batch, *_size(onnx)) for batch in batches]
    if importlib.util.find_spec("tensorrt"):
        _by_package(onnx, to, shapes, float16)
        return
    options = [f"--onnx={onnx}", f"--saveEngine={to}", *["--fp16"] * float16]
    for key, shape in zip(("min", "opt", "max"), shapes, strict=True):
        options.append(f"--{key}Shapes=image:{'x'.join(map(str, shape))}")
    program = shutil.which("trtexec")
    if program is None:
        raise ExportError(
            "an engine is built on the machine that runs it, by the package tensorrt (pip install tensorrt) "
            "or by trtexec, which comes with NVIDIA's TensorRT; neither is here. Export --formats onnx, "
            f"copy the file there, and run: trtexec {' '.join(options).replace(str(onnx.parent) + '/', '')}"
        )
    done = subprocess.run([program, *options], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ExportError(f"trtexec built no engine of {onnx.name}: {(done.stderr or done.stdout)[-500:]}")


def _size(path: Path) -> list[int]:
    import onnx

    [*inputs] = onnx.load(str(path), load_external_data=False).graph.input
    size = [dimension.dim_value for dimension in inputs[0].type.tensor_type.shape.dim[1:]]
    if len(inputs) != 1 or 0 in size:
        raise ExportError(f"an engine needs plain images of one size. Received: {path.name}, of volumes")
    return size


def _by_package(path: Path, to: Path, shapes: list[tuple[int, ...]], float16: bool) -> None:
    import tensorrt  # type: ignore[import-not-found]

    log = tensorrt.Logger(tensorrt.Logger.WARNING)
    builder = tensorrt.Builder(log)
    network = builder.create_network(0)
    parser = tensorrt.OnnxParser(network, log)
    if not parser.parse_from_file(str(path)):
        faults = "; ".join(str(parser.get_error(place)) for place in range(parser.num_errors))
        raise ExportError(f"tensorrt reads no {path.name}: {faults}")
    config = builder.create_builder_config()
    if float16:
        config.set_flag(tensorrt.BuilderFlag.FP16)
    profile = builder.create_optimization_profile()
    profile.set_shape("image", *shapes)
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise ExportError(f"tensorrt built no engine of {path.name}; its log above says why")
    to.write_bytes(engine)

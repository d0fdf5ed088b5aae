"""TensorRT engines from ONNX files."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

from keras_medattn.export.saved_model import ExportError

# those with "Y" in NVIDIA's list "Supported ONNX Operators" of TensorRT 9.2
# (github.com/onnx/onnx-tensorrt, docs/operators.md); uint8 it takes as a network's input, as here
OPERATORS = frozenset(
    re.findall(
        r"\w+",
        """Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh AveragePool BatchNormalization Cast
    CastLike Ceil Celu Clip Concat Constant ConstantOfShape Conv ConvTranspose Cos Cosh CumSum
    DepthToSpace DequantizeLinear Div Dropout Einsum Elu Equal Erf Exp Expand EyeLike Flatten Floor
    Gather GatherElements GatherND Gemm GlobalAveragePool GlobalLpPool GlobalMaxPool Greater
    GreaterOrEqual GridSample GroupNormalization GRU HardSwish HardSigmoid Hardmax Identity If
    InstanceNormalization IsInf IsNaN LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax Loop
    LRN LSTM LpNormalization LpPool MatMul Max MaxPool Mean MeanVarianceNormalization Min Mod Mul Neg
    NonMaxSuppression NonZero Not OneHot Or Pad Pow PRelu QuantizeLinear RandomNormal RandomNormalLike
    RandomUniform RandomUniformLike Range Reciprocal ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp
    ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Reshape Resize
    ReverseSequence RNN RoiAlign Round Scan Scatter ScatterElements ScatterND Selu Shape Shrink Sigmoid
    Sign Sin Sinh Size Slice Softmax Softplus Softsign SpaceToDepth Split Sqrt Squeeze Sub Sum Tan Tanh
    ThresholdedRelu Tile TopK Transpose Trilu Unsqueeze Upsample Where Xor""",
    )
)


def build(onnx: Path, to: Path, batches: tuple[int, int, int] = (1, 8, 32)) -> None:
    """Build an engine for the GPU of this machine, by the package `tensorrt` or the program `trtexec`.

    TensorRT up to 10 may compute in float16. TensorRT 11 computes in the file's own precision, float32: its
    documentation ("Migrating from Weak Typing to Strong Typing") says how to convert the file before.

    Args:
        onnx: a file whose input is `image (batch, H, W, 3)`.
        to: the engine.
        batches: the least, the one to tune for, and the largest.

    Raises:
        ExportError: the batches are not in order; there is neither, or it cannot build the engine.
    """
    if not 1 <= batches[0] <= batches[1] <= batches[2]:
        raise ExportError(f"`batches` must be the least, the best and the largest. Received: {batches}")
    shapes = [(batch, *_size(onnx)) for batch in batches]
    if importlib.util.find_spec("tensorrt"):
        _by_package(onnx, to, shapes)
        return
    options = [f"--onnx={onnx}", f"--saveEngine={to}"]
    for key, shape in zip(("min", "opt", "max"), shapes, strict=True):
        options.append(f"--{key}Shapes=image:{'x'.join(map(str, shape))}")
    program = shutil.which("trtexec")
    if program is None:
        raise ExportError(
            "an engine is built on the machine that runs it, by the package tensorrt (pip install tensorrt) "
            "or by trtexec, which comes with NVIDIA's TensorRT; neither is here. Export --formats onnx, copy "
            f"the file there, and run: trtexec {' '.join(options).replace(str(onnx.parent) + '/', '')} "
            "(up to TensorRT 10 with --fp16 for float16)"
        )
    told = subprocess.run([program, "--help"], capture_output=True, text=True, check=False)
    options += ["--fp16"] * ("--fp16" in told.stdout)
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


def _by_package(path: Path, to: Path, shapes: list[tuple[int, ...]]) -> None:
    import tensorrt  # type: ignore[import-not-found]

    log = tensorrt.Logger(tensorrt.Logger.WARNING)
    builder = tensorrt.Builder(log)
    network = builder.create_network(0)
    parser = tensorrt.OnnxParser(network, log)
    if not parser.parse_from_file(str(path)):
        faults = "; ".join(str(parser.get_error(place)) for place in range(parser.num_errors))
        raise ExportError(f"tensorrt reads no {path.name}: {faults}")
    config = builder.create_builder_config()
    if hasattr(tensorrt.BuilderFlag, "FP16"):  # there is none from 11 on
        config.set_flag(tensorrt.BuilderFlag.FP16)
    profile = builder.create_optimization_profile()
    profile.set_shape("image", *shapes)
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise ExportError(f"tensorrt built no engine of {path.name}; its log above says why")
    to.write_bytes(engine)

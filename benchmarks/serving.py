"""A served request beside a direct call of the same SavedModel signature with the same bytes.

    python benchmarks/serving.py saved_models/NAME IMAGE [--signature explain] [--requests 300]

The three take turns, so that whatever slows the machine slows all of them: the direct call; one Predict
through TensorFlow Serving's stubs, from bytes to arrays; and `Client.predict`, which checks the header too.
Run it on an idle machine.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tensorflow as tf

from keras_medattn.serve import Client
from keras_medattn.serve.protos import grpc, predict_pb2, prediction_service_pb2_grpc, string_tensor, to_array

SERVE = (
    "import sys; from keras_medattn.serve import serve; sys.exit(serve(sys.argv[1], port=int(sys.argv[2])))"
)


def start_server(folder: Path) -> tuple[subprocess.Popen, str]:
    """Starts a server process on a free port, and waits until it serves."""
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, str(folder), "0"], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr
    for line in process.stderr:
        if " serving " in line:
            return process, line.split()[-1]
    raise SystemExit("The server did not start: run `medattn serve` on the folder to see why.")


def measure(calls: dict[str, Callable[[], object]], turns: int, warm: int = 20) -> dict[str, np.ndarray]:
    """Answers each call's times in milliseconds; the calls take turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(warm + turns):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            if turn >= warm:
                times[name].append(1000 * (time.perf_counter() - began))
    return {name: np.array(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="an exported model: saved_models/NAME")
    parser.add_argument("image", type=Path, help="a JPEG, PNG or BMP file")
    parser.add_argument("--signature", default="serving_default")
    parser.add_argument("--requests", type=int, default=300)
    args = parser.parse_args()

    data = args.image.read_bytes()
    version = max((p for p in args.model.iterdir() if p.name.isdigit()), key=lambda p: int(p.name))
    model = tf.saved_model.load(str(version))
    signature = model.signatures[args.signature]
    process, target = start_server(args.model.resolve().parent)
    try:
        client = Client(target, args.model.resolve().name)
        stub = prediction_service_pb2_grpc.PredictionServiceStub(grpc.insecure_channel(target))

        def direct() -> dict[str, np.ndarray]:
            return {name: out.numpy() for name, out in signature(image_bytes=tf.constant([data])).items()}

        def served() -> dict[str, np.ndarray]:
            request = predict_pb2.PredictRequest()
            request.model_spec.name = client.model
            request.model_spec.signature_name = args.signature
            request.inputs["image_bytes"].CopyFrom(string_tensor([data]))
            return {name: to_array(proto) for name, proto in stub.Predict(request).outputs.items()}

        difference = np.abs(direct()["probabilities"] - served()["probabilities"]).max()
        calls = {"direct": direct, "gRPC": served, "Client": lambda: client.predict([data], args.signature)}
        times = measure(calls, args.requests)
    finally:
        process.terminate()
    assert process.wait(30) == 0

    print(f"{args.model.name}, {args.signature}, {len(data):,} bytes, {args.requests} turns, batch 1")
    print(f"largest difference in probabilities: {difference:.1e}")
    print(f"{'':8}{'p50 ms':>9}{'p99 ms':>9}{'p50 ratio':>11}{'p99 ratio':>11}")
    base = np.percentile(times["direct"], [50, 99])
    for name, values in times.items():
        row = np.percentile(values, [50, 99])
        print(f"{name:8}{row[0]:9.2f}{row[1]:9.2f}{row[0] / base[0]:11.3f}{row[1] / base[1]:11.3f}")


if __name__ == "__main__":
    main()

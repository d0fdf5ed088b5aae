"""Requests to the local server beside direct calls of the same SavedModel signature with the same bytes.

    python benchmarks/serving.py [saved_models/NAME [IMAGE]]       # about 4 minutes

The two take turns, so that whatever slows the machine slows both; with several clients there are as many
threads that call the signature directly. A request goes through TensorFlow Serving's stubs, from bytes to
arrays. Without a model it is an untrained MIMS on MobileNetV3-Small at 224 pixels, which answers so soon that
a server shows; without an image a JPEG of 640 x 480 of noise on a ramp. Run it on an idle machine; the last
column, the processor's time of server and client over that of the direct call, tells something on a busy one.
A second table has where one client's time goes: ms beside the signature's own.
"""

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import tensorflow as tf
from measure import table

from keras_medattn.serve.protos import grpc, predict_pb2, prediction_service_pb2_grpc, string_tensor, to_array
from keras_medattn.serve.servables import Servable

Call = Callable[[], dict[str, np.ndarray]]
SERVE = (
    "import sys; from keras_medattn.serve import serve; sys.exit(serve(sys.argv[1], port=int(sys.argv[2])))"
)
LIMIT = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


@contextlib.contextmanager
def server(folder: Path) -> Iterator[tuple[str, int]]:
    """HOST:PORT of a server process, once it serves, and the process's number."""
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, str(folder), "0"], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr
    for line in process.stderr:
        if " serving " in line:
            break
    else:
        raise SystemExit("The server did not start: run `medattn serve` on the folder to see why.")
    try:
        yield line.split()[-1], process.pid
    finally:
        process.terminate()
        process.wait(60)


def small_model(folder: Path) -> Path:
    """Exports an untrained model."""
    from keras_medattn.export import parity, saved_model
    from keras_medattn.models import MIMS, backbones

    model = MIMS(2, backbones.backbone("mobilenet_v3_small", 32, None), 64, kernels=((1, 3), (2, 4)), k=3)
    model.build((None, 224, 224, 3))
    recipe = SimpleNamespace(data=parity.plain_data((224, 224)))
    samples = parity.pictures(folder / "samples", False).take([0])
    saved_model.export(model, recipe, ("a", "b"), folder / "models" / "small", samples)
    return folder / "models" / "small"


def picture() -> bytes:
    noise = np.random.default_rng(0).integers(0, 60, (480, 640, 3)) + np.linspace(0, 190, 640)[:, None]
    return tf.io.encode_jpeg(noise.astype("uint8")).numpy()


def processor(pid: int) -> float:
    """Milliseconds of processor that a process and this one have used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return 1e3 * (sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK") + time.process_time())


def timed(call: Call, clients: int, seconds: float, pid: int) -> np.ndarray:
    """Of the calls of so many threads: p50 and p99 in ms, calls a second, processor's ms of a call."""
    times: list[float] = []
    end = time.perf_counter() + seconds

    def client() -> None:
        while (began := time.perf_counter()) < end:
            call()
            times.append(1e3 * (time.perf_counter() - began))

    threads = [threading.Thread(target=client) for _ in range(clients)]
    began, used = time.perf_counter(), processor(pid)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rate = len(times) / (time.perf_counter() - began)
    return np.array([*np.percentile(times, [50, 99]), rate, (processor(pid) - used) / len(times)])


def parts(servable: Servable, sent: Callable[[], predict_pb2.PredictRequest], direct: Call) -> list[float]:
    """Median ms of what a request adds in this process: sending, receiving, the server's own, the answer."""
    request = sent()
    data, response = request.SerializeToString(), servable.predict(request)
    steps: list[Callable[[], object]] = [
        lambda: sent().SerializeToString(),
        lambda: predict_pb2.PredictRequest.FromString(data),
        lambda: servable.predict(request),
        lambda: arrays(predict_pb2.PredictResponse.FromString(response.SerializeToString())),
        direct,
    ]
    times = np.zeros((15, len(steps)))
    for turn in times:
        for place, step in enumerate(steps):
            began = time.perf_counter()
            step()
            turn[place] = 1e3 * (time.perf_counter() - began)
    made, read, served, answer, alone = np.median(times, axis=0)
    return [made, read, served - alone, answer]


def arrays(response: predict_pb2.PredictResponse) -> dict[str, np.ndarray]:
    return {name: to_array(proto) for name, proto in response.outputs.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, nargs="?", help="an exported model: saved_models/NAME")
    parser.add_argument("image", type=Path, nargs="?", help="a JPEG, PNG or BMP file")
    parser.add_argument("--signature", default="serving_default")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--turns", type=int, default=5, help="of each, for a row of the table")
    parser.add_argument("--seconds", type=float, default=1.5, help="of a turn")
    args = parser.parse_args()

    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        model = (args.model or small_model(folder)).resolve()
        image = args.image.read_bytes() if args.image else picture()
        version = max((p for p in model.iterdir() if p.name.isdigit()), key=lambda p: int(p.name))
        loaded = tf.saved_model.load(str(version))
        servable = Servable(model.name, int(version.name), version)
        target, pid = stack.enter_context(server(model.parent))
        stub = prediction_service_pb2_grpc.PredictionServiceStub(grpc.insecure_channel(target, LIMIT))
        rows, where = [], []
        for batch in args.batches:
            images = [image] * batch

            def direct(images: list[bytes] = images) -> dict[str, np.ndarray]:
                answers = loaded.signatures[args.signature](image_bytes=tf.constant(images))
                return {name: out.numpy() for name, out in answers.items()}

            def sent(images: list[bytes] = images) -> predict_pb2.PredictRequest:
                request = predict_pb2.PredictRequest()
                request.model_spec.name = model.name
                request.model_spec.signature_name = args.signature
                request.inputs["image_bytes"].CopyFrom(string_tensor(images))
                return request

            def served(sent: Callable[[], predict_pb2.PredictRequest] = sent) -> dict[str, np.ndarray]:
                return arrays(stub.Predict(sent()))

            np.testing.assert_allclose(served()["probabilities"], direct()["probabilities"], atol=1e-6)
            for clients in args.clients:
                turns = np.array(
                    [
                        [timed(call, clients, args.seconds, pid) for call in (direct, served)]
                        for _ in range(args.turns + 1)
                    ]
                )[1:]  # the first turn warms up
                (p50, p99, *_), (own50, own99, *_) = np.median(turns, axis=0)
                ratios = np.median(turns[:, 1] / turns[:, 0], axis=0)
                name = f"batch {batch}, {clients} client{'s' * (clients > 1)}"
                rows.append([name, p50, p99, own50, own99, ratios[0], ratios[2], ratios[3]])
                if clients == 1:
                    added = parts(servable, sent, direct)
                    where.append([f"batch {batch}", p50, *added, own50 - p50 - sum(added)])
    columns = ["", "direct p50 ms", "p99", "served p50 ms", "p99", "p50 ratio", "rate ratio", "CPU ratio"]
    title = f"{model.name}, {args.signature}, {len(image):,} bytes an image, {args.turns} turns"
    table(title, columns, rows)
    if where:
        columns = ["", "signature", "request made", "read", "checked, copied", "answer", "wire, threads"]
        table("one client, median ms", columns, where)


if __name__ == "__main__":
    main()

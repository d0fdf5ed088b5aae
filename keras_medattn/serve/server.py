"""The local server: TensorFlow Serving's gRPC interface over the models that `medattn export` writes."""

import logging
import queue
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from keras_medattn.serve.protos import (
    grpc,
    health_pb2_grpc,
    model_service_pb2_grpc,
    prediction_service_pb2_grpc,
)
from keras_medattn.serve.servables import Repository
from keras_medattn.serve.services import Health, Prediction, Status

log = logging.getLogger("keras_medattn.serve")

# gRPC cancels requests that have arrived but that its Python loop has not picked up yet (measured: 15 of 100
# sent just before): so it goes on picking up for this many seconds before it shuts down.
_SETTLE = 0.5


class StartError(RuntimeError):
    """The server cannot start: no model, or no port. The message says what to do."""


class Server:
    """Serves a folder of exported models over gRPC, as TensorFlow Serving would.

    `PredictionService.Predict` and `GetModelMetadata`, `ModelService.GetModelStatus`, and gRPC health. Each
    model is served at its highest version. Nothing is encrypted and nobody is asked who he is: keep to the
    loopback address, or put a proxy in front.

    Args:
        folder: where `NAME/VERSION/saved_model.pb` lie.
        host: address to listen at.
        port: port to listen at; 0 takes a free one, see `port`.
        max_message_mib: largest request and answer, in MiB.
        workers: requests answered at the same time; more of them wait.

    Raises:
        StartError: from `start`, when there is no model that loads, or the port is taken.

    Example:

    >>> import tempfile
    >>> import tensorflow as tf
    >>> from keras_medattn.serve import Client, Server
    >>> module = tf.Module()
    >>> double = tf.function(lambda x: {"y": 2 * x}, input_signature=[tf.TensorSpec([None], name="x")])
    >>> folder = tempfile.mkdtemp()
    >>> tf.saved_model.save(module, f"{folder}/double/1", signatures=double.get_concrete_function())
    >>> server = Server(folder, port=0)
    >>> server.start()
    >>> Client(f"127.0.0.1:{server.port}", "double").status()
    [VersionStatus(version=1, state='AVAILABLE', error=None)]
    >>> server.stop()
    True
    """

    def __init__(
        self,
        folder: str | Path,
        host: str = "127.0.0.1",
        port: int = 8500,
        *,
        max_message_mib: int = 64,
        workers: int = 8,
    ) -> None:
        self._folder = Path(folder)
        self._host = host
        self.port = port
        self._health = Health()
        limit = max_message_mib << 20
        self._grpc = grpc.server(
            ThreadPoolExecutor(workers, thread_name_prefix="request"),
            options=[
                ("grpc.max_receive_message_length", limit),
                ("grpc.max_send_message_length", limit),
                # Else a second server on the same port starts, and gets half of the requests.
                ("grpc.so_reuseport", 0),
            ],
        )

    def start(self) -> None:
        """Loads the models, then listens."""
        try:
            models = Repository(self._folder)
        except OSError as error:
            raise StartError(str(error)) from error
        if not models.loaded:
            raise StartError(f"None of the models loads: {models.errors}")
        prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(Prediction(models), self._grpc)
        model_service_pb2_grpc.add_ModelServiceServicer_to_server(Status(models), self._grpc)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._grpc)
        try:
            self.port = self._grpc.add_insecure_port(f"{self._host}:{self.port}")
        except RuntimeError as error:
            raise StartError(f"Cannot listen at {self._host}:{self.port}: try another --port") from error
        self._grpc.start()
        log.info("serving %s at %s:%d", ", ".join(models.loaded), self._host, self.port)

    def wait(self) -> None:
        """Blocks until the server has stopped."""
        self._grpc.wait_for_termination()

    def stop(self, grace: float = 30.0) -> bool:
        """Says NOT_SERVING, settles, takes no more requests, and answers those it has.

        Args:
            grace: seconds for the answers; what is unanswered then is cancelled.

        Returns:
            Whether all were answered.
        """
        log.info("stopping")
        self._health.leave()
        time.sleep(_SETTLE)
        began = time.monotonic()
        self._grpc.stop(grace).wait()
        answered = time.monotonic() - began < grace
        log.info("stopped" if answered else "stopped; some requests had no answer in time")
        return answered


def serve(
    folder: str | Path,
    host: str = "127.0.0.1",
    port: int = 8500,
    *,
    max_message_mib: int = 64,
    workers: int = 8,
    grace: float = 30.0,
) -> int:
    """Serves until SIGTERM or SIGINT, then answers the requests in flight. For the main thread of a program.

    Args:
        folder: as for `Server`, like the next four.
        host: address.
        port: port.
        max_message_mib: largest message.
        workers: requests at a time.
        grace: seconds for the requests in flight. A second signal ends the program at once.

    Returns:
        The exit code: 0 all were answered, 1 some were not, 2 could not start.

    Example:

    >>> serve("/nowhere")
    2
    """
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    # An Event is not safe to set in a signal handler, a SimpleQueue is.
    signals: queue.SimpleQueue[int] = queue.SimpleQueue()

    def on_signal(number: int, _: Any) -> None:
        signal.signal(number, signal.SIG_DFL)
        signals.put(number)

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        server = Server(folder, host, port, max_message_mib=max_message_mib, workers=workers)
        server.start()
        signals.get()
        return 0 if server.stop(grace) else 1
    except StartError as error:
        log.error("%s", error)
        return 2
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

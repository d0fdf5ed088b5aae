"""The local server: TensorFlow Serving's interfaces over the models that `medattn export` writes."""

import logging
import queue
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from keras_medattn.serve.calls import Calls
from keras_medattn.serve.config import in_folder, read, versions
from keras_medattn.serve.protos import (
    grpc,
    health_pb2_grpc,
    model_service_pb2_grpc,
    prediction_service_pb2_grpc,
)
from keras_medattn.serve.repository import Repository
from keras_medattn.serve.rest import Rest
from keras_medattn.serve.services import Health, Models, Prediction

log = logging.getLogger("keras_medattn.serve")

# gRPC cancels requests that have arrived but that its Python loop has not picked up yet (measured: 15 of 100
# sent just before): so it goes on picking up for this many seconds before it shuts down.
_SETTLE = 0.5
# Threads beyond those of predictions: health, status and refusals never wait for a prediction.
_SPARE = 8


class StartError(RuntimeError):
    """The server cannot start: no model, or no port. The message says what to do."""


class Server:
    """Serves exported models over gRPC and REST, as TensorFlow Serving would.

    `PredictionService`, `ModelService` and health over gRPC; over REST `:predict`, status, metadata and a
    page for Prometheus. Of a folder each model is served at its highest version; a models.config says more.
    A new version is loaded aside, and the old one answers until it is ready. Nothing is encrypted and nobody
    is asked who he is: keep to the loopback address, or put a proxy in front.

    Args:
        folder: where `NAME/VERSION/saved_model.pb` lie; None with a `config`.
        host: address to listen at.
        port: port of gRPC; 0 takes a free one, see `port`.
        rest_port: port of REST; None for no REST, 0 takes a free one, see `rest_port`.
        config: TensorFlow Serving's models.config, in place of a folder.
        poll: seconds between looks for new versions; 0 looks once.
        max_message_mib: largest request and answer, in MiB.
        workers: predictions at the same time, over gRPC and REST together.
        waiting: how many more may wait; one more is refused with RESOURCE_EXHAUSTED.

    Raises:
        ValueError: a folder and a config were given, or neither.
        StartError: from `start`, when there is no model that loads, or a port is taken.

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
        folder: str | Path | None,
        host: str = "127.0.0.1",
        port: int = 8500,
        *,
        rest_port: int | None = None,
        config: str | Path | None = None,
        poll: float = 1.0,
        max_message_mib: int = 64,
        workers: int = 8,
        waiting: int = 64,
    ) -> None:
        if (folder is None) == (config is None):
            raise ValueError(f"Give a folder of models or a config. Received: {folder!r} and {config!r}")
        self._folder = None if folder is None else Path(folder)
        self._config = None if config is None else Path(config)
        self._poll = poll
        self._stopping = threading.Event()
        self._watch: threading.Thread | None = None
        self._host = host
        self.port = port
        self.rest_port = rest_port
        self._workers = workers
        self._waiting = waiting
        self._health = Health()
        self._rest: Rest | None = None
        self._limit = max_message_mib << 20
        self._grpc = grpc.server(
            ThreadPoolExecutor(workers + waiting + _SPARE, thread_name_prefix="request"),
            options=[
                ("grpc.max_receive_message_length", self._limit),
                ("grpc.max_send_message_length", self._limit),
                # Else a second server on the same port starts, and gets half of the requests.
                ("grpc.so_reuseport", 0),
            ],
        )

    def start(self) -> None:
        """Loads the models, then listens."""
        models = self._load()
        calls = Calls(models, self._workers, self._waiting)
        prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(
            Prediction(models, calls), self._grpc
        )
        model_service_pb2_grpc.add_ModelServiceServicer_to_server(Models(models, calls), self._grpc)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._grpc)
        try:
            self.port = self._grpc.add_insecure_port(f"{self._host}:{self.port}")
        except RuntimeError as error:
            raise StartError(f"Cannot listen at {self._host}:{self.port}: try another --port") from error
        if self.rest_port is not None:
            try:
                self._rest = Rest((self._host, self.rest_port), models, calls, self._limit)
            except OSError as error:
                where = f"{self._host}:{self.rest_port}"
                raise StartError(f"Cannot listen at {where}: try another --rest-port") from error
            self.rest_port = self._rest.server_port
            self._rest.start()
            log.info("REST at %s:%d", self._host, self.rest_port)
        self._grpc.start()
        if self._poll:
            watch = (self._poll, self._stopping)
            self._watch = threading.Thread(target=models.watch, args=watch, name="watch", daemon=True)
            self._watch.start()
        log.info("serving %s at %s:%d", ", ".join(models.served), self._host, self.port)

    def _load(self) -> Repository:
        folder, config = self._folder, self._config
        try:
            models = Repository(lambda: in_folder(folder) if folder else read(config))  # type: ignore[arg-type]
        except (OSError, ValueError) as error:
            raise StartError(str(error)) from error
        if not models.names:
            if folder is None:
                raise StartError(
                    f"No model of {config} has a version: expected BASE_PATH/VERSION/saved_model.pb"
                )
            hint = " It looks like one model: give the folder above it." if versions(folder) else ""
            raise StartError(
                "No exported model: expected NAME/VERSION/saved_model.pb in it, as `medattn export` writes."
                f"{hint} Received: {str(folder)!r}"
            )
        if not models.served:
            raise StartError(f"None of the models loads: {models.errors}")
        return models

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
        self._stopping.set()
        self._health.leave()
        time.sleep(_SETTLE)
        began = time.monotonic()
        stopped = self._grpc.stop(grace)
        rest_answered = self._rest is None or self._rest.stop(grace)
        stopped.wait()
        answered = rest_answered and time.monotonic() - began < grace
        if self._watch:
            # TensorFlow does not take it well when the program ends in the middle of a load.
            self._watch.join(grace)
        log.info("stopped" if answered else "stopped; some requests had no answer in time")
        return answered


def serve(
    folder: str | Path | None,
    host: str = "127.0.0.1",
    port: int = 8500,
    *,
    rest_port: int | None = None,
    config: str | Path | None = None,
    poll: float = 1.0,
    max_message_mib: int = 64,
    workers: int = 8,
    grace: float = 30.0,
) -> int:
    """Serves until SIGTERM or SIGINT, then answers the requests in flight. For the main thread of a program.

    Args:
        folder: as for `Server`, like the next seven.
        host: address.
        port: port of gRPC.
        rest_port: port of REST.
        config: models.config.
        poll: seconds between looks.
        max_message_mib: largest message.
        workers: predictions at a time.
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
        server = Server(
            folder,
            host,
            port,
            rest_port=rest_port,
            config=config,
            poll=poll,
            max_message_mib=max_message_mib,
            workers=workers,
        )
        server.start()
        # A signal that comes just before this thread waits would not wake it: it looks again.
        while True:
            with suppress(queue.Empty):
                signals.get(timeout=0.5)
                break
        return 0 if server.stop(grace) else 1
    except StartError as error:
        log.error("%s", error)
        return 2
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

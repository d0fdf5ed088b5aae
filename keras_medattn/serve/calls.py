"""What gRPC and REST share: how many predictions run at a time, what is counted and what is logged."""

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from keras_medattn.serve.monitoring import Monitor
from keras_medattn.serve.protos import grpc
from keras_medattn.serve.repository import Repository
from keras_medattn.serve.servables import RequestError

log = logging.getLogger("keras_medattn.serve")

# gRPC sends an error's text in a header of at most 8 KiB, where a character may take 12 bytes.
MAX_ERROR_TEXT = 600


class Calls:
    """The calls that are being answered.

    Args:
        models: the models, for the names that are counted.
        workers: predictions at a time.
        waiting: predictions that may wait for a worker; one more is refused.
    """

    def __init__(self, models: Repository, workers: int, waiting: int) -> None:
        self.monitor = Monitor()
        self._models = models
        self._limit = workers + waiting
        self._workers = threading.BoundedSemaphore(workers)
        self._places = threading.BoundedSemaphore(self._limit)

    @contextmanager
    def answering(self, model: str, method: str, door: str) -> Iterator[None]:
        """Counts a call, logs what goes wrong, and raises nothing but a `RequestError`."""
        began, status = time.monotonic(), "OK"
        try:
            yield
        except RequestError as error:
            status = error.code.name
            text = str(error)[:MAX_ERROR_TEXT]
            log.warning("model %r: %s %r", model[:100], status, text)
            raise RequestError(error.code, text) from None
        except Exception:
            status = "INTERNAL"
            log.exception("model %r: INTERNAL", model[:100])
            text = "The server failed to answer; its log says why."
            raise RequestError(grpc.StatusCode.INTERNAL, text) from None
        finally:
            # Names that nobody serves would make a series each.
            known = model if model in self._models.names else ""
            self.monitor.count(known, status, method, door, time.monotonic() - began)

    @contextmanager
    def place(self) -> Iterator[None]:
        """Waits for a worker.

        Raises:
            RequestError: as many wait as may.
        """
        if not self._places.acquire(blocking=False):
            raise RequestError(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"The server has {self._limit} predictions to answer and takes no more: ask again soon.",
            )
        try:
            with self._workers:
                yield
        finally:
            self._places.release()

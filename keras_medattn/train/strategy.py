"""Devices and machines that train a model together: the only place that builds a `tf.distribute` strategy."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import tensorflow as tf

NAMES = ("mirrored",)


class StrategyError(ValueError):
    """Devices or machines that cannot train together as asked."""


def get(name: str | None = None) -> tf.distribute.Strategy | None:
    """The strategy of a name; of several machines where `TF_CONFIG` names them; None for one device.

    A process has one: a second one would break TensorFlow's collectives. With `TF_CONFIG` it must be asked
    for before TensorFlow runs anything, which reading a recipe does.

    Args:
        name: `"mirrored"`, all GPUs of this machine, or its logical CPUs where it has none; or None.

    Raises:
        StrategyError: the name is unknown, or `TF_CONFIG` cannot be used.
    """
    if name is not None and name not in NAMES:
        raise StrategyError(f"strategy must be one of {', '.join(NAMES)}, or left out. Received: {name!r}")
    if workers()[1] > 1:
        return _of_machines()
    return _of_devices() if name else None


def workers() -> tuple[int, int]:
    """Which worker this process is, 0 for the chief, and how many there are, by `TF_CONFIG`.

    Raises:
        StrategyError: it is not JSON, or has no such task.

    Example:
        >>> workers()
        (0, 1)
    """
    text = os.environ.get("TF_CONFIG") or "{}"
    try:
        config = json.loads(text)
        cluster, task = config.get("cluster", {}), config.get("task", {"type": "worker", "index": 0})
        chiefs, others = cluster.get("chief", []), cluster.get("worker", [])
        place = {"chief": 0, "worker": len(chiefs)}[task["type"]] + int(task["index"])
        count = max(1, len(chiefs) + len(others))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StrategyError(
            'TF_CONFIG must be like {"cluster": {"worker": ["host:port", ...]}, "task": {"type": "worker", '
            f'"index": 0}}}}. Received: {text}'
        ) from error
    if not 0 <= place < count:
        raise StrategyError(f"TF_CONFIG has {count} workers, and its task is none of them. Received: {text}")
    return place, count


def chief() -> bool:
    """Whether this process is the one that writes the run's files."""
    return workers()[0] == 0


def scope(strategy: tf.distribute.Strategy | None) -> AbstractContextManager:
    """In it, variables are made on all devices of a strategy."""
    return strategy.scope() if strategy else nullcontext()


@contextmanager
def chief_first() -> Iterator[None]:
    """Let the chief do it before the others, which then find the files that it has made."""
    if not chief():
        mean(0)
    yield
    if chief():
        mean(0)


def mean(number: float) -> float:
    """The mean of the workers' numbers; it waits for all of them."""
    if workers()[1] == 1:
        return number
    return float(_mean(tf.constant(number, tf.float64)))


@contextmanager
def lost_workers_told() -> Iterator[None]:
    """Say in words that another worker is gone, where TensorFlow gives up waiting for it.

    Raises:
        ConnectionError: another worker has stopped.
    """
    try:
        yield
    except (tf.errors.UnavailableError, tf.errors.AbortedError, tf.errors.CancelledError) as error:
        if workers()[1] == 1:
            raise
        raise ConnectionError(
            f"worker {workers()[0]} of {workers()[1]} has lost another one: it stopped, and its own output "
            "tells why, or cannot be reached. Start all again with --resume, from the last checkpoint"
        ) from error


@tf.function(autograph=False)  # one trace for all calls: each new function would make another
def _mean(own: tf.Tensor) -> tf.Tensor:
    strategy = _of_machines()
    return strategy.reduce(tf.distribute.ReduceOp.MEAN, strategy.run(lambda: own), axis=None)


@functools.cache
def _of_devices() -> tf.distribute.Strategy:
    return tf.distribute.MirroredStrategy()


@functools.cache
def _of_machines() -> tf.distribute.Strategy:
    try:
        return tf.distribute.MultiWorkerMirroredStrategy()
    except RuntimeError as error:
        raise StrategyError(
            "the workers of TF_CONFIG must be set up before TensorFlow runs anything: call "
            f"keras_medattn.train.strategy.get() first, before a recipe is read ({error})"
        ) from error

"""What the server counts, as the text that Prometheus reads."""

import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable

# Upper ends of the latency histogram, in microseconds as TensorFlow Serving's: 1 ms to 65 s.
_BOUNDS = tuple(1000 * 2**i for i in range(17))


class Monitor:
    """Counts requests by model and status, and how long they took.

    The names are TensorFlow Serving's, so that its dashboards work: `:tensorflow:serving:request_count` and
    `:tensorflow:serving:request_latency`. The versions that are loaded are `medattn_loaded_version`.

    Example:

    >>> monitor = Monitor()
    >>> monitor.count("eyes", "OK", "Predict", "REST", 0.0015)
    >>> print(monitor.text([("eyes", 2)]).splitlines()[1])
    :tensorflow:serving:request_count{model_name="eyes",status="OK"} 1
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: Counter[tuple[str, str]] = Counter()
        self._seconds: Counter[tuple[str, str, str]] = Counter()
        self._buckets: dict[tuple[str, str, str], list[int]] = {}

    def count(self, model: str, status: str, method: str, door: str, seconds: float) -> None:
        """Counts one request that came by gRPC or REST."""
        with self._lock:
            self._requests[model, status] += 1
            if status == "OK":
                key = (model, method, door)
                buckets = self._buckets.setdefault(key, [0] * (len(_BOUNDS) + 1))
                buckets[bisect_left(_BOUNDS, seconds * 1e6)] += 1
                self._seconds[key] += seconds  # type: ignore[assignment]

    def text(self, loaded: Iterable[tuple[str, int]]) -> str:
        """Answers the page, given the (model, version) pairs that are loaded."""
        with self._lock:
            lines = ["# TYPE :tensorflow:serving:request_count counter"]
            for (model, status), number in sorted(self._requests.items()):
                labels = _labels(model_name=model, status=status)
                lines.append(f":tensorflow:serving:request_count{{{labels}}} {number}")
            lines.append("# TYPE :tensorflow:serving:request_latency histogram")
            for key, buckets in sorted(self._buckets.items()):
                lines += _histogram(key, buckets, self._seconds[key])
        lines.append("# TYPE medattn_loaded_version gauge")
        lines += [
            f"medattn_loaded_version{{{_labels(model_name=model, version=str(version))}}} 1"
            for model, version in loaded
        ]
        return "\n".join(lines) + "\n"


def _histogram(key: tuple[str, str, str], buckets: list[int], seconds: float) -> list[str]:
    model, method, door = key
    labels = _labels(model_name=model, API=method, entrypoint=door)
    name = ":tensorflow:serving:request_latency"
    lines, total = [], 0
    for bound, number in zip((*_BOUNDS, "+Inf"), buckets, strict=True):
        total += number
        lines.append(f'{name}_bucket{{{labels},le="{bound}"}} {total}')
    return [*lines, f"{name}_sum{{{labels}}} {seconds * 1e6:.0f}", f"{name}_count{{{labels}}} {total}"]


def _labels(**labels: str) -> str:
    escapes = str.maketrans({"\\": "\\\\", '"': '\\"', "\n": "\\n"})
    return ",".join(f'{name}="{value.translate(escapes)}"' for name, value in labels.items())

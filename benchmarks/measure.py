"""What the benchmarks share: alternating timings, peak memory in a process of its own, tables."""

import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np

Step = Callable[[], Any]  # one whole step; it waits for its result


def times(steps: dict[str, Step], runs: int, warm_up: int = 2) -> dict[str, np.ndarray]:
    """Milliseconds of each run of each step, the steps taking turns, so that all meet the same machine."""
    found: dict[str, list[float]] = {name: [] for name in steps}
    for run in range(runs + warm_up):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if run >= warm_up:  # the first ones trace and warm up
                found[name].append(1e3 * (time.perf_counter() - start))
    return {name: np.array(elapsed) for name, elapsed in found.items()}


def ratio(own: np.ndarray, other: np.ndarray) -> float:
    """The median over the turns of own time / other's time: below 1 is faster."""
    return float(np.median(own / other))


def memory(make: Callable[..., Step], *arguments: Any) -> float:
    """MiB that a first step takes above what the process held before it, at the peak.

    `make(*arguments)` runs in a new process, builds all that the step needs, and answers the step. It must be
    a function of a module's top level.
    """
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    child = context.Process(target=_measure, args=(queue, make, arguments))
    child.start()
    while child.is_alive() and queue.empty():
        child.join(0.1)
    if queue.empty() and child.exitcode:
        raise RuntimeError(f"the process that measured {make.__name__} ended with code {child.exitcode}")
    answer = queue.get()
    child.join()
    return answer


def _measure(queue: Any, make: Callable[..., Step], arguments: Sequence[Any]) -> None:
    step = make(*arguments)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # forgets the peak so far
    before = _status("VmRSS")
    step()
    queue.put((_status("VmHWM") - before) / 1024)


def _status(key: str) -> int:
    """KiB of a line of the process's status."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key + ":"))


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Prints a table: the first column is a name, floats get three significant digits."""

    def text(cell: Any) -> str:
        return (
            f"{cell:,.0f}"
            if isinstance(cell, float) and cell >= 1000
            else (f"{cell:.3g}" if isinstance(cell, float) else str(cell))
        )

    cells = [[text(cell) for cell in row] for row in [columns, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    print(title)
    for first, *others in cells:
        right = zip(others, widths[1:], strict=True)
        print("  " + first.ljust(widths[0]) + "".join("  " + cell.rjust(width) for cell, width in right))

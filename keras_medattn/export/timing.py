"""One exported format in a process of its own: what it costs to load and to answer, and what it answers.

`benchmark` runs it as `python -m keras_medattn.export.timing JOB`; only the format's own runtime is imported.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

Inputs = dict[str, np.ndarray]
Answer = Callable[[Inputs], np.ndarray]
RUNTIMES = {"": "tensorflow", ".tflite": "ai_edge_litert.interpreter", ".onnx": "onnxruntime"}


def measure(path: Path, signature: str, examples: Path, runs: int, threads: int) -> tuple[dict, np.ndarray]:
    """Load a format, and answer examples in turn, one at a time.

    Args:
        path: a SavedModel's folder, or a `.tflite` or `.onnx` file.
        signature: of the SavedModel.
        examples: folder of `N.npz`, the inputs by name.
        runs: answers to time at least, after one that counts as loading; each example is answered once.
        threads: that the runtime may use.

    Returns:
        `load`, the seconds from opening the file to its first answer, the runtime being there; `p50` and
        `p99` in milliseconds; `memory`, the process's peak in MiB; and the probabilities `(N, C)`.
    """
    runtime = importlib.import_module(RUNTIMES[path.suffix])
    if path.suffix == "":
        runtime.config.threading.set_intra_op_parallelism_threads(threads)
        runtime.config.threading.set_inter_op_parallelism_threads(threads)
    files = sorted(examples.glob("*.npz"), key=lambda file: int(file.stem))
    first = _inputs(files[0])
    began = time.perf_counter()
    answer = _opened(path, signature, threads)
    answer(first)
    load = time.perf_counter() - began
    times, answers = [], {}
    for turn in range(max(runs, len(files))):
        place = turn % len(files)
        inputs = _inputs(files[place])
        began = time.perf_counter()
        answers[place] = answer(inputs)[0]
        times.append(1e3 * (time.perf_counter() - began))
    p50, p99 = np.percentile(times, [50, 99])
    found = {"load": load, "p50": p50, "p99": p99, "memory": _peak()}
    return found, np.stack([answers[place] for place in range(len(files))])


def _opened(path: Path, signature: str, threads: int) -> Answer:
    if path.suffix == ".tflite":
        from keras_medattn.export import litert

        return _plain(litert.reader(path, threads))
    if path.suffix == ".onnx":
        from keras_medattn.export import onnx

        return _plain(onnx.reader(path, threads))
    import tensorflow as tf

    model = tf.saved_model.load(str(path))
    names = list(model.signatures[signature].structured_input_signature[1])

    def answer(inputs: Inputs) -> np.ndarray:
        sent = {name: tf.constant(inputs[name]) for name in names}
        return model.signatures[signature](**sent)["probabilities"].numpy()

    return answer


def _plain(answer: Answer) -> Answer:
    """Without the encoded image, which only a SavedModel takes."""
    return lambda inputs: answer({name: one for name, one in inputs.items() if name != "image_bytes"})


def _inputs(file: Path) -> Inputs:
    with np.load(file) as held:
        inputs = dict(held)
    if "image_bytes" in inputs:
        inputs["image_bytes"] = np.array([inputs["image_bytes"].tobytes()], object)
    return inputs


def _peak() -> float:
    """MiB; not by `getrusage`, which counts the process that started this one."""
    status = Path("/proc/self/status").read_text()
    return int(re.findall(r"VmHWM:\s*(\d+)", status)[0]) / 1024


def main() -> None:
    """Do the job that the argument describes in JSON."""
    job = json.loads(sys.argv[1])
    folder = Path(job["folder"])
    examples = folder / "examples"
    found, answers = measure(
        Path(job["path"]), job["signature"], examples, int(job["runs"]), int(job["threads"])
    )
    np.save(folder / "answers.npy", answers)
    (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()

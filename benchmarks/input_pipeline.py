"""Times reading photographs at the model's size beside OpenCV's decoding and area resize.

Run from the project's folder: `python benchmarks/input_pipeline.py [--runs 9] [--images 32]`. JPEG files of
1388 x 1040 pixels, written here, are read from disk and resized to 277 x 208, a batch at a time, by equal
thread pools; all sides take turns. Beside the time stand the processor's seconds, of all threads: they tell
more than the clock where other programs run. Below: each part of the work on one thread, what would be
faster, and how far its pixels lie from those that training and the exported model see.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import measure
import numpy as np
import tensorflow as tf

from keras_medattn.data import decode, pipeline
from keras_medattn.data.manifest import Manifest

WIDTH, HEIGHT, SIZE = 1388, 1040, (208, 277)


def write_images(folder: Path, count: int) -> Manifest:
    """Smooth blobs with a camera's noise, about as large as files as photographs of this size are."""
    rng = np.random.default_rng(0)
    names = tuple(f"{number:03d}.jpg" for number in range(count))
    for name in names:
        blobs = rng.uniform(0, 255, (HEIGHT // 16, WIDTH // 16, 3)).astype(np.float32)
        image = cv2.resize(blobs, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
        image += rng.normal(0, 6, image.shape)
        cv2.imwrite(str(folder / name), image.clip(0, 255).astype(np.uint8), [cv2.IMWRITE_JPEG_QUALITY, 90])
    return Manifest(folder, names, np.arange(count) % 2, ("a", "b"))


def opencv(path: Path) -> np.ndarray:
    return cv2.resize(cv2.imread(str(path)), SIZE[::-1], interpolation=cv2.INTER_AREA)


def graph(function: Callable[[], tf.Tensor]) -> measure.Step:
    """The function as a graph, traced on its first call."""
    compiled = tf.function(function)
    return lambda: compiled().numpy()


def parts(path: Path) -> dict[str, measure.Step]:
    """The parts of the work on one image, and faster ways to do them."""
    data = tf.constant(path.read_bytes())
    raw = np.frombuffer(data.numpy(), np.uint8)
    pixels = decode.decode(data)
    array = pixels.numpy()

    def scaled(ratio: int):
        small = tf.io.decode_jpeg(data, channels=3, ratio=ratio, dct_method="INTEGER_ACCURATE")
        return decode.resize(small, SIZE)

    return {
        "decode, OpenCV": lambda: cv2.imdecode(raw, cv2.IMREAD_COLOR),
        "resize, OpenCV, area": lambda: cv2.resize(array, SIZE[::-1], interpolation=cv2.INTER_AREA),
        "decode": graph(lambda: decode.decode(tf.identity(data))),
        "resize": graph(lambda: decode.resize(tf.identity(pixels), SIZE)),
        "decode and resize": graph(lambda: decode.resize(decode.decode(tf.identity(data)), SIZE)),
        "decode, and resize by area": graph(
            lambda: tf.cast(
                tf.round(tf.image.resize(decode.decode(tf.identity(data)), SIZE, method="area")), tf.uint8
            )
        ),
        "decode at 1/2, and resize": graph(lambda: scaled(2)),
        "decode at 1/4, and resize": graph(lambda: scaled(4)),
    }


def processor(step: measure.Step, spent: list[float]) -> measure.Step:
    """The step, which also notes the milliseconds that the processor's cores spent on it."""

    def run() -> None:
        start = time.process_time()
        step()
        spent.append(1e3 * (time.process_time() - start))

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--images", type=int, default=32)
    arguments = parser.parse_args()
    cores, rows = len(os.sched_getaffinity(0)), np.arange(arguments.images)
    cv2.setNumThreads(1)  # files side by side, not parts of one
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor() as pool:
        table = write_images(Path(folder), arguments.images)
        size = np.mean([path.stat().st_size for path in table.paths]) / 1e3
        whole, scaled = (pipeline.streamed(table, SIZE, scaled=scaled) for scaled in (False, True))
        steps: dict[str, measure.Step] = {
            "OpenCV": lambda: np.stack(list(pool.map(opencv, table.paths))),
            "keras_medattn": lambda: whole(rows, 0),
            "data.scaled_decoding": lambda: scaled(rows, 0),
        }
        spent: dict[str, list[float]] = {name: [] for name in steps}
        batches = measure.times(
            {name: processor(step, spent[name]) for name, step in steps.items()}, arguments.runs
        )
        busy = {name: np.array(ms[-arguments.runs :]) for name, ms in spent.items()}  # without the warm-up
        single = parts(table.paths[0])
        alone = measure.times(single, arguments.runs)
        wanted = single["decode and resize"]().astype(int)
        away = {
            name: np.abs(step() - wanted) for name, step in single.items() if step().shape == wanted.shape
        }
    measure.table(
        f"{arguments.images} JPEG of {WIDTH} x {HEIGHT}, {size:.0f} kB each, to {SIZE[1]} x {SIZE[0]} "
        f"on {cores} cores, {arguments.runs} runs in turn",
        ["an image", "fastest ms", "median ms", "x OpenCV's speed", "processor's ms", "x OpenCV's speed"],
        [
            [
                name,
                ms.min() / arguments.images,
                float(np.median(ms)) / arguments.images,
                measure.ratio(batches["OpenCV"], ms),
                float(np.median(busy[name])) / arguments.images,
                measure.ratio(busy["OpenCV"], busy[name]),
            ]
            for name, ms in batches.items()
        ],
    )
    measure.table(
        "one image on one thread",
        ["", "fastest ms", "median", "levels away at most", "on average"],
        [
            [name, ms.min(), float(np.median(ms))]
            + ([int(away[name].max()), float(away[name].mean())] if name in away else ["", ""])
            for name, ms in alone.items()
        ],
    )


if __name__ == "__main__":
    main()

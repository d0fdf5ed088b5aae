"""Batches; their order and augmentation are functions of (seed, epoch, example), not of a state."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import tensorflow as tf

from keras_medattn.data import readers
from keras_medattn.data.decode import resize
from keras_medattn.data.headers import MAX_PIXELS, ImageError
from keras_medattn.data.manifest import Manifest

Fetch = Callable[[np.ndarray, int], np.ndarray]  # rows, epoch -> their arrays
Augment = Callable[[tf.Tensor, tf.Tensor], tf.Tensor]  # images (B, H, W, C), seeds (B, 2) -> images


@functools.lru_cache(maxsize=8)
def _resizer(size: tuple[int, int]):
    spec = tf.TensorSpec((None, None, 3), tf.uint8)
    return tf.function(lambda image: resize(image, size)).get_concrete_function(spec)


def read_sized(path, size: tuple[int, int], window=None, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Read one file and resize it to the model's `(height, width)`: `(h, w, 3)` uint8."""
    return size_pixels(readers.read(path, window, max_pixels), size)


def size_pixels(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize RGB pixels to the model's `(height, width)`, as training and the exported model do."""
    return _resizer((size[0], size[1]))(tf.constant(pixels)).numpy()


def read_all(
    manifest: Manifest,
    size: tuple[int, int],
    window=None,
    max_pixels: int = MAX_PIXELS,
    progress: Callable[[Iterable, int], Iterable] = lambda items, _: items,
) -> np.ndarray:
    """Read every image at the model's size into memory: `(N, h, w, 3)` uint8.

    Raises:
        ImageError: names every file that cannot be read, not the first one.
    """
    images = np.empty((len(manifest), *size, 3), np.uint8)

    def one(place_and_path):
        place, path = place_and_path
        try:
            images[place] = read_sized(path, size, window, max_pixels)
        except ImageError as error:
            return str(error)

    with ThreadPoolExecutor() as pool:
        faults = list(progress(pool.map(one, enumerate(manifest.paths)), len(manifest)))
    faults = [fault for fault in faults if fault]
    if faults:
        shown = "\n  ".join(faults[:50])
        raise ImageError(f"{len(faults)} of {len(images)} images cannot be read:\n  {shown}")
    return images


def streamed(manifest: Manifest, size: tuple[int, int], window=None, max_pixels: int = MAX_PIXELS) -> Fetch:
    """A fetch that reads a batch's files when it is asked for them, for sets larger than memory."""
    paths = manifest.paths
    pool = ThreadPoolExecutor()

    def fetch(rows: np.ndarray, epoch: int) -> np.ndarray:
        return np.stack(list(pool.map(lambda i: read_sized(paths[i], size, window, max_pixels), rows)))

    return fetch


def steps_an_epoch(count: int, batch_size: int) -> int:
    """How many batches an epoch has; batches differ by one example at most, so none is tiny."""
    return -(-count // batch_size)


def rows_of_step(step: int, count: int, batch_size: int, seed: int) -> tuple[int, np.ndarray]:
    """The epoch that a step belongs to, and the rows of its batch.

    Example:
        >>> rows_of_step(3, count=4, batch_size=2, seed=0)[0]
        1
    """
    epoch, place = divmod(step, steps_an_epoch(count, batch_size))
    order = np.random.default_rng([seed, epoch]).permutation(count)
    return epoch, np.array_split(order, steps_an_epoch(count, batch_size))[place]


def training_batches(
    fetch: Fetch,
    labels: np.ndarray,
    batch_size: int,
    seed: int,
    epochs: range,
    augment: Augment | None = None,
) -> tf.data.Dataset:
    """Batches `(inputs, labels)` for the given epochs, in an order that the seed fixes.

    Args:
        fetch: rows and epoch to arrays.
        labels: `(N,)` int.
        batch_size: examples a step.
        seed: with epoch and row, it alone decides order and augmentation.
        epochs: those to deliver; after a resume it starts past 0.
        augment: maps images and a seed pair for each to images.
    """
    count, steps = len(labels), steps_an_epoch(len(labels), batch_size)
    first = fetch(np.array([0]), 0)

    def batch(step):
        epoch, rows = rows_of_step(int(step), count, batch_size, seed)
        mixed = np.random.default_rng([seed, epoch, 1]).integers(0, 2**31 - 1, count, np.int32)[rows]
        seeds = np.stack([mixed, rows.astype(np.int32)], axis=1)  # (B, 2)
        return fetch(rows, epoch), seeds, labels[rows].astype(np.int64)

    def load(step):
        inputs, seeds, targets = tf.numpy_function(batch, [step], (first.dtype, tf.int32, tf.int64))
        inputs.set_shape((None, *first.shape[1:]))
        seeds.set_shape((None, 2))
        targets.set_shape((None,))
        return (inputs if augment is None else augment(inputs, seeds)), targets

    steps_to_do = tf.data.Dataset.range(epochs.start * steps, epochs.stop * steps)
    return steps_to_do.map(load, num_parallel_calls=2, deterministic=True).prefetch(2)


def batches(fetch: Fetch, count: int, batch_size: int) -> tf.data.Dataset:
    """Inputs alone, in the table's order, for prediction."""
    first = fetch(np.array([0]), 0)

    def batch(start):
        return fetch(np.arange(start, min(start + batch_size, count)), 0)

    def load(start):
        inputs = tf.numpy_function(batch, [start], first.dtype)
        inputs.set_shape((None, *first.shape[1:]))
        return inputs

    return tf.data.Dataset.range(0, count, batch_size).map(load, num_parallel_calls=2).prefetch(2)

"""Batches; their order and augmentation are functions of (seed, epoch, example), not of a state."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import tensorflow as tf

from keras_medattn.data import readers, volumes
from keras_medattn.data.headers import MAX_PIXELS, ImageError
from keras_medattn.data.manifest import Manifest
from keras_medattn.data.readers import size_pixels

Fetch = Callable[[np.ndarray, int], Any]  # rows, epoch -> their array; of volumes what `padded` answers
Augment = Callable[[tf.Tensor, tf.Tensor], tf.Tensor]  # images (B, H, W, C), seeds (B, 2) -> images
Shards = tuple[int, int, int]  # the first of the parts of each batch, how many, and all that there are
Mix = Callable[[Any, tf.Tensor, tf.Tensor], tuple[Any, tf.Tensor]]  # inputs, labels, seed (2,) -> both


def read_sized(
    path, size: tuple[int, int], window=None, max_pixels: int = MAX_PIXELS, scaled: bool = False
) -> np.ndarray:
    """Read one file and resize it to the model's `(height, width)`: `(h, w, 3)` uint8.

    Where `scaled`, a JPEG is decoded towards that size already; see `decode.decode`.
    """
    wanted = size[0], size[1]
    return readers.read(path, window, max_pixels, wanted, wanted if scaled else None)


def read_sized_volume(
    path, size: tuple[int, int], window=None, max_pixels: int = MAX_PIXELS, central: int = 0
) -> np.ndarray:
    """Read the central slices of a volume (0: all) at the model's size: `(S, h, w, 3)` uint8."""
    return np.stack([size_pixels(pixels, size) for pixels in volumes.read(path, window, max_pixels, central)])


def padded(stacks: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Lay volumes of different depth side by side.

    Args:
        stacks: one `(S_i, h, w, 3)` a volume.

    Returns:
        `image (B, S, h, w, 3)`, zeros after a volume has ended, and `mask (B, S)` bool, true before.

    Example:
        >>> padded([np.ones((1, 2, 2, 3), np.uint8), np.ones((2, 2, 2, 3), np.uint8)])["mask"].tolist()
        [[True, False], [True, True]]
    """
    depths = np.array([len(stack) for stack in stacks])
    mask = np.arange(depths.max()) < depths[:, None]  # (B, S)
    image = np.zeros((*mask.shape, *stacks[0].shape[1:]), stacks[0].dtype)
    image[mask] = np.concatenate(stacks)
    return {"image": image, "mask": mask}


def _reader(
    size: tuple[int, int], window, max_pixels: int, central: int | None, scaled: bool
) -> Callable[[Any], np.ndarray]:
    if central is None:
        return lambda path: read_sized(path, size, window, max_pixels, scaled)
    return lambda path: read_sized_volume(path, size, window, max_pixels, central)


def read_all(
    manifest: Manifest,
    size: tuple[int, int],
    window=None,
    max_pixels: int = MAX_PIXELS,
    progress: Callable[[Iterable, int], Iterable] = lambda items, _: items,
    central: int | None = None,
    into: np.ndarray | None = None,
    scaled: bool = False,
) -> Any:
    """Read every image at the model's size: `(N, h, w, 3)` uint8.

    Args:
        manifest: the images.
        size: the model's `(height, width)`.
        window: see `readers.read`.
        max_pixels: see `readers.read`.
        progress: wraps the loop over `(items, total)`.
        central: of volumes, how many central slices are read, 0 for all; None: plain images.
        into: of plain images: the array to fill, say one that lies in a file; None: a new one in memory.
        scaled: see `read_sized`.

    Returns:
        The array; of volumes a list of one `(S_i, h, w, 3)` each.

    Raises:
        ImageError: names every file that cannot be read, not the first one.
    """
    images: Any = [None] * len(manifest)
    if central is None:
        images = np.empty((len(manifest), *size, 3), np.uint8) if into is None else into
    read = _reader(size, window, max_pixels, central, scaled)

    def one(place_and_path):
        place, path = place_and_path
        try:
            images[place] = read(path)
        except ImageError as error:
            return str(error)

    with ThreadPoolExecutor() as pool:
        faults = list(progress(pool.map(one, enumerate(manifest.paths)), len(manifest)))
    faults = [fault for fault in faults if fault]
    if faults:
        shown = "\n  ".join(faults[:50])
        raise ImageError(f"{len(faults)} of {len(images)} images cannot be read:\n  {shown}")
    return images


def held(images: Any) -> Fetch:
    """A fetch of what `read_all` has read."""
    if isinstance(images, np.ndarray):
        return lambda rows, epoch: images[rows]
    return lambda rows, epoch: padded([images[row] for row in rows])


def streamed(
    manifest: Manifest,
    size: tuple[int, int],
    window=None,
    max_pixels: int = MAX_PIXELS,
    central: int | None = None,
    scaled: bool = False,
) -> Fetch:
    """A fetch that reads a batch's files when it is asked for them, for sets larger than memory.

    The arguments are those of `read_all`.
    """
    paths = manifest.paths
    pool = ThreadPoolExecutor()
    read, joined = _reader(size, window, max_pixels, central, scaled), np.stack if central is None else padded

    def fetch(rows: np.ndarray, epoch: int) -> Any:
        return joined(list(pool.map(lambda row: read(paths[row]), rows)))

    return fetch


def drawn_slices(fetch: Fetch, slices: Sequence[int], seed: int) -> Fetch:
    """A fetch of some slices of each volume, in their order, drawn from (seed, epoch, row).

    Args:
        fetch: of whole volumes.
        slices: the fewest and the most to draw; of a volume with fewer, all.
        seed: with epoch and row, it alone decides which.
    """
    fewest, most = slices

    def fetch_drawn(rows: np.ndarray, epoch: int) -> dict[str, np.ndarray]:
        whole = fetch(rows, epoch)
        stacks = []
        for row, image, mask in zip(rows, whole["image"], whole["mask"], strict=True):
            draws = np.random.default_rng([seed, epoch, 3, row])
            depth = int(mask.sum())
            count = min(int(draws.integers(fewest, most + 1)), depth)
            stacks.append(image[np.sort(draws.choice(depth, count, replace=False))])
        return padded(stacks)

    return fetch_drawn


def steps_an_epoch(count: int, batch_size: int) -> int:
    """How many batches an epoch has; batches differ by one example at most, so none is tiny."""
    return -(-count // batch_size)


def rows_of_step(
    step: int, count: int, batch_size: int, seed: int, balance: np.ndarray | None = None
) -> tuple[int, np.ndarray]:
    """The epoch that a step belongs to, and the rows of its batch.

    Args:
        step: from 0, over all epochs.
        count: how many examples there are, and are drawn an epoch.
        batch_size: examples a step.
        seed: with the epoch, it alone decides the order.
        balance: `(count,)` labels, whose classes are drawn equally often: an epoch repeats the examples of
            rare classes, each as often as the others of its class but for one, and leaves out some of the
            frequent ones, others each time. None: an epoch has each example once.

    Example:
        >>> rows_of_step(3, count=4, batch_size=2, seed=0)[0]
        1
        >>> bool((rows_of_step(0, 4, 4, 0, np.array([0, 0, 0, 1]))[1] == 3).sum() == 2)
        True
    """
    epoch = step // steps_an_epoch(count, batch_size)
    draws = np.random.default_rng([seed, epoch])
    order = draws.permutation(count if balance is None else _balanced(balance, draws))
    return epoch, order[_places(step, count, batch_size)]


def _places(step: int, count: int, batch_size: int) -> np.ndarray:
    """Where in its epoch's order a step's batch stands."""
    steps = steps_an_epoch(count, batch_size)
    return np.array_split(np.arange(count), steps)[step % steps]


def _balanced(labels: np.ndarray, draws: np.random.Generator) -> np.ndarray:
    """As many rows as there are labels, of each class equally many, or one more."""
    classes = draws.permutation(np.unique(labels))  # so that not the same one always has one more
    shares = np.array_split(np.arange(len(labels)), len(classes))
    rows = []
    for name, share in zip(classes, shares, strict=True):
        own = np.flatnonzero(labels == name)
        rounds = [draws.permutation(own) for _ in range(-(-len(share) // len(own)))]
        rows.append(np.concatenate(rounds)[: len(share)])
    return np.concatenate(rows)


def training_batches(
    fetch: Fetch,
    labels: np.ndarray,
    batch_size: int,
    seed: int,
    steps: range,
    augment: Augment | None = None,
    balance: bool = False,
    mix: Mix | None = None,
    shards: Shards = (0, 1, 1),
) -> tf.data.Dataset:
    """Batches `(inputs, labels)` for the given steps, in an order that the seed fixes.

    Args:
        fetch: rows and epoch to arrays, or to volumes as `padded` answers them.
        labels: `(N,)` int.
        batch_size: examples a step.
        seed: with epoch and row, it alone decides order and augmentation.
        steps: those to deliver, counted over all epochs; after a resume they start past 0.
        augment: maps images and a seed pair for each to images.
        balance: draw the classes equally often; see `rows_of_step`.
        mix: maps a batch, augmented, and its labels to those that are learnt; the seed is one a step.
        shards: deliver only these parts of each batch, one after another, for the replicas that share it:
            `np.array_split` of its examples.
    """
    count, (first_part, parts, parts_of_all) = len(labels), shards
    first = fetch(np.array([0]), 0)

    def batch(number):
        step, part = divmod(int(number), parts)
        epoch, rows = rows_of_step(step, count, batch_size, seed, labels if balance else None)
        own = _places(step, count, batch_size) if balance else rows  # rows may stand twice in an epoch
        rows, own = (np.array_split(each, parts_of_all)[first_part + part] for each in (rows, own))
        mixed = np.random.default_rng([seed, epoch, 1]).integers(0, 2**31 - 1, count, np.int32)[own]
        seeds = np.stack([mixed, rows.astype(np.int32)], axis=1)  # (B, 2)
        return *tf.nest.flatten(fetch(rows, epoch)), seeds, labels[rows].astype(np.int64)

    def load(number):
        kinds = [part.dtype for part in tf.nest.flatten(first)]
        *fetched, seeds, targets = tf.numpy_function(batch, [number], [*kinds, tf.int32, tf.int64])
        seeds.set_shape((None, 2))
        targets.set_shape((None,))
        inputs = _shaped(first, fetched)
        inputs = inputs if augment is None else _augmented(inputs, seeds, augment)
        return (inputs, targets) if mix is None else mix(inputs, targets, seeds[0])

    numbers = tf.data.Dataset.range(steps.start * parts, steps.stop * parts)
    return numbers.map(load, num_parallel_calls=2, deterministic=True).prefetch(2)


def batches(fetch: Fetch, count: int, batch_size: int) -> tf.data.Dataset:
    """Inputs alone, in the table's order, for prediction."""
    first = fetch(np.array([0]), 0)

    def batch(start):
        return tf.nest.flatten(fetch(np.arange(start, min(start + batch_size, count)), 0))

    def load(start):
        kinds = [part.dtype for part in tf.nest.flatten(first)]
        return _shaped(first, tf.numpy_function(batch, [start], kinds))

    return tf.data.Dataset.range(0, count, batch_size).map(load, num_parallel_calls=2).prefetch(2)


def _shaped(first: Any, parts: Sequence[tf.Tensor]) -> Any:
    """Tensors in the structure of a first batch, with what is known of their shapes."""
    unknown = 2 if isinstance(first, dict) else 1  # volumes differ in their slices, too
    for part, like in zip(parts, tf.nest.flatten(first), strict=True):
        part.set_shape((*(None,) * unknown, *like.shape[unknown:]))
    return tf.nest.pack_sequence_as(first, parts)


def _augmented(inputs: Any, seeds: tf.Tensor, augment: Augment) -> Any:
    """Augmented images; the slices of a volume all in the same way."""
    if not isinstance(inputs, dict):
        return augment(inputs, seeds)
    image = inputs["image"]
    shape = tf.shape(image)
    each = tf.repeat(seeds, shape[1], axis=0)  # (B S, 2)
    changed = augment(tf.reshape(image, tf.concat([[-1], shape[2:]], axis=0)), each)
    changed = tf.ensure_shape(tf.reshape(changed, shape), image.shape)
    return inputs | {"image": changed}

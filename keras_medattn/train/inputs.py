"""What the trained part of a model reads: images, or cached features of its frozen part."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_medattn.data import augment, pipeline, volumes
from keras_medattn.data.manifest import Manifest
from keras_medattn.files import written_aside
from keras_medattn.train.recipe import Data, Recipe

Progress = Callable[[Iterable, int, str], Iterable]
_VIEW_SEED = 7919  # augmented views are the same for every seed of a study, so that a cache serves all


def images(recipe: Recipe, manifest: Manifest, progress: Progress, cache: Path) -> pipeline.Fetch:
    """Hold the images at the model's size in memory, or in a file of `cache`, or read them batch by batch."""
    data = recipe.data
    slices = len(manifest)
    if data.slices:
        depths = [volumes.check_header(path, data.max_pixels).pages for path in manifest.paths]
        slices = sum(min(depth, data.central or depth) for depth in depths)
    gigabytes = slices * data.image_size[0] * data.image_size[1] * 3 / 1e9
    if gigabytes > data.memory_gb and (data.slices or gigabytes > data.disk_gb):
        return streamed(data, manifest)

    def read(into: np.ndarray | None = None):
        return pipeline.read_all(
            manifest,
            data.image_size,
            data.window or None,
            data.max_pixels,
            lambda items, total: progress(items, total, "reading images"),
            data.central if data.slices else None,
            into,
            data.scaled_decoding,
        )

    return pipeline.held(read() if gigabytes <= data.memory_gb else _decoded(data, manifest, cache, read))


def _decoded(data: Data, manifest: Manifest, cache: Path, read: Callable[[np.ndarray], Any]) -> np.ndarray:
    """All images in one file, mapped: the system's own cache keeps in memory what there is room for."""
    files = [
        (str(path.resolve()), (stat := path.stat()).st_size, stat.st_mtime_ns) for path in manifest.paths
    ]
    told = json.dumps([files, data.image_size, data.window, data.max_pixels, data.scaled_decoding])
    path = cache / f"images-{hashlib.sha256(told.encode()).hexdigest()[:16]}.npy"
    if not path.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        with written_aside(path) as aside:
            out = np.lib.format.open_memmap(aside, "w+", np.uint8, (len(manifest), *data.image_size, 3))
            read(out)
            out.flush()
    return np.load(path, mmap_mode="r", allow_pickle=False)


def streamed(data: Data, manifest: Manifest) -> pipeline.Fetch:
    """Read images, or volumes where the recipe has slices, batch by batch at the model's size."""
    central = data.central if data.slices else None
    read = data.image_size, data.window or None, data.max_pixels, central, data.scaled_decoding
    return pipeline.streamed(manifest, *read)


def cached_features(
    stem: keras.Model,
    fetch: pipeline.Fetch,
    count: int,
    recipe: Recipe,
    folder: Path,
    progress: Progress,
    batch_size: int = 8,
) -> list[np.ndarray]:
    """Run the frozen layers on every augmented view of every image, once; later calls read the files.

    Args:
        stem: the frozen layers, image to maps.
        fetch: rows to images.
        count: how many images there are.
        recipe: how many views, and of which augmentation; view 0 is the image itself.
        folder: where the features are kept, one file a view.
        progress: wraps the loop over batches.
        batch_size: images a step.

    Returns:
        One array `(N, h, w, C)` a view, mapped from its file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    change = augment.augmenter(recipe.augment)
    forward = tf.function(lambda batch: stem(batch, training=False), reduce_retracing=True)
    views = []
    digest = _digest(stem, fetch, count, recipe)
    for view in range(recipe.train.cached_views):
        path = folder / f"{digest}-{view}.npy"
        if not path.is_file():
            with written_aside(path) as aside:
                _write_view(aside, view, forward, change, fetch, count, batch_size, progress)
        views.append(np.load(path, mmap_mode="r", allow_pickle=False))
    return views


def one_view_an_epoch(views: list[np.ndarray], seed: int) -> pipeline.Fetch:
    """A fetch that gives each image one of its views, drawn from (seed, epoch, image)."""

    def fetch(rows: np.ndarray, epoch: int) -> np.ndarray:
        drawn = np.random.default_rng([seed, epoch, 2]).integers(len(views), size=len(views[0]))
        return np.stack([views[drawn[row]][row] for row in rows])

    return fetch


def _write_view(path, view, forward, change, fetch, count, batch_size, progress):
    out = None
    starts = range(0, count, batch_size)
    for start in progress(starts, len(starts), f"features, view {view}"):
        rows = np.arange(start, min(start + batch_size, count))
        batch = tf.convert_to_tensor(fetch(rows, 0))
        if view and change is not None:
            seeds = np.stack([np.full(len(rows), _VIEW_SEED * view), rows], axis=1)  # (B, 2)
            batch = change(batch, tf.convert_to_tensor(seeds, tf.int32))
        maps = forward(batch).numpy()
        if out is None:
            out = np.lib.format.open_memmap(path, "w+", np.float32, (count, *maps.shape[1:]))
        out[rows] = maps
    assert out is not None
    out.flush()


def _digest(stem: keras.Model, fetch: pipeline.Fetch, count: int, recipe: Recipe) -> str:
    """A name for the features: of the layers, their weights, the images and the augmentation."""
    sha = hashlib.sha256()
    for layer in stem.layers:
        config = {
            key: value for key, value in layer.get_config().items() if key != "name"
        }  # names are numbered
        sha.update(f"{type(layer).__name__}{config}".encode())
    for weight in stem.get_weights():
        sha.update(weight.tobytes())
    for start in range(0, count, 64):
        sha.update(fetch(np.arange(start, min(start + 64, count)), 0).tobytes())
    sha.update(json.dumps([recipe.augment, recipe.data.image_size, recipe.data.window]).encode())
    return sha.hexdigest()[:16]

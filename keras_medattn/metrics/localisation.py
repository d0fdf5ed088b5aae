"""Does a heatmap point at the truth? Pointing game, share of the heat inside, coverage of boxes, and chance.

A heat is `(H, W)`, not negative, in image coordinates; a truth is boxes `(K, 4)` of (x0, y0, x1, y1) in
pixels or a boolean mask `(H, W)`. Pixel (row i, column j) covers [j, j + 1) x [i, i + 1); every pixel a box
touches is inside it.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy import ndimage

from keras_medattn.metrics.intervals import Bootstrap, Groups, resample


def boxes_to_mask(boxes: ArrayLike, shape: tuple[int, int]) -> np.ndarray:
    """Boolean mask `shape` of the pixels that boxes `(K, 4)` touch; parts outside the image are cut off.

    >>> boxes_to_mask([[1, 0, 3, 1]], (2, 4)).astype(int)
    array([[0, 1, 1, 0],
           [0, 0, 0, 0]])
    """
    mask = np.zeros(shape, dtype=bool)
    for x0, y0, x1, y1 in _pixel_boxes(boxes, shape):
        mask[y0:y1, x0:x1] = True
    return mask


def object_boxes(truth: ArrayLike, shape: tuple[int, ...]) -> np.ndarray:
    """Whole-pixel boxes `(K, 4)` of a truth's objects: its boxes, or a mask's components (8 neighbours).

    >>> object_boxes(np.eye(2, 4, dtype=bool), (2, 4))
    array([[0, 0, 2, 2]])
    """
    mask = _truth_mask(truth, shape)
    if np.asarray(truth).dtype != bool:
        return _pixel_boxes(truth, shape)
    labels, _ = ndimage.label(mask, structure=np.ones((3, 3)))  # pyright: ignore[reportGeneralTypeIssues]
    slices = ndimage.find_objects(labels)
    return np.array([(x.start, y.start, x.stop, y.stop) for y, x in slices])


def pointing_game(heat: ArrayLike, truth: ArrayLike, tolerance: float = 8.0) -> bool:
    """Whether the hottest pixel lies in the truth or within `tolerance` pixels of it (Zhang et al. 2018).

    Of equally hot pixels the first in reading order counts. A heat that is 0 everywhere is a miss. Distances
    are between pixel centres.

    Raises:
        ValueError: on a heat that is negative or not finite, or a truth that is empty or of another size.

    Example:

    >>> heat = np.zeros((32, 32)); heat[10, 14] = 1
    >>> pointing_game(heat, [[18, 8, 24, 16]]), pointing_game(heat, [[18, 8, 24, 16]], tolerance=3)
    (True, False)
    """
    heat = _heat(heat)
    return _points(heat, _distance(_truth_mask(truth, heat.shape)), tolerance)


def energy_inside(heat: ArrayLike, truth: ArrayLike) -> float:
    """The share of the heat that lies inside the truth (the energy-based game of Wang et al. 2020).

    A random map's expected share is the truth's share of the image. Of a heat that is 0 everywhere it is nan.

    >>> energy_inside([[3., 1.], [0., 0.]], [[0, 0, 1, 1]])
    0.75
    """
    heat = _heat(heat)
    total = heat.sum()
    return float(heat[_truth_mask(truth, heat.shape)].sum() / total) if total > 0 else np.nan


def coverage(
    found: ArrayLike, truth: ArrayLike, threshold: float | None = None, at_least: float = 0.5
) -> dict[str, float]:
    """How many true boxes the found region covers, and how many the same region would cover anywhere else.

    A box is covered when `at_least` of its area is under the region; its centre is hit when the centre's
    pixel is. Chance is the region moved to a uniformly random place of the image (around its edges): area and
    shape stay, and the expectation is exact, counted over all H W places. A mask's objects are its connected
    components (8 neighbours), each by its bounding box.

    Args:
        found: boolean mask, of proposed boxes `boxes_to_mask(boxes, shape)`; or a heat, cut where it is above
            `threshold`.
        truth: boxes or mask.
        threshold: share of the heat's maximum; None is the heat's mean.
        at_least: share of a box's area that must be covered.

    Returns:
        `boxes` (their number), `covered`, `centre` (shares of boxes), `area` (the region's share of the
        image), and for chance `covered_random` and `centre_random`.

    Example:

    >>> found = boxes_to_mask([[0, 0, 4, 4]], (8, 8))
    >>> coverage(found, [[2, 0, 6, 4], [5, 5, 8, 8]])["covered"]
    0.5
    """
    region = np.asarray(found)
    if region.dtype != bool:
        heat = _heat(region)
        region = heat > (heat.mean() if threshold is None else threshold * heat.max())
    boxes = object_boxes(truth, region.shape)
    shares = np.array([region[y0:y1, x0:x1].mean() for x0, y0, x1, y1 in boxes])
    centres = np.array([region[(y0 + y1) // 2, (x0 + x1) // 2] for x0, y0, x1, y1 in boxes])
    sizes, times = np.unique(boxes[:, [3, 2]] - boxes[:, [1, 0]], axis=0, return_counts=True)  # (h, w)
    # The running mean over a window of the box's size, at every place, is the box's covered share there.
    chance = [
        np.mean(ndimage.uniform_filter(region.astype(np.float64), size, mode="wrap") >= at_least - 1e-6)
        for size in sizes
    ]
    return {
        "boxes": float(len(boxes)),
        "covered": float(np.mean(shares >= at_least)),
        "centre": float(np.mean(centres)),
        "area": float(region.mean()),
        "covered_random": float(np.average(chance, weights=times)),
        "centre_random": float(region.mean()),
    }


def coverage_curve(
    heat: ArrayLike, truth: ArrayLike, thresholds: Sequence[float] = tuple(np.arange(1, 10) / 10)
) -> dict[str, list[float]]:
    """`coverage` of a heat cut at each threshold, a share of its maximum; `threshold` is one more key."""
    rows = [coverage(heat, truth, threshold) for threshold in thresholds]
    return {"threshold": list(thresholds)} | {key: [row[key] for row in rows] for key in rows[0]}


def pooled_coverage_curve(
    heats: Iterable[ArrayLike],
    truths: Iterable[ArrayLike],
    thresholds: Sequence[float] = tuple(np.arange(1, 10) / 10),
) -> dict[str, list[float]]:
    """`coverage_curve` over a set of images: shares of all of their boxes, and the mean `area` of an image.

    >>> heat = np.array([[1.0, 0.5], [0.2, 0.0]])
    >>> truths = [[[0, 0, 1, 1]], [[1, 0, 2, 1], [0, 1, 1, 2]]]
    >>> curve = pooled_coverage_curve([heat, heat], truths, (0.3, 0.7))
    >>> np.round(curve["covered"], 3).tolist(), curve["boxes"]
    ([0.667, 0.333], [3.0, 3.0])
    """
    curves = [coverage_curve(heat, truth, thresholds) for heat, truth in zip(heats, truths, strict=True)]
    if not curves:
        raise ValueError("A curve needs one heat or more. Received: 0")
    values = {key: np.array([curve[key] for curve in curves]) for key in curves[0]}  # (images, thresholds)
    boxes = values["boxes"]
    pooled = {key: (value * boxes).sum(axis=0) / boxes.sum(axis=0) for key, value in values.items()}
    pooled |= {"boxes": boxes.sum(axis=0), "area": values["area"].mean(axis=0)}
    return {key: value.tolist() for key, value in pooled.items()} | {"threshold": list(thresholds)}


def random_map(shape: tuple[int, int], seed: int) -> np.ndarray:
    """A heat of independent uniform values: the map that knows nothing.

    Expected, exactly: pointing = the truth's area grown by the tolerance over the image's area; share of the
    heat inside = the truth's area over the image's. `localise` reports these expectations, not draws.
    """
    return np.random.default_rng(seed).random(shape)


def localise(
    heats: Iterable[ArrayLike],
    truths: Iterable[ArrayLike],
    groups: Groups | None = None,
    tolerance: float = 8.0,
    n_resamples: int = 2000,
    seed: int = 0,
) -> Bootstrap:
    """The figures of localisation over a set of images, with chance beside them and bootstrap intervals.

    `pointing`, `energy`, `blank` (heats that are 0 everywhere: misses in `pointing`, left out of `energy`)
    and `area` are means over images; `covered` and `centre` are shares of all boxes, the heat cut at its
    mean. `NAME_random` is what chance would give on the same images: exact expectations, see `random_map` and
    `coverage`.

    Args:
        heats: a heat for each image, which may differ in size; taken one at a time.
        truths: boxes or a mask for each image, never empty.
        groups: the patient of each image, as in `bootstrap`.
        tolerance: pixels around the truth that still count in the pointing game.
        n_resamples: number of bootstrap resamples.
        seed: of the resamples.

    Example:

    >>> heat = np.zeros((20, 20)); heat[3, 3] = 1
    >>> figures = localise([heat, heat.T], [[[2, 2, 6, 6]], [[0, 0, 5, 5]]], tolerance=0).figures
    >>> figures["pointing"].value, round(figures["pointing_random"].value, 5)
    (1.0, 0.05125)
    """
    rows: list[dict[str, float]] = []
    for number, (heat, truth) in enumerate(zip(heats, truths, strict=True)):
        try:
            rows.append(_image_figures(_heat(heat), truth, tolerance))
        except ValueError as error:
            raise ValueError(f"Image {number}: {error}") from error
    columns = {name: np.array([row[name] for row in rows]) for name in (rows[0] if rows else ())}
    boxes = columns.pop("boxes", np.array([]))

    def means(weights: np.ndarray) -> dict[str, np.ndarray]:
        result = {}
        for name, values in columns.items():
            amount = boxes if name.startswith(("covered", "centre")) else (~np.isnan(values)).astype(float)
            with np.errstate(invalid="ignore"):
                result[name] = (weights @ (np.nan_to_num(values) * amount)) / (weights @ amount)
        return result

    return resample(means, len(rows), groups, n_resamples, seed=seed)


def _image_figures(heat: np.ndarray, truth: ArrayLike, tolerance: float) -> dict[str, float]:
    mask = _truth_mask(truth, heat.shape)
    distance = _distance(mask)
    return {
        "pointing": float(_points(heat, distance, tolerance)),
        "pointing_random": float((distance <= tolerance).mean()),
        "energy": energy_inside(heat, mask),
        "energy_random": float(mask.mean()),
        "blank": float(heat.max() == 0),
    } | coverage(heat, truth)


def _points(heat: np.ndarray, distance: np.ndarray, tolerance: float) -> bool:
    return bool(heat.max() > 0 and distance.flat[heat.argmax()] <= tolerance)


def _distance(mask: np.ndarray) -> np.ndarray:
    return np.asarray(ndimage.distance_transform_edt(~mask))


def _heat(heat: ArrayLike) -> np.ndarray:
    array = np.asarray(heat, dtype=np.float64)
    if array.ndim != 2 or not array.size:
        raise ValueError(f"A heat must have shape (H, W). Received: shape {array.shape}")
    low, high = array.min(), array.max()
    if not (np.isfinite(array).all() and low >= 0):
        raise ValueError(
            f"A heat must be finite and not negative: set negative values to 0. Received: {low} to {high}"
        )
    return array


def _truth_mask(truth: ArrayLike, shape: tuple[int, ...]) -> np.ndarray:
    truth = np.asarray(truth)
    mask = truth if truth.dtype == bool else boxes_to_mask(truth, (shape[0], shape[1]))
    if mask.shape != shape:
        raise ValueError(f"A mask must have the heat's shape {shape}. Received: shape {mask.shape}")
    if not mask.any():
        raise ValueError(
            "Localisation needs a truth: leave out images without one. "
            f"Received: nothing inside the image, shape {truth.shape}"
        )
    return mask


def _pixel_boxes(boxes: ArrayLike, shape: tuple[int, ...]) -> np.ndarray:
    boxes = np.asarray(boxes, dtype=np.float64)
    boxes = boxes.reshape(0, 4) if boxes.size == 0 else boxes
    if boxes.ndim != 2 or boxes.shape[1] != 4 or not np.isfinite(boxes).all():
        raise ValueError(
            "A truth is finite boxes (K, 4) of (x0, y0, x1, y1) in pixels, or a boolean mask (H, W). "
            f"Received: shape {boxes.shape}"
        )
    if (boxes[:, 2:] < boxes[:, :2]).any():
        raise ValueError(
            f"Boxes are corners (x0, y0, x1, y1) with x0 <= x1 and y0 <= y1. Received: {boxes.tolist()}"
        )
    low, high = np.floor(boxes[:, :2]), np.ceil(boxes[:, 2:])
    limit = np.array([shape[1], shape[0]])
    pixels = np.concatenate([low.clip(0, limit), high.clip(0, limit)], axis=1).astype(int)
    return pixels[(pixels[:, 2:] > pixels[:, :2]).all(axis=1)]

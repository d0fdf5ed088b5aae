"""Semi-synthetic fundus views: a real photograph, with drawn lesions whose places are known.

The photograph is the CC0 fundus image that scikit-image ships. No figure measured on these views says
anything about patients; they show whether a method can find a small thing from image labels.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

CLASSES = ("no lesions", "lesions")
BLUR = (0.3, 1.5)  # standard deviation in pixels, smallest and largest
NOISE = (1.0, 5.0)  # standard deviation in grey levels, smallest and largest


@dataclass(frozen=True)
class Lesions:
    """How the drawn lesions look, at the size of the view.

    Attributes:
        count: fewest and most in a view.
        radius: smallest and largest, in pixels.
        contrast: smallest and largest share of the green light that they take away.
    """

    count: tuple[int, int] = (4, 8)
    radius: tuple[float, float] = (3.0, 4.5)
    contrast: tuple[float, float] = (0.2, 0.4)


def make(
    folder: Path,
    train: int = 180,
    val: int = 40,
    test: int = 80,
    size: int = 512,
    lesions: Lesions = Lesions(),
    seed: int = 0,
    progress: Callable[[Iterable, int], Iterable] = lambda items, _: items,
) -> Path:
    """Write views, their lesion masks and a manifest.

    Training and validation views come from the left half of the photograph, test views from the right, so
    no pixel is on two sides. Every second view has lesions; vessel crossings and the fovea stay in as
    look-alikes. Each view has its own crop, flip, rotation, zoom, colour and illumination, from the seed.

    Args:
        folder: written: `manifest.csv` (path, label, split), `images/*.jpg`, and `masks/*.png` of the views
            with lesions, for measuring localisation only.
        train: views to train on.
        val: views to validate on.
        test: views to test on.
        size: side of a view in pixels.
        lesions: how they look.
        seed: fixes every pixel.
        progress: wraps the loop.

    Returns:
        The path of the manifest.
    """
    from PIL import Image
    from skimage import data

    photograph = data.retina()
    (folder / "images").mkdir(parents=True, exist_ok=True)
    (folder / "masks").mkdir(exist_ok=True)
    sides = ["train"] * train + ["val"] * val + ["test"] * test
    with open(folder / "manifest.csv", "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "label", "split"])
        for number, side in progress(enumerate(sides), len(sides)):
            rng = np.random.default_rng([seed, number])
            image, mask = view(photograph, side == "test", bool(number % 2), size, lesions, rng)
            name = f"{side}_{number:04d}"
            Image.fromarray(image).save(folder / "images" / f"{name}.jpg", quality=92)
            if mask.any():
                Image.fromarray(mask).save(folder / "masks" / f"{name}.png")
            rows.writerow([f"images/{name}.jpg", CLASSES[number % 2], side])
    return folder / "manifest.csv"


def view(
    photograph: np.ndarray,
    right: bool,
    ill: bool,
    size: int,
    lesions: Lesions,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Draw one view `(size, size, 3)` uint8 and the mask `(size, size)` of its lesions.

    Args:
        photograph: `(H, W, 3)` uint8.
        right: take it from the right half, else from the left.
        ill: draw lesions.
        size: side in pixels.
        lesions: how they look.
        rng: the source of all that is random.
    """
    half = photograph.shape[1] // 2
    region = photograph[:, half:] if right else photograph[:, :half]
    pixels = _crop(region, size, rng)
    while (pixels.max(axis=-1) > 40).mean() < 0.7:  # too much of the black around the eye
        pixels = _crop(region, size, rng)
    own = np.random.default_rng(rng.integers(2**32))  # so that light and noise are the same with and without
    count = int(own.integers(lesions.count[0], lesions.count[1] + 1)) if ill else 0
    cover = _cover(pixels, count, lesions.radius, own)
    taken = own.uniform(*lesions.contrast) * np.array([0.4, 1.0, 0.9])  # of red, green, blue: dark red stays
    return _light(pixels * (1 - cover[..., None] * taken), rng), cover > 0.5


def _crop(region: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Rotate, zoom, flip and crop in one resampling that never leaves the region."""
    from scipy.ndimage import affine_transform

    angle, zoom = rng.uniform(0, 2 * np.pi), rng.uniform(0.78, 0.94)  # region pixels a view pixel
    turn = zoom * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    if rng.random() < 0.5:
        turn[:, 0] *= -1
    reach = np.abs(turn).sum(axis=1) * size / 2 + 1
    limits = np.array(region.shape[:2])
    centre = rng.uniform(reach, limits - reach)
    offset = centre - turn @ np.full(2, (size - 1) / 2)
    channels = [
        affine_transform(region[..., c].astype(np.float32), turn, offset, (size, size), order=1)
        for c in range(3)
    ]
    return np.stack(channels, axis=-1)


def _cover(pixels: np.ndarray, count: int, radius: tuple[float, float], rng) -> np.ndarray:
    """How much of each pixel lesions cover, 0 to 1: blurred, slightly oval spots inside the eye."""
    from scipy.special import expit

    size = pixels.shape[0]
    cover = np.zeros((size, size), np.float32)
    inside = np.argwhere(pixels.max(axis=-1)[16:-16, 16:-16] > 60) + 16
    for row, column in inside[rng.integers(len(inside), size=count)]:
        extent, oval = rng.uniform(*radius), rng.uniform(0.8, 1.25)
        reach = int(3 * extent)
        window = tuple(slice(max(0, at - reach), min(size, at + reach)) for at in (row, column))
        y, x = np.mgrid[window]
        distance = np.hypot((y - row) * oval, (x - column) / oval)
        spot = expit((extent - distance) / (0.18 * extent))  # a soft edge
        cover[window] = np.maximum(cover[window], spot)
    return cover


def _light(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Change colour, illumination and sharpness, and add the camera's noise."""
    from scipy.ndimage import gaussian_filter

    size = pixels.shape[0]
    pixels = gaussian_filter(pixels, (*[rng.uniform(*BLUR)] * 2, 0))
    y, x = np.mgrid[:size, :size] / size - 0.5
    slope = rng.uniform(-0.25, 0.25, 2)
    light = 1 + slope[0] * y + slope[1] * x
    gain = rng.uniform(0.9, 1.1) * rng.uniform(0.93, 1.07, 3)
    noisy = pixels * light[..., None] * gain + rng.normal(0, rng.uniform(*NOISE), pixels.shape)
    return np.rint(np.clip(noisy, 0, 255)).astype(np.uint8)

"""Heatmaps over images: the overlay, boxes, and a contact sheet of several images, as PNG files."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image, ImageDraw
from scipy import ndimage

from keras_medattn.files import written_aside
from keras_medattn.metrics.plots import save_figure

TRUTH = (0, 230, 118)  # on the image, where no stain or retina is green
FOUND = (255, 0, 255)  # on the overlay: jet has no magenta
SIDE = 1600  # pixels of the longest side of what is drawn
_PAGE = 960  # and on a page of several; Matplotlib would hold megapixels as floats


@dataclass(frozen=True)
class PanelRow:
    """One image of a `panel`: uint8 `image (H, W, 3)`, `heat (h, w)`, what is true, what was found, a title.

    `truth` is boxes `(K, 4)` in pixels or a boolean mask `(H, W)`; `found` is boxes.
    """

    image: np.ndarray
    heat: np.ndarray
    truth: ArrayLike | None = None
    found: ArrayLike | None = None
    title: str = ""


def overlay(image: np.ndarray, heat: ArrayLike, colormap: str = "jet") -> np.ndarray:
    """`0.6 image + 0.3 heat`, clipped: the picture of appendix C of Li et al. (2019).

    Negative heat to 0; scaled so that its maximum is 255, rounded; bilinear to the image's size; colour map.
    With jet a place without heat is tinted dark blue, as in the paper, and a heat of 0 everywhere is all dark
    blue.

    Args:
        image: uint8 `(H, W, 3)`.
        heat: `(h, w)`, of any scale.
        colormap: a Matplotlib colour map's name, such as "inferno", whose 0 is black.

    Output shape: uint8 `(H, W, 3)`.

    Raises:
        ValueError: on an image that is not uint8 RGB, or a heat that is not finite or not of rank 2.

    Example:

    >>> overlay(np.full((4, 4, 3), 100, np.uint8), [[0., 2.], [0., 0.]], "gray")[0]
    array([[ 60,  60,  60],
           [ 79,  79,  79],
           [117, 117, 117],
           [136, 136, 136]], dtype=uint8)
    """
    from matplotlib import colormaps

    _check_image(image)
    height, width = image.shape[:2]
    levels = to_image_size(heat_levels(heat).astype(np.float32), height, width)
    table = colormaps[colormap](np.arange(256))[:, :3].astype(np.float32) * 255  # (256, 3)
    mixed = 0.6 * image.astype(np.float32) + 0.3 * table[np.rint(levels).astype(np.uint8)]
    return np.rint(mixed).clip(0, 255).astype(np.uint8)


def heat_levels(heat: ArrayLike) -> np.ndarray:
    """A heat `(h, w)` as grey levels uint8: negative to 0, the maximum to 255, rounded; 0 everywhere stays 0.

    >>> heat_levels([[-1., 0.], [1., 2.]])
    array([[  0,   0],
           [128, 255]], dtype=uint8)
    """
    heat = np.asarray(heat, dtype=np.float64)
    if heat.ndim != 2 or not heat.size or not np.isfinite(heat).all():
        raise ValueError(f"A heat must be finite and of shape (h, w). Received: shape {heat.shape}, {heat}")
    heat = np.maximum(heat, 0)
    return np.rint(heat / (heat.max() or 1) * 255).astype(np.uint8)


def drawn_size(shape: Sequence[int], side: int = SIDE) -> tuple[int, int]:
    """Rows and columns at which an image `(H, W, ...)` is drawn: its longest side is at most `side`.

    >>> drawn_size((2848, 4288)), drawn_size((480, 640, 3))
    ((1063, 1600), (480, 640))
    """
    height, width = shape[:2]
    ratio = min(1.0, side / max(height, width))
    return max(1, round(height * ratio)), max(1, round(width * ratio))


def shrink(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A uint8 image `(H, W, 3)` at rows and columns `size`, antialiased; the image itself where it is so."""
    if image.shape[:2] == tuple(size):
        return image
    return np.asarray(Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.BILINEAR))


def to_image_size(heat: ArrayLike, height: int, width: int) -> np.ndarray:
    """Bilinear resize `(h, w)` to `(height, width)`: half-pixel centres, no antialias, as `tf.image.resize`.

    >>> to_image_size([[0., 4.]], 1, 4)
    array([[0., 1., 3., 4.]])
    """
    heat = np.asarray(heat)
    heat = heat if heat.dtype.kind == "f" else heat.astype(np.float64)
    if heat.ndim != 2 or not heat.size or height < 1 or width < 1:
        raise ValueError(
            "A heat (h, w) is resized to a height and width of at least 1. "
            f"Received: shape {heat.shape}, height={height}, width={width}"
        )
    above, below, part = _neighbours(heat.shape[0], height)
    part = part[:, None].astype(heat.dtype)
    rows = heat[above] * (1 - part) + heat[below] * part  # (height, w)
    left, right, part = _neighbours(heat.shape[1], width)
    part = part.astype(heat.dtype)
    return rows[:, left] * (1 - part) + rows[:, right] * part  # (height, width)


def draw_boxes(image: np.ndarray, boxes: ArrayLike, colour: tuple[int, int, int] = TRUTH) -> np.ndarray:
    """A copy of the image with the outlines of boxes `(K, 4)`, drawn around the boxed pixels, not over them.

    The line grows with the image, so that it is seen on a page: 1 pixel for every 200 of the image's shorter
    side.

    Args:
        image: uint8 `(H, W, 3)`.
        boxes: (x0, y0, x1, y1) in pixels, x1 and y1 excluded.
        colour: red, green, blue.
    """
    _check_image(image)
    picture = Image.fromarray(image)
    draw, line = ImageDraw.Draw(picture), _line(image)
    for x0, y0, x1, y1 in np.asarray(boxes, dtype=np.float64).reshape(-1, 4):
        corners = (np.floor(x0) - line, np.floor(y0) - line, np.ceil(x1) + line - 1, np.ceil(y1) + line - 1)
        draw.rectangle(corners, outline=colour, width=line)
    return np.asarray(picture)


def draw_outline(image: np.ndarray, mask: np.ndarray, colour: tuple[int, int, int] = TRUTH) -> np.ndarray:
    """A copy of the image with a line around each region of a boolean mask `(H, W)`, outside of it."""
    _check_image(image)
    if mask.dtype != bool or mask.shape != image.shape[:2]:
        raise ValueError(
            f"A mask must be boolean, {image.shape[:2]} as the image. Received: {mask.dtype} {mask.shape}"
        )
    grown = ndimage.binary_dilation(mask, np.ones((3, 3)), iterations=_line(image))
    picture = image.copy()
    picture[grown & ~mask] = colour
    return picture


def panel(rows: Sequence[PanelRow], path: str | os.PathLike[str], colormap: str = "jet") -> None:
    """A contact sheet: a line an image, with the truth outlined, beside its overlay with what was found.

    Args:
        rows: the images.
        path: the PNG file to write.
        colormap: of the overlays.
    """
    from matplotlib.figure import Figure

    if not rows:
        raise ValueError("A panel needs at least one row. Received: none")
    heights = [row.image.shape[0] / row.image.shape[1] for row in rows]
    figure = Figure(figsize=(8, 4 * sum(heights) + 0.45 * len(rows) + 0.1), layout="constrained")
    cells = np.atleast_2d(figure.subplots(len(rows), 2, gridspec_kw={"height_ratios": heights}))  # (rows, 2)
    for row, (left, right) in zip(rows, cells, strict=True):
        original, heated = row.image, overlay(row.image, row.heat, colormap)
        if row.truth is not None:
            truth = np.asarray(row.truth)
            original = (draw_outline if truth.dtype == bool else draw_boxes)(original, truth, TRUTH)
        if row.found is not None:
            heated = draw_boxes(heated, row.found, FOUND)
        left.set_title(row.title, fontsize=11, loc="left")
        for axes, picture in ((left, original), (right, heated)):
            axes.imshow(shrink(picture, drawn_size(picture.shape, _PAGE)))
            axes.set_axis_off()
    save_figure(figure, path)


def save_png(image: np.ndarray, path: str | os.PathLike[str]) -> None:
    """Write a uint8 image `(H, W)` or `(H, W, 3)` as PNG, aside and then renamed."""
    with written_aside(Path(path)) as aside:
        Image.fromarray(image).save(aside, format="PNG")


def _neighbours(size: int, wanted: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each wanted place the two indices between which it lies, and how far it is towards the second."""
    places = ((np.arange(wanted) + 0.5) * (size / wanted) - 0.5).clip(0, size - 1)
    low = np.floor(places).astype(np.intp)
    return low, np.minimum(low + 1, size - 1), places - low


def _line(image: np.ndarray) -> int:
    return max(1, round(min(image.shape[:2]) / 200))


def _check_image(image: np.ndarray) -> None:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"An image must be uint8 (H, W, 3). Received: {image.dtype} {image.shape}")

"""Pages of several pictures: images and maps in rows, as PNG files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from keras_medattn.explain import overlays
from keras_medattn.metrics.plots import save_figure

_WIDTH = 10.0  # inches
_GAP = 0.2  # below a row
_MOST = 480  # pixels of an image on a page


@dataclass(frozen=True)
class Cell:
    """An image uint8 `(H, W, 3)`; or a map `(h, w)`, drawn as `aspect` = height / width, with its numbers."""

    values: np.ndarray
    title: str = ""
    aspect: float | None = None
    colormap: str = "viridis"

    @property
    def shape(self) -> float:
        """Height over width of the picture."""
        return self.aspect or self.values.shape[0] / self.values.shape[1]


@dataclass(frozen=True)
class Row:
    """Cells side by side under a heading; `columns` of them would fill the page."""

    cells: Sequence[Cell]
    heading: str = ""
    columns: int = 3


def page(rows: Sequence[Row], path: str | os.PathLike[str]) -> None:
    """Draw rows of cells, each map with a bar of its numbers beside it.

    Args:
        rows: none of them empty.
        path: the PNG file to write.
    """
    from matplotlib.figure import Figure

    total = sum(_height(row) for row in rows)
    figure = Figure(figsize=(_WIDTH, total))
    top = total
    for row in rows:
        if row.heading:
            figure.text(0, top / total, row.heading, fontsize=11, va="top")
        bottom = top - _height(row) + _GAP
        for place, cell in enumerate(row.cells):
            width, height = _picture_size(row, cell)
            left, low = place * _WIDTH / row.columns, bottom + _picture_size(row)[1] - height
            axes = figure.add_axes((left / _WIDTH, low / total, width / _WIDTH, height / total))
            _draw(cell, axes, 9 if row.columns < 5 else 8)
        top = bottom - _GAP
    save_figure(figure, path)


def _picture_size(row: Row, cell: Cell | None = None) -> tuple[float, float]:
    """Width and height in inches of a cell's picture, or of the room of the highest one."""
    bars = any(one.values.ndim == 2 for one in row.cells)
    width = _WIDTH / row.columns * (0.8 if bars else 0.97)
    return width, width * (max(one.shape for one in row.cells) if cell is None else cell.shape)


def _height(row: Row) -> float:
    titles = any(cell.title for cell in row.cells)
    return _picture_size(row)[1] + _GAP + 0.22 * bool(row.heading) + 0.2 * titles


def _draw(cell: Cell, axes: Any, size: int) -> None:
    axes.set_axis_off()
    axes.set_title(cell.title, fontsize=size, loc="left", pad=3)
    if cell.values.ndim == 3:
        axes.imshow(overlays.shrink(cell.values, overlays.drawn_size(cell.values.shape, _MOST)))
        return
    box = (0, 1, 0, cell.shape)
    shown = axes.imshow(cell.values, cmap=cell.colormap, interpolation="nearest", extent=box)
    bar = axes.figure.colorbar(shown, cax=axes.inset_axes([1.02, 0, 0.03, 1]))
    low, high = float(cell.values.min()), float(cell.values.max())
    bar.set_ticks(np.linspace(low, high, 3) if high > low else [low])
    bar.ax.set_yticklabels([f"{tick:.2g}" for tick in bar.get_ticks()], fontsize=size - 2)

"""Pictures of several runs side by side: a figure of each, learning curves, a figure over a setting."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from keras_medattn.metrics.intervals import Interval
from keras_medattn.metrics.plots import COLOURS, _figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Curves = Sequence[Mapping[str, np.ndarray]]  # one a model: values after each epoch, by name
SIDES: tuple[tuple[str, str, Any], ...] = (
    ("", "training", "-"),
    ("val_", "validation", "--"),
    ("test_", "test (never chosen by)", ":"),
)


def comparison_picture(
    names: Sequence[str],
    figures: Sequence[Interval],
    models: Sequence[np.ndarray],
    label: str,
    path: str | os.PathLike[str],
) -> None:
    """A figure of each run with its interval, and as small points those of its single models.

    Args:
        names: of the runs, drawn from the top down.
        figures: value and interval of each.
        models: the values of the models of each; of a single model none is drawn.
        label: of the axis.
        path: the PNG file to write.
    """
    figure, colours = _figure(7.5, 1.3 + 0.45 * len(names)), _colours(len(names))
    axes = figure.add_subplot()
    for place, (one, points) in enumerate(zip(figures, models, strict=True)):
        colour = colours[place]
        axes.plot([one.low, one.high], [place, place], color=colour, linewidth=2.5, solid_capstyle="butt")
        axes.plot(one.value, place, "o", color=colour, markersize=8)
        if len(points) > 1:
            axes.plot(points, np.full(len(points), place + 0.22), "|", color="0.4", markersize=7)
    axes.set_yticks(range(len(names)), names, fontsize=11)
    axes.set_ylim(len(names) - 0.5, -0.5)
    several = any(len(points) > 1 for points in models)
    note = "; ticks below: single models" if several else ""
    axes.set_xlabel(f"{label}, 95% bootstrap interval{note}", fontsize=11)
    axes.grid(axis="x", color="0.9")
    save_figure(figure, path)


def curves_picture(runs: Mapping[str, Curves], path: str | os.PathLike[str]) -> None:
    """Learning curves of several runs: a panel a figure, the mean over a run's models and a band of +- sd.

    A model that stopped earlier counts as long as it trained.

    Args:
        runs: histories of the models of each run: `loss`, `val_loss`, `val_auroc`, `test_auroc`, ...
        path: the PNG file to write.
    """
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    keys = list(dict.fromkeys(key for models in runs.values() for model in models for key in model))
    panels = list(dict.fromkeys(_parted(key)[1] for key in keys))
    columns, colours = min(3, len(panels)), _colours(len(runs))
    figure = _figure(4.6 * columns, 3.5 * -(-len(panels) // columns) + 0.5)
    for number, panel in enumerate(panels):
        axes = figure.add_subplot(-(-len(panels) // columns), columns, number + 1)
        for colour, models in zip(colours, runs.values(), strict=False):
            for prefix, _, style in SIDES:
                _curve(axes, [one[prefix + panel] for one in models if prefix + panel in one], colour, style)
        axes.set_title(panel.replace("_", " "), fontsize=12)
        axes.set_xlabel("Epoch", fontsize=11)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(color="0.92")
    lines = [Line2D([], [], color=colours[place], linewidth=2) for place in range(len(runs))]
    prefixes = {_parted(key)[0] for key in keys}
    used = [side for side in SIDES if side[0] in prefixes]
    lines += [Line2D([], [], color="0.4", linestyle=style, linewidth=1.6) for _, _, style in used]
    texts = [*runs, *(text for _, text, _ in used)]
    figure.legend(
        lines, texts, loc="outside lower center", ncols=min(4, len(texts)), frameon=False, fontsize=10
    )
    save_figure(figure, path)


def setting_picture(
    name: str,
    lines: Mapping[str, Sequence[tuple[Any, Interval]]],
    label: str,
    path: str | os.PathLike[str],
) -> None:
    """A figure over a setting: numbers along an axis (logarithmic where they are far apart), words in a row.

    Args:
        name: of the setting.
        lines: for each line (a second setting's value, or "" for one line) the points `(setting, figure)`.
        label: of the figure.
        path: the PNG file to write.
    """
    values = list(dict.fromkeys(value for points in lines.values() for value, _ in points))
    numeric = all(type(value) in (int, float) for value in values)
    places = {value: float(value) if numeric else float(row) for row, value in enumerate(values)}
    figure, colours = _figure(6.4, 4.2), _colours(len(lines))
    axes = figure.add_subplot()
    for number, (text, points) in enumerate(lines.items()):
        points = sorted(points, key=lambda point: places[point[0]])
        x = np.array([places[value] for value, _ in points])
        middle, low, high = (np.array([one[i] for _, one in points]) for i in range(3))
        if not numeric:
            x += 0.08 * (number - (len(lines) - 1) / 2)
        style: dict[str, Any] = {"color": colours[number], "linestyle": "-" if numeric else "none"}
        errors = np.stack([middle - low, high - middle])
        axes.errorbar(x, middle, errors, marker="o", capsize=3, label=text, **style)
    ticks = sorted(places.values())
    if numeric and ticks[0] > 0 and ticks[-1] >= 8 * ticks[0]:
        axes.set_xscale("log")
    if numeric:
        axes.set_xticks(ticks, [f"{value:g}" for value in ticks])
        axes.minorticks_off()
    else:
        axes.set_xticks(ticks, [str(value) for value in values])
        axes.set_xlim(-0.5, len(values) - 0.5)
    axes.set_xlabel(name, fontsize=11)
    axes.set_ylabel(f"{label}, 95% interval", fontsize=11)
    axes.grid(color="0.92")
    if len(lines) > 1:
        axes.legend(frameon=False, fontsize=10)
    save_figure(figure, path)


def _curve(axes: Axes, models: Sequence[np.ndarray], colour: Any, style: str) -> None:
    if not models:
        return
    values = np.full((len(models), max(map(len, models))), np.nan)
    for row, model in zip(values, models, strict=True):
        row[: len(model)] = model
    epochs = np.arange(1, values.shape[1] + 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # an epoch that no model has
        mean = np.nanmean(values, axis=0)
        sd = np.nanstd(values, axis=0, ddof=1) if len(models) > 1 else np.zeros_like(mean)
    axes.plot(epochs, mean, color=colour, linestyle=style, linewidth=1.6)
    if len(models) > 1:
        axes.fill_between(epochs, mean - sd, mean + sd, color=colour, alpha=0.15, linewidth=0)


def _colours(count: int) -> list[Any]:
    from matplotlib import colormaps

    return (
        list(COLOURS) if count <= len(COLOURS) else list(colormaps["turbo"](np.linspace(0.05, 0.95, count)))
    )


def _parted(key: str) -> tuple[str, str]:
    """`val_loss` -> `("val_", "loss")`."""
    prefix = next((prefix for prefix in ("val_", "test_") if key.startswith(prefix)), "")
    return prefix, key.removeprefix(prefix)

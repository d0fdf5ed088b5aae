"""Pictures of a classifier's figures as PNG files: ROC, precision-recall, confusion, training history.

Matplotlib is imported when a picture is drawn, through `Figure` alone: pyplot and its settings stay
untouched.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import ArrayLike
from sklearn.metrics import confusion_matrix, precision_recall_curve, roc_curve

from keras_medattn.files import written_aside
from keras_medattn.metrics.intervals import Bootstrap
from keras_medattn.metrics.scores import Threshold, check_predictions, predicted_classes, scores

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by colour-blind readers; then the same ones dashed.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", ":")


def roc_picture(
    labels: ArrayLike,
    probabilities: ArrayLike,
    class_names: Sequence[str],
    path: str | os.PathLike[str],
    intervals: Bootstrap | None = None,
) -> None:
    """ROC curves with the AUROC in the legend: of the second of two classes, of each one of more.

    Args:
        labels: class of each image, `(N,)`.
        probabilities: predicted probabilities, `(N, C)`.
        class_names: C names.
        path: the PNG file to write.
        intervals: of `bootstrap`, for the legend.

    Raises:
        ValueError: as `scores`, and on a wrong number of class names.
    """

    def curve(axes: Axes, positive: np.ndarray, score: np.ndarray, style: dict) -> None:
        false, true, _ = roc_curve(positive, score, drop_intermediate=False)
        axes.plot(false, true, **style)

    figure, axes = _square("ROC", "False positive rate (1 - specificity)", "True positive rate (sensitivity)")
    _curves(axes, labels, probabilities, class_names, "auroc", intervals, curve)
    axes.plot([0, 1], [0, 1], color="0.55", linestyle=(0, (2, 3)), linewidth=1.2, label="Chance, 0.500")
    _legend(axes, "AUROC")
    save_figure(figure, path)


def pr_picture(
    labels: ArrayLike,
    probabilities: ArrayLike,
    class_names: Sequence[str],
    path: str | os.PathLike[str],
    intervals: Bootstrap | None = None,
) -> None:
    """Precision-recall curves as in `roc_picture`, with the average precision; chance is the prevalence."""

    def curve(axes: Axes, positive: np.ndarray, score: np.ndarray, style: dict) -> None:
        precision, recall, _ = precision_recall_curve(positive, score)
        axes.plot(recall, precision, drawstyle="steps-post", **style)
        axes.axhline(positive.mean(), color=style["color"], linestyle=(0, (2, 3)), linewidth=1)

    figure, axes = _square(
        "Precision and recall", "Recall (sensitivity)", "Precision (positive predictive value)"
    )
    _curves(axes, labels, probabilities, class_names, "auprc", intervals, curve)
    axes.plot(
        [], [], color="0.55", linestyle=(0, (2, 3)), linewidth=1, label="Chance: the class's prevalence"
    )
    _legend(axes, "Average precision")
    save_figure(figure, path)


def confusion_picture(
    labels: ArrayLike,
    probabilities: ArrayLike,
    class_names: Sequence[str],
    path: str | os.PathLike[str],
    threshold: Threshold = 0.5,
) -> None:
    """Confusion matrix: counts and shares of each true class, which also give the colour.

    Args:
        labels: class of each image, `(N,)`.
        probabilities: predicted probabilities, `(N, C)`.
        class_names: C names.
        path: the PNG file to write.
        threshold: as in `scores`.
    """
    labels, probabilities = check_predictions(labels, probabilities)
    names = _names(class_names, probabilities)
    classes = range(len(names))
    counts = confusion_matrix(labels, predicted_classes(probabilities, threshold), labels=list(classes))
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = 3.2 + 0.75 * len(names)
    figure = _figure(side + 0.6, side)
    axes = figure.add_subplot()
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for true in classes:
        for answered in classes:
            share = f"{shares[true, answered]:.0%}" if counts[true].any() else "no image"
            colour = "white" if shares[true, answered] > 0.55 else "0.1"
            text = f"{counts[true, answered]}\n{share}"
            axes.text(answered, true, text, ha="center", va="center", color=colour, fontsize=11)
    turned = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if max(map(len, names)) > 8 else {}
    axes.set_xticks(classes, names, fontsize=11, **turned)
    axes.set_yticks(classes, names, fontsize=11)
    axes.set_xlabel("Predicted class", fontsize=12)
    axes.set_ylabel("True class", fontsize=12)
    cuts = " to ".join(f"{cut:.3g}" for cut in sorted({np.min(threshold), np.max(threshold)}))
    at = f", threshold {cuts}" if len(names) == 2 else ""
    axes.set_title(f"Confusion, {len(labels)} images{at}", fontsize=13)
    figure.colorbar(picture, ax=axes, label="Share of the true class", fraction=0.046, pad=0.04)
    save_figure(figure, path)


def history_picture(history: Mapping[str, Sequence[float]], path: str | os.PathLike[str]) -> None:
    """Training curves: a panel for each figure of a Keras history, with its `val_...` beside it.

    Args:
        history: `History.history`, a list of values, one an epoch, for each name.
        path: the PNG file to write.

    Raises:
        ValueError: on an empty history.
    """
    from matplotlib.ticker import MaxNLocator

    names = list(dict.fromkeys(name.removeprefix("val_") for name in history))
    if not names:
        raise ValueError(f"`history` must hold at least one list of values. Received: {dict(history)}")
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure = _figure(4.2 * columns + 0.4, 3.4 * rows)
    for number, name in enumerate(names):
        axes = figure.add_subplot(rows, columns, number + 1)
        for key, label, colour, style in ((name, "training", 0, "-"), (f"val_{name}", "validation", 1, "--")):
            if key in history:
                epochs = np.arange(1, len(history[key]) + 1)
                marker = "o" if len(epochs) < 30 else None
                line = {"color": COLOURS[colour], "linestyle": style, "marker": marker, "markersize": 4}
                axes.plot(epochs, history[key], label=label, linewidth=1.8, **line)
        axes.set_xlabel("Epoch", fontsize=11)
        axes.set_title(name.replace("_", " "), fontsize=12)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(color="0.9")
        if f"val_{name}" in history:
            axes.legend(fontsize=10, frameon=False)
    save_figure(figure, path)


def save_figure(figure: Figure, path: str | os.PathLike[str], dpi: int = 120) -> None:
    """Write a Matplotlib figure as PNG, aside and then renamed."""
    with written_aside(path) as aside:
        figure.savefig(aside, dpi=dpi, format="png", facecolor="white", bbox_inches="tight", pad_inches=0.12)


def _curves(
    axes: Axes,
    labels: ArrayLike,
    probabilities: ArrayLike,
    class_names: Sequence[str],
    name: str,
    intervals: Bootstrap | None,
    curve: Callable[[Axes, np.ndarray, np.ndarray, dict], None],
) -> None:
    """Draw `curve` for each class that has positives and negatives, with the figure `name` in its legend."""
    labels, probabilities = check_predictions(labels, probabilities)
    names = _names(class_names, probabilities)
    figures = scores(labels, probabilities)
    for k in range(len(names)) if len(names) > 2 else (1,):
        value = figures[f"{name}/{k}"]
        label = f"{names[k]}, {value:.3f}"
        if np.isnan(value):
            axes.plot([], [], " ", label=f"{names[k]}, undefined: needs images with it and without it")
            continue
        if intervals is not None:
            _, low, high, _ = intervals.figures[f"{name}/{k}"]
            label += f" ({intervals.confidence:.0%} CI {low:.3f} to {high:.3f})"
        style = {"color": COLOURS[k % len(COLOURS)], "linestyle": STYLES[k // len(COLOURS) % len(STYLES)]}
        curve(axes, labels == k, probabilities[:, k], style | {"label": label, "linewidth": 2})
    basis = f"{len(labels)} images"
    if intervals and intervals.unit != "images":
        basis = f"{intervals.units} {intervals.unit}, {basis}"
    elif intervals and intervals.units != len(labels):  # several models predicted each image
        basis = f"{intervals.units} images, {len(labels)} predictions"
    axes.set_title(f"{axes.get_title()}, {basis}", fontsize=13)


def _names(class_names: Sequence[str], probabilities: np.ndarray) -> list[str]:
    if len(class_names) != probabilities.shape[1]:
        raise ValueError(
            f"`class_names` must name each of the {probabilities.shape[1]} columns of `probabilities`. "
            f"Received: {list(class_names)}"
        )
    return [str(name) for name in class_names]


def _figure(width: float, height: float, layout: Literal["constrained"] | None = "constrained") -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout=layout)


def _square(title: str, x: str, y: str) -> tuple[Figure, Axes]:
    """A figure with one axis from 0 to 1 both ways."""
    figure = _figure(6, 6, layout=None)  # a constrained layout would shrink the axes for a long legend
    axes = figure.add_subplot()
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal", title=title)
    axes.set_xlabel(x, fontsize=12)
    axes.set_ylabel(y, fontsize=12)
    axes.tick_params(labelsize=11)
    axes.grid(color="0.92")
    return figure, axes


def _legend(axes: Axes, title: str) -> None:
    # Below the axes: inside them a long list of classes would lie on the curves.
    axes.legend(title=title, loc="upper center", bbox_to_anchor=(0.5, -0.12), fontsize=10, frameon=False)

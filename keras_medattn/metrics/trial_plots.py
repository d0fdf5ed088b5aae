"""A picture of a search's trials: the figure over each searched setting."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from keras_medattn.metrics.plots import COLOURS, _figure, save_figure


def trials_picture(
    rows: Sequence[Mapping[str, Any]], figure: str, settings: Sequence[str], path: str | os.PathLike[str]
) -> None:
    """A panel for each setting, a point for each trial that did not fail; later trials are darker.

    Args:
        rows: one a trial, in their order: the figure, nan where it failed, and the settings.
        figure: its name.
        settings: their names.
        path: the PNG file to write.

    Raises:
        ValueError: there is no trial.
    """
    if not rows:
        raise ValueError("`rows` must hold at least one trial. Received: none")
    values = np.array([float(row[figure]) for row in rows])
    shade = np.linspace(0.3, 1, len(rows))
    picture = _figure(3.4 * len(settings) + 0.6, 3.4)
    for number, name in enumerate(settings):
        axes = picture.add_subplot(1, len(settings), number + 1)
        found = [row[name] for row in rows]
        if all(type(one) in (int, float) for one in found):
            places = np.array(found, float)
            if places.min() > 0 and places.max() / places.min() >= 30:
                axes.set_xscale("log")
        else:
            names = sorted({json.dumps(one) for one in found})
            places = np.array([names.index(json.dumps(one)) for one in found])
            axes.set_xticks(range(len(names)), names)
        axes.scatter(places, values, color=COLOURS[0], alpha=shade, s=36)  # type: ignore[arg-type]
        axes.set_xlabel(name)
        axes.grid(alpha=0.3)
        if not number:
            axes.set_ylabel(figure)
    save_figure(picture, path)

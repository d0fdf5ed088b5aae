import numpy as np
import pytest
from PIL import Image

from keras_medattn.metrics import bootstrap, reliability_picture, reliability_plots

RNG = np.random.default_rng(0)
LABELS = RNG.integers(0, 2, 90)
POSITIVE = RNG.random(90)
PROBABILITIES = np.stack([1 - POSITIVE, POSITIVE], axis=1)


def test_points_are_the_bins_and_bars_count_them(monkeypatch, tmp_path):
    figures, save = [], reliability_plots.save_figure
    monkeypatch.setattr(
        reliability_plots, "save_figure", lambda figure, path: (figures.append(figure), save(figure, path))
    )
    intervals = bootstrap(LABELS, PROBABILITIES, n_resamples=50)
    reliability_picture(LABELS, PROBABILITIES, tmp_path / "reliability.png", intervals)
    upper, lower = figures[0].axes
    confidence = np.maximum(POSITIVE, 1 - POSITIVE)
    right = (POSITIVE > 0.5) == LABELS
    points, counts = [], []
    for low in np.arange(15) / 15:
        inside = (confidence > low) & (confidence <= low + 1 / 15)
        counts.append(inside.sum())
        if inside.any():
            points.append([confidence[inside].mean(), right[inside].mean()])
    np.testing.assert_allclose(upper.lines[1].get_xydata(), points)
    assert np.array_equal(upper.lines[0].get_xydata(), [[0, 0], [1, 1]])
    assert [bar.get_height() for bar in lower.patches] == counts
    gaps = [abs(x - y) for x, y in points]
    error = np.dot(gaps, [count for count in counts if count]) / 90
    assert intervals.figures["ece"].value == pytest.approx(error)
    assert upper.get_title() == f"Reliability, 90 images, ECE {intervals.figures['ece']}"
    assert min(Image.open(tmp_path / "reliability.png").size) > 500

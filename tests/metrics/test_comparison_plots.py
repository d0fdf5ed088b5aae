import numpy as np
import pytest
from PIL import Image

from keras_medattn.metrics import (
    Interval,
    comparison_picture,
    comparison_plots,
    curves_picture,
    setting_picture,
)


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved, which are saved all the same."""
    figures, save = [], comparison_plots.save_figure
    monkeypatch.setattr(
        comparison_plots, "save_figure", lambda figure, path: (figures.append(figure), save(figure, path))
    )
    return figures


def interval(value: float) -> Interval:
    return Interval(value, value - 0.1, value + 0.2, 0)


def test_runs_with_intervals_and_single_models(drawn, tmp_path):
    models = [np.array([0.6]), np.array([0.7, 0.8])]
    comparison_picture(["a", "b"], [interval(0.6), interval(0.75)], models, "auroc", tmp_path / "c.png")
    axes = drawn[0].axes[0]
    lines = [line.get_xydata().tolist() for line in axes.lines]
    assert lines[0] == pytest.approx(np.array([[0.5, 0], [0.8, 0]]))
    assert lines[1] == [[0.6, 0]]
    assert [point[0] for point in lines[-1]] == [0.7, 0.8]
    assert len(lines) == 5  # of a run with one model no point is drawn twice
    assert [text.get_text() for text in axes.get_yticklabels()] == ["a", "b"]
    assert axes.yaxis_inverted()
    assert Image.open(tmp_path / "c.png").width > 500


def test_curves_are_means_with_a_band_of_sd(drawn, tmp_path):
    """Two models, of which one stopped earlier; the test side is drawn where it was watched."""
    long, short = np.array([3.0, 2.0, 1.0]), np.array([5.0, 4.0])
    runs = {
        "a": [{"loss": long, "val_loss": long}, {"loss": short, "val_loss": short}],
        "b": [{"loss": long, "val_loss": long + 1, "test_accuracy": long / 3}],
    }
    curves_picture(runs, tmp_path / "curves.png")
    loss, accuracy = drawn[0].axes
    assert (loss.get_title(), accuracy.get_title()) == ("loss", "accuracy")
    np.testing.assert_allclose(loss.lines[0].get_ydata(), [4, 3, 1])
    low, high = (bound(loss.collections[0].get_paths()[0].vertices[:, 1]) for bound in (np.min, np.max))
    assert (low, high) == pytest.approx((3 - np.sqrt(2), 4 + np.sqrt(2)))
    assert [line.get_linestyle() for line in loss.lines] == ["-", "--", "-", "--"]
    assert [line.get_linestyle() for line in accuracy.lines] == [":"]
    texts = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert texts == ["a", "b", "training", "validation", "test (never chosen by)"]


def test_many_runs_have_colours_of_their_own(drawn, tmp_path):
    curves_picture({str(run): [{"loss": np.ones(2)}] for run in range(9)}, tmp_path / "curves.png")
    assert len({tuple(np.atleast_1d(line.get_color())) for line in drawn[0].axes[0].lines}) == 9


def test_a_figure_over_numbers_and_over_words(drawn, tmp_path):
    points = [(32, interval(0.5)), (256, interval(0.6)), (64, interval(0.7))]
    setting_picture(
        "model.channels", {"l1 0.1": points, "l1 0.01": points[:1]}, "accuracy", tmp_path / "n.png"
    )
    axes = drawn[0].axes[0]
    np.testing.assert_allclose(axes.lines[0].get_xydata(), [[32, 0.5], [64, 0.7], [256, 0.6]])
    assert axes.get_xscale() == "log"
    bars = [segment[:, 1].tolist() for segment in axes.containers[0].lines[2][0].get_segments()]
    np.testing.assert_allclose(bars, [[0.4, 0.7], [0.6, 0.9], [0.5, 0.8]])
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["l1 0.1", "l1 0.01"]
    setting_picture(
        "model.mask", {"": [("none", interval(0.5)), ("global", interval(0.6))]}, "", tmp_path / "w.png"
    )
    axes = drawn[1].axes[0]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["none", "global"]
    assert axes.lines[0].get_linestyle() == "None"
    assert axes.get_legend() is None

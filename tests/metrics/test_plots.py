import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import precision_recall_curve, roc_curve

from keras_medattn.metrics import (
    bootstrap,
    confusion_picture,
    history_picture,
    plots,
    pr_picture,
    roc_picture,
    scores,
)

RNG = np.random.default_rng(0)
LABELS = RNG.integers(0, 3, 90)
LOGITS = RNG.normal(size=(90, 3)) + np.eye(3)[LABELS]
PROBABILITIES = np.exp(LOGITS) / np.exp(LOGITS).sum(axis=1, keepdims=True)
TWO = (LABELS > 0).astype(int), np.stack([PROBABILITIES[:, 0], 1 - PROBABILITIES[:, 0]], axis=1)
NAMES = ["normal", "mild", "severe"]


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved, which are saved all the same."""
    figures, save = [], plots.save_figure
    monkeypatch.setattr(
        plots, "save_figure", lambda figure, path: (figures.append(figure), save(figure, path))
    )
    return figures


def legend_of(axes) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_roc_of_two_classes_is_the_second_one(drawn, tmp_path):
    intervals = bootstrap(*TWO, groups=np.arange(90) // 2, n_resamples=50)
    roc_picture(*TWO, ["normal", "ill"], tmp_path / "roc.png", intervals)
    axes = drawn[0].axes[0]
    false, true, _ = roc_curve(TWO[0], TWO[1][:, 1], drop_intermediate=False)
    assert np.array_equal(axes.lines[0].get_xydata(), np.stack([false, true], axis=1))
    value, low, high, _ = intervals.figures["auroc"]
    assert legend_of(axes) == [f"ill, {value:.3f} (95% CI {low:.3f} to {high:.3f})", "Chance, 0.500"]
    assert np.array_equal(axes.lines[-1].get_xydata(), [[0, 0], [1, 1]])
    assert axes.get_aspect() == 1.0
    assert axes.get_title() == "ROC, 45 patients, 90 images"
    picture = np.asarray(Image.open(tmp_path / "roc.png").convert("RGB"))
    assert min(picture.shape[:2]) > 500
    assert (picture == [0xD5, 0x5E, 0x00]).all(axis=2).sum() > 100


def test_pr_has_a_curve_and_a_prevalence_for_each_class(drawn, tmp_path):
    pr_picture(LABELS, PROBABILITIES, NAMES, tmp_path / "pr.png")
    axes = drawn[0].axes[0]
    for k in range(3):
        precision, recall, _ = precision_recall_curve(k == LABELS, PROBABILITIES[:, k])
        curve, chance = axes.lines[2 * k], axes.lines[2 * k + 1]
        assert np.array_equal(curve.get_xydata(), np.stack([recall, precision], axis=1))
        assert curve.get_drawstyle() == "steps-post"
        assert chance.get_ydata()[0] == pytest.approx(np.mean(k == LABELS))
    figures = scores(LABELS, PROBABILITIES)
    assert legend_of(axes)[:3] == [f"{name}, {figures[f'auprc/{k}']:.3f}" for k, name in enumerate(NAMES)]


def test_a_class_without_images_is_said_not_drawn(drawn, tmp_path):
    labels = np.minimum(LABELS, 1)
    roc_picture(labels, PROBABILITIES, NAMES, tmp_path / "roc.png", bootstrap(labels, PROBABILITIES))
    assert "severe, undefined: needs images with it and without it" in legend_of(drawn[0].axes[0])
    confusion_picture(labels, PROBABILITIES, NAMES, tmp_path / "confusion.png")
    assert [text.get_text() for text in drawn[1].axes[0].texts][6:] == [f"{0}\nno image"] * 3


def test_confusion_counts_rows_of_truth(drawn, tmp_path):
    confusion_picture(*TWO, ["normal", "ill"], tmp_path / "confusion.png", threshold=0.8)
    axes = drawn[0].axes[0]
    called = TWO[1][:, 1] >= 0.8
    counts = [[np.sum((TWO[0] == t) & (called == a)) for a in (0, 1)] for t in (0, 1)]
    expected = [f"{n}\n{n / sum(row):.0%}" for row in counts for n in row]
    assert [text.get_text() for text in axes.texts] == expected
    assert "threshold 0.8" in axes.get_title()
    assert axes.get_ylabel() == "True class"


def test_history_pairs_training_with_validation(drawn, tmp_path):
    history = {"loss": [1.0, 0.5], "auroc": [0.6, 0.9], "val_loss": [1.2, 0.8], "learning_rate": [0.1, 0.1]}
    history_picture(history, tmp_path / "history.png")
    loss, auroc, rate = drawn[0].axes
    assert [line.get_ydata().tolist() for line in loss.lines] == [[1.0, 0.5], [1.2, 0.8]]
    assert loss.lines[0].get_xdata().tolist() == [1, 2]
    assert (auroc.get_title(), len(auroc.lines)) == ("auroc", 1)
    assert rate.get_title() == "learning rate"
    with pytest.raises(ValueError, match="Received: "):
        history_picture({}, tmp_path / "none.png")


def test_class_names_must_fit(tmp_path):
    for picture in (roc_picture, pr_picture, confusion_picture):
        with pytest.raises(ValueError, match=r"3 columns.*Received: \['a'\]"):
            picture(LABELS, PROBABILITIES, ["a"], tmp_path / "wrong.png")
    assert not list(tmp_path.iterdir())


def test_a_killed_process_leaves_the_old_file(tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(b"old")
    script = (
        "import os, signal, sys\n"
        "from keras_medattn.files import written_aside\n"
        "with written_aside(sys.argv[1]) as aside:\n"
        "    aside.write_bytes(b'half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", script, str(path)]).returncode == -9
    assert path.read_bytes() == b"old"


def test_a_failed_write_leaves_nothing(tmp_path):
    class Broken:
        def savefig(self, path, **_):
            path.write_bytes(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        plots.save_figure(Broken(), tmp_path / "other.png")  # pyright: ignore[reportArgumentType]
    assert not list(tmp_path.iterdir())


def test_neither_pyplot_nor_keras_is_loaded(tmp_path):
    script = (
        "import sys\n"
        "from keras_medattn.metrics import history_picture\n"
        "assert 'matplotlib' not in sys.modules\n"
        "history_picture({'loss': [1.0, 0.5]}, sys.argv[1])\n"
        "assert not {'matplotlib.pyplot', 'keras', 'tensorflow'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "history.png")], check=True)

import numpy as np
import pytest

from keras_medattn.metrics import best_window, plateau


def test_window_has_the_highest_mean_over_folds_and_epochs():
    accuracies = np.random.default_rng(0).random((5, 80))
    means = [accuracies[:, start : start + 30].mean() for start in range(51)]
    assert best_window(accuracies) == range(int(np.argmax(means)), int(np.argmax(means)) + 30)
    assert best_window(np.full((2, 40), 0.1)).start == 0  # of equal ones the first
    assert best_window(accuracies[:, :30]) == range(30)


@pytest.mark.parametrize("accuracies", [np.zeros((5, 29)), np.zeros(30), np.full((2, 40), np.nan)])
def test_window_needs_its_epochs(accuracies):
    with pytest.raises(ValueError, match=r"30 epochs.*Received: shape"):
        best_window(accuracies)


def test_plateau_ends_a_tenth_below_chance():
    chance = np.log(10)  # 2.3026, so that it ends below 2.0723
    assert plateau([2.4, 2.3, 2.08, 2.07, 2.2], chance) == 3
    assert plateau([1.0], chance) == 0
    assert plateau([2.4, 2.3, 2.08], chance) is None
    assert plateau([0.6, 0.5, 0.3], np.log(2), share=0.5) == 2

"""Localisation of findings, against counting by hand."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from keras_medattn.explain import places
from keras_medattn.explain.report import Finding
from keras_medattn.explain.truth import TruthError

NO_BOXES = np.zeros((0, 4))


def finding(argued, boxes=NO_BOXES, size=(40, 60), probabilities=(0.2, 0.8), side=1600, **named) -> Finding:
    probabilities = np.array(probabilities)
    return Finding(
        Path("a.png"),
        probabilities,
        int(probabilities.argmax()),
        np.asarray(argued, np.float32),
        size,
        np.asarray(boxes, np.float64),
        np.zeros(len(boxes)),
        named,
        side,
    )


def test_true_positives_of_two_classes_and_of_more():
    two, three = finding([[1]]), finding([[1]], probabilities=(0.6, 0.3, 0.1))
    truth = np.array([[0, 0, 1, 1]])
    no = finding([[1]], probabilities=(0.9, 0.1))
    assert places.true_positives(
        [two, two, two, no], [truth, None, truth, truth], np.array([1, 1, 0, 0])
    ) == [0]
    assert places.true_positives([three, three], [truth, truth], np.array([0, 1])) == [0]


def test_region_above_a_threshold_covers_what_it_covers():
    above = np.zeros((4, 6), bool)
    above[1, 2:4] = True  # of 40 x 60 pixels, the rows 10 to 19 and the columns 20 to 39
    one = finding(np.ones((2, 3)), above=above)
    truth = np.array([[20, 10, 30, 20], [36, 12, 44, 18], [0, 30, 5, 35]])  # whole, a half, not
    figures = places.localisation([one, one], [truth, truth[2:]])["region"].figures
    assert figures["covered"].value == 2 / 4
    assert figures["centre"].value == 1 / 4  # that of the second is at column 40
    assert figures["area"].value == 200 / 2400
    assert figures["centre_random"].value == pytest.approx(200 / 2400)
    assert "region" not in places.localisation([finding(np.ones((2, 3)))], [truth])


def test_uniform_patches_by_counting_all_draws():
    boxes = [[0, 0, 20, 16], [30, 20, 50, 36]]  # 20 x 16 pixels
    one = finding(np.ones((4, 6)), boxes, cells=np.array([0, 1]))
    truth = np.array([[22, 12, 24, 14], [0, 0, 2, 2], [55, 30, 58, 39]])
    centres = [(23.5, 13.5), (1.5, 1.5), (56.5, 34.5)]  # middle pixels' centres
    cells = [(10 * column + 5, 10 * row + 5) for row in range(4) for column in range(6)]
    held = [
        np.mean([any(abs(x - u) <= 10 and abs(y - v) <= 8 for u, v in draw) for x, y in centres])
        for draw in itertools.product(cells, repeat=2)
    ]
    figures = places.localisation([one], [truth])["region"].figures
    assert figures["centre_uniform"].value == pytest.approx(np.mean(held))
    assert figures["covered"].value == 1 / 3  # the second object, under the first patch
    assert figures["area"].value == (20 * 16 * 2) / 2400


def test_large_images_are_measured_as_drawn():
    """The same finding, at twice the size and shrunk to half of it, has the same figures."""
    argued = np.random.default_rng(0).random((4, 6))
    boxes, truth = np.array([[10, 4, 30, 20]]), np.array([[12, 10, 20, 14]])
    small = finding(argued, boxes, cells=np.array([0]))
    large = finding(argued, boxes * 2, (80, 120), side=60, cells=np.array([0]))
    mask = np.zeros((40, 60), bool)
    mask[10:14, 12:20] = True
    expected = places.localisation([small], [truth])
    for found in (places.localisation([large], [truth * 2]), places.localisation([large], [mask])):
        for group in ("heat", "region"):
            values = {name: one.value for name, one in found[group].figures.items()}
            known = {name: one.value for name, one in expected[group].figures.items()}
            assert values == pytest.approx(known)


def test_a_mask_of_another_size_is_named():
    with pytest.raises(TruthError, match=r"a.png: its mask must have the image's \(40, 60\) rows"):
        places.localisation([finding([[1.0]])], [np.ones((10, 10), bool)])

import numpy as np
import pytest

from keras_medattn.metrics import (
    boxes_to_mask,
    coverage,
    coverage_curve,
    energy_inside,
    localise,
    pointing_game,
    pooled_coverage_curve,
    random_map,
)

BOXES = np.array([[3.0, 2.0, 9.0, 7.0], [15.0, 10.0, 20.0, 16.0]])  # two of them in a 18 x 24 image
SHAPE = (18, 24)


def truth_mask() -> np.ndarray:
    mask = np.zeros(SHAPE, bool)
    mask[2:7, 3:9] = True
    mask[10:16, 15:20] = True
    return mask


def distance_to_truth(row: int, column: int) -> float:
    rows, columns = np.nonzero(truth_mask())
    return np.sqrt((rows - row) ** 2 + (columns - column) ** 2).min()


def test_boxes_cover_every_pixel_they_touch():
    assert np.array_equal(boxes_to_mask(BOXES, SHAPE), truth_mask())
    found = np.argwhere(boxes_to_mask([[1.2, 0.0, 1.9, 1.1], [-5, 2, 1, 99]], (4, 3)))
    assert found.tolist() == [[0, 1], [1, 1], [2, 0], [3, 0]]


@pytest.mark.parametrize("truth", [BOXES, truth_mask()], ids=["boxes", "mask"])
@pytest.mark.parametrize("tolerance", [0, 2, 2.9, 8])
def test_pointing_is_the_distance_to_the_truth(truth, tolerance):
    hits = 0
    for row in range(SHAPE[0]):
        for column in range(SHAPE[1]):
            heat = np.full(SHAPE, 0.5)
            heat[row, column] = 0.6
            expected = distance_to_truth(row, column) <= tolerance
            assert pointing_game(heat, truth, tolerance) == expected, (row, column)
            hits += expected
    # Which is also what a map that knows nothing would score.
    chance = localise([heat], [truth], tolerance=tolerance, n_resamples=1).figures["pointing_random"].value
    assert chance == pytest.approx(hits / np.prod(SHAPE), abs=1e-12)


def test_of_equally_hot_pixels_the_first_counts():
    heat = np.zeros(SHAPE)
    heat[4, 5] = heat[17, 23] = 1
    assert pointing_game(heat, BOXES, 0)
    heat[0, 23] = 1
    assert not pointing_game(heat, BOXES, 0)


def test_a_blank_heat_is_a_miss_and_has_no_share():
    blank = np.zeros(SHAPE)
    assert not pointing_game(blank, np.ones(SHAPE, bool))
    assert np.isnan(energy_inside(blank, BOXES))
    assert coverage(blank, BOXES)["covered"] == 0 == coverage(blank, BOXES, threshold=0.0)["area"]


def test_energy_is_the_share_inside():
    heat = np.random.default_rng(0).random(SHAPE) ** 3
    inside = sum(heat[r, c] for r, c in np.argwhere(truth_mask()))
    assert energy_inside(heat, BOXES) == pytest.approx(inside / heat.sum(), abs=1e-12)
    assert energy_inside(heat, BOXES) == energy_inside(heat, truth_mask())


def test_a_random_map_scores_what_is_expected_of_it():
    maps = [random_map(SHAPE, seed) for seed in range(1500)]
    expected = localise(maps[:1], [BOXES], tolerance=2, n_resamples=1).figures
    points = [pointing_game(heat, BOXES, 2) for heat in maps]
    shares = [energy_inside(heat, BOXES) for heat in maps]
    for draws, name in ((points, "pointing_random"), (shares, "energy_random")):
        error = np.std(draws) / np.sqrt(len(draws))
        assert abs(np.mean(draws) - expected[name].value) < 3 * error, name


def test_coverage_and_its_chance_are_counted():
    found = np.zeros(SHAPE, bool)
    found[1:6, 4:14] = True  # 20 of the first box's 30 pixels
    found[13:16, 15:20] = True  # exactly half of the second box's
    result = coverage(found, BOXES)
    assert result["boxes"] == 2
    assert result["covered"] == 1.0
    assert result["centre"] == 1.0  # pixels (4, 6) and (13, 17)
    assert result["area"] == result["centre_random"] == pytest.approx(65 / 432)
    hits = []
    for down in range(SHAPE[0]):
        for right in range(SHAPE[1]):
            moved = np.roll(found, (down, right), (0, 1))
            hits += [moved[2:7, 3:9].mean() >= 0.5, moved[10:16, 15:20].mean() >= 0.5]
    assert 0 < result["covered_random"] == pytest.approx(np.mean(hits), abs=1e-12)
    assert coverage(found, BOXES, at_least=0.6)["covered"] == 0.5
    assert coverage(found, truth_mask()) == result  # components by their bounding boxes
    found[13, 17] = False
    assert coverage(found, BOXES)["covered"] == coverage(found, BOXES)["centre"] == 0.5


def test_a_heat_is_cut_at_its_mean_or_at_a_share_of_its_maximum():
    heat = np.random.default_rng(1).random(SHAPE) ** 2
    assert coverage(heat, BOXES) == coverage(heat > heat.mean(), BOXES)
    curve = coverage_curve(heat, BOXES, (0.2, 0.7))
    assert curve["threshold"] == [0.2, 0.7]
    assert curve["area"] == [(heat > 0.2 * heat.max()).mean(), (heat > 0.7 * heat.max()).mean()]
    assert len(coverage_curve(heat, BOXES)["covered"]) == 9


def test_a_pooled_curve_counts_boxes_and_averages_areas():
    rng = np.random.default_rng(3)
    heats, truths = [rng.random(SHAPE) ** 2 for _ in range(3)], [BOXES, BOXES[:1], truth_mask()]
    curve = pooled_coverage_curve(heats, truths, (0.1, 0.4))
    for place, threshold in enumerate((0.1, 0.4)):
        found = [heat > threshold * heat.max() for heat in heats]
        boxes = [
            (found[n], box) for n, truth in enumerate((BOXES, BOXES[:1], BOXES)) for box in truth.astype(int)
        ]
        hits = [region[y0:y1, x0:x1].mean() >= 0.5 for region, (x0, y0, x1, y1) in boxes]
        assert curve["covered"][place] == pytest.approx(np.mean(hits))
        assert curve["area"][place] == pytest.approx(np.mean([region.mean() for region in found]))
    assert curve["threshold"] == [0.1, 0.4]
    assert curve["boxes"] == [5.0, 5.0]
    with pytest.raises(ValueError, match="one heat or more"):
        pooled_coverage_curve([], [])


def test_localise_averages_images_and_pools_boxes():
    rng = np.random.default_rng(2)
    heats = [rng.random(SHAPE) for _ in range(4)] + [np.zeros((30, 10))]
    truths = [BOXES, BOXES[:1], truth_mask(), BOXES[1:], [[1, 1, 4, 6]]]
    groups = ["a", "a", "b", "c", "d"]
    result = localise(heats, truths, groups, tolerance=3, n_resamples=200, seed=4)
    figures = result.figures
    points = [pointing_game(h, t, 3) for h, t in zip(heats, truths, strict=True)]
    shares = np.array([energy_inside(h, t) for h, t in zip(heats, truths, strict=True)])
    rows = [coverage(h, t) for h, t in zip(heats, truths, strict=True)]
    boxes = np.array([row["boxes"] for row in rows])
    assert figures["pointing"].value == pytest.approx(np.mean(points))
    assert figures["energy"].value == pytest.approx(np.nanmean(shares))
    assert figures["blank"].value == pytest.approx(0.2)
    for name in ("covered", "covered_random", "centre", "centre_random"):
        each = np.array([row[name] for row in rows])
        assert figures[name].value == pytest.approx((each * boxes).sum() / boxes.sum()), name
    drawn = np.random.default_rng(4).integers(0, 4, (200, 4))
    images = [[0, 1], [2], [3], [4]]
    draws = [np.nanmean(shares[np.concatenate([images[p] for p in row])]) for row in drawn if set(row) != {3}]
    assert figures["energy"][1:3] == pytest.approx(tuple(np.percentile(draws, [2.5, 97.5])))
    assert (result.units, result.unit) == (4, "patients")


@pytest.mark.parametrize(
    ("heat", "truth", "message"),
    [
        (np.full(SHAPE, -1.0), BOXES, "negative"),
        (np.full(SHAPE, np.nan), BOXES, "finite"),
        (np.zeros(5), BOXES, "shape"),
        (np.ones(SHAPE), np.zeros((0, 4)), "leave out"),
        (np.ones(SHAPE), [], "leave out"),
        (np.ones(SHAPE), np.zeros(SHAPE, bool), "leave out"),
        (np.ones(SHAPE), [[50, 50, 60, 60]], "leave out"),
        (np.ones(SHAPE), np.ones((5, 5), bool), "the heat's shape"),
        (np.ones(SHAPE), np.ones(SHAPE, np.uint8), "boolean mask"),
        (np.ones(SHAPE), [[9, 9, 3, 3]], "corners"),
    ],
)
def test_wrong_inputs_are_named(heat, truth, message):
    with pytest.raises(ValueError, match=rf"{message}.*Received: "):
        pointing_game(heat, truth)
    with pytest.raises(ValueError, match=rf"Image 1: .*{message}"):
        localise([np.ones(SHAPE), heat], [BOXES, truth])


def test_no_images_or_unequal_lists():
    with pytest.raises(ValueError, match="0 images"):
        localise([], [])
    with pytest.raises(ValueError, match="zip"):
        localise([np.ones(SHAPE)], [])

import numpy as np
import pytest
import tensorflow as tf
from scipy import ndimage

from keras_medattn.ops import above_threshold, bounding_boxes, heaviest_components, label_components

EIGHT = np.ones((3, 3))


def _snake(size):
    """A path that fills the mask from its first to its last row."""
    mask = np.zeros((size, size), bool)
    mask[::2] = True
    mask[1::4, -1] = mask[3::4, 0] = True
    return mask


def _same_partition(labels, mask):
    expected, count = ndimage.label(mask, EIGHT)
    np.testing.assert_array_equal(labels > 0, mask)
    pairs = set(zip(labels[mask].tolist(), expected[mask].tolist(), strict=True))
    assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs}) == count


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (7, 5), (33, 40), (56, 56)])
def test_components_are_those_of_scipy(size):
    """About 0.4 of the cells is where 8-connected random masks percolate: the longest paths."""
    rng = np.random.default_rng(0)
    density = np.repeat([0.0, 0.1, 0.3, 0.38, 0.41, 0.45, 0.6, 0.9, 1.0], 6)
    masks = rng.random((len(density), *size)) < density[:, None, None]
    for labels, mask in zip(label_components(tf.constant(masks)).numpy(), masks, strict=True):
        _same_partition(labels, mask)


def test_longest_paths_and_corners():
    masks = np.stack([_snake(29), _snake(29).T, np.eye(29, dtype=bool), np.eye(29, dtype=bool)[::-1]])
    labels = label_components(tf.constant(masks)).numpy()
    for label, mask in zip(labels, masks, strict=True):
        _same_partition(label, mask)
        assert label.max() == 1 + np.flatnonzero(mask)[-1]  # named after its last cell


def test_sizes_known_only_at_run_time_and_compiled():
    masks = np.random.default_rng(1).random((2, 20, 17)) < 0.41
    expected = label_components(tf.constant(masks))
    unknown = tf.function(label_components, input_signature=[tf.TensorSpec((None,) * 3, "bool")])
    np.testing.assert_array_equal(unknown(masks), expected)
    np.testing.assert_array_equal(tf.function(label_components, jit_compile=True)(masks), expected)


def _otsu(values):
    """The higher of the two classes, by trying every split."""
    best, chosen = -1, None
    for limit in np.unique(values)[:-1]:
        high = values > limit
        variance = high.mean() * (1 - high.mean()) * (values[high].mean() - values[~high].mean()) ** 2
        if variance > best:
            best, chosen = variance, high
    return chosen


@pytest.mark.parametrize("rounded", [False, True], ids=["reals", "few levels"])
@pytest.mark.parametrize("offset", [0, 100, -100])
def test_thresholds(rounded, offset):
    rng = np.random.default_rng(2)
    maps = np.concatenate([rng.gamma(2, size=(4, 9, 8)), rng.normal(size=(2, 9, 8))]).astype("float32")
    maps = (np.round(2 * maps) if rounded else maps) + np.float32(offset)
    graph = tf.function(above_threshold, input_signature=[tf.TensorSpec((None,) * 3)])
    for values, mean, largest, quantile, otsu in zip(
        maps.astype("float64"),
        graph(maps).numpy(),
        above_threshold(maps, "max", 0.3),
        above_threshold(maps, "quantile", 0.77),
        above_threshold(maps, "otsu"),
        strict=True,
    ):
        np.testing.assert_array_equal(mean, values > values.mean())
        np.testing.assert_array_equal(largest, values > 0.3 * values.max())
        np.testing.assert_array_equal(quantile, values > np.quantile(values, 0.77))
        np.testing.assert_array_equal(otsu, _otsu(values))


@pytest.mark.parametrize("threshold", ["mean", "quantile", "otsu"])
def test_no_cell_of_a_constant_map_is_above(threshold):
    for value in (0, 0.1, 1 / 3, -7.7, 1e-30, 1e30):
        assert not above_threshold(np.full((1, 7, 11), value, "float32"), threshold).numpy().any()


def test_an_unknown_threshold_is_an_error():
    with pytest.raises(ValueError, match=r"one of .* Received: threshold='median'"):
        above_threshold(np.zeros((1, 2, 2), "float32"), "median")


@pytest.mark.parametrize("k", [1, 4, 40])
def test_the_heaviest_components_and_their_boxes(k):
    rng = np.random.default_rng(3)
    masks = rng.random((5, 12, 15)) < np.array([0, 0.05, 0.2, 0.4, 1])[:, None, None]
    weights = rng.random(masks.shape).astype("float32")
    members, sums, found = heaviest_components(label_components(tf.constant(masks)), weights, k)
    boxes = bounding_boxes(members).numpy()
    for b, mask in enumerate(masks):
        labels, count = ndimage.label(mask, EIGHT)
        mass = ndimage.sum_labels(weights[b], labels, range(1, count + 1))
        order = np.argsort(-mass)[:k]
        assert found[b].numpy().tolist() == [slot < count for slot in range(k)]
        np.testing.assert_allclose(sums[b], np.pad(mass[order], (0, k - len(order))), rtol=1e-5)
        slices = ndimage.find_objects(labels)
        for slot in range(k):
            inside = labels == order[slot] + 1 if slot < count else np.zeros_like(mask)
            np.testing.assert_array_equal(members[b, slot], inside)
            rows, columns = slices[order[slot]] if slot < count else [slice(0, 0)] * 2
            assert boxes[b, slot].tolist() == [columns.start, rows.start, columns.stop, rows.stop]


def test_negative_weights_are_ranked_too():
    labels = tf.constant([[[1, 0, 3, 0, 5]]])
    _, sums, found = heaviest_components(labels, tf.constant([[[-2.0, 9.0, -1.0, 9.0, -3.0]]]), 2)
    assert sums[0].numpy().tolist() == [-1, -2]
    assert found.numpy().all()

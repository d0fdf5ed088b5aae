"""Keras's augmentation layers as functions of a seed pair for each image."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_medattn.data import augment

IMAGE = np.asarray(
    keras.ops.image.resize(np.random.default_rng(0).uniform(0, 255, (6, 6, 3)).astype(np.float32), (24, 24))
)
LAYERS = {
    "RandomFlip": {"mode": "horizontal_and_vertical"},
    "RandomRotation": {"factor": 0.3},
    "RandomBrightness": {"factor": 0.5},
    "RandomContrast": {"factor": 0.5},
    "RandomHue": {"factor": 0.3},
    "RandomSaturation": {"factor": [0.2, 0.8]},
    "RandomZoom": {"height_factor": 0.4},
    "RandomTranslation": {"height_factor": 0.3, "width_factor": 0.3},
    "RandomShear": {"x_factor": 0.3},
    "RandomSharpness": {"factor": 0.5},
    "RandomGaussianBlur": {"factor": [1.0, 1.0], "sigma": (0.1, 2.0)},
    "RandomStain": {"alpha": 0.2, "beta": 0.1},
    "RandomErasing": {"factor": [1.0, 1.0]},
}


def run(settings, images, seeds):
    change = augment.augmenter(settings)
    assert change is not None
    return tf.function(change)(images, np.asarray(seeds, np.int32)).numpy()


@pytest.mark.parametrize("name", LAYERS)
def test_each_image_follows_its_seed(name):
    seeds = [[5, 0], [5, 0], *([100 * i, i] for i in range(1, 11))]
    images = np.repeat(IMAGE[None], 12, axis=0)
    got = run([{"layer": name, **LAYERS[name]}], images, seeds)
    assert got.shape == images.shape
    assert got.dtype == np.float32
    assert got.min() >= 0
    assert got.max() <= 255
    np.testing.assert_array_equal(got[0], got[1])
    different = {one.tobytes() for one in got}
    assert len(different) >= (2 if name == "RandomFlip" else 9)  # Keras flips both ways at once, or none
    again = run([{"layer": name, **LAYERS[name]}], images[3:5], seeds[3:5])  # made anew, in another batch
    np.testing.assert_array_equal(again, got[3:5])


def test_flips_are_flips_and_fair():
    count = 200
    seeds = np.random.default_rng(0).integers(0, 2**31 - 1, (count, 2))
    got = run([{"layer": "RandomFlip", "mode": "horizontal"}], np.repeat(IMAGE[None], count, 0), seeds)
    flipped = [np.array_equal(one, IMAGE[:, ::-1]) for one in got]
    assert all(a or np.array_equal(one, IMAGE) for a, one in zip(flipped, got, strict=True))
    assert abs(np.mean(flipped) - 0.5) < 4 * 0.5 / count**0.5


def test_brightness_is_uniform_over_seeds():
    """Neighbouring seed pairs must not give neighbouring draws."""
    count, grey = 400, np.full((1, 2, 2, 3), 127.5, np.float32)
    seeds = [[7, row] for row in range(count)]
    got = run([{"layer": "RandomBrightness", "factor": 0.5}], np.repeat(grey, count, 0), seeds)[:, 0, 0, 0]
    draws = (got - 127.5) / 255  # in [-.5, .5]
    assert np.abs(draws).max() <= 0.5
    assert abs(draws.mean()) < 4 * (1 / 12 / count) ** 0.5
    assert abs(draws.std() - 12**-0.5) < 0.03
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 4 / count**0.5


def test_layers_of_a_chain_draw_apart():
    grey = np.full((50, 2, 2, 3), 127.5, np.float32)
    seeds = [[3, row] for row in range(50)]
    bright = {"layer": "RandomBrightness", "factor": 0.2}
    once = run([bright], grey, seeds)[:, 0, 0, 0] - 127.5
    twice = run([bright, bright], grey, seeds)[:, 0, 0, 0] - 127.5
    second = twice - once
    assert abs(np.corrcoef(once, second)[0, 1]) < 0.5
    assert np.abs(second - once).max() > 1


def test_bright_pixels_are_clipped():
    white = np.full((8, 4, 4, 3), 250, np.uint8)
    got = run([{"layer": "RandomBrightness", "factor": [0.4, 0.5]}], white, [[i, i] for i in range(8)])
    assert (got == 255).all()


def test_none_for_no_layers():
    assert augment.augmenter([]) is None


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"layer": "RandomFlop"}, r"must name an image augmentation.*Received: 'RandomFlop'"),
        ({"layer": "Dense", "units": 3}, r"must name an image augmentation.*Received: 'Dense'"),
        ({"factor": 0.1}, r"must name an image augmentation.*Received: None"),
        ({"layer": 3}, r"must name an image augmentation.*Received: 3"),
        ({"layer": "RandomRotation", "angle": 3}, r"RandomRotation refuses \{'angle': 3\}"),
        ({"layer": "RandomStain", "alpha": 1}, r"RandomStain refuses .*alpha must be in \[0, 1\)"),
        ({"layer": "RandomHue", "factor": 7}, r"RandomHue refuses \{'factor': 7\}"),
        ({"layer": "RandAugment"}, "RandAugment draws from a state of its own"),
        ({"layer": "RandomCrop", "height": 8, "width": 8}, "RandomCrop changes the size"),
    ],
)
def test_layers_that_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        augment.layer(settings)


@pytest.mark.parametrize(
    ("settings", "off"),
    [({"layer": "MixUp", "alpha": 0.4}, 1e-3), ({"layer": "CutMix", "factor": [1.0, 1.0]}, 0.15)],
)
def test_labels_are_mixed_as_the_images_are(settings, off):
    """A class an image, so that the labels tell each image's shares; of plain images pixels tell them, too.

    Off: CutMix's label is that of a box between pixels, 20 x 20 of them.
    """
    count, alpha = 60, settings.get("alpha", 1.0)
    values = np.arange(count, dtype=np.float32) * 4
    plain = np.repeat(values, 20 * 20 * 3).reshape(count, 20, 20, 3)
    chain = [{"layer": "RandomFlip"}, settings]
    mix = tf.function(augment.mixer(chain, count))
    shares, seeds = [], [[3, 5], [4, 5], [3, 5]]
    for seed in seeds:
        images, labels = (one.numpy() for one in mix(plain, np.arange(count), np.array(seed, np.int32)))
        own = np.diag(labels)
        assert images.shape == plain.shape
        np.testing.assert_allclose(labels.sum(axis=1), 1, atol=1e-5)
        partner = np.where(own == 1, np.arange(count), (labels - np.diag(own)).argmax(axis=1))
        got = images.mean(axis=(1, 2, 3))
        assert len(set(partner.tolist())) == count  # each image once
        assert np.abs(got - (own * values + (1 - own) * values[partner])).max() <= off * 236
        if settings["layer"] == "CutMix":
            pair = np.stack([values, values[partner]])
            assert all(np.isin(image, two).all() for image, two in zip(images, pair.T, strict=True))
        shares.append(own)
    np.testing.assert_array_equal(shares[0], shares[2])
    assert np.abs(shares[0] - shares[1]).max() > 0.1
    variance = 1 / (4 * (2 * alpha + 1))  # of Beta(alpha, alpha), whose mean is .5
    mixed = np.concatenate([one[one < 1] for one in shares[:2]])
    assert abs(mixed.mean() - 0.5) < 4 * (variance / len(mixed)) ** 0.5
    assert abs(mixed.var() - variance) < 0.05


def test_nothing_to_mix_leaves_images_and_one_hot_labels():
    images, labels = augment.mixer([{"layer": "RandomFlip"}], 3)(IMAGE[None], np.array([2]), np.array([0, 0]))
    assert images is not None
    np.testing.assert_array_equal(images, IMAGE[None])
    assert labels.numpy().tolist() == [[0, 0, 1]]
    assert augment.augmenter([{"layer": "MixUp"}]) is None

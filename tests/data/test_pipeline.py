"""Batches are functions of (seed, epoch, row), and hold the pixels that the reader reads."""

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from keras_medattn.data import augment, pipeline, readers
from keras_medattn.data.headers import ImageError
from keras_medattn.data.manifest import Manifest

IMAGES = np.random.default_rng(0).integers(0, 256, (11, 16, 16, 3), np.uint8)
LABELS = np.arange(11, dtype=np.int32)  # the row itself, so that a batch tells which rows it holds
CHANGES = [
    {"layer": "RandomFlip", "mode": "horizontal_and_vertical"},
    {"layer": "RandomRotation", "factor": 0.2},
    {"layer": "RandomBrightness", "factor": 0.3},
]


def memory(rows, epoch):
    return IMAGES[rows]


def epochs_of(batch_size, epochs, seed=4, change=None):
    """A list of epochs of `{row: its pixels}`, and the rows in order."""
    steps = pipeline.steps_an_epoch(len(LABELS), batch_size)
    wanted = range(epochs.start * steps, epochs.stop * steps)
    data = pipeline.training_batches(memory, LABELS, batch_size, seed, wanted, change)
    batches = [(inputs.numpy(), labels.numpy()) for inputs, labels in data]
    assert len(batches) == steps * len(epochs)
    pixels, orders = [], []
    for start in range(0, len(batches), steps):
        mine = batches[start : start + steps]
        sizes = [len(labels) for _, labels in mine]
        assert max(sizes) - min(sizes) <= 1
        assert max(sizes) <= batch_size
        orders.append(np.concatenate([labels for _, labels in mine]))
        pixels.append({int(i): x for inputs, labels in mine for x, i in zip(inputs, labels, strict=True)})
    return pixels, orders


@pytest.mark.parametrize("batch_size", [1, 3, 4, 10, 11, 64])
def test_every_epoch_sees_every_row_once(batch_size):
    pixels, orders = epochs_of(batch_size, range(3))
    for mine, order in zip(pixels, orders, strict=True):
        assert sorted(order) == list(range(11))
        for row, seen in mine.items():
            np.testing.assert_array_equal(seen, IMAGES[row])
    assert not np.array_equal(orders[0], orders[1])
    assert not np.array_equal(orders[0], epochs_of(batch_size, range(1), seed=5)[1][0])


def test_a_resumed_run_goes_on_bit_equal():
    change = augment.augmenter(CHANGES)
    full, full_order = epochs_of(4, range(4), change=change)
    rest, rest_order = epochs_of(4, range(2, 4), change=augment.augmenter(CHANGES))
    np.testing.assert_array_equal(full_order[2:], rest_order)
    for a, b in zip(full[2:], rest, strict=True):
        for row in a:
            np.testing.assert_array_equal(a[row], b[row])


def test_the_augmentation_of_a_row_is_fixed_by_seed_and_epoch_whatever_the_batch():
    change = augment.augmenter(CHANGES)
    one, other = epochs_of(4, range(2), change=change)[0], epochs_of(7, range(2), change=change)[0]
    for a, b in zip(one, other, strict=True):
        for row in a:
            np.testing.assert_array_equal(a[row], b[row])
    reseeded = epochs_of(4, range(2), seed=5, change=change)[0]
    for row in range(11):
        assert not np.array_equal(one[0][row], one[1][row])  # another epoch
        assert not np.array_equal(one[0][row], reseeded[0][row])


def test_rows_of_step_is_what_the_batches_hold():
    data = pipeline.training_batches(memory, LABELS, 4, 9, range(2, 9))
    for step, (_, labels) in enumerate(data, start=2):  # in the middle of an epoch
        epoch, rows = pipeline.rows_of_step(step, 11, 4, 9)
        assert epoch == step // 3
        np.testing.assert_array_equal(labels, rows)


RARE = np.array([0] * 20 + [1] * 6 + [2] * 3)


def order_of(epoch, batch_size=4, labels=RARE):
    steps = pipeline.steps_an_epoch(len(labels), batch_size)
    found = [
        pipeline.rows_of_step(epoch * steps + step, len(labels), batch_size, 5, labels)
        for step in range(steps)
    ]
    assert {one for one, _ in found} == {epoch}
    return np.concatenate([rows for _, rows in found])


def test_balanced_epochs_draw_classes_equally_often():
    orders = [order_of(epoch) for epoch in range(60)]
    shares = np.array([np.bincount(RARE[rows], minlength=3) for rows in orders])
    assert (shares.sum(axis=1) == len(RARE)).all()
    assert set(shares.ravel()) == {9, 10}
    assert (shares == 9).any(axis=0).all()  # 29 = 10 + 10 + 9, and no class is always the short one
    for rows in orders:
        times = np.bincount(rows, minlength=len(RARE))
        assert times[:20].max() == 1
        for rare in (slice(20, 26), slice(26, 29)):
            assert np.ptp(times[rare]) <= 1
    seen = np.bincount(np.concatenate(orders), minlength=len(RARE))
    drawn = shares[:, 0].sum() / 20
    assert np.abs(seen[:20] - drawn).max() < 5 * (drawn * 0.5) ** 0.5  # none of the frequent is preferred
    first = np.array([RARE[rows[:10]] for rows in orders])
    np.testing.assert_allclose((first == 2).mean(), 1 / 3, atol=5 * (2 / 9 / 600) ** 0.5)  # and well mixed
    np.testing.assert_array_equal(orders[7], order_of(7, batch_size=11))
    assert not np.array_equal(np.sort(orders[0]), np.sort(orders[1]))


def test_balanced_batches_go_on_after_a_resume_and_augment_repeats_apart():
    images = np.repeat(IMAGES[:1], len(RARE), axis=0)
    images[:, 0, 0, 0] = np.arange(len(RARE))  # what the row is, in a corner that no change below touches

    def batches(epochs, batch_size=4):
        def change(images, seeds):
            corner = tf.cast(images[:, :1, :1, :1], tf.float32)
            return corner + tf.reshape(tf.cast(seeds[:, 0], tf.float32), (-1, 1, 1, 1)) / 2**31

        steps = pipeline.steps_an_epoch(len(RARE), batch_size)
        wanted = range(epochs.start * steps, epochs.stop * steps)
        data = pipeline.training_batches(
            lambda rows, _: images[rows], RARE, batch_size, 5, wanted, change, balance=True
        )
        parts = [(x.numpy().ravel(), y.numpy()) for x, y in data]
        return (np.concatenate(part) for part in zip(*parts, strict=True))

    seen, labels = batches(range(2))
    np.testing.assert_array_equal(np.floor(seen), np.concatenate([order_of(0), order_of(1)]))
    np.testing.assert_array_equal(labels, RARE[np.floor(seen).astype(int)])
    assert len(np.unique(seen[:29])) == 29  # repeats of a row have seeds of their own
    rest, _ = batches(range(1, 2), batch_size=7)
    np.testing.assert_array_equal(seen[29:], rest)


def test_fetch_is_told_the_epoch():
    data = pipeline.training_batches(
        lambda rows, epoch: np.full((len(rows), 1), epoch, np.float32), LABELS, 4, 0, range(6, 14)
    )
    assert [int(inputs[0, 0]) for inputs, _ in data] == [2, 2, 2, 3, 3, 3, 4, 4]
    assert data.element_spec[0].shape.as_list() == [None, 1]
    assert data.element_spec[1].dtype == tf.int64


def test_batches_for_prediction_keep_the_order():
    got = [x.numpy() for x in pipeline.batches(memory, 11, 4)]
    assert [len(x) for x in got] == [4, 4, 3]
    np.testing.assert_array_equal(np.concatenate(got), IMAGES)


@pytest.fixture
def files(tmp_path, picture):
    """Files of several kinds and sizes."""
    names = ["a.png", "b.jpg", "c.bmp", "d.tif", "e.png"]
    for place, name in enumerate(names):
        picture.resize((40 + 9 * place, 50 - 6 * place)).convert("L" if place == 4 else "RGB").save(
            tmp_path / name
        )
    return Manifest(tmp_path, tuple(names), np.array([0, 1, 0, 1, 0]), ("x", "y"))


def test_streamed_equals_in_memory(files):
    size = (24, 36)
    images = pipeline.read_all(files, size)
    assert images.shape == (5, 24, 36, 3)
    assert images.dtype == np.uint8
    fetch = pipeline.streamed(files, size)
    np.testing.assert_array_equal(fetch(np.array([3, 0, 4]), 0), images[[3, 0, 4]])
    for path, image in zip(files.paths, images, strict=True):
        np.testing.assert_array_equal(pipeline.size_pixels(readers.read(path), size), image)
        with Image.open(path) as picture:
            wanted = np.asarray(picture.convert("RGB").resize((36, 24), Image.Resampling.BILINEAR))
        assert np.abs(image.astype(int) - wanted).max() <= 1
    held = pipeline.training_batches(lambda rows, _: images[rows], files.labels, 2, 0, range(6))
    read = pipeline.training_batches(fetch, files.labels, 2, 0, range(6))
    for (a, i), (b, j) in zip(held, read, strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(i, j)


def test_max_pixels_and_window_reach_the_reader(files, tmp_path):
    with pytest.raises(ImageError, match="allowed are 1 to 100"):
        pipeline.read_all(files, (8, 8), max_pixels=100)
    deep = np.full((8, 8, 1), 600, np.uint16)
    (tmp_path / "a.png").write_bytes(tf.io.encode_png(deep).numpy())
    window = (500, 700)
    assert (pipeline.read_all(files.take([0]), (4, 4), window) == 128).all()
    assert (pipeline.streamed(files, (4, 4), window)(np.array([0]), 0) == 128).all()


def test_all_unreadable_files_are_named(files, tmp_path):
    (tmp_path / "b.jpg").write_bytes(b"")
    (tmp_path / "d.tif").write_bytes(b"text")
    with pytest.raises(ImageError, match="2 of 5 images cannot be read") as caught:
        pipeline.read_all(files, (8, 8))
    assert "b.jpg: the file is empty" in str(caught.value)
    assert "d.tif: not an image" in str(caught.value)


def test_an_unreadable_file_is_named_while_streaming(files, tmp_path):
    fetch = pipeline.streamed(files, (8, 8))
    (tmp_path / "c.bmp").write_bytes(b"")
    data = pipeline.training_batches(fetch, files.labels, 2, 0, range(1))
    with pytest.raises(tf.errors.OpError, match=r"c\.bmp: the file is empty"):
        list(data)


def test_a_sized_picture_is_not_resized(picture):
    pixels = np.asarray(picture)
    np.testing.assert_array_equal(pipeline.size_pixels(pixels, (47, 61)), pixels)


def volumes_of(depths, seed=0):
    """Volumes in which a slice's pixels name the volume and the slice."""
    return [
        np.stack([np.full((4, 6, 3), 20 * number + place, np.uint8) for place in range(depth)])
        for number, depth in enumerate(depths)
    ]


def test_volumes_of_different_depth_share_a_batch():
    stacks = volumes_of([3, 1, 5])
    fetch = pipeline.held(stacks)
    [whole] = pipeline.batches(fetch, 3, 8)
    assert whole["image"].shape == (3, 5, 4, 6, 3)
    for stack, image, mask in zip(stacks, whole["image"].numpy(), whole["mask"].numpy(), strict=True):
        assert mask.tolist() == [True] * len(stack) + [False] * (5 - len(stack))
        np.testing.assert_array_equal(image[mask], stack)
        assert not image[~mask].any()


def test_slices_drawn_are_a_function_of_seed_epoch_and_row():
    fetch = pipeline.held(volumes_of([9, 2, 9, 9]))
    labels = np.arange(4)

    def drawn(seed, batch_size, epochs):
        steps = pipeline.steps_an_epoch(4, batch_size)
        wanted = range(epochs.start * steps, epochs.stop * steps)
        data = pipeline.training_batches(
            pipeline.drawn_slices(fetch, (3, 5), seed), labels, batch_size, seed, wanted
        )
        found = {}
        for step, (inputs, targets) in enumerate(data):
            for image, mask, row in zip(
                inputs["image"].numpy(), inputs["mask"].numpy(), targets, strict=True
            ):
                found[epochs.start + step // steps, int(row)] = (
                    image[mask][:, 0, 0, 0] - 20 * int(row)
                ).tolist()
        return found

    chosen = drawn(7, 2, range(6))
    assert {len(chosen[epoch, 0]) for epoch in range(6)} == {3, 4, 5}
    for (_, row), places in chosen.items():
        assert places == sorted(set(places))  # in their order, none twice
        assert len(places) == 2 if row == 1 else 3 <= len(places) <= 5
    assert {place for row in (0, 2, 3) for epoch in range(6) for place in chosen[epoch, row]} == set(range(9))
    assert drawn(7, 3, range(4, 6)) == {key: value for key, value in chosen.items() if key[0] >= 4}
    assert drawn(8, 2, range(6)) != chosen


def test_all_slices_of_a_volume_are_augmented_alike():
    rng = np.random.default_rng(1)
    single = rng.integers(0, 256, (3, 8, 8, 3), np.uint8)
    stacks = [np.stack([one] * depth) for one, depth in zip(single, (2, 4, 3), strict=True)]
    change = augment.augmenter(CHANGES)
    data = pipeline.training_batches(pipeline.held(stacks), np.arange(3), 3, 5, range(1), change)
    flat = pipeline.training_batches(pipeline.held(single), np.arange(3), 3, 5, range(1), change)
    [(inputs, rows)], [(images, same)] = data, flat
    np.testing.assert_array_equal(rows, same)
    for volume, mask, image in zip(inputs["image"], inputs["mask"], images, strict=True):
        for pixels in volume[mask]:
            np.testing.assert_array_equal(pixels, image)


def test_central_slices_are_read_at_the_models_size(tmp_path):
    rng = np.random.default_rng(0)
    stack = rng.integers(0, 256, (7, 20, 10, 3), np.uint8)
    (tmp_path / "a").mkdir()
    for place, pixels in enumerate(stack):
        Image.fromarray(pixels).save(tmp_path / "a" / f"{place}.png")
    table = Manifest(tmp_path, ("a",), np.array([0]), ("x", "y"))
    [read] = pipeline.read_all(table, (8, 12), central=3)
    expected = np.stack([pipeline.size_pixels(pixels, (8, 12)) for pixels in stack[2:5]])
    np.testing.assert_array_equal(read, expected)
    fetched = pipeline.streamed(table, (8, 12), central=3)(np.array([0]), 0)
    np.testing.assert_array_equal(fetched["image"][0], expected)
    assert len(pipeline.read_all(table, (8, 12), central=0)[0]) == 7

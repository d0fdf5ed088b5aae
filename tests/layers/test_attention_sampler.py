import keras
import numpy as np
import pytest
import reference.sampler
import tensorflow as tf

from keras_medattn import ops
from keras_medattn.layers import AttentionSampler


def _attention(*shape, seed=0, sharpness=1.0):
    weights = np.exp(sharpness * np.random.default_rng(seed).normal(size=shape))
    return (weights / weights.sum(axis=(1, 2), keepdims=True)).astype("float32")


def _image(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, "uint8")


def test_training_draws_by_seed_step_and_example():
    attention, image = _attention(4, 5, 6), _image(4, 20, 24, 3)
    layer = AttentionSampler(6, 5, stride=4, seed=1)
    first, second = (np.array(layer(attention, image, training=True)[1]) for _ in range(2))
    assert int(layer.step) == 2
    assert (first != second).any()
    assert (
        first != np.array(AttentionSampler(6, 5, stride=4, seed=2)(attention, image, training=True)[1])
    ).any()

    again = AttentionSampler(6, 5, stride=4, seed=1)
    order = np.array([2, 0, 3])
    cells = again(attention[order], image[order], examples=order.astype("int32"), training=True)[1]
    np.testing.assert_array_equal(cells, first[order])  # whatever else is in the batch
    np.testing.assert_array_equal(again(attention, image, draw=0)[1], first)
    np.testing.assert_array_equal(again(attention, image, draw=1, training=True)[1], second)
    assert int(again.step) == 1  # only a training call that is not given its number counts


def test_draws_follow_the_attention():
    attention = _attention(1, 3, 4)
    many = np.repeat(attention, 2000, axis=0)
    cells = AttentionSampler(10, 2, stride=1, seed=0)(many, np.zeros((2000, 3, 4, 1), "uint8"), draw=0)[1]
    share = np.bincount(np.array(cells).ravel(), minlength=12) / 20_000
    p = attention.ravel()
    assert (np.abs(share - p) < 4 * np.sqrt(p * (1 - p) / 20_000)).all()


def test_draws_without_replacement_differ_and_know_of_each_other():
    attention, image = _attention(3, 2, 3), _image(3, 8, 12, 1)
    layer = AttentionSampler(5, 4, replacement=False, stride=4, seed=0)
    _, cells, log_probs = layer(attention, image, training=True)
    for b in range(3):
        drawn = np.array(cells[b])
        assert len(set(drawn)) == 5
        left = 1.0
        for cell, log_prob in zip(drawn, np.array(log_probs[b]), strict=True):
            p = attention[b].flat[cell]
            np.testing.assert_allclose(log_prob, np.log(p / left), rtol=1e-4)
            left -= p


@pytest.mark.parametrize("stride", [4, None])
def test_inference_chooses_patches_that_do_not_overlap(stride):
    attention, image = _attention(2, 10, 12), _image(2, 40, 48, 1)
    layer = AttentionSampler(6, 9, stride=stride)
    _, cells, log_probs = layer(attention, image)
    for b in range(2):
        expected = reference.sampler.greedy(attention[b], 6, distance=3)
        np.testing.assert_array_equal(cells[b], expected)
        np.testing.assert_allclose(log_probs[b], np.log(attention[b].flat[expected]), rtol=1e-5)
        corners = np.array(ops.cells_to_corners(cells[b : b + 1], (10, 12), (40, 48), 9, stride))[0]
        for i, one in enumerate(corners):
            assert all(np.abs(one - other).max() >= 9 for other in corners[:i])
    plain = AttentionSampler(6, 9, stride=stride, nms=False)(attention, image)[1]
    np.testing.assert_array_equal(plain, np.argsort(-attention.reshape(2, -1), axis=1)[:, :6])
    assert int(layer.step) == 0


def test_one_trace_serves_images_of_all_sizes():
    """A compiled step that samples, over batches of several sizes, and of several sizes in one batch."""
    layer = AttentionSampler(4, 7, stride=3, seed=0)
    eager = AttentionSampler(4, 7, stride=3, seed=0)
    layer.build((None, None, None), (None, None, None, 3))  # a function that makes variables is traced twice
    images = tf.TensorSpec((None, None, None, 3), "uint8")

    @tf.function(input_signature=[images, tf.TensorSpec((None, 2), "int32")])
    def step(image, size):
        attention = ops.masked_softmax(
            keras.ops.mean(ops.overview(image, 3, size), axis=-1) / 50,
            ops.cell_mask(size, (tf.shape(image)[1] // 3, tf.shape(image)[2] // 3), tf.shape(image)[1:3], 3),
        )
        return attention, *layer(attention, image, size, training=True)

    for number, sizes in enumerate([[(9, 12)], [(20, 14)] * 3, [(20, 14), (11, 30), (2, 9)]]):
        height, width = np.max(sizes, axis=0)
        batch = np.full((len(sizes), height, width, 3), 255, "uint8")
        for b, (rows, columns) in enumerate(sizes):
            batch[b, :rows, :columns] = _image(rows, columns, 3, seed=b)
        attention, patches, cells, log_probs = step(batch, np.array(sizes, "int32"))
        for b, (rows, columns) in enumerate(sizes):
            own = batch[b : b + 1, :rows, :columns]
            if min(rows, columns) < 3:  # smaller than a cell
                for answer in (attention, patches, cells, log_probs):
                    np.testing.assert_array_equal(answer[b], 0)
                continue
            alone = np.array(attention)[b : b + 1, : rows // 3, : columns // 3]
            np.testing.assert_allclose(alone.sum(), 1, rtol=1e-5)
            expected = eager(alone, own, examples=np.array([b], "int32"), draw=number)
            np.testing.assert_array_equal(patches[b], expected[0][0])
            np.testing.assert_allclose(log_probs[b], expected[2][0], rtol=1e-5)
    assert step.experimental_get_tracing_count() == 1


def test_log_probabilities_train_the_attention():
    """REINFORCE with a reward for bright patches, in `fit`, on batches of two sizes of image."""
    image = np.zeros((8, 30, 30, 1), "uint8")
    for b in range(8):
        image[b, 6 * (b % 4) : 6 * (b % 4) + 6, 6 * (b // 2) : 6 * (b // 2) + 6] = 255

    class Reader(keras.Model):
        def __init__(self):
            super().__init__()
            self.logits = keras.layers.Conv2D(1, 1)
            self.sampler = AttentionSampler(3, 6, stride=6, seed=0)

        def call(self, image, training=None):
            view = ops.overview(image, 6) / 255
            attention = ops.masked_softmax(keras.ops.squeeze(self.logits(view), -1))
            patches, _, log_probs = self.sampler(attention, image, training=training)
            return keras.ops.mean(patches, axis=(2, 3, 4)) / 255, log_probs

        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
            return ops.reinforce_surrogate(y_pred[1], y_pred[0], "batch_mean")

    model = Reader()
    model(image)
    model.logits.set_weights([np.zeros((1, 1, 1, 1)), np.zeros(1)])
    model.compile(keras.optimizers.Adam(0.1))
    model.fit(image, batch_size=4, epochs=15, verbose=0)
    assert int(model.sampler.step) == 30
    assert float(model.logits.kernel[0, 0, 0, 0]) > 0.5  # it looks at bright cells


def test_replicas_draw_as_one_does(mirrored):
    attention, image = _attention(4, 5, 6), _image(4, 20, 24, 3)
    examples = np.arange(10, 14, dtype="int32")
    alone = AttentionSampler(6, 5, stride=4, seed=1)
    expected = [np.array(alone(attention, image, examples=examples, training=True)[1]) for _ in range(2)]
    with mirrored.scope():
        layer = AttentionSampler(6, 5, stride=4, seed=1)
        layer.build(attention.shape, image.shape)

    def replica():
        first = 2 * tf.distribute.get_replica_context().replica_id_in_sync_group
        half = [tf.constant(each)[first : first + 2] for each in (attention, image, examples)]
        return layer(*half[:2], examples=half[2], training=True)[1]

    step = tf.function(lambda: mirrored.run(replica))
    for cells in expected:
        replicas = mirrored.experimental_local_results(step())
        np.testing.assert_array_equal(np.concatenate(replicas), cells)


def test_the_number_of_training_calls_is_saved(tmp_path):
    attention, image = keras.Input((5, 6)), keras.Input((20, 24, 3), dtype="uint8")
    model = keras.Model([attention, image], AttentionSampler(6, 5, stride=4)(attention, image))
    inputs = [_attention(2, 5, 6), _image(2, 20, 24, 3)]
    model(inputs, training=True)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(again(inputs, training=True)[1], model(inputs, training=True)[1])


def test_small_attention_is_not_rounded_in_mixed_precision():
    attention, image = _attention(2, 40, 40, sharpness=0.001), _image(2, 80, 80, 3)
    exact = AttentionSampler(5, 4, stride=2)(attention, image)
    mixed = AttentionSampler(5, 4, stride=2, dtype="mixed_bfloat16")(attention, image)
    np.testing.assert_array_equal(mixed[1], exact[1])
    assert mixed[0].dtype == "bfloat16"
    np.testing.assert_array_equal(tf.cast(mixed[0], "float32"), exact[0])  # bytes have at most 8 bits


def test_errors_name_what_was_received():
    with pytest.raises(ValueError, match="Received: patches=0, patch_size=5, stride=None"):
        AttentionSampler(0, 5)
    with pytest.raises(ValueError, match=r"Received: attention.shape=\(1, 4\), image.shape=\(1, 8, 8, 3\)"):
        AttentionSampler(1, 5)(np.zeros((1, 4)), _image(1, 8, 8, 3))
    with pytest.raises(ValueError, match="give `stride`, or nms=False"):
        AttentionSampler(1, 5)(keras.Input((4, 4)), keras.Input((None, None, 3)))
    with pytest.raises(ValueError, match="at most the number of cells"):
        AttentionSampler(5, 5, replacement=False)(_attention(1, 2, 2), _image(1, 8, 8, 3), training=True)

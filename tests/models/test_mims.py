"""MIMS: its configurations against their equations, and a saved model against itself."""

import subprocess
import sys

import keras
import numpy as np
import pytest
import reference
import reference.mims

import keras_medattn
from keras_medattn.models import MIMS, arguments, system

IMAGES = np.random.default_rng(0).integers(0, 255, (2, 64, 80, 3)).astype("uint8")


def backbone():
    """Maps at stride 8, by plain pooling: what is tested is what follows."""
    image = keras.Input((None, None, 3))
    pooled = keras.layers.AveragePooling2D(8)(image)
    return keras.Model(image, keras.layers.Rescaling(1 / 64, -2.0)(pooled))


def build(**arguments):
    model = MIMS(3, backbone(), stride=8, **arguments)
    model.build((None, 64, 80, 3))
    rng = np.random.default_rng(1)
    for weight in model.weights:
        if weight.name != "seed_generator_state":
            value = rng.normal(size=weight.shape) * 0.5
            weight.assign(np.abs(value) + 0.5 if weight.name in ("moving_variance", "sw") else value)
    return model


def maps_of(model):
    return np.float64(model.features(IMAGES))


def head(model, features):
    return features @ np.float64(model.head.kernel) + np.float64(model.head.bias)


@pytest.mark.parametrize("aggregation", ["mean", "max", "top_k"])
def test_primary_maps_pooled(aggregation):
    """`kernels=()` is the paper's MI-Pre; with the mean, global average pooling and a linear probe."""
    model = build(kernels=(), aggregation=aggregation, k=4)
    bag = maps_of(model).reshape(2, -1, 3)
    highest = -np.sort(-bag, axis=1)
    if aggregation == "top_k":
        logits = np.float64(model.pool.weights[0])
        weights = np.exp(logits) / np.exp(logits).sum()
        pooled = np.einsum("bkn,k->bn", highest[:, :4], weights)
    else:
        pooled = bag.mean(axis=1) if aggregation == "mean" else highest[:, 0]
    mean, variance = (np.float64(w) for w in model.standardise.get_weights())
    standard = (pooled - mean) / np.sqrt(variance + model.standardise.epsilon)
    np.testing.assert_allclose(model(IMAGES), head(model, standard), rtol=1e-4, atol=1e-4)


def test_whole_system_is_conv_pool_head():
    """Maps -> tied convolutions over scales, normalised -> top k -> linear, by the reference's equations."""
    model = build(kernels=((1, 2), (2, 3)), scales=(0.5, 1.0), k=3)
    conv = {weight.path.split("ms_conv/", 1)[1]: np.float64(weight) for weight in model.ms_conv.weights}
    pool = {weight.path.split("pool/", 1)[1]: np.float64(weight) for weight in model.pool.weights}
    bags = reference.mims.ms_conv(
        conv, maps_of(model), None, training=False, kernels=((1, 2), (2, 3)), scales=(0.5, 1.0)
    )
    pooled = reference.mims.top_k_pool(pool, bags)["pooled"]
    np.testing.assert_allclose(model(IMAGES), head(model, pooled), rtol=1e-4, atol=1e-4)


TRIDENT = {"kernels": ((3, 2),), "scales": (1.0, 1.0, 1.0), "dilations": (1, 2, 3)}
PYRAMID = {"kernels": ((2, 3), (1, 2)), "scales": (0.5, 0.75, 1.0), "pyramid": True}
VOLUMES = np.random.default_rng(2).integers(0, 255, (2, 3, 64, 80, 3)).astype("uint8")
MASK = np.array([[True, False, True], [True, True, True]])


def secondary(model, maps, mask=None, name="ms_conv"):
    """Bags of a model's convolution by the equations, in float64."""
    layer = getattr(model, name)
    weights = {weight.path.split(f"{name}/", 1)[1]: np.float64(weight) for weight in layer.weights}
    return reference.mims.ms_conv(
        weights, maps, mask, kernels=layer.kernels, scales=layer.scales, dilations=layer.dilations
    )


def pooled(model, bags):
    pool = {weight.path.split("pool/", 1)[1]: np.float64(weight) for weight in model.pool.weights}
    return reference.mims.top_k_pool(pool, bags)["pooled"]


def pyramid_of(model, images):
    """Maps of the images at each scale, resized by the reference, through the backbone."""
    flat = np.float64(images).reshape(-1, *images.shape[-3:])
    maps = []
    for scale in model.scales:
        scaled = reference.resize_bilinear(flat, int(64 * scale), int(80 * scale)).astype("float32")
        level = np.float64(model.backbone(scaled))
        maps.append(level.reshape(*images.shape[:-3], *level.shape[1:]))
    return maps


def log_softmax(scores):
    scores = scores - scores.max(axis=-1, keepdims=True)
    return scores - np.log(np.exp(scores).sum(axis=-1, keepdims=True))


def test_trident_convolves_at_three_dilations():
    model = build(**TRIDENT, k=3)
    expected = head(model, pooled(model, secondary(model, maps_of(model))))
    np.testing.assert_allclose(model(IMAGES), expected, rtol=1e-4, atol=1e-4)


def test_a_pyramid_of_images_goes_through_the_backbone_and_the_same_kernels():
    model = build(**PYRAMID, k=3)
    expected = head(model, pooled(model, secondary(model, pyramid_of(model, IMAGES))))
    np.testing.assert_allclose(model(IMAGES), expected, rtol=1e-3, atol=1e-3)


def test_a_pyramid_of_primary_maps_shares_the_top_k():
    model = build(kernels=(), pyramid=True, aggregation="max", scales=(0.5, 1.0))
    highest = np.max([level.max(axis=(1, 2)) for level in pyramid_of(model, IMAGES)], axis=0)
    mean, variance = (np.float64(w) for w in model.standardise.get_weights())
    standard = (highest - mean) / np.sqrt(variance + model.standardise.epsilon)
    np.testing.assert_allclose(model(IMAGES), head(model, standard), rtol=1e-3, atol=1e-3)


def test_two_strides_have_kernels_of_their_own(tmp_path):
    arguments = {"kernels": ((2, 3),), "scales": (1.0,), "k": 2, "stride": 8, "second_stride": 16}
    model = MIMS(3, "mobilenet_v3_small", weights=None, **arguments)
    model.build((None, 64, 80, 3))
    first = np.float64(model.features(IMAGES))
    second = np.float64(model.upper(model.features(IMAGES)))
    assert second.shape[1:3] == (4, 5)
    bags = secondary(model, first) + secondary(model, second, name="upper_conv")
    np.testing.assert_allclose(model(IMAGES), head(model, pooled(model, bags)), rtol=1e-4, atol=1e-4)
    model.save(tmp_path / "model.keras")
    np.testing.assert_array_equal(keras_medattn.load_model(tmp_path / "model.keras")(IMAGES), model(IMAGES))
    other = MIMS(3, "mobilenet_v3_small", weights_from=str(tmp_path / "model.keras"), **arguments)
    np.testing.assert_array_equal(other(IMAGES), model(IMAGES))
    with pytest.raises(ValueError, match=r"`weights_from` must be a saved MIMS with the same arguments"):
        MIMS(2, "mobilenet_v3_small", weights_from=str(tmp_path / "model.keras"), **arguments)(IMAGES)
    with pytest.raises(ValueError, match=r"`second_stride` must be above `stride`"):
        MIMS(3, "mobilenet_v3_small", stride=16, second_stride=16)


def test_volume_pools_positions_scales_and_slices_together():
    model = build(kernels=((1, 2), (2, 3)), scales=(0.5, 1.0), k=4)
    maps = np.float64(model.features(VOLUMES))
    expected = head(model, pooled(model, secondary(model, maps, MASK)))
    np.testing.assert_allclose(model({"image": VOLUMES, "mask": MASK}), expected, rtol=1e-4, atol=1e-4)


def slice_scores(model):
    flat = VOLUMES.reshape(-1, 64, 80, 3)
    bags = secondary(model, np.float64(model.features(flat)))
    return head(model, pooled(model, bags)).reshape(2, 3, 3)


def test_mean_of_slice_predictions():
    model = build(kernels=((2, 3),), scales=(0.5, 1.0), aggregation="slice_mean")
    chances = np.exp(log_softmax(slice_scores(model)))
    expected = [chances[0, [0, 2]].mean(axis=0), chances[1].mean(axis=0)]
    answer = log_softmax(np.float64(model({"image": VOLUMES, "mask": MASK})))
    np.testing.assert_allclose(np.exp(answer), expected, rtol=1e-4, atol=1e-6)


def test_max_of_slice_predictions():
    """The slice least likely of the first class; of two classes, the highest probability of the second."""
    model = build(kernels=((2, 3),), scales=(0.5, 1.0), aggregation="slice_max")
    scores = slice_scores(model)
    first = log_softmax(scores)[..., 0]
    first[~MASK] = np.inf
    expected = scores[[0, 1], first.argmin(axis=1)]
    named = model.explain({"image": VOLUMES, "mask": MASK})
    np.testing.assert_allclose(named["scores"], expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(model({"image": VOLUMES, "mask": MASK}), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(np.array(named["slice_scores"])[MASK], scores[MASK], rtol=1e-4, atol=1e-4)
    weights, slices = np.array(named["weights"]), np.array(named["slices"])
    for volume in range(2):  # only the boxes of the chosen slice weigh, and sum to its score without the bias
        assert set(slices[volume][weights[volume] != 0]) == {first[volume].argmin()}
        predicted = expected[volume].argmax()
        total = expected[volume, predicted] - float(model.head.bias[predicted])
        np.testing.assert_allclose(weights[volume].sum(), total, rtol=1e-3, atol=1e-4)


KINDS = {
    "primary": {"kernels": ()},
    "mean": {"aggregation": "mean", "kernels": ((2, 3),)},
    "pyramid": PYRAMID,
    "trident": TRIDENT,
    "bottleneck": {"bottleneck": 4, "kernels": ((2, 3),)},
    "slices": {"aggregation": "slice_max", "kernels": ((2, 3),)},
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_lies_in_padding_changes_nothing(kind):
    model = build(**KINDS[kind])
    float_volumes = VOLUMES.astype("float32")
    answers = []
    for filler in (0.0, 255.0, np.nan):
        float_volumes[0, 1] = filler
        answers.append(np.array(model({"image": float_volumes, "mask": MASK})))
        np.testing.assert_array_equal(answers[-1], answers[0])
    alone = model(VOLUMES[:1, ::2])  # the two slices that exist, without a mask
    np.testing.assert_allclose(answers[0][:1], alone, rtol=1e-4, atol=1e-5)
    one = model({"image": VOLUMES[:, :1], "mask": MASK[:, :1]})
    np.testing.assert_allclose(one, model(VOLUMES[:, 0]), rtol=1e-4, atol=1e-5)
    none = np.array(model({"image": float_volumes, "mask": np.zeros_like(MASK)}))
    assert np.isfinite(none).all()


def normalised():
    """As `backbone`, with a batch norm that learns."""
    image = keras.Input((None, None, 3))
    norm = keras.layers.BatchNormalization(momentum=0.5)
    return keras.Model(image, norm(keras.layers.AveragePooling2D(8)(image)))


def test_padding_enters_no_batch_statistics():
    """Neither the backbone's, where they are learnt, nor those of the bottleneck, the scales or the head."""
    learnt = []
    for filler in (0, 255):
        padded = VOLUMES.copy()
        padded[0, 1] = filler
        models = [
            MIMS(2, normalised(), 8, kernels=kernels, scales=(1.0,), bottleneck=3)
            for kernels in ((), ((2, 3),))
        ]
        for number, model in enumerate(models):
            model.build((None, 64, 80, 3))
            rng = np.random.default_rng(3 + number)
            for weight in model.trainable_weights:
                weight.assign(rng.normal(size=weight.shape))
            model({"image": padded, "mask": MASK}, training=True)
        learnt.append([np.array(w) for model in models for w in model.non_trainable_weights])
    for first, second in zip(*learnt, strict=True):
        np.testing.assert_array_equal(first, second)
    rows = np.float64(VOLUMES[MASK]).reshape(-1, 8, 8, 10, 8, 3).mean(axis=(2, 4))
    np.testing.assert_allclose(learnt[0][0], 0.5 * rows.mean(axis=(0, 1, 2)), rtol=1e-5)


def test_boxes_of_a_volume_name_their_slice():
    """A bright patch on one slice: its box lies there, whatever is beside it."""
    model = build(kernels=((1, 1),), scales=(1.0,), k=1)
    for weight in model.ms_conv.convolutions[0].weights:
        weight.assign(np.ones(weight.shape))
    model.head.kernel.assign([[0.0, 1.0, 0.5]])
    model.head.bias.assign([0.0, 0.0, 0.0])
    volume = np.zeros((1, 4, 64, 80, 3), "uint8")
    volume[0, 2, 16:24, 40:48] = 255
    named = model.explain({"image": volume, "mask": np.ones((1, 4), bool)})
    assert np.array(named["slices"]).tolist() == [[2]]
    np.testing.assert_allclose(named["boxes"], [[[40, 16, 48, 24]]])


def test_volumes_of_different_depth_are_fitted():
    keras.utils.set_random_seed(0)
    model = MIMS(2, normalised(), 8, kernels=((1, 4),), scales=(1.0,), k=2)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.01), loss, jit_compile=False)
    inputs = {"image": VOLUMES, "mask": MASK}
    history = model.fit(inputs, np.array([0, 1]), epochs=6, verbose=0).history["loss"]
    assert history[-1] < history[0]
    assert np.isfinite(model.predict(inputs, verbose=0)).all()


def test_bottleneck_is_relu_of_a_projection():
    model = build(kernels=(), aggregation="mean", bottleneck=5)
    norm, conv = model.bottleneck.layers
    mean, variance = (np.float64(w) for w in norm.get_weights())
    kernel, bias = (np.float64(w) for w in conv.get_weights())
    standard = (maps_of(model) - mean) / np.sqrt(variance + norm.epsilon)
    pooled = np.maximum(standard @ kernel[0, 0] + bias, 0).mean(axis=(1, 2))
    mean, variance = (np.float64(w) for w in model.standardise.get_weights())
    standard = (pooled - mean) / np.sqrt(variance + model.standardise.epsilon)
    np.testing.assert_allclose(model(IMAGES), head(model, standard), rtol=1e-4, atol=1e-4)


def test_saved_and_reloaded_in_a_fresh_process_is_bit_equal(tmp_path):
    model = MIMS(2, "mobilenet_v3_small", 8, None, kernels=((2, 3),), k=3, dropout=0.1, bottleneck=4)
    model.build((None, 64, 80, 3))
    model.save(tmp_path / "model.keras")
    np.save(tmp_path / "images.npy", IMAGES)
    code = (
        "import sys, numpy as np, keras_medattn\n"
        "model = keras_medattn.load_model(sys.argv[1] + '/model.keras')\n"
        "norms = [one for one in model.backbone.layers if 'BatchNorm' in type(one).__name__]\n"
        "assert norms and not any(one.trainable for one in norms)\n"
        "np.save(sys.argv[1] + '/scores.npy', model(np.load(sys.argv[1] + '/images.npy')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path], capture_output=True, encoding="utf-8", check=False
    )
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(np.load(tmp_path / "scores.npy"), model(IMAGES))


def test_fit_as_any_keras_model_and_frozen_batch_norm_stays():
    keras.utils.set_random_seed(0)
    model = MIMS(2, "mobilenet_v3_small", 8, None, kernels=((1, 4),), scales=(1.0,), k=2)
    norms = [one for one in model.backbone.layers if isinstance(one, keras.layers.BatchNormalization)]
    before = [one.get_weights() for one in norms]
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.01), loss, jit_compile=False)
    labels = np.array([0, 1])
    history = model.fit(IMAGES, labels, epochs=8, verbose=0).history["loss"]
    assert history[-1] < history[0]
    for one, old in zip(norms, before, strict=True):
        for new, first in zip(one.get_weights(), old, strict=True):
            np.testing.assert_array_equal(new, first)


def test_faults_are_named():
    with pytest.raises(ValueError, match=r"`aggregation` must be one of .* Received: 'sum'"):
        MIMS(2, backbone(), aggregation="sum")
    with pytest.raises(ValueError, match=r"`dilations` must be a rate .* for each scale"):
        MIMS(2, backbone(), dilations=(1, 2))
    wide = MIMS(2, backbone(), kernels=((3, 2),), scales=(1.0,), dilations=(3,))
    with pytest.raises(ValueError, match=r"At scale 1.0 the map is smaller than the kernel of size 7"):
        wide.build((None, 48, 80, 3))
    with pytest.raises(ValueError, match=r"`num_classes` must be 2 or more. Received: 1"):
        MIMS(1, backbone())
    with pytest.raises(ValueError, match=r"Did you mean 'MIMS'\? Received: 'mims'"):
        system("mims")
    with pytest.raises(ValueError, match=r"Known: AttentionSampling, .*MIMS.*\. Received: 'resnet'"):
        system("resnet")
    assert "num_classes" not in arguments("MIMS")
    assert keras_medattn.models.SYSTEMS["MIMS"] is MIMS

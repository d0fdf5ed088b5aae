"""GatedFusion: its equations, what may not change its answer, the two losses, the model saved."""

import keras
import numpy as np
import pytest
import reference
import reference.gated
import tensorflow as tf
from conftest import TINY

import keras_medattn
from keras_medattn.explain import report
from keras_medattn.export import saved_model
from keras_medattn.layers import GatedAttention
from keras_medattn.models import GatedFusion, LossBalance, arguments, gated_fusion, system
from keras_medattn.train import evaluate, experiment, recipe

IMAGES = np.random.default_rng(0).integers(0, 255, (2, 60, 75, 3)).astype("uint8")
LABELS = np.array([0, 2])
CHANNELS, FEATURES = 64, 8


def small(channels, stride=8):
    """Maps at a stride, not negative; a black image has features, too."""
    image = keras.Input((None, None, 3))
    pooled = keras.layers.Rescaling(1 / 64)(keras.layers.AveragePooling2D(stride)(image))
    return keras.Model(image, keras.layers.Conv2D(channels, 1, activation="relu")(pooled))


def build(attention="gated", **arguments):
    settings = {"overview_size": 32, "crop_size": 8, "k": 4, "schedule": ()} | arguments
    model = GatedFusion(3, attention, small(CHANNELS), small(FEATURES), weights=None, **settings)
    model.build((None, None, None, 3))
    rng = np.random.default_rng(1)
    for weight in model.weights:
        if weight.name not in ("moving_variance", "temperature", "balance"):
            weight.assign(rng.normal(size=weight.shape) * 0.3)
    return model


def numbers(found):
    return keras.tree.map_structure(keras.ops.convert_to_numpy, found)


def dense(layer, features):
    kernel, bias = (np.float64(weight) for weight in layer.get_weights())
    return features @ kernel + bias


def cross_entropy(scores, weights=1.0):
    scores = np.float64(scores)
    losses = np.log(np.exp(scores).sum(axis=1)) - scores[np.arange(len(scores)), LABELS]
    return (losses * weights).mean()


def below(layer, name):
    return {weight.path.split(name + "/", 1)[1]: np.float64(numbers(weight)) for weight in layer.weights}


@pytest.mark.parametrize("gate_global", [True, False])
def test_whole_system_is_its_equations(gate_global):
    """Maps -> gated attention -> crops of the image in full resolution -> features -> fusion."""
    model = build(gate_global=gate_global)
    kernel = numbers(model.head.kernel).copy()
    kernel[CHANNELS:] = np.abs(kernel[CHANNELS:])
    kernel[CHANNELS : CHANNELS + FEATURES] = 0  # the instance that is first in attention weighs least
    model.head.kernel.assign(kernel)
    found = numbers(model.explain(IMAGES))
    expected = reference.gated.gated_attention(below(model.attention, "attention"), np.float64(found["maps"]))
    for name in ("semantic", "gates", "attention"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=1e-6)
    crops, boxes, mask = reference.gated.instance_crops(
        expected["attention"], IMAGES, None, k=4, crop_size=8, label_size=56
    )
    assert 0 < mask.sum() < mask.size  # there are instances, and empty slots
    pixel_kernel, bias = (np.float64(weight) for weight in model.instance_backbone.get_weights())
    pixels = crops.mean(axis=(2, 3)) / 64  # (B, K, 3): one cell a crop
    features = np.maximum(pixels @ pixel_kernel[0, 0] + bias, 0) * mask[..., None]
    pooled = (expected["gated"] if gate_global else np.float64(found["maps"])).mean(axis=(1, 2))
    fused = np.concatenate([pooled, features.reshape(2, -1)], axis=1)
    np.testing.assert_allclose(found["scores"], dense(model.head, fused), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["global_scores"], dense(model.global_head, pooled), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(numbers(model(IMAGES)), found["scores"])
    added = np.einsum("bkd,kdc->bkc", features, np.float64(kernel)[CHANNELS:].reshape(4, FEATURES, 3))
    predicted = found["scores"].argmax(axis=1)[:, None, None]
    added = np.take_along_axis(added, predicted, axis=2)[..., 0]
    inside = reference.resize_bilinear(expected["attention"][..., None], 56, 56)[..., 0]
    np.testing.assert_array_equal(found["above"], inside > inside.mean(axis=(1, 2), keepdims=True))
    order = np.argsort(np.where(mask, -added, np.inf), axis=1)
    assert (order != np.arange(4)).any()
    for name, values in {"weights": added, "mask": mask}.items():
        sorted_values = np.take_along_axis(values, order, axis=1)
        np.testing.assert_allclose(np.float64(found[name]), sorted_values, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["boxes"], np.take_along_axis(boxes, order[..., None], 1), rtol=1e-5)
    shares = np.take_along_axis(found["shares"], np.argsort(order, axis=1), 1)  # as the crops come
    assert (np.diff(shares, axis=1) <= 0).all()
    assert (shares > 0).tolist() == mask.tolist()


def test_slots_without_an_instance_change_nothing():
    """Whatever the head makes of them; the crops of these slots are black, and black has features."""
    model = build(k=40)
    found = numbers(model.explain(IMAGES))
    used = found["mask"].any(axis=0).sum()
    assert used < 40
    assert np.maximum(model.instance_backbone.get_weights()[1], 0).max() > 0
    kernel = numbers(model.head.kernel).copy()
    kernel[CHANNELS + used * FEATURES :] = 1e9
    model.head.kernel.assign(kernel)
    np.testing.assert_array_equal(numbers(model(IMAGES)), found["scores"])
    fewer = build(k=int(used))
    fewer.attention.set_weights(model.attention.get_weights())
    fewer.head.set_weights([kernel[: CHANNELS + used * FEATURES], model.head.get_weights()[1]])
    np.testing.assert_allclose(numbers(fewer(IMAGES)), found["scores"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("balance", [1.0, 0.7, 0.0])
def test_loss_is_the_mixture_of_both(balance):
    model = build()
    model.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.head.kernel.regularizer = keras.regularizers.L2(0.01)
    added = 0.01 * np.square(np.float64(numbers(model.head.kernel))).sum()  # once, whatever the mixture
    model.balance.assign(balance)
    found = numbers(model(IMAGES, training=True))
    assert set(found) == {"scores", "global_scores"}
    weights = np.array([0.5, 2.0], "float32")
    mixed = [
        added
        + balance * cross_entropy(found["global_scores"], w)
        + (1 - balance) * cross_entropy(found["scores"], w)
        for w in (1.0, weights)
    ]
    assert not np.isclose(cross_entropy(found["global_scores"]), cross_entropy(found["scores"]), rtol=0.01)
    np.testing.assert_allclose(numbers(model.compute_loss(None, LABELS, found)), mixed[0], rtol=1e-5)
    np.testing.assert_allclose(numbers(model.compute_loss(None, LABELS, found, weights)), mixed[1], rtol=1e-5)
    np.testing.assert_allclose(
        model.evaluate(IMAGES, LABELS, verbose=0), added + cross_entropy(numbers(model(IMAGES))), rtol=1e-5
    )


def test_fit_lowers_the_balance_and_each_part_learns_by_its_own_loss():
    """At 1 fusion rests; at 0 the global head. Metrics are those of the answer."""
    model = build(schedule=(0.5, 2, 0.25))
    model.compile(
        keras.optimizers.SGD(0.01),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    balances, moved = [], []
    parts = {name: getattr(model, name) for name in ("global_head", "head", "instance_backbone", "attention")}

    def begin(epoch, logs):
        balances.append(float(model.balance))

    def kept():
        return {name: part.get_weights() for name, part in parts.items()}

    before = kept()

    def end(epoch, logs):
        after = kept()
        moved.append(
            {
                name: any((a != b).any() for a, b in zip(before[name], after[name], strict=True))
                for name in parts
            }
        )
        before.update(after)

    watch = keras.callbacks.LambdaCallback(on_epoch_begin=begin, on_epoch_end=end)
    history = model.fit(IMAGES, LABELS, epochs=5, verbose=0, callbacks=[watch], batch_size=2).history
    assert balances == [1, 1, 0.5, 0.5, 0.25]
    assert model.ready_epoch == 2  # fusion rests before, see `moved`
    assert moved[0] == {"global_head": True, "head": False, "instance_backbone": False, "attention": True}
    assert all(moved[2].values())
    assert set(history) == {"loss", "accuracy"}
    model.schedule = (0.5, 2)
    model.fit(IMAGES, LABELS, initial_epoch=5, epochs=6, verbose=0, callbacks=[watch])
    assert balances[-1] == 0
    assert moved[-1] == {"global_head": False, "head": True, "instance_backbone": True, "attention": True}


def test_read_literally_the_attention_is_not_trained():
    model = build(gate_global=False)
    model.compile(keras.optimizers.SGD(0.1), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.balance.assign(0.5)
    before = [numbers(weight) for weight in model.attention.trainable_weights]
    head = numbers(model.head.kernel)
    model.fit(IMAGES, LABELS, verbose=0)
    for weight, old in zip(model.attention.trainable_weights, before, strict=True):
        np.testing.assert_array_equal(numbers(weight), old)
    assert (numbers(model.head.kernel) != head).any()


@pytest.mark.parametrize("attention", sorted(gated_fusion.ATTENTION))
def test_every_module_trains_and_names_what_it_has(attention):
    model = build(attention)
    model.balance.assign(0.5)
    model.compile(keras.optimizers.SGD(0.01), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    # a step of the temperature is lost in the rounding of a number around 20
    own = [weight for weight in model.attention.trainable_weights if weight.name != "temperature"]
    before = [numbers(weight) for weight in own]
    losses = model.fit(IMAGES, LABELS, epochs=4, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    assert all((old != numbers(weight)).any() for old, weight in zip(before, own, strict=True))
    names = {
        "gated": {"semantic", "gates"},
        "non_local": {"affinity"},
        "channel": {"affinity"},
        "dual": {"positions", "channels"},
        "squeeze_excite": {"gates"},
        "global_context": {"context"},
    }[attention]
    shared = {"maps", "attention", "above", "boxes", "mask", "weights", "shares", "scores", "global_scores"}
    found = numbers(model.explain(IMAGES))
    assert set(found) == names | shared
    refined = numbers(model.attention(found["maps"]))
    np.testing.assert_allclose(found["attention"], np.mean(refined, axis=-1), rtol=1e-4, atol=1e-5)
    pooled = np.mean(refined, axis=(1, 2), dtype="float64")
    np.testing.assert_allclose(found["global_scores"], dense(model.global_head, pooled), rtol=1e-3, atol=1e-4)


def test_overview_averages_where_it_shrinks():
    image = np.random.default_rng(0).normal(size=(1, 9, 40, 2)).astype("float32")
    enlarged = numbers(gated_fusion.overview(image, 48))
    np.testing.assert_allclose(enlarged, reference.resize_bilinear(image, 48, 48), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(numbers(gated_fusion.overview(image[:, :, :9], 9)), image[:, :, :9], rtol=1e-6)
    eight = np.repeat(image[:, :8], 2, axis=1)[:, :, :16]  # 16 rows of pairs, 16 columns
    means = eight.reshape(1, 2, 8, 2, 8, 2).mean(axis=(2, 4))
    shrunk = numbers(gated_fusion.overview(eight, 2))
    assert np.abs(shrunk - means).max() < 0.1 < np.abs(reference.resize_bilinear(eight, 2, 2) - means).max()
    # one row: pixel 1 of 2 over 8 pixels reads 4 + 1.5 + 3 (j + 1/2) / 8 - 3 / 2, j = 0 ... 7
    row = np.random.default_rng(1).integers(0, 256, 8)
    places = 5.5 + 3 * ((np.arange(8) + 0.5) / 8 - 0.5)
    expected = np.interp(places, np.arange(8), row).mean()
    for dtype in ("uint8", "float32"):
        answer = gated_fusion.overview(np.tile(row.reshape(1, 1, 8, 1), (1, 3, 1, 1)).astype(dtype), 2)
        np.testing.assert_allclose(numbers(answer)[0, :, 1, 0], [expected, expected], rtol=1e-5)


def test_saved_model_is_the_same_model(tmp_path):
    model = build(GatedAttention(sequential=True, name="mine"), threshold="max", level=0.3)
    model.balance.assign(0.3)
    expected = numbers(model(IMAGES))
    model.save(tmp_path / "model.keras")
    again = keras_medattn.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(numbers(again(IMAGES)), expected)
    assert (again.attention.sequential, again.crops.threshold, again.crops.level) == (True, "max", 0.3)
    assert float(again.balance) == float(model.balance)
    fresh = GatedFusion.from_config(model.get_config())
    assert fresh.get_config() == model.get_config()


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="a SavedModel is TensorFlow's")
def test_exported_model_is_the_same_model_at_any_size(tmp_path):
    import tensorflow as tf

    model = build()
    signature = [keras.InputSpec(dtype="uint8", shape=(None, None, None, 3))]
    model.export(tmp_path / "exported", input_signature=signature, verbose=False)
    served = tf.saved_model.load(str(tmp_path / "exported"))
    for images in (IMAGES, np.random.default_rng(2).integers(0, 255, (5, 130, 41, 3)).astype("uint8")):
        np.testing.assert_allclose(served.serve(images), model(images), rtol=1e-5, atol=1e-5)


def test_recipes_know_it():
    assert system("GatedFusion") is GatedFusion
    assert {"attention", "backbone", "crop_size", "threshold"} <= set(arguments("GatedFusion"))


def test_the_paper_s_networks_are_the_default():
    """ResNet-18 for the overview, ResNet-50 for the crops, 512 filters; at the paper's sizes."""
    model = GatedFusion(4, weights=None)
    model.build((None, None, None, 3))
    assert [one.name for one in model.backbones] == ["resnet18", "resnet50"]
    assert (model.overview_size, model.crops.crop_size, model.ready_epoch) == (224, 336, 20)
    trained = [one.count_params() for one in model.backbones]
    assert trained == [11_176_512 + 9_600, 23_587_712]  # without heads; 9,600 statistics; Keras's own count
    fused = 512 + 4 * 2048
    gated = 2 * (9 * 512 * 512 + 4 * 512) + 1  # two blocks with batch norm, the temperature
    assert model.count_params() == sum(trained) + gated + 513 * 4 + (fused + 1) * 4 + 1  # lambda


def test_errors_say_what_was_received():
    with pytest.raises(ValueError, match=r"one of \('gated', .* or a layer. Received: 'gate'"):
        GatedFusion(2, "gate", small(4), small(4))
    with pytest.raises(ValueError, match=r"`overview_size` must be at least 1. Received: 0"):
        GatedFusion(2, "gated", small(4), small(4), overview_size=0)
    with pytest.raises(ValueError, match=r"`every` must be at least 1. Received: every=0"):
        LossBalance(every=0)


@pytest.mark.slow
def test_recipe_to_saved_model(tmp_path, tiny_set):
    """Trained, evaluated, explained and exported as any other system."""
    networks = dict.fromkeys(("backbone", "instance_backbone"), "mobilenet_v3_small")
    model = {"system": "GatedFusion", "weights": None, "overview_size": 48, "crop_size": 32, "k": 3}
    values = {"model": model | networks | {"schedule": [0.5, 1, 0.0], "freeze_batch_norm": False}}
    settings = recipe.from_dict(TINY | values | {"train": {"epochs": 2, "batch_size": 8}})
    parts = experiment.train(settings, tiny_set, tmp_path / "run", write=lambda line: None)
    found = evaluate.evaluate(parts)
    [part] = parts
    test = part.manifest.split("test")
    finding = next(report.findings(part.model(), part.recipe, test.paths[:1]))
    np.testing.assert_allclose(finding.probabilities, found.probabilities[0], rtol=1e-4)
    assert len(finding.boxes) == len(finding.weights) <= 3
    assert (finding.boxes[:, 2:] > finding.boxes[:, :2]).all()  # none is an empty slot
    (tmp_path / "exported").mkdir()
    folder, differences = saved_model.export(
        part.model(), part.recipe, part.manifest.class_names, tmp_path / "exported", test
    )
    assert max(differences.values()) <= 1e-4
    served = tf.saved_model.load(str(folder))
    answer = served.signatures["explain"](tf.constant([test.paths[0].read_bytes()]))
    real = answer["boxes"][0, :, 2] > 0
    np.testing.assert_allclose(answer["boxes"][0][real], finding.boxes, atol=1e-3)

"""GlobalMask: its equations, its two phases, what a snapshot holds, and what must not leave training."""

import itertools
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import keras
import numpy as np
import pytest
import reference.global_pixel_mask
import tensorflow as tf
from PIL import Image
from tensorflow.core.protobuf import saved_model_pb2

import keras_medattn
from keras_medattn.data import pipeline
from keras_medattn.data.manifest import Manifest
from keras_medattn.explain import heatmaps
from keras_medattn.export import saved_model
from keras_medattn.layers import PixelWeights
from keras_medattn.models import GlobalMask, arguments, system
from keras_medattn.train import trainer
from keras_medattn.train.recipe import Data, Recipe, RecipeError, Train

IMAGES = np.random.default_rng(0).integers(0, 255, (9, 32, 40, 3)).astype("uint8")
LABELS = np.arange(9) % 3
MEAN, STDDEV = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def small(channels=6, stride=8):
    """One linear map of the cells' means, and a ReLU."""
    image = keras.Input((None, None, 3))
    pooled = keras.layers.Rescaling(1 / 64)(keras.layers.AveragePooling2D(stride)(image))
    return keras.Model(image, keras.layers.Conv2D(channels, 1, activation="relu")(pooled))


def build(mask="global", images=IMAGES, **arguments):
    settings = {"channels": 4, "l1": 0.01, "joint_epochs": 2} | arguments
    model = GlobalMask(3, settings.pop("backbone", None) or small(), mask, **settings)
    model.adapt(images[first : first + 4] for first in range(0, len(images), 4))
    model.build((None, *images.shape[1:]))
    return model


def fit(model, epochs, optimizer=None, **arguments):
    model.compile(optimizer or keras.optimizers.SGD(0.05), LOSS, jit_compile=False)
    return model.fit(IMAGES, LABELS, epochs=epochs, verbose=0, batch_size=9, **arguments).history["loss"]


def numbers(found):
    return keras.tree.map_structure(keras.ops.convert_to_numpy, found)


def learnt(model):
    return [numbers(weight) for weight in model.learner.weights if weight.name != "mask"]


@pytest.mark.parametrize("raw", [False, True], ids=["standardised", "raw"])
def test_whole_system_is_its_equations(raw):
    """P standardised -> M; X standardised, masked, put back; backbone; mean; head; and the L1 norm."""
    model = build(raw=raw)
    weights = {weight.name: np.float64(numbers(weight)) for weight in model.learner.weights}
    scale, offset = (1.0, 0.0) if raw else (STDDEV, MEAN)
    standard = (IMAGES / 255.0 - offset) / scale
    mask = reference.global_pixel_mask.mask(
        {name: value for name, value in weights.items() if name != "mask"}, standard
    )
    assert np.ptp(mask) > 0.3
    np.testing.assert_allclose(numbers(model.pixel_mask()), mask, rtol=1e-4, atol=1e-5)
    shown = 255 * (standard * mask * scale + offset)
    cells = shown.reshape(9, 4, 8, 5, 8, 3).mean(axis=(2, 4)) / 64
    kernel, bias = (np.float64(weight) for weight in model.backbone.get_weights())
    pooled = np.maximum(cells @ kernel[0, 0] + bias, 0).mean(axis=(1, 2))
    kernel, bias = (np.float64(weight) for weight in model.head.get_weights())
    np.testing.assert_allclose(numbers(model(IMAGES)), pooled @ kernel + bias, rtol=1e-4, atol=1e-5)
    assert [float(loss) for loss in model.losses] == pytest.approx([0.01 * mask.sum()], rel=1e-4)
    model.reduction = "mean"
    model(IMAGES)
    assert [float(loss) for loss in model.losses] == pytest.approx([0.01 * mask.mean()], rel=1e-4)


def test_two_phases():
    """Both parts learn in epochs 1 and 2; then the mask stays, and a ruined pixel CNN is never run."""
    model, seen = build(), []
    first, kernels = numbers(model.pixel_mask()), learnt(model)
    note = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: seen.append((numbers(model.stored), learnt(model)))
    )
    fit(model, 2, callbacks=[note])
    np.testing.assert_allclose(numbers(model.initial), first, atol=1e-6)
    masks = [first, *(mask for mask, _ in seen)]
    assert all(np.abs(one - other).max() > 1e-4 for one, other in itertools.pairwise(masks))
    assert all((one != other).any() for one, other in zip(kernels, seen[-1][1], strict=True))
    head, reference_scores = numbers(model.head.kernel), numbers(model(IMAGES))
    model.learner.kernel_0.assign(np.full(model.learner.kernel_0.shape, np.nan))
    np.testing.assert_array_equal(numbers(model(IMAGES)), reference_scores)
    losses = model.fit(
        IMAGES, LABELS, initial_epoch=2, epochs=4, verbose=0, batch_size=9, callbacks=[note]
    ).history["loss"]
    assert np.isfinite(losses).all()
    assert (numbers(model.head.kernel) != head).any()
    for mask, _ in seen[2:]:
        np.testing.assert_array_equal(mask, masks[-1])
    np.testing.assert_array_equal(numbers(model.pixel_mask()), masks[-1])


def test_in_one_fit_the_mask_of_the_last_joint_epoch_stays():
    """Whatever decay and momentum do to the pixel CNN's weights; validation leaves the phase as it is."""
    model, seen = build(), []
    note = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: seen.append(numbers(model.stored)))
    adamw = keras.optimizers.AdamW(0.01, weight_decay=0.1)
    fit(model, 4, adamw, validation_data=(IMAGES, LABELS), callbacks=[note])
    assert np.abs(seen[0] - seen[1]).max() > 1e-4
    np.testing.assert_array_equal(seen[1], seen[3])
    model.fit({"maps": model.features(IMAGES)}, LABELS, initial_epoch=4, epochs=6, verbose=0)
    np.testing.assert_array_equal(numbers(model.pixel_mask()), seen[1])


def test_pixel_weights_begin_as_the_plain_network_and_are_penalised_as_the_layer():
    plain = build("none", backbone=small())
    model = build("pixels", joint_epochs=1, backbone=plain.backbone)
    model.head.set_weights(plain.head.get_weights())
    np.testing.assert_allclose(numbers(model(IMAGES)), numbers(plain(IMAGES)), rtol=1e-5, atol=1e-6)
    layer = PixelWeights(l1=0.01)
    layer.build((None, 32, 40, 3))
    for weights in (model.learner.pixels, layer.pixels):
        weights.assign(np.random.default_rng(1).normal(size=(1, 32, 40, 1)))
    model(IMAGES)
    assert float(model.losses[0]) == pytest.approx(float(layer.losses[0]), rel=1e-5)
    assert model.losses[0] > 0.005
    fit(model, 1, keras.optimizers.Adam(0.1))
    kept = numbers(model.stored)
    assert np.abs(kept - 1).max() > 0.05
    model.fit(IMAGES, LABELS, initial_epoch=1, epochs=3, verbose=0)
    np.testing.assert_array_equal(numbers(model.pixel_mask()), kept)
    assert model.initial.numpy().std() > 0.5
    assert "mask" not in plain.explain(IMAGES)


def test_maps_in_place_of_images_are_the_same():
    model = build()
    model.rest()
    np.testing.assert_array_equal(numbers(model({"maps": model.features(IMAGES)})), numbers(model(IMAGES)))


def test_snapshot_is_the_same_model_in_a_fresh_process_and_holds_no_image(tmp_path):
    model = build(kernel_initializer="he_uniform", channels=(4, 2), dense=True)
    fit(model, 1)
    expected, path = numbers(model.explain(IMAGES)), tmp_path / "best.keras"
    snapshot = build(kernel_initializer="he_uniform", channels=(4, 2), dense=True).snapshot()
    assert model.snapshot(into=snapshot) is snapshot  # brought up to date
    snapshot.save(path)
    np.save(tmp_path / "images.npy", IMAGES)
    code = (
        "import sys, numpy as np, keras_medattn; model = keras_medattn.load_model(sys.argv[1]); "
        "found = model.explain(np.load(sys.argv[2])); "
        "np.savez(sys.argv[3], **{k: np.asarray(v) for k, v in found.items()})"
    )
    files = [str(tmp_path / name) for name in ("best.keras", "images.npy", "found.npz")]
    subprocess.run([sys.executable, "-c", code, *files], check=True, capture_output=True)
    with np.load(files[-1]) as found:
        assert set(found) == {"maps", "scores", "mask", "normalised_mask", "initial_mask"}
        for name in found:
            np.testing.assert_array_equal(found[name], expected[name])
    assert (expected["normalised_mask"].min(), expected["normalised_mask"].max()) == (0, 1)
    raw = expected["mask"][0]
    np.testing.assert_allclose(
        expected["normalised_mask"][0], (raw - raw.min()) / np.ptp(raw), rtol=1e-4, atol=1e-5
    )
    assert np.abs(expected["mask"] - expected["initial_mask"]).max() > 1e-5
    again = keras_medattn.load_model(path)
    assert (again.mask, again.channels, again.dense) == ("fixed", (4, 2), True)
    assert again.learnt_from == model.learnt_from
    assert (again.learnt_from["images"], len(again.learnt_from["order"])) == (9, 64)
    assert [weight.shape for weight in again.non_trainable_weights] == [(1, 32, 40, 1)] * 2
    held = sum(weight.numpy().nbytes for weight in again.weights)
    with zipfile.ZipFile(path) as file:
        size = sum(entry.file_size for entry in file.infolist())
    assert size < held + 60_000 < held + IMAGES.size * 4 // 2  # HDF5's own overhead, and no images


def test_a_mask_that_is_still_learnt_leaves_no_file(tmp_path):
    model = build()
    for write in (model.save, model.export):
        with pytest.raises(ValueError, match=r"save or export `snapshot\(\)`. Received: mask='global'"):
            write(tmp_path / "model.keras")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="a SavedModel is TensorFlow's")
def test_exported_model_is_the_same_and_holds_no_image(tmp_path):
    """Even of a model that still learns: what is written is its snapshot."""
    model, to = build(), tmp_path / "exported"
    for name, image in zip("abcdefghi", IMAGES, strict=True):
        Image.fromarray(image).save(tmp_path / f"{name}.png")
    table = replace(manifest(), root=tmp_path, names=tuple(f"{name}.png" for name in "abcdefghi"))
    folder, differences = saved_model.export(model, settings(), table.class_names, to, table)
    assert max(differences.values()) <= 1e-4
    served = tf.saved_model.load(str(folder))
    answer = served.signatures["tensor"](tf.constant(IMAGES))["probabilities"]
    np.testing.assert_allclose(answer, tf.nn.softmax(model(IMAGES)), atol=1e-5)
    held = sum(path.stat().st_size for path in (folder / "variables").iterdir())
    weights = sum(weight.numpy().nbytes for weight in model.snapshot().weights)
    assert held < weights + 4000 < weights + IMAGES.size  # float32 images would be four times these
    graph = (
        saved_model_pb2.SavedModel.FromString((folder / "saved_model.pb").read_bytes())
        .meta_graphs[0]
        .graph_def
    )
    nodes = [*graph.node, *(node for function in graph.library.function for node in function.node_def)]
    assert max(len(node.attr["value"].tensor.tensor_content) for node in nodes if node.op == "Const") < 1000


def test_heatmap_is_taken_on_the_maps_of_the_masked_image():
    model = build()
    model.rest()
    found = heatmaps.evidence(model, tf.constant(IMAGES), tf.constant([1] * 9))
    maps, kernel = numbers(model.features(IMAGES)), numbers(model.head.kernel)
    np.testing.assert_allclose(found["contributions"], (maps @ kernel[:, 1]) / 20, rtol=1e-4, atol=1e-6)


def manifest():
    sides = ("train",) * 5 + ("val",) * 3 + ("test",)
    return Manifest(Path(), tuple("abcdefghi"), LABELS, ("a", "b", "c"), splits=sides)


def settings(cached=0, augment=(), epochs=4, **model):
    values = {"system": "GlobalMask", "backbone": small(stride=16), "channels": 4, "joint_epochs": 2} | model
    frozen = {"frozen_stride": 32, "cached_views": cached, "monitor": "epoch"}
    train = Train(epochs=epochs, batch_size=3, learning_rate=0.02, schedule="constant", **frozen)
    return Recipe(Data(image_size=(32, 40)), values, train, augment)


def trained(folder, **changes):
    folder.mkdir(exist_ok=True)
    keras.utils.set_random_seed(3)  # of the backbone
    fetch: pipeline.Fetch = lambda rows, epoch: IMAGES[rows]  # noqa: E731
    trainer.fit(
        settings(**changes), manifest(), fetch, folder, folder, lambda items, *_: items, lambda line: None
    )
    model: GlobalMask = keras_medattn.load_model(folder / "best.keras")
    history = np.genfromtxt(folder / "history.csv", delimiter=",", names=True)
    return model, np.stack([np.atleast_1d(history[name]) for name in ("loss", "val_loss")])


def test_trainer_keeps_features_once_mask_and_backbone_rest(tmp_path):
    """And a run that was stopped in either phase goes on as if it had not been."""
    model, history = trained(tmp_path / "whole")
    assert model.learnt_from["images"] == 5  # the training side alone
    assert np.abs(numbers(model.stored) - numbers(model.initial)).max() > 1e-4
    for epochs in (1, 3, 4):
        again, cached = trained(tmp_path / "stopped", cached=1, epochs=epochs)
        np.testing.assert_allclose(cached, history[:, :epochs], rtol=1e-4)
    for one, other in zip(model.weights, again.weights, strict=True):
        np.testing.assert_allclose(numbers(one), numbers(other), rtol=1e-3, atol=1e-5)


def test_trainer_refuses_what_moves_pixels_under_the_mask():
    moved = {"augment": ({"layer": "RandomBrightness", "factor": 0.1}, {"layer": "RandomFlip"})}
    with pytest.raises(RecipeError, match=r"^augment: RandomFlip must be left out: GlobalMask"):
        trainer.build(settings(**moved), 3, [IMAGES])
    assert trainer.build(settings(mask="none", **moved), 3).mask == "none"


def test_recipes_know_it():
    assert system("GlobalMask") is GlobalMask
    assert {"mask", "channels", "l1", "reduction", "joint_epochs", "raw"} <= set(arguments("GlobalMask"))


def test_errors_say_what_was_received():
    with pytest.raises(ValueError, match=r"`mask` must be one of .* Received: mask='globe'"):
        GlobalMask(2, small(), "globe")
    with pytest.raises(ValueError, match=r"must not be negative. Received: l1=-1, joint_epochs=60"):
        GlobalMask(2, small(), l1=-1)
    with pytest.raises(ValueError, match="needs the training images: call `adapt`"):
        GlobalMask(2, small()).build((None, 32, 32, 3))
    with pytest.raises(
        ValueError, match=r"height and width must be known. Received: \(None, None, None, 3\)"
    ):
        GlobalMask(2, small(), "pixels").build((None, None, None, 3))
    model = build()
    with pytest.raises(ValueError, match="adapted to other images, or to these in another order"):
        model.adapt([IMAGES[::-1]])

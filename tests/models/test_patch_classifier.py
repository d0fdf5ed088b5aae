import conformance
import keras
import numpy as np
import pytest
import reference.attention_sampling
import tensorflow as tf
from conftest import TINY

from keras_medattn import load_model
from keras_medattn.models import AttentionSampling, PatchClassifier, with_classifier
from keras_medattn.train import evaluate, experiment, recipe

IMAGES = np.random.default_rng(1).integers(0, 256, (3, 23, 30, 3)).astype("uint8")
LABELS = np.array([2, 0, 1])


def trained():
    """An attention sampling with random weights."""
    model = AttentionSampling(3, patches=4, patch_size=7, stride=4, seed=5)
    model.build(IMAGES.shape)
    conformance.randomise(model.attention)
    return model


def system(fuse, **arguments):
    """A classifier of patches by their mean colour, with random weights, compiled."""
    classifier = keras.Sequential(
        [keras.Input((7, 7, 3)), keras.layers.Rescaling(1 / 255), keras.layers.GlobalAveragePooling2D()]
    )
    classifier.add(keras.layers.Dense(3))
    conformance.randomise(classifier)
    model = with_classifier(trained(), classifier, fuse, **arguments)
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True), jit_compile=False)
    model.build(IMAGES.shape)
    return model


def fused(fuse, scores, own):
    """Scores of an image from those of its patches `(P, N)` and their probabilities."""
    if fuse == "attention":
        return own @ scores / own.sum()
    if fuse == "mean":
        return scores.mean(axis=0)
    votes = np.bincount(scores.argmax(axis=1), minlength=scores.shape[1])
    return np.log(np.maximum(votes / len(scores), 1e-6))


@pytest.mark.parametrize("fuse", ["attention", "mean", "vote"])
def test_fusion_of_chosen_patches_and_loss_of_drawn_ones(fuse):
    model = system(fuse)
    kernel, bias = model.features.layers[-1].get_weights()
    named = {name: np.array(value) for name, value in model.explain(IMAGES).items()}
    for b, (boxes, image) in enumerate(zip(named["boxes"].astype(int), IMAGES, strict=True)):
        own = named["attention"][b].ravel()[named["cells"][b]]
        shares = own / own.sum() if fuse == "attention" else np.full(4, 1 / 4)
        np.testing.assert_allclose(named["shares"][b], shares, rtol=1e-4)
        inside = [place for place, (x0, y0, x1, y1) in enumerate(boxes) if (x1 - x0, y1 - y0) == (7, 7)]
        assert inside  # at the border a patch is reflected
        for place in inside:
            x0, y0, x1, y1 = boxes[place]
            scores = image[y0:y1, x0:x1].mean(axis=(0, 1)) / 255 @ kernel + bias
            weight = scores[named["scores"][b].argmax()] * shares[place]
            assert named["weights"][b][place] == pytest.approx(weight, rel=1e-4, abs=1e-5)
    found = model._pass(IMAGES)
    own = [a.ravel()[cells] for a, cells in zip(named["attention"], np.array(found["cells"]), strict=True)]
    expected = [fused(fuse, *each) for each in zip(np.array(found["patch_scores"]), own, strict=True)]
    np.testing.assert_allclose(model(IMAGES), expected, rtol=1e-4, atol=1e-5)

    answer = model(IMAGES, training=True)
    entropy = reference.attention_sampling.cross_entropy
    of = answer["patch_scores" if fuse == "vote" else "scores"]
    losses = [entropy(*each) for each in zip(np.array(of), LABELS, strict=True)]
    assert float(model.compute_loss(IMAGES, LABELS, answer)) == pytest.approx(np.mean(losses), rel=1e-4)
    weights = tf.constant([1.0, 0.0, 2.0])
    weighed = model.compute_loss(IMAGES, LABELS, answer, weights)
    expected = np.mean([np.mean(loss) * weight for loss, weight in zip(losses, [1, 0, 2], strict=True)])
    assert float(weighed) == pytest.approx(expected, rel=1e-4)


def test_the_attention_stays_as_it_is_and_the_rest_is_reloaded(tmp_path):
    model = system("attention", patches=2)
    before = [np.array(weight) for weight in model.attention.weights]
    kernel = np.array(model.features.layers[-1].kernel)
    model.fit(IMAGES, LABELS, epochs=2, verbose=0)
    for weight, old in zip(model.attention.weights, before, strict=True):
        np.testing.assert_array_equal(weight, old)
    assert np.abs(np.array(model.features.layers[-1].kernel) - kernel).max() > 1e-5
    model.save(tmp_path / "model.keras")
    reloaded = load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(reloaded(IMAGES), model(IMAGES))
    assert len(reloaded.trainable_weights) == len(model.trainable_weights) == 2
    assert (reloaded.sampler.patches, reloaded.patch_size, reloaded.stride) == (2, 7, 4)


def test_recipe_on_a_trained_run(tmp_path, tiny_set):
    source = AttentionSampling(2, patches=3, patch_size=32, stride=8, seed=1)
    source.build((None, 64, 80, 3))
    source.save(tmp_path / "best.keras")
    model = {"system": "PatchClassifier", "attention_from": str(tmp_path / "best.keras")}
    model |= {"classifier": "small_cnn", "feature_stride": 8, "fuse": "mean"}
    train = {"epochs": 1, "batch_size": 8, "frozen_stride": 2}
    settings = recipe.from_dict(TINY | {"model": model, "train": train})
    [part] = experiment.train(settings, tiny_set, tmp_path / "run", write=lambda line: None)
    (tmp_path / "best.keras").unlink()  # the run has all it needs
    found = evaluate.evaluate([part])
    assert np.isfinite(found.probabilities).all()
    kept = part.model().attention
    for weight, old in zip(kept.weights, source.attention.weights, strict=True):
        np.testing.assert_array_equal(weight, old)


def test_wrong_arguments_are_errors(tmp_path):
    small = keras.Sequential([keras.layers.GlobalMaxPooling2D(), keras.layers.Dense(3)])
    with pytest.raises(ValueError, match=r"`fuse` must be one of .*Received: 'median'"):
        with_classifier(trained(), small, "median")
    with pytest.raises(ValueError, match=r"there is no file .*none\.keras\. Give RUN/best\.keras"):
        PatchClassifier(3, tmp_path / "none.keras", small)
    keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)]).save(tmp_path / "other.keras")
    with pytest.raises(ValueError, match=r"must be an AttentionSampling\. Received: .*other\.keras, a Seq"):
        PatchClassifier(3, str(tmp_path / "other.keras"), small)
    with pytest.raises(ValueError, match="conditional=False"):
        with_classifier(AttentionSampling(3, conditional=True), small)

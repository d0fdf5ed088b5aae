"""AttnVGG: the plain network, the modules in their places, and the whole path from recipe to SavedModel."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import TINY

import keras_medattn
from keras_medattn.explain import report
from keras_medattn.export import saved_model
from keras_medattn.models import AttnVGG, backbones
from keras_medattn.train import evaluate, experiment, fitted, recipe

IMAGES = np.random.default_rng(0).integers(0, 255, (2, 64, 96, 3)).astype("uint8")


def build(**arguments):
    keras.utils.set_random_seed(1)
    return AttnVGG(3, weights=None, units=8, dropout=0.0, **arguments)


def test_extra_parameters_are_those_of_the_paper():
    """C-Attn of 64 and 128 channels, S-Attn of 256, 512 and 512: 1.0% of VGG19."""
    both = build()
    own = [weight for layer in both.backbone.layers if "attention" in layer.name for weight in layer.weights]
    assert sum(int(np.prod(weight.shape)) for weight in own) == 1_413_120
    assert both.backbone.count_params() == 20_024_384 + 1_413_120


def test_without_modules_it_is_the_plain_network(tmp_path):
    plain = keras.applications.VGG19(include_top=False, weights=None, input_shape=(64, 96, 3))
    plain.save_weights(tmp_path / "vgg19.weights.h5")
    bare = build(attention=("none",) * 5)
    for weight, other in zip(bare.backbone.weights, plain.weights, strict=True):
        weight.assign(other)
    expected = plain(keras.applications.vgg19.preprocess_input(IMAGES.astype("float32")))
    np.testing.assert_allclose(bare.features(IMAGES), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("after_pool", [False, True])
def test_modules_stand_where_they_are_asked_for(after_pool):
    """Modules whose values are 0 change nothing; one that doubles its input shows in every later block."""
    attention = ("channel", "none", "spatial", "none", "none")
    model = build(attention=attention, after_pool=after_pool)
    bare = build(attention=("none",) * 5)
    modules = [layer for layer in model.backbone.layers if "attention" in layer.name]
    assert [type(layer).__name__ for layer in modules] == ["ChannelAttn", "SpatialAttn"]
    shared = {layer.name: layer for layer in bare.backbone.layers}
    for layer in model.backbone.layers:
        if layer in modules:
            layer.value.assign(np.zeros(layer.value.shape))
        else:
            layer.set_weights(shared[layer.name].get_weights())
    np.testing.assert_allclose(model.features(IMAGES), bare.features(IMAGES), rtol=1e-5)
    named = model.explain(IMAGES)
    assert {key for key in named if key.startswith("attention")} == {"attention_1", "attention_3"}
    layer = "block3_pool" if after_pool else "block3_conv4"
    inside = keras.Model(bare.backbone.inputs[0], bare.backbone.get_layer(layer).output)
    np.testing.assert_allclose(
        named["attention_3"], inside(IMAGES).numpy().mean(axis=-1), rtol=1e-4, atol=1e-5
    )


def test_batch_norm_stands_between_convolution_and_relu():
    model = build(batch_norm=True, attention=("none",) * 5)
    names = [layer.name for layer in model.backbone.layers if layer.name.startswith("block1")]
    assert names[:3] == ["block1_conv1", "block1_conv1_bn", "block1_conv1_relu"]
    first = keras.Model(model.backbone.inputs[0], model.backbone.get_layer("block1_conv1").output)
    assert first(IMAGES).numpy().min() < 0  # no ReLU in front of the normalisation
    assert sum(isinstance(layer, keras.layers.BatchNormalization) for layer in model.backbone.layers) == 16
    with pytest.raises(ValueError, match="no ImageNet weights for VGG19 with batch"):
        AttnVGG(2, batch_norm=True)
    with pytest.raises(ValueError, match=r"for backbone='vgg16' or 'vgg19'.*Received: backbone='resnet18'"):
        AttnVGG(2, backbone="resnet18", batch_norm=True, weights=None)


def on_mobilenet(**arguments):
    keras.utils.set_random_seed(1)
    return AttnVGG(3, weights=None, backbone="mobilenet_v3_small", units=0, **arguments)


def test_on_another_backbone_the_modules_stand_at_the_ends_of_its_strides():
    """Each adds what it attends to to the maps at its stride; the head takes the means over the positions."""
    attention = ("channel", "none", "spatial", "none", "spatial")
    model = on_mobilenet(attention=attention)
    plain = backbones.backbone("mobilenet_v3_small", 32, None)
    modules = [layer for layer in model.backbone.layers if "attention" in layer.name]
    assert [type(layer).__name__ for layer in modules] == ["ChannelAttn", "SpatialAttn", "SpatialAttn"]
    others = [layer for layer in model.backbone.layers if layer not in modules]
    for layer, other in zip(plain.layers, others, strict=True):
        layer.set_weights(other.get_weights())
    for layer in modules[:2]:
        layer.value.assign(np.zeros(layer.value.shape))
    named = model.explain(IMAGES)
    for block, stride in ((1, 2), (3, 8)):
        inside = backbones.split(plain, stride)[0](IMAGES).numpy()
        np.testing.assert_allclose(named[f"attention_{block}"], inside.mean(axis=-1), rtol=1e-3, atol=1e-4)
    maps = modules[2](plain(IMAGES)).numpy()
    np.testing.assert_allclose(named["maps"], maps, rtol=1e-3, atol=1e-3 * np.abs(maps).max())
    kernel, bias = model.head.layers[-1].get_weights()
    scores = named["maps"].numpy().mean(axis=(1, 2)) @ kernel + bias
    np.testing.assert_allclose(model(IMAGES), scores, rtol=1e-4, atol=1e-5)


def test_layers_below_the_first_module_can_be_frozen():
    """A cut at a module's stride lies in front of it, also at the last one."""
    model = on_mobilenet(attention=("none", "none", "none", "spatial", "spatial"))
    for stride, modules in ((8, 2), (16, 2), (32, 1)):
        stem, rest = backbones.split(model.backbone, stride)
        assert sum("attention" in layer.name for layer in rest.layers) == modules
        np.testing.assert_allclose(rest(stem(IMAGES)), model.features(IMAGES), rtol=1e-4, atol=1e-5)
    with pytest.raises(recipe.RecipeError, match="attention_4 of AttnVGG would be frozen untrained"):
        fitted.freeze(model, 32)
    stem, rest = fitted.parts(on_mobilenet(attention=("none",) * 4 + ("spatial",)), 32)
    assert not stem.trainable_variables
    assert [weight.name for weight in rest.trainable_variables] == ["query", "key", "value"]


def test_on_another_backbone_saved_it_is_the_same_model(tmp_path):
    """Also where it ends early: then its later strides have no place for a module."""
    model = on_mobilenet(
        layer="expanded_conv_5_add", attention=("none", "none", "channel", "spatial", "none")
    )
    expected = model(IMAGES).numpy()
    model.save(tmp_path / "model.keras")
    np.testing.assert_array_equal(keras_medattn.load_model(tmp_path / "model.keras")(IMAGES), expected)
    with pytest.raises(ValueError, match=r"no layer at stride 32 .* Received: .*layer='expanded_conv_5_add'"):
        on_mobilenet(layer="expanded_conv_5_add")


def test_split_in_stem_and_rest_it_is_the_same_network():
    """What a recipe's frozen layers need."""
    model = build()
    stem, rest = backbones.split(model.backbone, 8)
    np.testing.assert_allclose(rest(stem(IMAGES)), model.features(IMAGES), rtol=1e-4, atol=1e-4)
    assert len(stem.weights) + len(rest.weights) == len(model.backbone.weights)


def test_saved_model_is_the_same_model(tmp_path):
    model = build()
    expected = model(IMAGES).numpy()
    model.save(tmp_path / "model.keras")
    again = keras_medattn.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(again(IMAGES), expected)


def test_unknown_module_is_an_error():
    with pytest.raises(ValueError, match=r"each of the 5 blocks. Received: attention=\('spatial',\)"):
        AttnVGG(2, attention=("spatial",))


@pytest.mark.slow
def test_recipe_to_saved_model(tmp_path, tiny_set):
    """Trained, evaluated, explained and exported as any other system."""
    model = {"system": "AttnVGG", "weights": None, "units": 4}
    train = {"epochs": 1, "batch_size": 8, "backbone_rate": 1.0}
    settings = recipe.from_dict(TINY | {"model": model, "train": train})
    parts = experiment.train(settings, tiny_set, tmp_path / "run", write=lambda line: None)
    found = evaluate.evaluate(parts)
    [part] = parts
    test = part.manifest.split("test")
    finding = next(report.findings(part.model(), part.recipe, test.paths[:1]))
    np.testing.assert_allclose(finding.probabilities, found.probabilities[0], rtol=1e-4)
    (tmp_path / "exported").mkdir()
    folder, differences = saved_model.export(
        part.model(), part.recipe, part.manifest.class_names, tmp_path / "exported", test
    )
    assert max(differences.values()) <= 1e-4
    answer = tf.saved_model.load(str(folder)).signatures["explain"](tf.constant([test.paths[0].read_bytes()]))
    np.testing.assert_allclose(answer["probabilities"][0], found.probabilities[0], atol=1e-4)

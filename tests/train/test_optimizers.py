"""What moves the weights: coupled L2 against its equation, schedules, and which optimiser a recipe gets."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_medattn.models import MIMS, GatedFusion
from keras_medattn.train.fitted import fitted_part
from keras_medattn.train.optimizers import optimizer, penalise
from keras_medattn.train.recipe import Train

IMAGES = np.random.default_rng(0).integers(0, 255, (4, 48, 48, 3)).astype("uint8")
LABELS = tf.one_hot([0, 1, 1, 0], 2)
SGD = Train(optimizer="sgd", momentum=0.0, learning_rate=0.1, schedule="constant", backbone_rate=0.5)


def small(channels):
    """Convolutions with a bias and batch normalisation, at stride 8."""
    image = keras.Input((None, None, 3))
    maps = keras.layers.Conv2D(channels, 3, 8, "same", bias_initializer="ones")(image / 255)
    return keras.Model(image, keras.layers.BatchNormalization()(maps))


def mims():
    return MIMS(2, small(4), kernels=((2, 3),), scales=(1.0,), k=2)


def fusion():
    sizes = {"overview_size": 48, "crop_size": 16, "k": 2, "schedule": ()}
    return GatedFusion(2, "squeeze_excite", small(16), small(4), **sizes)


def update(make, l2):
    """Every weight before and after one step of plain SGD."""
    keras.utils.set_random_seed(1)
    model = make()
    model.build((None, 48, 48, 3))
    if hasattr(model, "balance"):
        model.balance.assign(0.3)  # both losses of GatedFusion count
    fitted = fitted_part(model, None, None, (48, 48))
    penalise(fitted, l2)
    fitted.compile(
        optimizer(SGD, model, 1), keras.losses.CategoricalCrossentropy(from_logits=True), jit_compile=False
    )
    before = [variable.numpy() for variable in model.trainable_variables]
    fitted.train_on_batch(IMAGES, LABELS)
    return model, before, [variable.numpy() for variable in model.trainable_variables]


@pytest.mark.parametrize("make", [mims, fusion])
def test_first_update_with_coupled_l2_is_its_equation(make):
    """w - rate (g + 2 l2 w), for every weight of every nested model, biases too; half the rate below."""
    l2 = 0.05
    model, before, plain = update(make, 0.0)
    _, again, penalised = update(make, l2)
    below = {id(variable) for one in model.backbones for variable in one.trainable_variables}
    assert 0 < len(below) < len(before)
    variables = model.trainable_variables
    for variable, old, same, one, other in zip(variables, before, again, plain, penalised, strict=True):
        np.testing.assert_array_equal(old, same)
        rate = 0.05 if id(variable) in below else 0.1
        np.testing.assert_allclose(other, one - rate * 2 * l2 * old, atol=2e-6, err_msg=variable.path)
    biases = [old for variable, old in zip(variables, before, strict=True) if "bias" in variable.path]
    assert any(bias.any() for bias in biases)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ({"schedule": "constant"}, lambda step: 0.2),
        ({"schedule": "cosine"}, lambda step: 0.1 * (1 + np.cos(np.pi * step / 60))),
        ({"schedule": "step", "step_epochs": 2, "step_factor": 0.5}, lambda step: 0.2 * 0.5 ** (step // 20)),
    ],
    ids=lambda value: value["schedule"] if isinstance(value, dict) else "",
)
def test_schedules(schedule, expected):
    """Of 6 epochs of 10 steps."""
    settings = Train(epochs=6, learning_rate=0.2, **schedule)
    one = optimizer(settings, keras.Sequential([keras.layers.Dense(1)]), 10)
    for step in (0, 19, 20, 41, 59):
        one.iterations.assign(step)
        assert float(one.learning_rate) == pytest.approx(expected(step), rel=1e-4)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sgd", [-0.1, -0.1 * 2.9]),  # v = .9 v - rate g
        ("adam", [-0.1, -0.2]),  # a constant gradient: rate times its sign
        ("adamw", [1 - 0.1 - 0.1 * 0.2 - 1, (1 - 0.12) * (1 - 0.02) - 0.1 - 1]),  # decoupled decay first
    ],
)
def test_two_steps_of_each_optimizer(name, expected):
    settings = Train(optimizer=name, learning_rate=0.1, schedule="constant", weight_decay=0.2)
    one = optimizer(settings, keras.Sequential([keras.layers.Dense(1)]), 10)
    weight = keras.Variable(1.0, name="kernel")
    one.build([weight])
    for moved in expected:
        one.apply([tf.constant(1.0)], [weight])
        assert float(weight) - 1 == pytest.approx(moved, abs=1e-5)

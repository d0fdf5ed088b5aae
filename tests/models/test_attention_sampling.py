from fractions import Fraction

import conformance
import keras
import numpy as np
import pytest
import reference.attention_sampling
import reference.sampler
import tensorflow as tf
from conftest import TINY

from keras_medattn import load_model, ops
from keras_medattn.explain import report
from keras_medattn.export import saved_model
from keras_medattn.models import AttentionSampling, attention_network, feature_network
from keras_medattn.train import evaluate, experiment, recipe, trainer


def _random(network):
    conformance.randomise(network)
    return {weight.path.removeprefix(f"{network.name}/"): np.array(weight) for weight in network.weights}


def _trainable(network):
    return sum(int(np.prod(weight.shape)) for weight in network.trainable_weights)


def test_counts_are_those_of_the_paper():
    assert _trainable(attention_network()) == 1513
    assert _trainable(feature_network()) == feature_network().count_params() == 7459
    assert _trainable(attention_network(channels=1)) == 1513 - 2 * 72
    assert feature_network(filters=32).count_params() == 28739  # the author's checkpoints


@pytest.mark.parametrize("training", [False, True])
def test_attention_network_equals_its_equation(training):
    network = attention_network()
    weights = _random(network)
    view = np.random.default_rng(0).normal(size=(2, 6, 7, 3)).astype("float32")
    attention = network(view, training=training)
    np.testing.assert_allclose(
        attention, reference.sampler.attention_network(weights, view, training), rtol=1e-4, atol=1e-7
    )


def test_feature_network_equals_its_equation():
    network = feature_network()
    weights = _random(network)
    patches = np.random.default_rng(0).normal(size=(3, 9, 8, 3)).astype("float32")
    scores = network(patches)
    np.testing.assert_allclose(scores, reference.sampler.feature_network(weights, patches), rtol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(scores, axis=1), 1, rtol=1e-6)


def test_feature_network_can_average():
    network = feature_network(pool="average")
    weights = _random(network)
    patches = np.random.default_rng(0).normal(size=(3, 9, 8, 3)).astype("float32")
    maps = np.array(keras.Model(network.inputs[0], network.get_layer("conv_3").output)(patches))
    scores = maps.mean(axis=(1, 2)) @ weights["head/kernel"] + weights["head/bias"]
    expected = scores / np.linalg.norm(scores, axis=1, keepdims=True)
    np.testing.assert_allclose(network(patches), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("training", [False, True])
def test_padding_changes_no_attention_and_is_not_read(training):
    image = np.random.default_rng(0).integers(0, 256, (2, 20, 24, 3)).astype("float32")
    padded = np.pad(image, ((0, 0), (0, 9), (0, 13), (0, 0)), constant_values=np.nan)
    size = np.array([[20, 24]] * 2)
    states = []
    for pixels, sizes in ((image, None), (padded, size)):
        network = attention_network()
        _random(network)
        view = ops.overview(pixels, 4, sizes)
        mask = None if sizes is None else ops.cell_mask(sizes, view.shape[1:3], pixels.shape[1:3], 4)
        attention = np.array(network(view / 255, mask=mask, training=training))
        states.append([attention[:, :5, :6], *map(np.array, network.non_trainable_weights)])
        np.testing.assert_allclose(attention.sum(axis=(1, 2)), 1, rtol=1e-5)
    for plain, other in zip(*states, strict=True):
        np.testing.assert_allclose(other, plain, rtol=1e-4, atol=1e-6)


def test_networks_are_reloaded(tmp_path):
    view = np.random.default_rng(0).normal(size=(2, 6, 7, 3)).astype("float32")
    for network in (attention_network(), feature_network(4)):
        _random(network)
        expected = network(view)
        network.save(tmp_path / "network.keras")
        np.testing.assert_array_equal(load_model(tmp_path / "network.keras")(view), expected)


def test_both_train_in_fit():
    """A feature network tells bright from dark patches; an attention network learns where the light is."""
    rng = np.random.default_rng(0)
    patches = rng.normal(size=(32, 8, 8, 3)).astype("float32") + np.repeat([0, 1], 16)[:, None, None, None]
    network = feature_network(2)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    network.compile(keras.optimizers.Adam(0.01), loss)
    losses = network.fit(patches, np.repeat([0, 1], 16), epochs=6, verbose=0).history["loss"]
    assert losses[-1] < 0.8 * losses[0]

    places = rng.integers(0, 30, 32)
    views = np.zeros((32, 5, 6, 1), "float32")
    views.reshape(32, 30)[np.arange(32), places] = 1
    inputs = keras.Input((5, 6, 1))
    model = keras.Model(inputs, keras.layers.Flatten()(attention_network(1)(inputs)))
    model.compile(keras.optimizers.Adam(0.01), "sparse_categorical_crossentropy")
    losses = model.fit(views, places, epochs=12, verbose=0).history["loss"]
    assert losses[-1] < 0.8 * losses[0]


SMALL = {"patches": 3, "patch_size": 7, "stride": 4, "temperature": 2.0, "seed": 5}
IMAGES = np.random.default_rng(1).integers(0, 256, (2, 23, 30, 3)).astype("uint8")
LABELS = np.array([2, 0])


def system(**arguments):
    """A system with random weights, compiled, and the weights of its two networks."""
    model = AttentionSampling(3, **SMALL | arguments)
    weights = [_random(network) for network in (model.attention, model.features)]
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True), jit_compile=False)
    model(IMAGES)
    return model, weights


def expected_pass(weights, steps=None, **arguments):
    return reference.attention_sampling.forward(*weights, IMAGES, steps=steps, **SMALL | arguments)


def gradient(model, images=IMAGES, weight=None):
    """Of the loss of the first training step, in the attention network's last kernel."""
    model.sampler.step.assign(0)
    with tf.GradientTape() as tape:
        weight = None if weight is None else tf.constant(weight, tf.float32)
        loss = model.compute_loss(images, tf.constant(LABELS), model(images, training=True), weight)
    return float(loss), tape.gradient(loss, model.attention.logits.kernel.value).numpy()


def test_chosen_cells_answer_the_equation():
    model, weights = system()
    found = expected_pass(weights)
    np.testing.assert_allclose(model(IMAGES), found["scores"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(model(IMAGES.astype("float32")), found["scores"], rtol=1e-4, atol=1e-5)
    named = {key: np.array(value) for key, value in model.explain(IMAGES).items()}
    np.testing.assert_allclose(named["attention"], found["attention"], rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(named["weights"].sum(axis=1), found["scores"].max(axis=1), rtol=1e-4)
    assert (np.diff(named["weights"], axis=1) <= 0).all()
    shares = found["probabilities"] / found["probabilities"].sum(axis=1, keepdims=True)
    for b in range(2):
        predicted = found["scores"][b].argmax()
        order = np.argsort(-shares[b] * found["patch_scores"][b][:, predicted])
        np.testing.assert_array_equal(named["cells"][b], found["cells"][b][order])
        np.testing.assert_allclose(named["shares"][b], shares[b][order], rtol=1e-4)
        for box, (row, column) in zip(named["boxes"][b], found["corners"][b][order], strict=True):
            assert list(box) == [max(column, 0), max(row, 0), min(column + 7, 30), min(row + 7, 23)]


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"reward": "image", "aggregation": "mean", "baseline": "z_score"},
        {"replacement": False},
        {"replacement": False, "reward": "image", "baseline": "batch_mean", "repeats": 1},
        {"estimator": "expectation", "aggregation": "mean"},
        {"estimator": "expectation", "aggregation": "mean", "replacement": False},
    ],
    ids=lambda arguments: "-".join(map(str, arguments.values())) or "default",
)
def test_loss_of_drawn_cells_equals_its_equation(arguments):
    repeats = arguments.get("repeats", 2)
    model, weights = system(**{"entropy": 0.3, "repeats": repeats} | arguments)
    model.sampler.step.assign(4)
    answer = model(IMAGES, training=True)
    of_pass = {key: arguments[key] for key in ("aggregation", "replacement") if key in arguments}
    found = expected_pass(weights, steps=[4, 5][:repeats], **of_pass)
    assert int(model.sampler.step) == 4 + repeats
    np.testing.assert_array_equal(answer["cells"], found["cells"])
    np.testing.assert_allclose(answer["scores"], found["scores"], rtol=1e-4, atol=1e-5)
    of_loss = {key: value for key, value in arguments.items() if key != "aggregation"}
    expected = reference.attention_sampling.loss(
        found, LABELS, **{"entropy": 0.3, "repeats": repeats} | of_loss
    )
    assert float(model.compute_loss(IMAGES, LABELS, answer)) == pytest.approx(expected, rel=1e-4)
    one_hot = np.eye(3, dtype="float32")[LABELS]
    model.compile("sgd", keras.losses.CategoricalCrossentropy(from_logits=True))
    assert float(model.compute_loss(IMAGES, one_hot, answer)) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("estimator", ["reinforce", "expectation"])
def test_weights_of_images_weigh_all_that_they_add(estimator):
    model, weights = system(estimator=estimator, aggregation="mean", repeats=2)
    _, plain = gradient(model)
    parts = [gradient(model, weight=weight) for weight in ([1.5, 0.0], [0.0, 1.0], [1.5, 1.0], [1.0, 1.0])]
    np.testing.assert_allclose(parts[3][1], plain, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(parts[0][1] + parts[1][1], parts[2][1], rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(parts[0][1] / 1.5 + parts[1][1], plain, rtol=1e-3, atol=1e-6)
    assert np.abs(parts[0][1]).max() > 1e-4
    found = expected_pass(weights, steps=[0, 1], aggregation="mean")
    settings = {"estimator": estimator, "repeats": 2}
    expected = reference.attention_sampling.loss(found, LABELS, weights=np.array([1.5, 1.0]), **settings)
    assert parts[2][0] == pytest.approx(expected, rel=1e-4)


def test_patches_that_are_all_alike_teach_the_attention_nothing():
    """Rewards are those of their baseline, and the cross entropy does not reach the attention."""
    flat = keras.Sequential([keras.Input((7, 7, 3)), keras.layers.GlobalMaxPooling2D()])
    model = AttentionSampling(3, **SMALL, features=flat, entropy=0.0)
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    conformance.randomise(model.attention)
    model.build(IMAGES.shape)
    assert np.abs(gradient(model, IMAGES)[1]).max() > 1e-5
    assert np.abs(gradient(model, np.full_like(IMAGES, 90))[1]).max() < 1e-6


def test_samples_are_those_of_their_seed_and_spread_around_a_mean():
    model, weights = system(aggregation="mean")
    drawn = np.array(model.sample(IMAGES, draws=30, seed=3))
    assert drawn.shape == (2, 30, 3)
    assert int(model.sampler.step) == 0
    np.testing.assert_array_equal(model.sample(IMAGES, draws=30, seed=3), drawn)
    assert np.abs(np.array(model.sample(IMAGES, draws=30, seed=4)) - drawn).max() > 0.1
    every = reference.attention_sampling.forward(*weights, IMAGES, **SMALL | {"patches": 35})
    own, scores = every["probabilities"][..., None], every["patch_scores"]
    error = np.sqrt(((own * scores**2).sum(axis=1) - every["scores"] ** 2) / (30 * 3))  # of 30 draws of 3
    assert (np.abs(drawn.mean(axis=1) - every["scores"]) < 4 * error + 1e-6).all()  # sum_p a_p f_p over all


def test_padded_images_answer_as_alone():
    model, _ = system()
    padded = np.pad(IMAGES, ((0, 0), (0, 9), (0, 11), (0, 0)), constant_values=255)
    inputs = {"image": padded, "size": np.array([[23, 30]] * 2)}
    np.testing.assert_allclose(model(inputs), model(IMAGES), rtol=1e-4, atol=1e-5)
    boxes = [np.array(model.explain(each)["boxes"]) for each in (inputs, IMAGES)]
    np.testing.assert_array_equal(*boxes)


def test_reloaded_with_networks_of_ones_own(tmp_path):
    attend = keras.Sequential(
        [
            keras.Input((None, None, 3)),
            keras.layers.Conv2D(1, 3, padding="same"),
            keras.layers.Reshape((35,)),
            keras.layers.Softmax(),
            keras.layers.Reshape((5, 7)),
        ]
    )
    features = keras.Sequential(
        [keras.Input((7, 7, 3)), keras.layers.Flatten(), keras.layers.Dense(3), keras.layers.Dropout(0.5)]
    )
    model = AttentionSampling(3, **SMALL, attention=attend, features=features, reward="image", nms=False)
    expected = model(IMAGES)
    again = AttentionSampling.from_config(model.get_config())
    assert again.get_config() == model.get_config()
    model.save(tmp_path / "model.keras")
    reloaded = load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(reloaded(IMAGES), expected)
    for name, value in model.explain(IMAGES).items():
        np.testing.assert_array_equal(reloaded.explain(IMAGES)[name], value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"estimator": "pathwise"}, r"`estimator` must be one of .*Received: estimator='pathwise'"),
        ({"estimator": "expectation"}, "needs aggregation='mean'"),
        ({"patch_size": 5}, "`patch_size` above `stride`.*patch_size=5, stride=5"),
        ({"features": 3}, "must be names or Keras models. Received: 3"),
        ({"attention": "resnet50"}, "'paper', 'wide', 'uniform', or a Keras model. Received: 'resnet50'"),
        ({"pool": "mean"}, "`pool` must be 'max' or 'average'. Received: pool='mean'"),
        ({"estimator": "expectation", "aggregation": "mean", "conditional": True}, "conditional=True"),
    ],
)
def test_wrong_arguments_are_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        AttentionSampling(2, **arguments)


def test_fit_teaches_where_to_look():
    """Red and blue spots: draws that know nothing of them would see less than half of them."""
    rng = np.random.default_rng(0)
    images = rng.integers(90, 130, (64, 48, 48, 3)).astype("uint8")
    labels = np.arange(64) % 2
    for image, label, (row, column) in zip(images, labels, rng.integers(0, 40, (64, 2)), strict=True):
        image[row : row + 8, column : column + 8] = [250, 30, 30] if label else [30, 30, 250]
    model = AttentionSampling(2, patches=6, patch_size=12, stride=4, repeats=2, seed=1)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.005), loss, metrics=["accuracy"], jit_compile=False)
    history = model.fit(images, labels, batch_size=16, epochs=10, verbose=0).history
    assert int(model.sampler.step) == 10 * 4 * 2
    assert history["accuracy"][0] < 0.7
    assert history["accuracy"][-1] > 0.9


def patches_of(cells, columns, image, size=7, stride=4):
    """The patches of one image's cells, cut by the reference."""
    corners = [
        [reference.sampler.corner(i, Fraction(stride), size) for i in divmod(int(cell), columns)]
        for cell in cells
    ]
    return np.stack([reference.sampler.patch(image, *place, size) for place in corners]).astype("float32")


@pytest.mark.parametrize("reward", ["patch", "image"])
def test_conditional_draws_follow_the_attention_and_their_loss_its_equation(reward):
    """As built, v = 0: each draw is one from the attention alone, whatever was seen before."""
    model, [_, features] = system(conditional=True, reward=reward, repeats=2, entropy=0.3)
    assert model.sampler.kernel.shape[0] == 8 + 3 + 16  # it sees the attention network's 8 maps
    answer = {name: np.array(value) for name, value in model(IMAGES, training=True).items()}
    a = answer["attention"].reshape(2, -1)
    assert int(model.sampler.step) == 1
    for row in range(4):
        cells, own = answer["cells"][row], a[row // 2][answer["cells"][row]]
        np.testing.assert_allclose(answer["log_probs"][row], np.log(own), rtol=1e-4)
        shown = reference.sampler.feature_network(features, patches_of(cells, 7, IMAGES[row // 2]) / 255)
        np.testing.assert_allclose(answer["patch_scores"][row], 2 * shown, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(answer["scores"][row], own @ (2 * shown) / own.sum(), rtol=1e-4, atol=1e-5)
    truth = np.repeat(LABELS, 2)
    of = answer["patch_scores" if reward == "patch" else "scores"]
    entropies = [reference.attention_sampling.cross_entropy(*each) for each in zip(of, truth, strict=True)]
    rewards = np.exp(-np.stack(entropies)).reshape(2, 2, -1)
    others = rewards[:, ::-1].mean(axis=2, keepdims=True)  # the other repeat's mean
    gains = (rewards - others).reshape(4, -1)
    logs = np.cumsum(answer["log_probs"], axis=1)
    surrogate = -np.mean(gains * (logs if reward == "patch" else logs[:, -1:]))
    losses = [
        reference.attention_sampling.cross_entropy(*each)
        for each in zip(answer["scores"], truth, strict=True)
    ]
    expected = np.mean(losses) + 0.3 * np.mean((a * np.log(a)).sum(axis=1)) + surrogate
    answer = {name: tf.constant(value) for name, value in answer.items()}
    assert float(model.compute_loss(IMAGES, LABELS, answer)) == pytest.approx(expected, rel=1e-4)


def test_conditional_system_learns_is_padded_and_reloaded(tmp_path):
    model, _ = system(conditional=True, repeats=2)
    model.fit(IMAGES, LABELS, epochs=2, verbose=0)
    assert np.abs(np.array(model.sampler.score)).max() > 0
    drawn = np.array(model.sample(IMAGES, draws=8, seed=1))
    np.testing.assert_allclose(drawn, model.sample(IMAGES, draws=8, seed=1), atol=1e-6)
    assert drawn.std(axis=1).max() > 1e-3
    padded = np.pad(IMAGES, ((0, 0), (0, 9), (0, 11), (0, 0)), constant_values=255)
    inputs = {"image": padded, "size": np.array([[23, 30]] * 2)}
    np.testing.assert_allclose(model(inputs), model(IMAGES), rtol=1e-4, atol=1e-5)
    model.save(tmp_path / "model.keras")
    np.testing.assert_array_equal(load_model(tmp_path / "model.keras")(IMAGES), model(IMAGES))


def test_uniform_attention_is_not_trained_and_reads_the_same_places():
    model, _ = system(attention="uniform", aggregation="mean", repeats=2)
    answer = model(IMAGES, training=True)
    np.testing.assert_allclose(answer["attention"], 1 / 35, rtol=1e-6)
    losses = [
        reference.attention_sampling.cross_entropy(*each)
        for each in zip(np.array(answer["scores"]), np.repeat(LABELS, 2), strict=True)
    ]
    assert float(model.compute_loss(IMAGES, LABELS, answer)) == pytest.approx(np.mean(losses), rel=1e-5)
    assert len(model.trainable_weights) == 10  # the feature network's
    one, other, alone = (
        np.array(each) for each in (*model.explain(IMAGES)["boxes"], model.explain(IMAGES[1:])["boxes"][0])
    )
    assert {tuple(box) for box in one} == {tuple(box) for box in other} == {tuple(box) for box in alone}
    assert np.ptp(np.array(model.sample(IMAGES, draws=4)), axis=1).max() > 0.1


def test_named_backbone_reads_patches_as_images():
    model, [_, features] = system(features="small_cnn", feature_stride=8, pool="average")
    [backbone] = model.backbones
    found = model._pass(IMAGES)
    patches = np.concatenate([patches_of(found["cells"][b], 7, IMAGES[b]) for b in range(2)])
    pooled = np.array(backbone(patches)).mean(axis=(1, 2))  # it takes 0..255
    scores = pooled @ features["head/kernel"] + features["head/bias"]
    expected = 2 * scores / np.linalg.norm(scores, axis=1, keepdims=True)
    np.testing.assert_allclose(np.reshape(found["patch_scores"], (6, 3)), expected, rtol=1e-4, atol=1e-4)
    again = AttentionSampling.from_config(model.get_config())
    assert [one.name for one in again.backbones] == ["small_cnn"]


@pytest.fixture(scope="module")
def part(tmp_path_factory, tiny_set):
    """The one part of a small finished run, of which a frozen backbone stands under the features."""
    model = {"system": "AttentionSampling", "patches": 4, "patch_size": 12, "stride": 4, "repeats": 2}
    model |= {"features": "small_cnn", "feature_stride": 8}
    train = {"epochs": 1, "batch_size": 8, "frozen_stride": 4}
    settings = recipe.from_dict(TINY | {"model": model, "train": train})
    out = tmp_path_factory.mktemp("runs") / "sampling"
    [part] = experiment.train(settings, tiny_set, out, write=lambda line: None)
    return part


def test_recipe_to_saved_model(tmp_path, part):
    """Trained, evaluated, explained and exported as any other system."""
    found = evaluate.evaluate([part])
    untrained = trainer.build(part.recipe, 2)
    pairs = list(zip(untrained.backbones[0].weights, part.model().backbones[0].weights, strict=True))
    same = [np.array_equal(*pair) for pair in pairs]
    assert same == [True] * 4 + [False] * 4  # the first two layers are frozen, the others train
    test = part.manifest.split("test")
    finding = next(report.findings(part.model(), part.recipe, test.paths[:1]))
    np.testing.assert_allclose(finding.probabilities, found.probabilities[0], rtol=1e-4)
    assert finding.argued.sum() == pytest.approx(1, abs=1e-4)
    assert finding.argued.shape == (16, 20)
    assert ((finding.boxes >= 0) & (finding.boxes <= np.array([70, 60, 70, 60]) + 1e-3)).all()
    (tmp_path / "exported").mkdir()
    folder, differences = saved_model.export(
        part.model(), part.recipe, part.manifest.class_names, tmp_path / "exported", test
    )
    assert max(differences.values()) <= 1e-4
    served = tf.saved_model.load(str(folder))
    answer = served.signatures["explain"](tf.constant([test.paths[0].read_bytes()]))
    np.testing.assert_allclose(answer["attention"][0], finding.argued / finding.argued.max(), atol=1e-3)
    np.testing.assert_allclose(answer["boxes"][0], finding.boxes, atol=1e-3)
    np.testing.assert_allclose(answer["weights"][0], finding.weights, atol=1e-4)

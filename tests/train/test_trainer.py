"""Training: what moves, at which rate, what a killed run needs, and what a run folder holds."""

import json

import keras
import numpy as np
import pytest
from conftest import TINY
from scipy.special import log_softmax
from sklearn.metrics import accuracy_score, roc_auc_score

from keras_medattn.data import augment, pipeline
from keras_medattn.data import manifest as manifests
from keras_medattn.data.manifest import ManifestError
from keras_medattn.files import read_json, write_json
from keras_medattn.train import evaluate, experiment, recipe, trainer
from keras_medattn.train.experiment import RunError
from keras_medattn.train.recipe import RecipeError

SMALL = TINY["model"] | {"backbone": "small_cnn"}  # where it is not about the backbone


def settings(model=TINY["model"], **train):
    return recipe.from_dict(TINY | {"model": model, "train": TINY["train"] | train})


def quiet(line):
    pass


def test_backbone_moves_at_half_the_rate():
    """Adam's first step is the learning rate times the gradient's sign, so steps show the rates."""
    tiny = settings(learning_rate=1e-3, weight_decay=0.0, epochs=1000)
    model = trainer.build(tiny, 2)
    optimizer = trainer.optimizer(tiny.train, model, steps=1000)
    before = [variable.numpy() for variable in model.trainable_variables]
    gradients = [keras.ops.ones(variable.shape) for variable in model.trainable_variables]
    optimizer.apply(gradients, model.trainable_variables)
    backbone = {id(variable) for variable in model.backbone.trainable_variables}
    assert 0 < len(backbone) < len(before)
    for variable, old in zip(model.trainable_variables, before, strict=True):
        rate = 5e-4 if id(variable) in backbone else 1e-3
        np.testing.assert_allclose(old - variable.numpy(), rate, rtol=2e-3, err_msg=variable.path)


@pytest.mark.parametrize(("stride", "frozen", "moving"), [(8, "all", "none"), (4, "some", "some")])
def test_frozen_layers_keep_their_weights(tmp_path, tiny_set, stride, frozen, moving):
    [part] = experiment.train(
        settings(epochs=1, frozen_stride=stride), tiny_set, tmp_path / "run", write=quiet
    )
    fresh, trained = trainer.build(part.recipe, 2), part.model()
    stem, _ = trainer.parts(fresh, stride)
    still = len(stem.get_weights())
    pairs = list(zip(fresh.backbone.get_weights(), trained.backbone.get_weights(), strict=True))
    same = [np.array_equal(*pair) for pair in pairs]
    assert all(same[:still])
    assert (False in same) == (moving == "some")  # batch norm is frozen: kernels alone move
    assert not np.array_equal(fresh.head.get_weights()[0], trained.head.get_weights()[0])


def test_cached_features_train_the_same_model(tmp_path, tiny_set):
    """Without augmentation a cache is a short cut, nothing else."""
    plain = recipe.from_dict(
        TINY
        | {
            "train": TINY["train"] | {"frozen_stride": 4, "epochs": 2},
            "augment": [],
            "model": TINY["model"] | {"dropout": 0.0},
        }
    )
    cached = recipe.from_dict(plain.to_dict() | {"train": plain.to_dict()["train"] | {"cached_views": 1}})
    models = [
        experiment.train(one, tiny_set, tmp_path / name, write=quiet)[0].model()
        for name, one in (("plain", plain), ("cached", cached))
    ]
    for one, other in zip(*(model.get_weights() for model in models), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-4)


def test_training_learns_the_spot(tiny_run):
    rows = (tiny_run.folder / "history.csv").read_text().splitlines()
    losses = [float(row.split(",")[1]) for row in rows[1:]]
    assert rows[0] == "epoch,loss,val_loss,val_auroc,seconds"
    assert losses[-1] < losses[0]


def test_stopped_run_of_a_system_with_a_loss_of_its_own_draws_on(tmp_path, tiny_set):
    """Resumed after its first epoch it makes the draws, and the weights, of a run that was not stopped.

    With another optimiser than the other resumed run, and with the test side watched.
    """
    model = {"system": "AttentionSampling", "patches": 3, "patch_size": 12, "stride": 4, "repeats": 2}
    train = {"optimizer": "sgd", "schedule": "step", "step_epochs": 1, "l2": 1e-4, "watch_test": True}
    values = TINY | {"model": model, "train": train | {"epochs": 2, "batch_size": 8, "monitor": "epoch"}}
    tiny = recipe.from_dict(values)
    [whole] = experiment.train(tiny, tiny_set, tmp_path / "whole", write=quiet)

    def stop(line):
        if "epoch" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        experiment.train(tiny, tiny_set, tmp_path / "stopped", write=stop)
    experiment.train(tiny, tiny_set, tmp_path / "stopped", resume=True, write=quiet)
    states = [np.load(tmp_path / out / "checkpoint" / "state.npz") for out in ("whole", "stopped")]
    assert int(states[0]["epochs"]) == 2
    for name in states[0].files:
        np.testing.assert_array_equal(states[0][name], states[1][name], err_msg=name)
    assert not keras.saving.load_model(whole.best).compiled  # saved bare
    [*_, last] = np.genfromtxt(whole.folder / "history.csv", delimiter=",", names=True)
    test = whole.manifest.split("test")
    answers = evaluate.predict(whole, test)
    assert last["test_accuracy"] == accuracy_score(test.labels, answers.argmax(axis=1))
    assert last["test_auroc"] == roc_auc_score(test.labels, answers[:, 1])
    frozen = recipe.from_dict(values | {"train": {"frozen_stride": 8}})
    with pytest.raises(
        RecipeError, match=r"train\.frozen_stride must be 0: AttentionSampling has no backbone"
    ):
        trainer.build(frozen, 2)


def test_run_is_never_overwritten_and_resumes_only_itself(tmp_path, tiny_set, tiny_run):
    out = tiny_run.folder
    before = (out / "best.keras").read_bytes()
    with pytest.raises(RunError, match="a run is never overwritten"):
        experiment.train(tiny_run.recipe, tiny_set, out, write=quiet)
    with pytest.raises(RecipeError, match="cannot resume with another recipe"):
        experiment.train(settings(epochs=9), tiny_set, out, resume=True, write=quiet)
    with pytest.raises(RunError, match="no run to resume"):
        experiment.train(settings(), tiny_set, tmp_path / "none", resume=True, write=quiet)
    about = read_json(out / "run.json")
    about["recipe"]["train"].pop("balance")  # a setting that came later
    write_json(about, out / "run.json")
    experiment.train(tiny_run.recipe, tiny_set, out, resume=True, write=quiet)  # finished: nothing to do
    assert (out / "best.keras").read_bytes() == before
    assert experiment.load(out)[0].recipe == tiny_run.recipe


def test_balanced_epochs_reach_the_model(tmp_path, tiny_set):
    """Of equal pictures nothing can be learnt but how often each class is drawn."""
    rows = ["path,label,split"]
    for number in range(14):
        (tmp_path / f"{number}.png").write_bytes((tiny_set.parent / "01.png").read_bytes())
        side = "train" if number < 10 else "val" if number < 12 else "test"
        rows.append(f"{number}.png,{'b' if number in (0, 1, 10, 12) else 'a'},{side}")
    (tmp_path / "set.csv").write_text("\n".join(rows))
    means, said = [], []
    for balance in (False, True):
        cheap = {"epochs": 4, "learning_rate": 0.1, "monitor": "epoch", "frozen_stride": 8, "cached_views": 1}
        few = settings(**cheap, balance=balance, class_weights=False)
        plain = recipe.from_dict(few.to_dict() | {"augment": []})
        [part] = experiment.train(plain, tmp_path / "set.csv", tmp_path / str(balance), write=said.append)
        means.append(evaluate.predict(part, part.manifest.split("test"))[0, 1])
    assert said[0].startswith("warning: no patients are known")
    assert said[1] == "train 10 images, val 2 images, test 2 images"
    assert means[0] < 0.45 < means[1] < 0.65  # 2 of 10; 5 of 10


def test_run_folder_tells_what_made_it(tiny_run):
    about = json.loads((tiny_run.folder / "run.json").read_text())
    assert recipe.from_dict(about["recipe"]).train == tiny_run.recipe.train
    assert about["seeds"] == [0]
    assert about["versions"]["keras"] == keras.__version__
    assert about["seconds"] > 0
    assert 0.1 < about["peak_memory_gb"] < 64  # TensorFlow alone takes more than .1
    table = manifests.load(tiny_run.folder / "split.csv")
    assert [table.splits.count(side) for side in ("train", "val", "test")] == [16, 6, 8]


def test_run_of_an_older_version_is_named(tmp_path, tiny_run):
    about = read_json(tiny_run.folder / "run.json")
    about.pop("root")
    write_json(about, tmp_path / "run.json")
    with pytest.raises(RunError, match="Train it again"):
        experiment.load(tmp_path)


def test_all_unreadable_files_are_named_before_anything_is_made(tmp_path, tiny_set):
    rows = tiny_set.read_text().splitlines()
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("no image")
    rows += ["empty.png,none,q1,train", "text.png,spot,q2,train", "gone.png,spot,q3,train"]
    for name in (row.split(",")[0] for row in rows[1:31]):
        (tmp_path / name).write_bytes((tiny_set.parent / name).read_bytes())
    table = tmp_path / "set.csv"
    table.write_text("\n".join(rows))
    with pytest.raises(ManifestError, match="3 of 33 images") as caught:
        experiment.train(settings(), table, tmp_path / "run", write=quiet)
    for name in ("empty.png", "text.png", "gone.png"):
        assert name in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_public_set_that_is_not_there_leaves_nothing_behind(tmp_path):
    public = recipe.from_dict(TINY | {"data": {"set": "bach", "image_size": [64, 80]}})
    with pytest.raises(ManifestError, match="ICIAR2018_BACH_Challenge"):
        experiment.train(public, tmp_path, tmp_path / "run", write=quiet)
    assert not (tmp_path / "run").exists()


def test_loss_that_is_not_finite_stops_and_keeps_the_best(tmp_path, tiny_set):
    with pytest.raises(FloatingPointError, match=r"loss is (nan|inf)(.|\n)* Lower train\.learning_rate"):
        experiment.train(settings(learning_rate=1e30, epochs=8), tiny_set, tmp_path / "run", write=quiet)


def test_folds_and_seeds_make_a_model_each(tmp_path, tiny_set):
    quick = settings(SMALL, epochs=1, frozen_stride=8, cached_views=1)
    unsplit = tmp_path / "set.csv"
    lines = [line.rpartition(",")[0] for line in tiny_set.read_text().splitlines()]
    unsplit.write_text("\n".join(lines))
    for line in lines[1:]:
        name = line.split(",")[0]
        (tmp_path / name).write_bytes((tiny_set.parent / name).read_bytes())
    said = []
    parts = experiment.train(quick, unsplit, tmp_path / "run", folds=2, seeds=(0, 1), write=said.append)
    assert [part.folder.name for part in parts] == [
        "seed0-fold1",
        "seed0-fold2",
        "seed1-fold1",
        "seed1-fold2",
    ]
    for first, second in (parts[:2], parts[2:]):
        held = [set(part.manifest.split("test").names) for part in (first, second)]
        assert not held[0] & held[1]
        assert len(held[0] | held[1]) == 30
        for part in (first, second):
            sides = {side: set(part.manifest.split(side).patients) for side in ("train", "val", "test")}
            assert (
                not sides["train"] & sides["test"]
                | sides["train"] & sides["val"]
                | sides["val"] & sides["test"]
            )
            counts = [f"{side} {2 * len(one)} images of {len(one)} patients" for side, one in sides.items()]
            assert f"{part.folder.name}  {', '.join(counts)}" in said
    assert set(parts[0].manifest.split("test").names) != set(parts[2].manifest.split("test").names)
    assert len(list((tmp_path / "run" / "cache").glob("*.npy"))) == 2  # one a seed: random weights differ
    again = experiment.load(tmp_path / "run")
    assert [part.manifest.splits for part in again] == [part.manifest.splits for part in parts]
    [second] = experiment.load(parts[1].folder)
    assert (second.folder, second.manifest.splits) == (parts[1].folder, parts[1].manifest.splits)


def test_doubtful_table_is_refused(tmp_path, tiny_set):
    both = tmp_path / "set.csv"
    both.write_text(tiny_set.read_text().replace("01.png,spot,p0,train", "01.png,spot,p0,test"))
    with pytest.raises(ManifestError, match=r"1 patients stand in more than one split.*p0"):
        experiment.train(settings(), both, tmp_path / "run", write=quiet)


def test_best_epoch_is_the_one_kept(tiny_run):
    rows = (tiny_run.folder / "history.csv").read_text().splitlines()
    history = [dict(zip(rows[0].split(","), map(float, row.split(",")), strict=True)) for row in rows[1:]]
    best = min(history, key=lambda row: (-row["val_auroc"], row["val_loss"]))
    assert json.loads((tiny_run.folder / "metrics.json").read_text()) == best
    assert (tiny_run.folder / "history.png").stat().st_size > 5000
    val = tiny_run.manifest.split("val")
    probabilities = evaluate.predict(tiny_run, val)
    loss = -np.log(probabilities[np.arange(len(val)), val.labels]).mean()
    assert loss == pytest.approx(best["val_loss"], abs=1e-4)


def test_mixed_images_and_weighed_labels_reach_the_model(tmp_path, tiny_set):
    """The loss of an epoch that changes nothing, by hand: each batch a function of the seed and its step."""
    still = {"epochs": 1, "learning_rate": 1e-12, "weight_decay": 0.0, "frozen_stride": 8}
    values = TINY | {"train": TINY["train"] | still, "model": SMALL | {"dropout": 0.0}}
    mixed = recipe.from_dict(
        values | {"augment": [{"layer": "RandomFlip"}, {"layer": "MixUp", "alpha": 0.8}]}
    )
    table = tmp_path / "set.csv"  # three of one class to one of the other
    rows = tiny_set.read_text().splitlines()
    table.write_text(
        "\n".join(row for row in rows if ",train" not in row or row[:2] not in ("01", "03", "05"))
    )
    for row in rows[1:]:
        (tmp_path / row[:6]).write_bytes((tiny_set.parent / row[:6]).read_bytes())
    [part] = experiment.train(mixed, table, tmp_path / "run", write=quiet)
    side = part.manifest.split("train")
    images = pipeline.read_all(side, (64, 80))
    change, mix = augment.augmenter(mixed.augment), augment.mixer(mixed.augment, 2)
    whole = pipeline.training_batches(
        pipeline.held(images), side.labels, 6, 0, range(6), change, mix=mix
    ).as_numpy_iterator()
    batches = list(whole)
    counts = np.bincount(side.labels)
    weights, model, losses = len(side) / (2 * counts), part.model(), []
    assert counts.tolist() == [8, 5]
    for x, y in batches[:3]:
        assert np.abs(y - y.round()).max() > 0
        losses += list(
            -(log_softmax(np.float64(model(x, training=True)), axis=1) * y).sum(axis=1) * (y @ weights)
        )
    [row] = np.atleast_1d(np.genfromtxt(part.folder / "history.csv", delimiter=",", names=True))
    assert row["loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    later = pipeline.training_batches(
        pipeline.held(images), side.labels, 6, 0, range(3, 6), change, mix=mix
    )  # as after a resume
    for one, other in zip(batches[3:], later.as_numpy_iterator(), strict=True):
        np.testing.assert_array_equal(one[0], other[0])
        np.testing.assert_array_equal(one[1], other[1])
    for wrong in ({"train": values["train"] | {"cached_views": 1}}, {"data": {"slices": [1, 2]}}):
        with pytest.raises(RecipeError, match="without MixUp and CutMix where"):
            recipe.from_dict(mixed.to_dict() | wrong)

"""What `explain` writes for each system, and that it agrees with the model."""

import keras
import numpy as np
import pytest
import trees
from PIL import Image

from keras_medattn import models
from keras_medattn.data import manifest, pipeline
from keras_medattn.explain import overlays, report, stacks
from keras_medattn.files import read_json
from keras_medattn.train import experiment, recipe


def network():
    """A backbone of stride 8."""
    layers = [keras.Input((None, None, 3)), keras.layers.Rescaling(1 / 255)]
    return keras.Sequential([*layers, keras.layers.Conv2D(6, 8, 8, activation="relu")])


def fusion():
    return models.GatedFusion(
        2, backbone=network(), instance_backbone=network(), overview_size=64, crop_size=32, k=3, filters=8
    )


SYSTEMS = {
    "GatedFusion": (fusion, "attention"),
    "AttentionSampling": (lambda: models.AttentionSampling(2, 4, 12, 5, seed=0), "patches"),
    "GlobalMask": (lambda: models.GlobalMask(2, network(), "pixels"), None),
}


def untrained(folder, model, table, **data) -> experiment.Part:
    """A run of a model as it begins; where it has a head, all images are of the second class to it."""
    made = recipe.from_dict({"data": {"image_size": [64, 80], **data}})
    model.build((None, *made.data.image_size, 3))
    model = model.snapshot() if hasattr(model, "snapshot") else model
    if hasattr(model, "head"):
        model.head.bias.assign([-50.0, 50.0])
    model.save(folder / "best.keras")
    return experiment.Part(folder, made, table)


@pytest.mark.parametrize("system", SYSTEMS)
def test_pictures_and_arrays_agree_with_the_model(system, tiny_set, tmp_path):
    make, kind = SYSTEMS[system]
    table = manifest.load(tiny_set).split("test").take(range(2))
    part = untrained(tmp_path, make(), table)
    out, lines, model = tmp_path / "out", [], part.model()
    report.explain([report.Job(part, table)], out, write=lines.append, side=40)
    records = read_json(out / "explanations.json")
    pages = {"overlay", "heat"} | ({kind} if kind else set())
    assert {path.name for path in out.iterdir()} == {
        *(f"000{place}-{path.stem}.{page}.{'npy' if page == 'heat' else 'png'}"
          for place, path in enumerate(table.paths) for page in pages),
        "explanations.json",
        "sheet.png",
        *(["mask.png"] if system == "GlobalMask" else []),
    }  # fmt: skip
    for record, path in zip(records, table.paths, strict=True):
        sized = pipeline.read_sized(path, (64, 80))[None]
        named = {key: np.array(value)[0] for key, value in model.explain(sized).items()}
        scores = np.array(model(sized))[0]
        assert record["predicted"] == table.class_names[scores.argmax()]
        heat = np.load(record["heat"])
        assert heat.shape == (34, 40)  # of 60 x 70, shrunk
        assert record["scale"] == 40 / 70
        assert Image.open(record["overlay"]).size == (40, 34)
        if "attention" in named:
            expected = overlays.to_image_size(np.maximum(named["attention"], 0), 34, 40)
            np.testing.assert_allclose(heat, expected, atol=1e-6)
        if "boxes" in named:
            real = (named["boxes"][:, 2:] > named["boxes"][:, :2]).all(axis=1)
            expected = named["boxes"][real] * [70 / 80, 60 / 64, 70 / 80, 60 / 64]
            np.testing.assert_allclose(record["boxes"], expected, atol=0.06)
    assert lines[0].startswith("mask: 1 to 1" if system == "GlobalMask" else "wrote 2 overlays")


def test_localisation_of_what_is_cut_out(tiny_set, tmp_path):
    """Everything is called a spot, so that all that are spots count."""
    table = manifest.load(tiny_set).split("test")
    part = untrained(tmp_path, fusion(), table)
    boxes = tmp_path / "boxes.csv"
    boxes.write_text("path,xmin,ymin,xmax,ymax\n" + "".join(f"{name},0,0,70,60\n" for name in table.names))
    lines = []
    report.explain([report.Job(part, table)], tmp_path / "out", None, boxes, most=1, write=lines.append)
    found = read_json(tmp_path / "out" / "localisation.json")
    assert found["figures"]["energy"]["value"] == 1
    model, spots = part.model(), table.take(np.flatnonzero(table.labels))
    above = [
        np.mean(model.explain(pipeline.read_sized(path, (64, 80))[None])["above"]) for path in spots.paths
    ]
    assert found["region"]["area"]["value"] == pytest.approx(np.mean(above), abs=0.02)  # 56 cells on 60 x 70
    assert any(line.strip().startswith("covered_random") for line in lines)


def test_volumes_show_the_slices_that_argue(tmp_path):
    table = manifest.load(trees.volumes(tmp_path / "set")).take(range(2))
    model = models.MIMS(2, network(), kernels=((1, 3),), scales=(1.0,), k=2)
    part = untrained(tmp_path, model, table, image_size=[32, 32], slices=[2, 3])
    model.head.bias.assign([0.0, 0.0])
    rng = np.random.default_rng(0)
    for weight in (model.head.kernel, *model.ms_conv.trainable_weights):
        weight.assign(rng.normal(size=weight.shape))
    model.save(part.best)
    report.explain([report.Job(part, table)], tmp_path / "out", write=lambda line: None)
    for record, found in zip(
        read_json(tmp_path / "out" / "explanations.json"),
        stacks.stacks(part.model(), part.recipe, table.paths),
        strict=True,
    ):
        sized = pipeline.read_sized_volume(found.path, (32, 32))
        alone = np.concatenate(
            [model({"image": one[None, None], "mask": np.ones((1, 1), bool)}) for one in sized]
        )
        index = table.class_names.index(record["predicted"])
        wanted = np.flatnonzero(alone.argmax(axis=-1) == index)
        margins = alone[:, index] - alone[:, 1 - index]
        order = sorted(wanted, key=lambda place: -margins[place]) or [margins.argmax()]
        assert record["arguing"] == [place + 1 for place in order]
        np.testing.assert_allclose(record["slice_probabilities"], 1 / (1 + np.exp(-margins)), atol=1e-3)
        heat = np.load(record["heat"])
        assert heat.shape[0] == len(sized)
        assert set(np.flatnonzero(heat.any(axis=(1, 2)))) <= set(order)
        assert (found.boxes >= 0).all()
        assert (found.boxes[:, 2:] <= found.pixels.shape[2:0:-1]).all()
        assert Image.open(record["slices"]).width > 500
    assert (tmp_path / "out" / "sheet.png").is_file()


def test_what_cannot_be_explained_is_said(tiny_set, tmp_path):
    table = manifest.load(tiny_set).split("test").take(range(1))
    part = untrained(tmp_path, SYSTEMS["AttentionSampling"][0](), table)
    with pytest.raises(ValueError, match="argues against no class"):
        report.explain([report.Job(part, table)], tmp_path / "out", sign=-1)
    with pytest.raises(ValueError, match="--side must be 32 pixels or more"):
        report.explain([report.Job(part, table)], tmp_path / "out", side=8)
    assert not (tmp_path / "out").exists()


def test_a_pyramid_has_a_heat(tiny_set, tmp_path):
    table = manifest.load(tiny_set).split("test").take(range(1))
    model = models.MIMS(2, network(), kernels=((1, 3),), scales=(0.5, 1.0), k=2, pyramid=True)
    part = untrained(tmp_path, model, table)
    [found] = report.findings(part.model(), part.recipe, table.paths)
    assert found.argued.shape == (8, 10)
    assert np.isfinite(found.argued).all()
    assert found.argued.any()

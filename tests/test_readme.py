"""README's Python runs, and its recipe is one."""

import re
import tomllib

from conftest import ROOT

from keras_medattn.train import recipe

TEXT = (ROOT / "README.md").read_text()


def test_python_example_trains():
    [code] = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    names = {}
    exec(code, names)  # what a reader would paste
    assert names["model"].optimizer.iterations.numpy() == 1


def test_recipe_example_is_valid():
    [text] = re.findall(r"```toml\n(.*?)```", TEXT, re.DOTALL)
    settings = recipe.from_dict(tomllib.loads(text))
    assert settings.train.frozen_stride == 8


def test_recipes_that_are_shipped_are_valid():
    paths = sorted((ROOT / "training" / "recipes").glob("*.toml"))
    assert paths
    for path in paths:
        assert recipe.load(path).train.epochs > 0

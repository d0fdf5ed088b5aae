"""The Python of README and docs runs, and README's recipe is one."""

import re
import tomllib

import pytest
from conftest import ROOT

from keras_medattn.train import recipe

TEXT = (ROOT / "README.md").read_text()


def test_python_example_trains():
    [code] = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    names = {}
    exec(code, names)  # what a reader would paste
    assert names["model"].optimizer.iterations.numpy() == 1


def _examples():
    for path in sorted((ROOT / "docs").glob("*.md")):
        for match in re.finditer(
            r"^#+ (.*?)$|```python\n(.*?)```", path.read_text(), re.DOTALL | re.MULTILINE
        ):
            if match[1]:
                heading = match[1]
            else:
                yield pytest.param(match[2], id=f"{path.stem}-{heading}")


@pytest.mark.parametrize("code", _examples())
def test_example_of_the_docs_runs(code):
    exec(code, {})


def test_recipe_example_is_valid():
    [text] = re.findall(r"```toml\n(.*?)```", TEXT, re.DOTALL)
    settings = recipe.from_dict(tomllib.loads(text))
    assert settings.train.frozen_stride == 8


def test_recipes_that_are_shipped_are_valid():
    paths = sorted((ROOT / "training" / "recipes").glob("*.toml"))
    assert paths
    for path in paths:
        assert recipe.load(path).train.epochs > 0

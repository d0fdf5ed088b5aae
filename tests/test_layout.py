"""The house: which way imports go, who may import TensorFlow, what the wheel holds."""

import ast
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "keras_medattn"
# each may import those before it in its row; `files` lies below all
BELOW = {
    "files": set(),
    "ops": set(),
    "layers": {"ops"},
    "models": {"layers", "ops"},
    "data": {"files"},
    "metrics": {"files"},
    "train": {"explain", "models", "layers", "ops", "data", "metrics", "files"},
    "explain": {"models", "layers", "ops", "data", "metrics", "files"},
    "export": {"explain", "models", "layers", "ops", "data", "metrics", "files"},
    "serve": {"data", "files"},
}
TENSORFLOW = {"data", "train", "export", "serve", "explain"}


def imports(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module} | {f"{node.module}.{name.name}" for name in node.names}
    return found


def sources():
    return [path for path in sorted(PACKAGE.rglob("*.py")) if path.parent != PACKAGE or path.stem in BELOW]


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_downward(path):
    own = room(path)
    parts = {name.split(".")[1] for name in imports(path) if name.startswith("keras_medattn.")}
    upward = parts - BELOW[own] - {own, "load_model"}
    assert not upward, f"{path} imports {upward}, which lie above {own}"


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_some_rooms_import_tensorflow_and_none_keras_internals(path):
    names = {name.split(".")[0] for name in imports(path)}
    assert "tensorflow" not in names or room(path) in TENSORFLOW
    assert not any(name.startswith("keras.src") for name in imports(path))
    assert "pickle" not in names or path.name == "torch_weights.py"


def test_every_room_is_known():
    assert {room(path) for path in sources()} == set(BELOW)


def test_help_answers_without_keras_or_tensorflow():
    code = (
        "import sys\nfrom keras_medattn import cli\n"
        "try:\n    cli.main(['--help'])\nexcept SystemExit as stop:\n    assert stop.code == 0\n"
        "heavy = {'keras', 'tensorflow', 'numpy', 'grpc'} & set(sys.modules)\nassert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
    assert "examples:" in done.stdout


def test_wheel_holds_the_package_alone(tmp_path):
    source = (
        tmp_path / "source"
    )  # built in a copy: setuptools leaves a `build/` that a later wheel would take in
    shutil.copytree(PACKAGE, source / "keras_medattn", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "--wheel-dir", tmp_path, str(source)],
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0, done.stderr
    [wheel] = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"keras_medattn"}
    shipped = {name for name in names if name.endswith(".py")}
    assert shipped == {str(path.relative_to(ROOT)) for path in PACKAGE.rglob("*.py")}
    assert "keras_medattn/py.typed" in names

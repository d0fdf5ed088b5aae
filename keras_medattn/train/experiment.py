"""A run folder: one model, or folds and seeds of it, with all that made them."""

from __future__ import annotations

import importlib.metadata
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from keras_medattn.data import headers, sets, splits, volumes
from keras_medattn.data import manifest as manifests
from keras_medattn.data.manifest import NO_PATIENTS, Manifest, ManifestError
from keras_medattn.files import read_json, write_json
from keras_medattn.train import inputs, seeing
from keras_medattn.train import recipe as recipes
from keras_medattn.train.recipe import Recipe, RecipeError

Data = Path | str | Manifest
_PACKAGES = ("keras-medattn", "keras", "tensorflow", "numpy", "scikit-learn", "scipy", "pillow", "tifffile")


class RunError(ValueError):
    """A run folder that cannot be used as asked."""


@dataclass(frozen=True)
class Part:
    """One trained model of a run: its folder, recipe and split."""

    folder: Path
    recipe: Recipe
    manifest: Manifest

    @property
    def best(self) -> Path:
        """The best model's file."""
        return self.folder / "best.keras"

    def model(self):
        """Load the best model."""
        from keras_medattn import load_model

        if not self.best.is_file():
            raise RunError(
                f"{self.folder}: no best.keras in it. Train it to the end: `medattn train ... --resume`"
            )
        return load_model(self.best, compile=False)


def train(
    recipe: Recipe,
    data: Data,
    out: Path | str,
    folds: int = 0,
    seeds: Sequence[int] = (),
    resume: bool = False,
    cache: Path | str | None = None,
    progress: inputs.Progress = lambda items, *_: items,
    write: Callable[[str], None] = print,
    save_every: int = 0,
    strategy: str | None = None,
    log: str | None = None,
) -> list[Part]:
    """Train a recipe into a new run folder.

    Where `TF_CONFIG` names several workers, each calls this with the same arguments, and they train together:
    every step's batch is shared by all their devices. The chief alone writes and prints.

    The folder holds `run.json` (recipe, data, seeds, folds, versions, git commit, and the seconds and the
    memory that its finished models took), and for each model a folder with `split.csv`, `history.csv` and
    its picture, `best.keras` and its `metrics.json`, `checkpoint/` and `tensorboard/`; with a single model
    these stand in the run folder itself.

    Args:
        recipe: the settings.
        data: a folder a class, or a CSV, or its table; where the recipe names a public set, its root as
            distributed.
        out: the run folder; it must not exist, unless `resume`.
        folds: 0, or the number of stratified cross-validation folds, by patient where known; the data's own
            where they have such.
        seeds: one model (or set of folds) each; empty: the recipe's seed. A seed fixes its folds too.
        resume: go on with a run that was stopped: from each model's last checkpoint.
        cache: where features of frozen layers, images that a public set's protocol changes, and decoded ones
            (`data.disk_gb`) are kept; by default in the run folder.
        progress: wraps long loops.
        write: prints a line.
        save_every: steps between two checkpoints within epochs, which may differ after a resume; 0: after
            each epoch alone.
        strategy: `"mirrored"`: all GPUs of this machine share each batch; None: one device.
        log: `"mlflow"` or `"wandb"`: send settings and figures there, too; see `seeing.logged`.

    Raises:
        ConnectionError: another worker has stopped.
        StrategyError: `strategy` or `TF_CONFIG` cannot be used.
        RunError: the folder exists, holds another run, or cannot be written.
        FloatingPointError, OSError: a loss that is not finite, a full disk: the last checkpoint is kept.
        ManifestError, ImageError, RecipeError: name what is wrong in the data or the recipe.
    """
    from keras_medattn.train import strategy as strategies
    from keras_medattn.train import trainer

    out = Path(out)
    seeds = tuple(seeds) or (recipe.train.seed,)
    if folds == 1 or folds < 0:
        raise RunError(f"folds must be 0, or 2 and more. Received: {folds}")
    if save_every < 0:
        raise RunError(f"save_every must be 0 or more. Received: {save_every}")
    seeing.check(log)
    began = time.monotonic()
    where = Path(cache) if cache else out / "cache"
    together, chief = strategies.get(strategy), strategies.chief()
    if not chief:
        progress, write = lambda items, *_: items, lambda line: None
    with strategies.lost_workers_told(), _removed_on_failure(out, unless=resume or not chief):
        if chief or resume:
            _check_folder(out, resume)
        if chief:
            _make(out)
        with strategies.chief_first():
            manifest = table(recipe, data, Path(cache) if cache else out / "data", progress)
        made = list(_plan(recipe, manifest, out, folds, seeds))
        _check_headers(recipe, manifest)
        about = _about(recipe, manifest, data, out, folds, seeds)
        about = _stored_about(out, about) if resume else about
        trainer.build(recipe, len(manifest.class_names))  # what is wrong with the model shows here
        with strategies.chief_first():
            images = inputs.images(recipe, manifest, progress, where)
        if chief:
            write_json(about, out / "run.json")
    if together:
        write(f"{together.num_replicas_in_sync} replicas on {strategies.workers()[1]} machines")
    if manifest.patients is None:
        write(f"warning: {NO_PATIENTS}")
    for part in made:
        if chief:
            part.folder.mkdir(exist_ok=True)
            splits.write(part.manifest, part.folder / "split.csv")
        name = f"{part.folder.name}  " if part.folder != out else ""
        write(f"{name}{_basis(part.manifest)}")
        settings = part.recipe, part.manifest, images, part.folder, where
        called, tracker = str(part.folder.relative_to(out.parent)), log if chief else None
        with (
            strategies.lost_workers_told(),
            seeing.logged(tracker, called, part.recipe.to_dict(), part.folder, write) as further,
        ):
            trainer.fit(*settings, progress, write, name, save_every, together, further)
        spent = {
            "seconds": about["seconds"] + round(time.monotonic() - began, 1),
            "peak_memory_gb": max(about["peak_memory_gb"], peak_memory_gb()),
        }
        if chief:
            write_json(about | spent, out / "run.json")
    return made


def table(recipe: Recipe, data: Data, edited: Path, progress: inputs.Progress) -> Manifest:
    """The images of a recipe's data; those that a public set's protocol changes are kept in `edited`."""
    if isinstance(data, Manifest):
        return data
    if not recipe.data.set:
        return manifests.load(data, recipe.data.classes or None)
    return sets.load(
        recipe.data.set, data, edited, lambda items, total: progress(items, total, "preparing images")
    )


def peak_memory_gb() -> float:
    """The most memory that this process has held so far, in 10^9 bytes."""
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kibibytes elsewhere
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 3)


def load(run: Path | str, data: Path | str | None = None) -> list[Part]:
    """The models of a run folder, with the split that each was trained on.

    Args:
        run: a folder that `train` made, or a nested cross validation; or the folder of one of its models.
        data: where the images lie now, a folder or CSV; of a public set its root, or the folder with the
            images that its protocol changed; by default where they lay.

    Raises:
        RunError: it is no run folder.
        ManifestError: images of the split are not in `data`.
    """
    run = Path(run)
    if (run / "nested.json").is_file():
        return [part for name in read_json(run / "nested.json")["folds"] for part in load(run / name, data)]
    home = home_of(run)
    try:
        about = read_json(home / "run.json")
    except (OSError, ValueError) as error:
        raise RunError(f"{run}: not a run folder, its run.json cannot be read ({error})") from error
    if "root" not in about:
        raise RunError(f"{run}: made by a version that did not yet keep where its images lie. Train it again")
    recipe = recipes.from_dict(about["recipe"], str(run / "run.json"))
    root = Path(data) if data else home / about["root"]
    root = root if root.is_dir() else root.parent
    return [
        _stored(folder, replace(recipe, train=replace(recipe.train, seed=seed)), root, about["class_names"])
        for folder, seed, _ in _folders(home, about["folds"], about["seeds"])
        if run in (home, folder)
    ]


def home_of(run: Path) -> Path:
    """The run folder of a run, or of one of its models."""
    return run.parent if (run / "split.csv").is_file() and not (run / "run.json").is_file() else run


def _stored(folder: Path, recipe: Recipe, root: Path, class_names: list[str]) -> Part:
    path = folder / "split.csv"
    if not path.is_file():
        raise RunError(f"{folder}: not trained yet. Go on with `medattn train ... --resume`")
    return Part(folder, recipe, replace(manifests.load(path, class_names), root=root))


def _folders(out: Path, folds: int, seeds: Sequence[int]) -> Iterator[tuple[Path, int, int]]:
    for seed in seeds:
        for fold in range(max(1, folds)):
            names = [f"seed{seed}"] * (len(seeds) > 1) + [f"fold{fold + 1}"] * (folds > 0)
            yield out / "-".join(names) if names else out, seed, fold


def _plan(recipe: Recipe, manifest: Manifest, out: Path, folds: int, seeds: Sequence[int]) -> Iterator[Part]:
    for folder, seed, fold in _folders(out, folds, seeds):
        if folds:
            sides = splits.fold_splits(manifest, folds, fold, seed, recipe.data.val_fraction)
        else:
            sides = splits.with_splits(manifest, seed, recipe.data.val_fraction, recipe.data.test_fraction)
        yield Part(folder, replace(recipe, train=replace(recipe.train, seed=seed)), sides)


def _basis(manifest: Manifest) -> str:
    """How many images each side has, and of how many patients where they are known."""
    sides = {name: manifest.split(name) for name in ("train", "val", "test")}
    patients = {name: set(side.patients or ()) for name, side in sides.items()}
    return ", ".join(
        f"{name} {len(side)} images" + (f" of {len(patients[name])} patients" if patients[name] else "")
        for name, side in sides.items()
    )


def _check_headers(recipe: Recipe, manifest: Manifest) -> None:
    """Name every file that cannot be used before anything is written or trained."""
    look = volumes.check_header if recipe.data.slices else headers.check_header
    faults = []
    for path in manifest.paths:
        try:
            header = look(path, max_pixels=recipe.data.max_pixels)
            if header.bits > 8 and not recipe.data.window:
                faults.append(f"{path}: has {header.bits} bits, and the recipe has no data.window")
        except headers.ImageError as error:
            faults.append(str(error))
    if faults:
        more = f"\n  ... and {len(faults) - 50} more" if len(faults) > 50 else ""
        raise ManifestError(
            f"{len(faults)} of {len(manifest)} images cannot be used; `medattn check` tells more:\n  "
            + "\n  ".join(faults[:50])
            + more
        )


def _check_folder(out: Path, resume: bool) -> None:
    if out.exists() and not resume:
        raise RunError(f"{out} exists, and a run is never overwritten. Choose another --out, or --resume it")
    if resume and not (out / "run.json").is_file():
        raise RunError(f"{out}: there is no run to resume (no run.json)")


def _make(out: Path) -> None:
    """Make the run folder, and see that files can be written in it, before time is spent."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise RunError(f"{out}: cannot be written ({error.strerror}). Choose another --out") from error


@contextmanager
def _removed_on_failure(out: Path, unless: bool) -> Iterator[None]:
    """Leave no folder behind where what comes before training fails; one that was there stays."""
    unless = unless or out.exists()
    try:
        yield
    except BaseException:
        if not unless:
            shutil.rmtree(out, ignore_errors=True)
        raise


def _stored_about(out: Path, about: dict) -> dict:
    """The `run.json` of the run to resume, which must be the same run."""
    try:
        stored = read_json(out / "run.json")
    except (OSError, ValueError) as error:
        raise RunError(f"{out / 'run.json'}: cannot be read ({error}). Train into another --out") from error
    whole = recipes.from_dict(stored["recipe"], str(out / "run.json"))  # with settings that came later
    stored |= {"recipe": whole.to_dict()}
    for key in ("recipe", "folds", "seeds", "class_names"):
        if stored[key] != about[key]:
            raise RecipeError(
                f"{out}: cannot resume with another {key}. Stored: {stored[key]!r}. Received: {about[key]!r}"
            )
    return stored


def _about(
    recipe: Recipe, manifest: Manifest, data: Data, out: Path, folds: int, seeds: Sequence[int]
) -> dict:
    root, own = manifest.root.resolve(), out.resolve()
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "recipe": recipe.to_dict(),
        "data": str(data.root if isinstance(data, Manifest) else data),
        "root": str(root.relative_to(own) if root.is_relative_to(own) else root),  # a run may be moved
        "folds": folds,
        "seeds": list(seeds),
        "command": sys.argv,
        "versions": versions,
        "git_commit": _git_commit(),
        "class_names": list(manifest.class_names),
        "seconds": 0.0,
        "peak_memory_gb": 0.0,
    }


def _git_commit() -> str | None:
    """The commit of the working folder, which is the user's project, or None."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()

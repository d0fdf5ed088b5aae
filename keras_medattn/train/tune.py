"""A search for a recipe's settings with KerasTuner, by validation images alone; and nested in folds."""

from __future__ import annotations

import contextlib
import csv
import io
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from keras_medattn import metrics
from keras_medattn.data import splits
from keras_medattn.data.manifest import NO_PATIENTS, Manifest
from keras_medattn.files import read_json, write_json, written_aside
from keras_medattn.train import experiment, inputs, ranges
from keras_medattn.train.experiment import Part, RunError
from keras_medattn.train.predict import predict_parts
from keras_medattn.train.recipe import Recipe, RecipeError

_DIRECTIONS = {"val_auroc": "max", "val_loss": "min"}


def tune(
    recipe: Recipe,
    data: Path | str,
    out: Path | str,
    trials: int,
    inner: int = 0,
    folds: int = 0,
    resume: bool = False,
    cache: Path | str | None = None,
    progress: inputs.Progress = lambda items, *_: items,
    write: Callable[[str], None] = print,
) -> list[Recipe]:
    """Search for the settings that the recipe's `[tune]` names, by Bayesian optimisation.

    `out` holds a run folder a trial in `trials/`, `trials.csv` and its picture, and `best.toml`, the recipe
    with the best settings. The images of the test side are never opened. With `folds`, each fold has such a
    folder, `searchN`, of its training and validation images alone, and a model trained with its best settings
    in `foldN`: nested cross validation, whose figures `medattn evaluate` gives.

    Args:
        recipe: with `[tune]`.
        data, cache, progress, write: as of `experiment.train`.
        out: the folder to make; it must not exist, unless `resume`.
        trials: how many settings to try, at most.
        inner: 0: a trial's figure is the watched one, of its best epoch on the validation side; else the mean
            over so many folds of the training and validation images, by patient where known, of the held-out
            fold, on which no epoch was chosen.
        folds: 0, or the number of outer folds.
        resume: go on with a search that was stopped: finished trials are kept, an unfinished one goes on from
            its last epoch. There may be more trials than before.

    Returns:
        The best recipe; of each fold, where there are such.

    Raises:
        RunError: the folder exists or holds another search, or no trial ended.
        RecipeError: there is no `[tune]`, or it is wrong.
    """
    out = Path(out)
    ranges.ranges(recipe)
    if recipe.train.monitor not in _DIRECTIONS:
        raise RecipeError(f"train.monitor must be val_auroc or val_loss. Received: {recipe.train.monitor!r}")
    for name, value in (("trials", trials - 1), ("inner", inner), ("folds", folds)):
        if value < 0 or (value == 1 and name != "trials"):
            raise RunError(f"{name} must be 0, or 2 and more; trials 1 and more. Received: {value}")
    _start(out, {"recipe": recipe.to_dict(), "inner": inner, "folds": folds}, resume)
    cache = Path(cache) if cache else out / "cache"
    manifest = experiment.table(recipe, data, cache, progress)
    settings = trials, inner, cache, progress, write
    seed, share = recipe.train.seed, recipe.data.val_fraction
    if not folds:
        sides = splits.with_splits(manifest, seed, share, recipe.data.test_fraction)
        return [search(recipe, _seen(sides), out, *settings)]
    found = []
    for fold in range(folds):
        sides, folder = splits.fold_splits(manifest, folds, fold, seed, share), out / f"fold{fold + 1}"
        best = search(recipe, _seen(sides), out / f"search{fold + 1}", *settings)
        experiment.train(
            best, sides, folder, resume=_begun(folder), cache=cache, progress=progress, write=write
        )
        write_json({"trials": trials, "inner": inner, "figure": best.train.monitor}, folder / "tuned.json")
        found.append(best)
    write_json({"folds": [f"fold{fold + 1}" for fold in range(folds)]}, out / "nested.json")
    return found


def search(
    recipe: Recipe,
    seen: Manifest,
    out: Path,
    trials: int,
    inner: int,
    cache: Path,
    progress: inputs.Progress,
    write: Callable[[str], None],
) -> Recipe:
    """Try settings on the training and validation images `seen`, and answer the best; see `tune`."""
    import keras_tuner

    searched, name = ranges.ranges(recipe), recipe.train.monitor
    out.mkdir(parents=True, exist_ok=True)
    space = keras_tuner.HyperParameters()
    ranges.declare(searched, space)
    oracle = keras_tuner.oracles.BayesianOptimizationOracle(
        keras_tuner.Objective(name, _DIRECTIONS[name]),
        max_trials=trials,
        hyperparameters=space,
        allow_new_entries=False,
        seed=recipe.train.seed,
        max_consecutive_failed_trials=trials + 1,
    )

    class Tuner(keras_tuner.Tuner):
        """Trains a run folder a trial."""

        def run_trial(self, trial, *args, **kwargs):
            folder = out / "trials" / str(trial.trial_id)
            try:
                own = ranges.changed(recipe, ranges.drawn(searched, trial.hyperparameters))
                return {name: _figure(own, seen, folder, inner, cache, progress)}
            except (RecipeError, FloatingPointError) as error:  # settings that do not work
                raise keras_tuner.errors.FailedTrialError(str(error)) from error
            except Exception as error:
                raise keras_tuner.errors.FatalError(str(error)) from error

        def on_trial_end(self, trial):
            super().on_trial_end(trial)
            rows = _rows(oracle, searched, name)
            _write_table(rows, out / "trials.csv")
            metrics.trials_picture(rows, name, list(searched), out / "trials.png")
            [last] = [row for row in rows if row["trial"] == trial.trial_id]
            write(
                f"trial {len(rows)}/{trials}  "
                + "  ".join(f"{key} {_text(one)}" for key, one in last.items())
            )

    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it says that it reloads
            tuner = Tuner(oracle, directory=str(out), project_name="tuner")
    except (ValueError, KeyError, RuntimeError) as error:
        raise RunError(
            f"{out / 'tuner'}: the state of the search cannot be read ({error}). Begin another with another "
            f"--out; the trials that ended are told in {out / 'trials.csv'}"
        ) from error
    tuner.save()  # so that a search killed in its first trial is found again
    try:
        tuner.search(verbose=0)
    except keras_tuner.errors.FatalError as error:
        raise error.__cause__ or error from None
    ended = [one for one in oracle.get_best_trials(1) if one.score is not None]
    if not ended:
        reasons = "\n".join(str(one.message).strip().splitlines()[-1] for one in oracle.trials.values())
        raise RunError(f"{out}: none of {len(oracle.trials)} trials ended:\n{reasons}")
    best = ranges.changed(recipe, ranges.drawn(searched, ended[0].hyperparameters))
    about = f"# the best of {len(oracle.trials)} trials: {name} {ended[0].score:.4f} {_basis(seen, inner)}\n"
    with written_aside(out / "best.toml") as aside:
        aside.write_text(about + "\n" + ranges.to_toml(best), encoding="utf-8")
    write(about.removeprefix("# ").strip())
    return best


def _figure(
    recipe: Recipe, seen: Manifest, folder: Path, inner: int, cache: Path, progress: inputs.Progress
) -> float:
    """Train a trial, or go on with it, and answer its figure."""
    table = replace(seen, splits=None, folds=None) if inner else seen
    if not _begun(folder):
        shutil.rmtree(folder, ignore_errors=True)
    parts = experiment.train(
        recipe,
        table,
        folder,
        inner,
        resume=_begun(folder),
        cache=cache,
        progress=progress,
        write=lambda line: None,
    )
    if not inner:
        return read_json(parts[0].folder / "metrics.json")[recipe.train.monitor]
    return float(np.mean([_held_out(part, recipe.train.monitor, cache, progress) for part in parts]))


def _held_out(part: Part, monitor: str, cache: Path, progress: inputs.Progress) -> float:
    side = part.manifest.split("test")
    [found] = predict_parts([part], [side], cache if part.recipe.train.cached_views else None, 0, progress)
    if monitor == "val_loss":
        return metrics.negative_log_likelihood(side.labels, found.scores, 1.0)
    return metrics.scores(side.labels, found.probabilities())["auroc"]


def _rows(oracle: Any, searched: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """A row a trial that ended: its number, its figure, nan where it failed, and its settings."""
    rows = []
    for number in oracle.end_order:
        trial = oracle.trials[number]
        figure = float("nan") if trial.score is None else trial.score
        rows.append({"trial": number, name: figure} | ranges.drawn(searched, trial.hyperparameters))
    return rows


def _write_table(rows: list[dict[str, Any]], path: Path) -> None:
    with written_aside(path) as aside, open(aside, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _start(out: Path, about: dict[str, Any], resume: bool) -> None:
    path = out / "search.json"
    if out.exists() and not resume:
        raise RunError(
            f"{out} exists, and a search is never overwritten. Choose another --out, or --resume it"
        )
    if not resume:
        out.mkdir(parents=True)
        write_json(about, path)
    elif not path.is_file():
        raise RunError(f"{out}: there is no search to resume (no search.json)")
    elif read_json(path) != about:
        raise RunError(f"{out}: cannot resume with another recipe, --inner or --folds")


def _begun(folder: Path) -> bool:
    return (folder / "run.json").is_file()


def _seen(manifest: Manifest) -> Manifest:
    """All but the test side."""
    return manifest.take([place for place, side in enumerate(manifest.splits or ()) if side != "test"])


def _basis(seen: Manifest, inner: int) -> str:
    """What the figures of trials rest on."""
    side = seen if inner else seen.split("val")
    how = f"over {inner} folds of" if inner else "on"
    basis = f"{how} {len(side)} images"
    if side.patients is None:
        return f"{basis}. Warning: {NO_PATIENTS}"
    return f"{basis} of {len(set(side.patients))} patients, which chose it: test it on others"


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)

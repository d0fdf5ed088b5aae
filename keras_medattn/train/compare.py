"""Runs side by side on the same test images: figures, their differences, and tests of these."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from keras_medattn import metrics
from keras_medattn.data.manifest import Manifest
from keras_medattn.metrics import Difference, Interval
from keras_medattn.train import calibrate, evaluate, experiment, histories, inputs
from keras_medattn.train.experiment import Part, RunError
from keras_medattn.train.figures import Evaluation, joined, part_names, per_part, statistic, subset, summarise


@dataclass(frozen=True)
class Run:
    """A run to compare: its name, its models, and their predictions."""

    name: str
    parts: Sequence[Part]
    evaluation: Evaluation

    @property
    def keys(self) -> list[str]:
        """What tells its models apart, alike in every run: `seed0-fold1`; empty of a single model."""
        return [part.folder.name if len(self.parts) > 1 else "" for part in self.parts]


@dataclass(frozen=True)
class Paired:
    """Tests of the differences between models of equal seed and fold.

    Attributes:
        plain: Student's paired t-test.
        corrected: Nadeau and Bengio's, where the models were tested on different images: then their training
            images overlap, and the plain test's p-value is too small. Else None.
        sign_flip: the exact permutation p-value, of up to 12 pairs; else None.
    """

    plain: Difference
    corrected: Difference | None
    sign_flip: float | None


@dataclass(frozen=True)
class Window:
    """The test accuracies of a run over the epochs that a cross validation picked.

    `accuracies (models, epochs)`; `welch` and `paired` compare them with the first run's: the first takes the
    epochs of one run as independent, which they are not, the second pairs the models' means.
    """

    accuracies: np.ndarray
    welch: Difference | None
    paired: Paired | None


@dataclass(frozen=True)
class Row:
    """A run's figure, on all test images or on those of one `value` of a column; of `models` the mean.

    `difference` is to the first run, with its paired bootstrap interval.
    """

    name: str
    value: str
    figure: Interval
    models: np.ndarray
    difference: Interval | None
    paired: Paired | None
    window: Window | None = None


@dataclass(frozen=True)
class Comparison:
    """All of it; `figure` names what `rows` are of."""

    figure: str
    runs: Sequence[Run]
    rows: list[Row]
    epochs: range | None = None


def load(
    runs: Sequence[tuple[str, Path]],
    data: Path | str | None = None,
    split: str = "test",
    threshold: float = 0.5,
    cache: Path | str | None = None,
    progress: inputs.Progress = lambda items, *_: items,
) -> list[Run]:
    """The runs with their predictions: those in `RUN/evaluation` where they are of these models and images,
    else new ones, which are kept there if nothing was.

    Args:
        runs: name and folder of each.
        data: as in `evaluate`.
        split: as in `evaluate`.
        threshold: as in `evaluate`.
        cache: as in `evaluate`.
        progress: as in `evaluate`.

    Raises:
        RunError: two runs have one name, or other test images, labels, patients or classes than the first.
    """
    names = [name for name, _ in runs]
    if len(set(names)) < len(names):
        raise RunError(f"two runs have one name: give each its own, as NAME=RUN. Received: {names}")
    found: list[Run] = []
    for name, folder in runs:
        parts = experiment.load(folder, data)
        chosen = [evaluate.held_out(part, data, split) for part in parts]
        rows, models = joined(chosen), part_names(parts, chosen)
        if found:
            _check_same_images(found[0], name, rows)
        kept = folder / "evaluation"
        probabilities = _kept(kept / "predictions.csv", parts, rows, models)
        if probabilities is None:
            result = evaluate.evaluate(parts, data, split, threshold, cache, progress)
            if not kept.exists():
                evaluate.write(result, kept)
        else:
            result = summarise(rows, probabilities, models, threshold)
        found.append(Run(name, parts, result))
    return found


def compare(
    runs: Sequence[Run],
    figure: str = "auroc",
    threshold: float = 0.5,
    by: str | None = None,
    epochs: int = 30,
    epochs_from: Path | None = None,
) -> Comparison:
    """Compare every run with the first.

    Args:
        runs: of `load`.
        figure: which one, by its name in `metrics.json`.
        threshold: of two classes, the probability from which the second is answered.
        by: a column of the table: compare on the images of each of its values, too.
        epochs: how many epochs `epochs_from` picks.
        epochs_from: a cross validation on the training images, whose held-out accuracies pick the epochs
            over which each run's test accuracy is averaged (Xu et al.).

    Raises:
        RunError: there is no such figure or column; the cross validation saw test images.
    """
    known = runs[0].evaluation.figures.figures
    if figure not in known:
        raise RunError(f"there is no figure {figure!r} of these runs. Known: {', '.join(known)}")
    window = None if epochs_from is None else _window(epochs_from, epochs, runs)
    rows = [_row(run, runs[0], "", figure, threshold, window) for run in runs]
    if by:
        columns = {run.name: evaluate.column(run.evaluation.manifest, by) for run in runs}
        for value in sorted(set(columns[runs[0].name])):
            some = [
                Run(run.name, run.parts, subset(run.evaluation, np.equal(columns[run.name], value)))
                for run in runs
            ]
            rows += [_row(run, some[0], value, figure, threshold) for run in some]
    return Comparison(figure, runs, rows, window)


def interval(evaluation: Evaluation, figure: str, threshold: float = 0.5) -> Interval:
    """The mean of a figure over a run's models, with its percentile bootstrap interval over patients.

    Pooled predictions would not do: an AUROC over them compares the scores of one model with another's.
    """
    numbers = _numbers(evaluation)
    mean = _mean_of_models(evaluation, figure, threshold, numbers)
    return metrics.resample(lambda weights: {figure: mean(weights)}, len(numbers)).figures[figure]


def difference(first: Evaluation, other: Evaluation, figure: str, threshold: float = 0.5) -> Interval:
    """`other - first` of the means over models, with the percentile bootstrap interval over patients.

    Each resample draws the same patients (images, where none are known) for both, so that what makes a
    patient hard cancels out.
    """
    numbers = _numbers(first)
    means = [_mean_of_models(one, figure, threshold, numbers) for one in (first, other)]

    def differences(weights: np.ndarray) -> dict[str, np.ndarray]:
        return {figure: means[1](weights) - means[0](weights)}

    return metrics.resample(differences, len(numbers)).figures[figure]


def paired(first: Run, other: Run, values: Sequence[np.ndarray]) -> Paired | None:
    """Tests of one value a model of two runs, or None where the models do not pair.

    They pair where both runs have the same seeds and folds, two or more, with the same test images in each.
    """
    tested = _tested(first)
    if tested != _tested(other) or len(tested) < 2:
        return None
    differences = values[1] - values[0]
    if not np.isfinite(differences).all():
        return None
    flipped = metrics.sign_flip(differences) if len(differences) <= 12 else None
    corrected = None
    if len(set(map(frozenset, tested.values()))) > 1:
        images = dict(zip(first.keys, (len(part.manifest) for part in first.parts), strict=True))
        shares = [len(names) / (images[key] - len(names)) for key, names in tested.items()]
        corrected = metrics.paired_t(differences, float(np.mean(shares)))
    return Paired(metrics.paired_t(differences), corrected, flipped)


def _row(run: Run, first: Run, value: str, figure: str, threshold: float, epochs: range | None = None) -> Row:
    models = [_models(one, figure, threshold) for one in (first, run)]
    window = None
    if epochs is not None:
        windows = [histories.window_accuracies(one.parts, epochs) for one in (first, run)]
        window = Window(windows[1], None, None)
        if run is not first:
            welch = metrics.welch(windows[0].ravel(), windows[1].ravel())
            window = Window(windows[1], welch, paired(first, run, [one.mean(axis=1) for one in windows]))
    own = interval(run.evaluation, figure, threshold)
    if run is first:
        return Row(run.name, value, own, models[1], None, None, window)
    apart = difference(first.evaluation, run.evaluation, figure, threshold)
    return Row(run.name, value, own, models[1], apart, paired(first, run, models), window)


def _models(run: Run, figure: str, threshold: float) -> np.ndarray:
    one = run.evaluation
    return per_part(statistic(one.manifest, one.probabilities, one.parts, threshold), one.parts)[figure]


def _tested(run: Run) -> dict[str, set[str]]:
    """The images that each model answered, by what tells the model apart in every run."""
    keys = dict(zip((part.folder.name for part in run.parts), run.keys, strict=True))
    names: dict[str, set[str]] = {}
    for name, part in zip(run.evaluation.manifest.names, run.evaluation.parts, strict=True):
        names.setdefault(keys[part], set()).add(name)
    return names


def _window(folder: Path, epochs: int, runs: Sequence[Run]) -> range:
    parts = experiment.load(folder)
    leaked = {name for part in parts for name in part.manifest.names} & set(runs[0].evaluation.manifest.names)
    if leaked:
        raise RunError(
            f"{folder}: {len(leaked)} of the test images are among its own, so that they would pick the "
            f"epochs, for one {min(leaked)}. Cross-validate on the training images alone"
        )
    return histories.picked_window(parts, epochs)


def _mean_of_models(
    one: Evaluation, figure: str, threshold: float, numbers: dict[str, int]
) -> Callable[[np.ndarray], np.ndarray]:
    """`weights (R, units) -> (R,)`."""
    names, units = np.asarray(one.parts), np.array([numbers[unit] for unit in _units(one.manifest)])
    models = []
    for name in dict.fromkeys(one.parts):
        rows = np.flatnonzero(names == name)
        table = one.manifest.take(rows)
        models.append((statistic(table, one.probabilities[rows], [name] * len(rows), threshold), units[rows]))

    def mean(weights: np.ndarray) -> np.ndarray:
        undefined = np.full(len(weights), np.nan)
        return np.mean([of(weights[:, unit]).get(figure, undefined) for of, unit in models], axis=0)

    return mean


def _numbers(one: Evaluation) -> dict[str, int]:
    return {unit: number for number, unit in enumerate(dict.fromkeys(_units(one.manifest)))}


def _units(rows: Manifest) -> Sequence[str]:
    return rows.names if rows.patients is None else rows.patients


def _check_same_images(first: Run, name: str, rows: Manifest) -> None:
    told = [_facts(first.evaluation.manifest), _facts(rows)]
    if told[0] == told[1] and first.evaluation.manifest.class_names == rows.class_names:
        return
    missing, more = (sorted(set(a) - set(b)) for a, b in (told, told[::-1]))
    if missing or more:
        only = [
            f"{len(some)} only in {run}, as {some[0]}"
            for some, run in ((missing, first.name), (more, name))
            if some
        ]
        what = f"their test images differ: {'; '.join(only)}"
    else:
        what = "labels, patients or classes of the same test images differ"
    raise RunError(f"{first.name} and {name} cannot be compared, {what}")


def _facts(rows: Manifest) -> dict[str, tuple[str, ...]]:
    patients = rows.patients or [""] * len(rows)
    labels = [rows.class_names[label] for label in rows.labels]
    return {name: tuple(facts) for name, *facts in zip(rows.names, labels, patients, strict=True)}


def _kept(path: Path, parts: Sequence[Part], rows: Manifest, models: Sequence[str]) -> np.ndarray | None:
    """Probabilities of an earlier evaluation, or None unless it is of these models and images."""
    made_of = [own for part in parts for own in (part.best, part.folder / calibrate.FILE)]
    if not path.is_file() or any(_newer(own, path) for own in made_of):
        return None
    with open(path, newline="", encoding="utf-8") as file:
        [header, *lines] = csv.reader(file)
    labels = [rows.class_names[label] for label in rows.labels]
    wanted = list(zip(rows.names, models, labels, strict=True))
    if header[5:] != list(rows.class_names) or [(line[0], line[2], line[3]) for line in lines] != wanted:
        return None
    return np.array([[float(value) for value in line[5:]] for line in lines])


def _newer(own: Path, path: Path) -> bool:
    return own.is_file() and own.stat().st_mtime > path.stat().st_mtime

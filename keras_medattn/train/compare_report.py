"""A comparison as text, as tables and as pictures."""

from __future__ import annotations

import csv
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from keras_medattn import metrics, models
from keras_medattn.files import read_json, write_json, written_aside
from keras_medattn.metrics import Difference, Interval
from keras_medattn.train import histories
from keras_medattn.train.compare import Comparison, Paired, Row, Run, Window
from keras_medattn.train.evaluate import plain
from keras_medattn.train.experiment import RunError

_EPOCHS = (
    "Welch's test takes the epochs of one run as independent. They are not, so its p-value is too small;\n"
    "it is given because the paper gives it"
)


def text(comparison: Comparison) -> str:
    """The table, a line a run, then the tests over models, the windows of epochs, and the histories."""
    first = comparison.runs[0]
    warning = [f"warning: {first.evaluation.warning}"] * bool(first.evaluation.warning)
    lines = [f"{comparison.figure}, of several models the mean: {first.evaluation.figures}", *warning, ""]
    several = any(len(row.models) > 1 for row in comparison.rows)
    header = ["run", comparison.figure, f"difference to {first.name}", *(["sd of its models"] * several)]
    lines += _table(
        header,
        [
            [_name(row), row.figure, _signed(row.difference), *([_spread(row.models)] * several)]
            for row in comparison.rows
        ],
    )
    tested = [(_name(row), row.paired) for row in comparison.rows if row.paired]
    if tested:
        lines += ["", f"difference to {first.name} of models of equal seed and fold:", *_tests(tested)]
    if comparison.epochs is not None:
        lines += ["", f"test accuracy, mean +- sd over {_epochs(comparison.epochs)}"]
        windows = [(row.name, row.window) for row in comparison.rows if row.window]
        lines += _table(["run", "accuracy", "Welch's t-test"], [_window(*one) for one in windows])
        lines.append(_EPOCHS)
        tested = [(name, window.paired) for name, window in windows if window.paired]
        lines += _tests(tested) if tested else []
    return "\n".join([*lines, "", *_learning(comparison.runs)])


def write(comparison: Comparison, folder: Path, over: str | None = None) -> list[Path]:
    """Write `comparison.csv` and `.json`, and the pictures of figures, learning curves and settings.

    Args:
        comparison: of `compare.compare`.
        folder: where to; it is made.
        over: the setting along the axis of `settings.png`. By default that picture is drawn where the runs
            differ in one or two settings.

    Returns:
        The files written.

    Raises:
        RunError: `over` is no setting in which the runs differ.
    """
    lines = _lines_over_setting(comparison, over)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"comparison.{kind}" for kind in ("csv", "json", "png")] + [folder / "curves.png"]
    _write_csv(comparison, paths[0])
    write_json(to_dict(comparison), paths[1])
    rows = comparison.rows
    names, figures = [_name(row) for row in rows], [row.figure for row in rows]
    label = comparison.figure.replace("_", " ")
    metrics.comparison_picture(names, figures, [row.models for row in rows], label, paths[2])
    curves = {
        run.name: [
            {key: one for key, one in histories.history(part).items() if key not in ("epoch", "seconds")}
            for part in run.parts
        ]
        for run in comparison.runs
    }
    metrics.curves_picture(curves, paths[3])
    if lines is not None:
        paths.append(folder / "settings.png")
        metrics.setting_picture(lines[0], lines[1], label, paths[-1])
    return paths


def to_dict(comparison: Comparison) -> dict:
    """The comparison as plain values; what is undefined is None."""
    first = comparison.runs[0]
    return {
        "figure": comparison.figure,
        "rests_on": str(first.evaluation.figures),
        "warning": first.evaluation.warning or None,
        "first": first.name,
        "rows": [_row(row) for row in comparison.rows],
        "runs": {
            run.name: {"models": len(run.parts)}
            | _cost(run)
            | {"settings": settings(comparison.runs)[run.name]}
            for run in comparison.runs
        },
        "epochs": None
        if comparison.epochs is None
        else [comparison.epochs.start + 1, comparison.epochs.stop],
    }


def settings(runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
    """The settings in which the runs differ, seeds aside: `{run: {"model.k": 5}}`, defaults filled in."""
    flat = {run.name: _flat(run) for run in runs}
    keys = list(dict.fromkeys(key for one in flat.values() for key in one if key != "train.seed"))
    differ = [key for key in keys if len({repr(one.get(key)) for one in flat.values()}) > 1]
    return {name: {key: one.get(key) for key in differ} for name, one in flat.items()}


def _flat(run: Run) -> dict[str, Any]:
    recipe = run.parts[0].recipe
    values = recipe.to_dict()
    parameters = inspect.signature(models.system(recipe.model["system"])).parameters
    defaults = {key: one.default for key, one in parameters.items() if one.default is not one.empty}
    values["model"] = defaults | values["model"]
    augment, _ = values.pop("augment"), values.pop("tune")
    flat = {f"{section}.{key}": value for section, one in values.items() for key, value in one.items()}
    return flat | {"augment": augment}


def _lines_over_setting(comparison: Comparison, over: str | None) -> tuple[str, dict[str, list]] | None:
    """The setting along the axis, and for each line the points `(setting, figure)`."""
    found = settings(comparison.runs)
    differ = list(next(iter(found.values())))
    if over is not None and over not in differ:
        raise RunError(f"the runs do not differ in {over}, but in {', '.join(differ) or 'nothing'}")
    if over is None:
        if len(differ) not in (1, 2):
            return None
        numeric = [key for key in differ if all(type(one[key]) in (int, float) for one in found.values())]
        over = (numeric or differ)[0]
    lines: dict[str, list] = {}
    for row in comparison.rows:
        if not row.value:
            others = [
                f"{key.partition('.')[2] or key} {found[row.name][key]}" for key in differ if key != over
            ]
            value = found[row.name][over]
            value = value if isinstance(value, int | float | str) else str(value)
            lines.setdefault(", ".join(others), []).append((value, row.figure))
    return over, lines


def _learning(runs: Sequence[Run]) -> list[str]:
    rows = []
    for run in runs:
        cost = _cost(run)
        on, plateau = cost["on_plateau"], cost["plateau_epochs"]
        stayed = f"{on} of {len(run.parts)} never left it"
        numbers = [cost[key] for key in ("seconds_per_epoch", "seconds_per_step", "peak_memory_gb")]
        rows.append(
            [run.name, f"{cost['epochs']:.1f}", stayed if plateau is None else f"{plateau:.1f}"]
            + ["" if number is None else f"{number:.3g}" for number in numbers]
        )
    return _table(["run", "epochs", "on the plateau", "s an epoch", "s a step", "peak GB"], rows)


def _cost(run: Run) -> dict[str, Any]:
    folder = run.parts[0].folder
    about = read_json((folder if (folder / "run.json").is_file() else folder.parent) / "run.json")
    return histories.learning(run.parts) | {"peak_memory_gb": about.get("peak_memory_gb")}


def _row(row: Row) -> dict:
    values: dict[str, Any] = {"run": row.name, "of": row.value or None}
    values |= dict(zip(("value", "low", "high"), map(plain, row.figure[:3]), strict=True))
    mean, sd = metrics.mean_sd(row.models)
    values |= {"models": [plain(one) for one in row.models], "mean": plain(mean), "sd": plain(sd)}
    if row.difference:
        parts = zip(("value", "low", "high"), map(plain, row.difference[:3]), strict=True)
        values |= {"difference": dict(parts), "paired": _plain_paired(row.paired)}
    if row.window:
        mean, sd = metrics.mean_sd(row.window.accuracies.ravel())
        values["window"] = {"mean": mean, "sd": sd}
        if row.window.welch:
            tests = {"welch": _plain_test(row.window.welch), "paired": _plain_paired(row.window.paired)}
            values["window"] |= {"note": _EPOCHS} | tests
    return values


def _plain_test(one: Difference | None) -> dict | None:
    return None if one is None else {key: plain(value) for key, value in one._asdict().items()}


def _plain_paired(one: Paired | None) -> dict | None:
    if one is None:
        return None
    tests = {"paired_t": _plain_test(one.plain), "corrected_t": _plain_test(one.corrected)}
    return tests | {"sign_flip_p": one.sign_flip}


def _write_csv(comparison: Comparison, path: Path) -> None:
    columns = ["run", "of", "figure", "value", "low", "high", "models", "mean", "sd"]
    columns += ["difference", "difference_low", "difference_high"]
    columns += ["pairs", "paired_t_p", "corrected_t_p", "sign_flip_p"]
    with written_aside(path) as aside, open(aside, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for row in comparison.rows:
            one = [row.name, row.value, comparison.figure, *row.figure[:3], len(row.models)]
            one += [*metrics.mean_sd(row.models), *(row.difference[:3] if row.difference else ("", "", ""))]
            if row.paired:
                corrected = row.paired.corrected.p if row.paired.corrected else ""
                one += [row.paired.plain.n, row.paired.plain.p, corrected, row.paired.sign_flip]
            writer.writerow(one + [""] * (len(columns) - len(one)))


def _name(row: Row) -> str:
    return f"{row.name}, {row.value}" if row.value else row.name


def _signed(one: Interval | None) -> str:
    return f"{one.value:+.3f} ({one.low:+.3f}, {one.high:+.3f})" if one else ""


def _spread(values: np.ndarray) -> str:
    return f"+- {metrics.mean_sd(values)[1]:.3f}, {len(values)} models" if len(values) > 1 else ""


def _window(name: str, window: Window) -> list[Any]:
    mean, sd = metrics.mean_sd(window.accuracies.ravel())
    return [name, f"{mean:.4f} +- {sd:.4f}", window.welch or ""]


def _epochs(window: range) -> str:
    return f"the {len(window)} epochs {window.start + 1} to {window.stop}, picked by cross validation"


def _tests(tested: Sequence[tuple[str, Paired]]) -> list[str]:
    """Rows of tests; the corrected one allows for training images that folds share (Nadeau and Bengio)."""
    header = ["run", "paired t-test", "corrected (Nadeau and Bengio)", "exact p of the signs"]
    rows = [
        [name, one.plain, one.corrected or "", "" if one.sign_flip is None else f"{one.sign_flip:.3g}"]
        for name, one in tested
    ]
    if not any(one.corrected for _, one in tested):
        header, rows = [*header[:2], header[3]], [[*row[:2], row[3]] for row in rows]
    return _table(header, rows)


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    cells = [list(map(str, row)) for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["   ".join(map(str.ljust, row, widths)).rstrip() for row in cells]

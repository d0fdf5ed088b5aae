"""What each exported format of a model costs and answers: size, loading, latency, difference, AUROC."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from keras_medattn.data import manifest as manifests
from keras_medattn.data import readers
from keras_medattn.data.headers import read_header
from keras_medattn.data.manifest import Manifest
from keras_medattn.export import formats, parity
from keras_medattn.export.saved_model import ExportError
from keras_medattn.files import read_json, written_aside
from keras_medattn.metrics import scores

SIGNATURES = ("tensor", "serving_default", "explain")  # the first is what the others are compared with


@dataclass(frozen=True)
class Row:
    """One format. What was not measured is nan, and `note` says why.

    Attributes:
        name: of the format, and of the signature of a SavedModel.
        file: in the model's folder.
        mb: size in millions of bytes.
        load: seconds from opening the file to its first answer, its runtime being imported.
        p50: median milliseconds of an answer to one image.
        p99: what one answer in a hundred exceeds.
        memory: MiB of the process at the peak, the runtime included.
        difference: the largest in a probability to the first row's.
        auroc: of labelled images.
        note: why nothing was measured.
    """

    name: str
    file: str
    mb: float
    load: float = math.nan
    p50: float = math.nan
    p99: float = math.nan
    memory: float = math.nan
    difference: float = math.nan
    auroc: float = math.nan
    note: str = ""


@dataclass(frozen=True)
class Benchmark:
    """The rows of a model's formats, and on what they were measured."""

    rows: tuple[Row, ...]
    title: str

    @property
    def failed(self) -> list[Row]:
        """Rows of what should run here and did not."""
        return [row for row in self.rows if row.note and row.name != "tensorrt"]


def benchmark(
    model: Path | str,
    data: Path | str | None = None,
    split: str = "test",
    runs: int = 50,
    threads: int = 2,
    progress: Callable[[Iterable, int], Iterable] = lambda items, _: items,
) -> Benchmark:
    """Measure every format of an exported model, each in a process of its own, one after the other.

    All get the same images, one at a time: pixels at the model's size, and `serving_default` and `explain`
    the encoded files.

    Args:
        model: the folder that `medattn export` wrote, `NAME` with `NAME/N` or `NAME/files/N` in it; of each
            format the newest is taken.
        data: labelled images for the AUROC; by default five pictures of noise are answered.
        split: which side of data that names sides.
        runs: answers to time at least; each image is answered once.
        threads: that each runtime may use.
        progress: wraps the loop over `(rows, total)`.

    Raises:
        ExportError: there is nothing exported, or it is of several models.
        ManifestError, ImageError: as `manifest.load` and `readers.read`.
    """
    model = Path(model)
    rows, about = _found(model), _about(model)
    with tempfile.TemporaryDirectory() as folder:
        examples = Path(folder) / "examples"
        examples.mkdir()
        if data is None:
            table = parity.pictures(Path(folder) / "pictures", about["central"] is not None)
        else:
            table = manifests.load(data, about["class_names"])
            table = table.split(split) if table.splits else table
        if not len(table):
            raise ExportError(f"{data}: has no images of the side {split!r}")
        _write_examples(table, about, examples)
        done, answers = [], []
        for row in progress(rows, len(rows)):
            measured, answer = _measured(model, row, Path(folder), runs, threads, about)
            if answer is not None:
                answers.append(answer)
                shares = answer / answer.sum(axis=-1, keepdims=True)  # int8 has steps of 1/256: no sum of 1
                auroc = math.nan if data is None else scores(table.labels, shares)["auroc"]
                worst = float(np.abs(answer - answers[0]).max())
                measured = replace(measured, difference=worst, auroc=auroc)
            done.append(measured)
    what = f"{len(table)} images" if data else f"{len(table)} pictures of noise"
    turns = max(runs, len(table))
    title = f"{model.name}: {what}, one at a time, {turns} answers, {threads} threads"
    return Benchmark(tuple(done), title)


def text(result: Benchmark) -> str:
    """The table for people."""
    shown = {
        "format": lambda row: row.name,
        "MB": lambda row: f"{row.mb:.2f}",
        "load s": lambda row: f"{row.load:.2f}",
        "p50 ms": lambda row: f"{row.p50:.2f}",
        "p99 ms": lambda row: f"{row.p99:.2f}",
        "peak MiB": lambda row: f"{row.memory:.0f}",
        "difference": lambda row: f"{row.difference:.1e}",
        "AUROC": lambda row: f"{row.auroc:.4f}",
    }
    cells = [list(shown), *([cell(row) for cell in shown.values()] for row in result.rows)]
    cells = [["-" if cell == "nan" else cell for cell in line] for line in cells]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [result.title]
    for first, *others in cells:
        right = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
        lines.append("  ".join([first.ljust(widths[0]), *right]))
    measured = [row.name for row in result.rows if not row.note]
    lines += [f"difference: the largest in a probability, to {measured[0]}"] if measured else []
    return "\n".join([*lines, *(f"{row.name}: {row.note}" for row in result.rows if row.note)])


def write(result: Benchmark, folder: Path) -> list[Path]:
    """Write `benchmark.csv` and `benchmark.png`, and answer their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "benchmark.csv", folder / "benchmark.png"]
    with written_aside(paths[0]) as aside, aside.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        for row in result.rows:
            writer.writerow({key: "" if value != value else value for key, value in asdict(row).items()})
    _picture(result, paths[1])
    return paths


def _picture(result: Benchmark, path: Path) -> None:
    """Bars of the median time, with a tick at the 99th percentile, and of the size."""
    from matplotlib.figure import Figure

    from keras_medattn.metrics.plots import COLOURS, save_figure

    rows = [row for row in result.rows if not row.note]
    places = range(len(rows))
    figure = Figure(figsize=(9.5, 1.5 + 0.4 * len(rows)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    left.barh(places, [row.p50 for row in rows], color=COLOURS[0], height=0.6)
    left.plot([row.p99 for row in rows], places, "|", color=COLOURS[1], markersize=11, markeredgewidth=2)
    right.barh(places, [row.mb for row in rows], color=COLOURS[2], height=0.6)
    for place, row in enumerate(rows):
        left.annotate(f" {row.p50:.2g}", (row.p50, place), va="bottom", fontsize=8)
        right.annotate(f" {row.mb:.2g}", (row.mb, place), va="center", fontsize=9)
    left.set_yticks(places, [row.name for row in rows], fontsize=10)
    left.set_ylim(len(rows) - 0.4, -0.6)
    left.set_xscale("log")
    right.margins(x=0.15)
    left.set_xlabel("ms an image: median, and a tick at the 99th percentile")
    right.set_xlabel("MB")
    figure.suptitle(result.title, fontsize=10)
    save_figure(figure, path)


def _found(model: Path) -> list[Row]:
    """A row for each signature and file that is there."""
    from tensorflow.core.protobuf import saved_model_pb2

    rows = []
    if version := _newest(model, "saved_model.pb"):
        saved = saved_model_pb2.SavedModel.FromString((version / "saved_model.pb").read_bytes())
        there = saved.meta_graphs[0].signature_def
        size = sum(path.stat().st_size for path in version.rglob("*") if path.is_file())
        rows += [Row(f"saved_model {name}", version.name, size / 1e6) for name in SIGNATURES if name in there]
    for name, file in formats.FILES.items():
        if version := _newest(model / "files", file):
            path = version / file
            rows.append(Row(name, str(path.relative_to(model)), path.stat().st_size / 1e6))
    if not rows:
        raise ExportError(
            f"{model}: holds no N/saved_model.pb and no files/N, as `medattn export --to {model}` writes them"
        )
    return rows


def _newest(home: Path, file: str) -> Path | None:
    """The folder of the highest version that has a file."""
    versions = [path.parent for path in home.glob(f"*/{file}") if path.parent.name.isdigit()]
    return max(versions, key=lambda path: int(path.name), default=None)


def _about(model: Path) -> dict[str, Any]:
    """What all the formats say of the model."""
    paths = [
        _newest(model, "saved_model.pb"),
        *(_newest(model / "files", one) for one in formats.FILES.values()),
    ]
    files = {
        path / ("medattn.json" if path.parent.name == "files" else "assets.extra/medattn.json")
        for path in paths
        if path
    }
    abouts = {file: read_json(file) for file in sorted(files)}
    keys = ("system", "class_names", "image_size", "window", "central", "temperature")
    [first, *others] = abouts
    for other in others:
        for key in keys:
            if abouts[other][key] != abouts[first][key]:
                raise ExportError(
                    f"{model}: {first} and {other} are of different models: {key} {abouts[first][key]} and "
                    f"{abouts[other][key]}: export all formats of one run again"
                )
    return abouts[first]


def _write_examples(table: Manifest, about: dict[str, Any], folder: Path) -> None:
    """The inputs of every image by name, a file each, so that formats need no decoder of ours."""
    volumes = about["central"] is not None
    data = SimpleNamespace(
        image_size=tuple(about["image_size"]),
        window=tuple(about["window"] or ()),
        max_pixels=about["max_pixels"],
        slices=volumes,
        central=about["central"],
        scaled_decoding=about.get("scaled_decoding", False),
    )
    for place, (path, inputs) in enumerate(zip(table.paths, formats.examples(table, data), strict=True)):
        if not volumes:
            inputs["image_bytes"] = np.frombuffer(_encoded(path, data), np.uint8)
        np.savez(folder / f"{place}.npz", allow_pickle=False, **inputs)


def _encoded(path: Path, data: Any) -> bytes:
    """A file that the SavedModel decodes, as it is; of other kinds a PNG of the pixels, as `Client` sends."""
    if read_header(path).kind in ("jpeg", "png", "bmp"):
        return path.read_bytes()
    import tensorflow as tf

    return tf.io.encode_png(readers.read(path, data.window or None, data.max_pixels)).numpy()


def _measured(
    model: Path, row: Row, folder: Path, runs: int, threads: int, about: dict[str, Any]
) -> tuple[Row, np.ndarray | None]:
    """A row with its times, and the probabilities; or with a note."""
    if row.name == "tensorrt":
        shape = "x".join(map(str, [1, *about["image_size"], 3]))
        line = f"trtexec --loadEngine={model / row.file} --shapes=image:{shape}"
        return replace(row, note=f"an engine answers on its own GPU alone; time it with: {line}"), None
    job = {
        "folder": str(folder),
        "path": str(model / row.file),
        "signature": row.name.partition(" ")[2],
        "runs": runs,
        "threads": threads,
    }
    command = [sys.executable, "-m", "keras_medattn.export.timing", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = [line for line in done.stderr.splitlines() if line.strip()][-1:] or [f"exit {done.returncode}"]
        return replace(row, note=f"does not run here: {last[0][:300]}"), None
    return replace(row, **read_json(folder / "found.json")), np.load(folder / "answers.npy")

"""The whole path on semi-synthetic fundus views: train, compare, explain, export, serve, ask."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

EPOCHS = 20
_BASE: dict[str, Any] = {
    "data": {"image_size": [512, 512], "classes": ["no lesions", "lesions"]},
    "train": {
        "epochs": EPOCHS,
        "batch_size": 16,
        "learning_rate": 3e-3,
        "frozen_stride": 8,
        "cached_views": 1,
        "patience": EPOCHS,
    },
}
_BACKBONE = {"system": "MIMS", "stride": 8, "layer": "block4_add"}
MODELS: dict[str, dict[str, Any]] = {
    "average-pooling": _BACKBONE | {"kernels": [], "aggregation": "mean"},
    "max-pooling": _BACKBONE | {"kernels": [], "aggregation": "max"},
    "mims": _BACKBONE | {"kernels": [[3, 16]], "scales": [0.75, 1.0], "k": 5},
}


def run(out: Path, progress: Callable, write: Callable[[str], None]) -> None:
    """Run the demo into a new folder and print what it found.

    Args:
        out: the folder to make; it must not exist.
        progress: wraps long loops.
        write: prints a line.

    Raises:
        FileExistsError: the folder exists.
    """
    if out.exists():
        raise FileExistsError(
            f"{out} exists, and a run is never overwritten: remove it, or give another --out"
        )
    from keras_medattn.data import semi_synthetic

    began = time.monotonic()

    def step(text: str) -> None:
        write(f"\n[{time.monotonic() - began:4.0f} s] {text}")

    out.mkdir(parents=True)
    step("1/6 drawing semi-synthetic views: a real fundus photograph, drawn lesions in every second view")
    data = semi_synthetic.make(
        out / "data", progress=lambda items, total: progress(items, total, "drawing views")
    )
    parts = _train(data, out, progress, write, step)
    _evaluate(parts, out, progress, write, step)
    step("4/6 explaining the test views: the heatmap against the drawn lesions, which training never saw")
    _explain(parts["mims"], out, progress, write)
    step("5/6 exporting, and comparing the export with the Keras model")
    _export(parts["mims"], out, write)
    step("6/6 serving it, and asking over gRPC about a test view")
    _ask(parts["mims"], out, write)
    step("done. Left behind:")
    for path in sorted(out.rglob("*")):
        if path.is_file() and not {"images", "masks"} & set(path.parts):
            write(f"  {path}")
    write(f"  {out}/data/images/, {out}/data/masks/ (the views, and where their lesions are)")


def _train(data: Path, out: Path, progress, write, step) -> dict[str, Any]:
    from keras_medattn.train import experiment, recipe

    parts = {}
    for name, model in MODELS.items():
        step(f"2/6 training {name} from image labels alone, on frozen EfficientNet-Lite0 features")
        settings = recipe.from_dict(_BASE | {"model": model})
        [parts[name]] = experiment.train(
            settings, data, out / "runs" / name, cache=out / "cache", progress=progress, write=write
        )
    return parts


def _evaluate(parts, out: Path, progress, write, step) -> None:
    from keras_medattn.train import evaluate

    step("3/6 evaluating on test views, from another half of the photograph (semi-synthetic figures)")
    lines = []
    for name, part in parts.items():
        result = evaluate.evaluate([part], progress=progress)
        evaluate.write(result, out / "runs" / name / "evaluation")
        figures = result.figures.figures
        lines.append(f"  {name:<16} {figures['auroc']!s:<24} {figures['balanced_accuracy']!s}")
    write(f"  {'':<16} {'AUROC (95% interval)':<24} balanced accuracy\n" + "\n".join(lines))
    write(f"  {result.figures}")


def _explain(part, out: Path, progress, write) -> None:
    from keras_medattn.explain import report

    job = report.Job(part, part.manifest.split("test"))
    report.explain([job], out / "explanations", None, out / "data" / "masks", (), 16, progress, write)


def _export(part, out: Path, write) -> None:
    from keras_medattn.export import saved_model

    samples = part.manifest.split("test").take(range(4))
    folder, differences = saved_model.export(
        part.model(), part.recipe, part.manifest.class_names, out / "saved_models" / "demo", samples
    )
    write(f"  {folder}: largest difference in a probability {max(differences.values()):.1e}")


def _ask(part, out: Path, write) -> None:
    from keras_medattn.serve import Client, Server

    server = Server(out / "saved_models", port=0)
    server.start()
    try:
        path = part.manifest.split("test").paths[1]
        with Client(f"127.0.0.1:{server.port}", "demo") as client:
            [answer] = client.predict([path], "explain")
    finally:
        server.stop()
    if answer.probabilities is None or answer.boxes is None or answer.weights is None:
        raise RuntimeError(answer.error or "the server answered no evidence")
    write(f"  asked 127.0.0.1:{server.port} about {path}")
    write(f"  answer: {answer.class_name}, probability {answer.probabilities[answer.label]:.4f}")
    box = ", ".join(f"{edge:.0f}" for edge in answer.boxes[0])
    write(f"  strongest evidence: box ({box}) in pixels, {answer.weights[0]:.2f} of the class's score")

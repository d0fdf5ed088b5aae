"""The command `medattn`: what each command does; cli_parser.py says what it takes.

Heavy imports wait until a command runs, so that `--help` answers at once.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from keras_medattn import cli_parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and answer its exit code."""
    options = cli_parser.parser().parse_args(arguments)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # TensorFlow's start-up chatter
    try:
        return COMMANDS[options.command](options)
    except ModuleNotFoundError as error:
        if options.traceback or (error.name or "").startswith("keras_medattn"):
            raise
        extras = f'pip install "keras-medattn[{options.extras}]"'
        return _fail(f"this command needs the package {error.name}: {extras}")
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        if options.traceback:
            raise
        return _fail(str(error))
    except KeyboardInterrupt:
        _tell("stopped. A training run goes on with --resume")
        return 130


def _fail(message: str) -> int:
    _tell(f"error: {message}")
    return 1


def _tell(message: str) -> None:
    """Print to standard error; on a terminal over a progress line that may stand there."""
    clear = "\r\x1b[K" if sys.stderr.isatty() else ""
    print(f"{clear}medattn: {message}", file=sys.stderr)


def _progress(items: Iterable, total: int, text: str = "") -> Iterable:
    from tqdm import tqdm

    return tqdm(items, total=total, desc=text, unit="", mininterval=1.0)


def _check(options) -> int:
    from keras_medattn.data import check, headers, manifest, sets

    found = sets.find(options.set, options.data) if options.set else sets.Found(manifest.load(options.data))
    report = check.check(
        found.manifest,
        tuple(options.window) if options.window else None,
        options.max_pixels or headers.MAX_PIXELS,
        lambda items, total: _progress(items, total, "reading images"),
    )
    report.problems += found.problems
    report.warnings += found.notes
    print(json.dumps(report.to_dict(), indent=2) if options.json else check.text(report))
    return 0 if report.ok else 1


def _train(options) -> int:
    from keras_medattn.train import experiment, recipe, strategy

    strategy.get(options.strategy)  # before TensorFlow runs anything
    parts = experiment.train(
        recipe.load(options.recipe, options.set),
        options.data,
        options.out,
        options.folds,
        options.seeds,
        options.resume,
        options.cache,
        _progress,
        save_every=options.save_every,
        strategy=options.strategy,
        log=options.log,
    )
    print(
        f"{len(parts)} model{'s' * (len(parts) > 1)} in {options.out}. Next: medattn evaluate {options.out}"
    )
    return 0


def _tune(options) -> int:
    from keras_medattn.train import recipe, tune

    out, data = options.out, options.data
    tune.tune(
        recipe.load(options.recipe, options.set),
        data,
        out,
        options.trials,
        options.inner,
        options.folds,
        options.resume,
        options.cache,
        _progress,
    )
    then = f"evaluate {out}" if options.folds else f"train {out / 'best.toml'} --data {data} --out runs/best"
    print(f"wrote {out}. Next: medattn {then}")
    return 0


def _calibrate(options) -> int:
    from keras_medattn.train import calibrate, experiment

    wanted = ("sensitivity", options.sensitivity) if options.sensitivity is not None else None
    wanted = ("specificity", options.specificity) if options.specificity is not None else wanted
    parts = experiment.load(options.run_folder, options.data)
    for part, one in zip(parts, calibrate.calibrate(parts, wanted, options.cache, _progress), strict=True):
        print(calibrate.text(part, one))
    print(f"wrote {calibrate.FILE}. Next: medattn evaluate {options.run_folder}")
    return 0


def _evaluate(options) -> int:
    from keras_medattn.train import evaluate, experiment, figures

    parts = experiment.load(options.run_folder, options.data)
    result = evaluate.evaluate(
        parts,
        options.data,
        options.split,
        options.threshold,
        options.cache,
        _progress,
        options.tie,
        options.by,
        options.draws,
    )
    if ids := _pseudonyms(options):
        result = figures.pseudonymised(result, ids)
    paths = evaluate.write(result, options.out or options.run_folder / "evaluation")
    if options.json:
        print(json.dumps(evaluate.to_dict(result), indent=2))
        return 0
    print(evaluate.table(result))
    print(f"\n{result.figures}")
    print("wrote " + ", ".join(str(path) for path in paths))
    return 0


def _pseudonyms(options):
    """The ids of a run, where they are asked for."""
    if not options.pseudonymise:
        return None
    from keras_medattn.data.pseudonyms import Pseudonyms
    from keras_medattn.train import experiment

    return Pseudonyms(experiment.home_of(options.run_folder))


def _compare(options) -> int:
    from keras_medattn.train import compare, compare_report

    runs = []
    for text in options.runs:
        name, equals, folder = text.partition("=")
        named = equals and not Path(text).exists()
        runs.append((name, Path(folder)) if named else (Path(text).name, Path(text)))
    loaded = compare.load(runs, options.data, options.split, options.threshold, options.cache, _progress)
    result = compare.compare(
        loaded, options.figure, options.threshold, options.by, options.epochs, options.epochs_from
    )
    paths = compare_report.write(result, options.out, options.over)
    if options.json:
        print(json.dumps(compare_report.to_dict(result), indent=2))
        return 0
    print(compare_report.text(result))
    print("\nwrote " + ", ".join(str(path) for path in paths))
    return 0


def _explain(options) -> int:
    from keras_medattn.explain import report
    from keras_medattn.train import calibrate, experiment

    if bool(options.images) == bool(options.split):
        return _fail("give images, or --split test for those of the run's own data")
    parts = experiment.load(options.run_folder, options.data)
    out = options.out or options.run_folder / "explanations"
    ids = _pseudonyms(options)
    if len(parts) > 1 and not options.split:
        return _fail(f"{options.run_folder} holds {len(parts)} models: name one, say {parts[0].folder}")
    jobs = []
    for part in parts:
        table = part.manifest.split(options.split) if options.split else None
        own = calibrate.stored(part)
        cut = own.threshold.value if own.threshold else None
        jobs.append(report.Job(part, table, options.images, ids, own.temperature, cut))
    return report.explain(
        jobs,
        out,
        options.wanted,
        options.truth,
        [kind for kind in options.truth_class.split(",") if kind],
        options.most,
        _progress,
        print,
        options.side,
        -1 if options.against else 1,
    )


def _export(options) -> int:
    from keras_medattn.export import formats, saved_model
    from keras_medattn.train import calibrate, experiment

    parts = experiment.load(options.run_folder, options.data)
    if len(parts) > 1:
        return _fail(f"{options.run_folder} holds {len(parts)} models: name one, say {parts[0].folder}")
    own, samples = calibrate.stored(parts[0]), parts[0].manifest.split("val")
    samples = samples.take(range(min(options.samples, len(samples))))
    what = parts[0].model(), parts[0].recipe, parts[0].manifest.class_names, options.to, samples
    settings = own.temperature, own.threshold.value if own.threshold else None
    folders, differences = [], {}
    if "saved_model" in options.formats:
        folder, found = saved_model.export(*what, *settings)
        folders, differences = [folder], found
    if files := [name for name in options.formats if name != "saved_model"]:
        training = parts[0].manifest.split("train")
        training = training.take(range(0, len(training), -(-len(training) // 100)))
        folder, found = formats.export(*what, training, files, *settings, tuple(options.batches))
        folders, differences = [*folders, folder], differences | found
    for name, value in differences.items():
        print(f"{name:<16} largest difference to Keras in a probability: {value:.2e} ({len(samples)} images)")
    if "litert_int8" in options.formats:
        print(
            "warning: int8 moves probabilities, far in some images. Measure it before use, on images that "
            f"the model never saw: medattn benchmark {options.to} --data HELD_OUT"
        )
    served = f". Next: medattn serve {options.to.parent}" if "saved_model" in options.formats else ""
    print("wrote " + " and ".join(map(str, folders)) + served)
    return 0


def _benchmark(options) -> int:
    from keras_medattn.export import benchmark

    result = benchmark.benchmark(
        options.model, options.data, options.split, options.runs, options.threads, _progress
    )
    print(benchmark.text(result))
    paths = benchmark.write(result, options.out or options.model / "benchmark")
    print("wrote " + ", ".join(map(str, paths)))
    return 1 if result.failed else 0


def _serve(options) -> int:
    from keras_medattn.serve import serve

    if (options.folder is None) == (options.config is None):
        return _fail("give a folder of models, or --config FILE")
    return serve(
        options.folder,
        options.host,
        options.port,
        rest_port=options.rest_port or None,
        config=options.config,
        poll=options.poll,
        workers=options.workers,
    )


def _predict(options) -> int:
    from keras_medattn.serve import Client, ServerError

    window = tuple(options.window) if options.window else None
    try:
        with Client(options.server, options.model, options.timeout) as client:
            results = client.predict(options.images, options.signature, window)
    except ServerError as error:
        return _fail(str(error))
    for result in results:
        if options.json:
            print(json.dumps(result.as_dict()))
        elif result.error:
            print(f"medattn: error: {result.error}", file=sys.stderr)
        else:
            probability = result.probabilities[result.label]  # type: ignore[index]
            print(f"{result.name}: {result.class_name} ({probability:.4f})")
    return 1 if any(result.error for result in results) else 0


def _make(options) -> int:
    from keras_medattn.data import megapixel_mnist

    counts = (options.train, options.val, options.test)
    made = megapixel_mnist.make(
        options.out,
        *counts,
        options.size,
        options.seed,
        lambda items, total: _progress(items, total, "drawing images"),
    )
    print(f"{sum(counts)} images, their boxes in {made.with_name('boxes.csv')}. Next: medattn check {made}")
    return 0


def _demo(options) -> int:
    from keras_medattn import demo

    demo.run(options.out, _progress, print)
    return 0


COMMANDS = {
    "check": _check,
    "train": _train,
    "tune": _tune,
    "calibrate": _calibrate,
    "evaluate": _evaluate,
    "compare": _compare,
    "explain": _explain,
    "export": _export,
    "benchmark": _benchmark,
    "serve": _serve,
    "predict": _predict,
    "make": _make,
    "demo": _demo,
}


if __name__ == "__main__":
    sys.exit(main())

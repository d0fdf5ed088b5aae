"""The command `medattn`. Heavy imports wait until a command runs, so that `--help` answers at once."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

EPILOG = """examples:
  medattn check photos/                                   look at a folder a class before training
  medattn check BreaKHis --set breakhis                   what is there of a public set, and what is missing
  medattn train recipe.toml --data photos/ --out runs/a   train; a run is never overwritten
  medattn train recipe.toml --data photos/ --out runs/a --resume
  medattn train recipe.toml --data set.csv --out runs/cv --folds 5 --set train.epochs=20
  medattn calibrate runs/a --sensitivity 0.95             confidence and threshold, on validation images
  medattn evaluate runs/a                                 figures with 95% intervals, pictures, predictions
  medattn compare runs/a runs/b                           which is better, and whether that is chance
  medattn explain runs/a --split test --truth masks/      where it looked, and whether it was there
  medattn export runs/a --to saved_models/photos          a SavedModel for TF-Serving
  medattn serve saved_models                              the local server, gRPC on port 8500
  medattn predict --server localhost:8500 --model photos a.jpg b.png
  medattn make megapixel-mnist --out digits --size 1500   images in which three small digits decide
  medattn demo                                            all of it, on semi-synthetic views

exit codes: 0 done, 1 it failed or `check` found problems, 2 the command line is wrong, 130 stopped by Ctrl-C
This is no medical device. No network call is made unless a command says so."""

EXPORTS = ("saved_model", "litert", "litert_batch1", "litert_float16", "litert_int8", "onnx", "tensorrt")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and answer its exit code."""
    options = _parser().parse_args(arguments)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # TensorFlow's start-up chatter
    try:
        return options.run(options)
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
        print("medattn: stopped. A training run goes on with --resume", file=sys.stderr)
        return 130


def _fail(message: str) -> int:
    print(f"medattn: error: {message}", file=sys.stderr)
    return 1


def _parser() -> argparse.ArgumentParser:
    from keras_medattn import __version__

    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "medattn",
        description="Classify medical images in which a small thing decides.",
        epilog=EPILOG,
        formatter_class=raw,
    )
    parser.add_argument("--version", action="version", version=f"medattn {__version__}")
    parser.add_argument("--traceback", action="store_true", help="show Python's traceback of an error")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, run, text: str, example: str, extras: str = "train") -> argparse.ArgumentParser:
        one = commands.add_parser(
            name, help=text, description=f"{text}.", epilog=f"example:\n  {example}", formatter_class=raw
        )
        one.set_defaults(run=run, extras=extras)
        return one

    one = command("check", _check, "look at every image and label", "medattn check set.csv --json")
    one.add_argument(
        "data", type=Path, metavar="DATA", help="a folder a class, or a CSV: path,label[,patient][,split]"
    )
    one.add_argument(
        "--set", metavar="NAME", help="DATA is the folder of this public set; a wrong name lists them"
    )
    one.add_argument("--json", action="store_true", help="print the report as JSON")
    one.add_argument(
        "--window", type=float, nargs=2, metavar=("LOW", "HIGH"), help="intensities of 16-bit images"
    )
    one.add_argument("--max-pixels", type=int, metavar="N", help="refuse larger images (100 million)")

    one = command(
        "train",
        _train,
        "train a recipe",
        "medattn train mims.toml --data set.csv --out runs/a --set model.k=3",
    )
    one.add_argument("recipe", type=Path, metavar="RECIPE", help="a TOML file")
    one.add_argument(
        "--data",
        type=Path,
        required=True,
        help="a folder a class, or a CSV; or the root of the public set that the recipe names",
    )
    one.add_argument("--out", type=Path, required=True, metavar="RUN", help="the run folder to make")
    one.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a setting; repeatable; null is None",
    )
    one.add_argument("--folds", type=int, default=0, metavar="N", help="cross-validate over N folds")
    one.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        default=[],
        metavar="SEED",
        help="train once a seed; with --folds, repeat the cross validation, each time with other folds",
    )
    one.add_argument("--resume", action="store_true", help="go on from the last finished epoch")
    one.add_argument("--cache", type=Path, metavar="DIR", help="share cached features between runs")

    one = command(
        "calibrate",
        _calibrate,
        "fit a run's confidence to its validation images",
        "medattn calibrate runs/a --sensitivity 0.95",
    )
    one.add_argument("run_folder", type=Path, metavar="RUN")
    wish = one.add_mutually_exclusive_group()
    for figure in ("sensitivity", "specificity"):
        wish.add_argument(
            f"--{figure}",
            type=float,
            metavar="SHARE",
            help=f"of two classes, also choose the threshold that reaches this {figure} of the second",
        )
    one.add_argument("--data", type=Path, help="where the run's images are now")
    one.add_argument("--cache", type=Path, metavar="DIR", help="use features cached by training, for speed")

    one = command("evaluate", _evaluate, "figures on held-out images", "medattn evaluate runs/a --json")
    one.add_argument("run_folder", type=Path, metavar="RUN")
    one.add_argument(
        "--data", type=Path, help="where the images are now, or other images; by default the run's own"
    )
    one.add_argument(
        "--split", default="test", choices=("train", "val", "test"), help="side to evaluate (test)"
    )
    one.add_argument(
        "--threshold",
        type=float,
        help="from which the second of two classes is answered (the one that calibrate chose, or 0.5)",
    )
    one.add_argument(
        "--tie",
        default="probability",
        choices=("probability", "negative", "positive"),
        help="what decides a patient's vote between equals: the mean probability, or the first or last class",
    )
    one.add_argument("--by", metavar="COLUMN", help="figures of each value of this column of the table, too")
    one.add_argument(
        "--pseudonymise",
        action="store_true",
        help="write ids in place of the names of images and patients; the run keeps their key",
    )
    one.add_argument(
        "--draws",
        type=int,
        default=0,
        metavar="N",
        help="answer by N drawn sets of patches, too (Monte-Carlo)",
    )
    one.add_argument("--cache", type=Path, metavar="DIR", help="use features cached by training, for speed")
    one.add_argument("--out", type=Path, metavar="DIR", help="where to write (RUN/evaluation)")
    one.add_argument("--json", action="store_true", help="print the figures as JSON")

    one = command(
        "compare",
        _compare,
        "runs side by side, with tests of their differences",
        "medattn compare plain=runs/a mask=runs/b --figure accuracy --out comparison",
    )
    one.add_argument("runs", nargs="+", metavar="[NAME=]RUN", help="the first is what others are compared to")
    one.add_argument(
        "--figure", default="auroc", metavar="NAME", help="a figure of `medattn evaluate` (auroc)"
    )
    one.add_argument(
        "--split", default="test", choices=("train", "val", "test"), help="side to compare on (test)"
    )
    one.add_argument("--data", type=Path, help="where the images are now, or other images")
    one.add_argument("--by", metavar="COLUMN", help="compare on the images of each value of it, too")
    one.add_argument("--over", metavar="SETTING", help="draw the figure over this setting, say model.k")
    one.add_argument(
        "--threshold", type=float, default=0.5, help="from which the second of two classes is answered"
    )
    one.add_argument(
        "--epochs-from",
        type=Path,
        metavar="CVRUN",
        help="also average test accuracies over the epochs that this cross validation picks",
    )
    one.add_argument("--epochs", type=int, default=30, metavar="N", help="how many epochs it picks (30)")
    one.add_argument("--cache", type=Path, metavar="DIR", help="use features cached by training, for speed")
    one.add_argument(
        "--out", type=Path, default=Path("comparison"), metavar="DIR", help="where to write (comparison)"
    )
    one.add_argument("--json", action="store_true", help="print the comparison as JSON")

    one = command(
        "explain", _explain, "where a model looked", "medattn explain runs/a eye.jpg --class lesions"
    )
    one.add_argument("run_folder", type=Path, metavar="RUN")
    one.add_argument("images", type=Path, nargs="*", metavar="IMAGE")
    one.add_argument(
        "--split", choices=("train", "val", "test"), help="explain a side of the run's own data instead"
    )
    one.add_argument("--data", type=Path, help="where the run's images are now")
    one.add_argument(
        "--class", dest="wanted", metavar="NAME", help="argue for this class; by default the predicted"
    )
    one.add_argument(
        "--truth", type=Path, metavar="PATH", help="folder of masks, or CSV of boxes, to measure against"
    )
    one.add_argument(
        "--truth-class",
        metavar="NAME[,NAME]",
        default="",
        help="kinds of masks (IMAGE_KIND.png), or classes of a CSV with a class column, to take; all",
    )
    one.add_argument(
        "--against",
        action="store_true",
        help="show what argues against the class instead",
    )
    one.add_argument(
        "--side", type=int, default=1600, metavar="PIXELS", help="draw larger images so long at most (1600)"
    )
    one.add_argument("--most", type=int, metavar="N", help="write pictures of the first N images only")
    one.add_argument(
        "--pseudonymise",
        action="store_true",
        help="write ids in place of the names of images; the run keeps their key",
    )
    one.add_argument("--out", type=Path, metavar="DIR", help="where to write (RUN/explanations)")

    one = command(
        "export",
        _export,
        "write a model for TF-Serving, LiteRT, ONNX or TensorRT",
        "medattn export runs/a --to saved_models/eyes --formats saved_model litert onnx",
        "train,serve,litert,onnx",
    )
    one.add_argument("run_folder", type=Path, metavar="RUN")
    one.add_argument(
        "--to", type=Path, required=True, metavar="DIR", help="the model's folder; a version is added"
    )
    one.add_argument(
        "--formats",
        nargs="+",
        default=["saved_model"],
        choices=EXPORTS,
        metavar="FORMAT",
        help=f"of {', '.join(EXPORTS)} (saved_model); all but the first go to DIR/files",
    )
    one.add_argument("--data", type=Path, help="where the run's images are now")
    one.add_argument("--samples", type=int, default=8, metavar="N", help="images to verify on (8)")

    one = command("serve", _serve, "serve exported models", "medattn serve saved_models --port 8500", "serve")
    one.add_argument("folder", nargs="?", type=Path, metavar="DIR", help="holds NAME/VERSION/saved_model.pb")
    one.add_argument(
        "--config", type=Path, metavar="FILE", help="TensorFlow Serving's models.config, in place of DIR"
    )
    one.add_argument(
        "--poll",
        type=float,
        default=1.0,
        metavar="SECONDS",
        help="between looks for new versions; 0: one look (1)",
    )
    one.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    one.add_argument("--port", type=int, default=8500, help="gRPC port (8500)")
    one.add_argument(
        "--rest-port", type=int, default=8501, metavar="PORT", help="REST port; 0 for none (8501)"
    )
    one.add_argument("--workers", type=int, default=8, help="predictions at a time (8)")

    one = command(
        "predict",
        _predict,
        "ask a server about images",
        "medattn predict --server localhost:8500 --model eyes a.jpg",
        "serve",
    )
    one.add_argument("images", nargs="+", metavar="IMAGE")
    one.add_argument("--server", required=True, metavar="HOST:PORT")
    one.add_argument("--model", default="default", metavar="NAME", help="by default the server's only model")
    one.add_argument("--signature", default="serving_default", help="serving_default or explain")
    one.add_argument("--window", type=float, nargs=2, metavar=("LOW", "HIGH"), help="of 16-bit TIFF images")
    one.add_argument("--timeout", type=float, default=30.0, help="seconds for each image (30)")
    one.add_argument("--json", action="store_true", help="print JSON, a line an image")

    one = command(
        "make",
        _make,
        "make a synthetic data set",
        "medattn make megapixel-mnist --out digits --size 1500 --train 5000 --test 1000",
        "train,mnist",
    )
    one.add_argument("name", choices=("megapixel-mnist",), metavar="NAME", help="megapixel-mnist")
    one.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to make")
    one.add_argument("--size", type=int, default=1500, metavar="PIXELS", help="side of an image (1500)")
    one.add_argument("--train", type=int, default=5000, metavar="N", help="images to train on (5000)")
    one.add_argument("--val", type=int, default=0, metavar="N", help="to validate on (0: some of training)")
    one.add_argument("--test", type=int, default=1000, metavar="N", help="images to test on (1000)")
    one.add_argument("--seed", type=int, default=0, help="fixes every pixel (0)")

    one = command(
        "demo", _demo, "train, evaluate, explain, export and serve", "medattn demo --out demo", "demo"
    )
    one.add_argument("--out", type=Path, default=Path("demo"), metavar="DIR", help="folder to make (demo)")
    return parser


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
    from keras_medattn.train import experiment, recipe

    parts = experiment.train(
        recipe.load(options.recipe, options.set),
        options.data,
        options.out,
        options.folds,
        options.seeds,
        options.resume,
        options.cache,
        _progress,
    )
    print(
        f"{len(parts)} model{'s' * (len(parts) > 1)} in {options.out}. Next: medattn evaluate {options.out}"
    )
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
    from keras_medattn.train import experiment

    if bool(options.images) == bool(options.split):
        return _fail("give images, or --split test for those of the run's own data")
    parts = experiment.load(options.run_folder, options.data)
    out = options.out or options.run_folder / "explanations"
    ids = _pseudonyms(options)
    if options.split:
        jobs = [report.Job(part, part.manifest.split(options.split), ids=ids) for part in parts]
    else:
        if len(parts) > 1:
            return _fail(f"{options.run_folder} holds {len(parts)} models: name one, say {parts[0].folder}")
        jobs = [report.Job(parts[0], None, options.images, ids)]
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
        folder, found = formats.export(*what, training, files, *settings)
        folders, differences = [*folders, folder], differences | found
    for name, value in differences.items():
        print(f"{name:<16} largest difference to Keras in a probability: {value:.2e} ({len(samples)} images)")
    served = f". Next: medattn serve {options.to.parent}" if "saved_model" in options.formats else ""
    print("wrote " + " and ".join(map(str, folders)) + served)
    return 0


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


if __name__ == "__main__":
    sys.exit(main())

"""What each command of `medattn` takes. Nothing heavy is imported, so that `--help` answers at once."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

EPILOG = """examples:
  medattn check photos/                                   look at a folder a class before training
  medattn check BreaKHis --set breakhis                   what is there of a public set, and what is missing
  medattn train recipe.toml --data photos/ --out runs/a   train; a run is never overwritten
  medattn train recipe.toml --data photos/ --out runs/a --resume
  medattn train recipe.toml --data set.csv --out runs/cv --folds 5 --set train.epochs=20
  medattn tune recipe.toml --data set.csv --out tuned     search the settings that its [tune] names
  medattn calibrate runs/a --sensitivity 0.95             confidence and threshold, on validation images
  medattn evaluate runs/a                                 figures with 95% intervals, pictures, predictions
  medattn compare runs/a runs/b                           which is better, and whether that is chance
  medattn explain runs/a --split test --truth masks/      where it looked, and whether it was there
  medattn export runs/a --to saved_models/photos          a SavedModel for TF-Serving
  medattn benchmark saved_models/photos                   each exported format: size, time, difference
  medattn serve saved_models                              the local server, gRPC on port 8500
  medattn predict --server localhost:8500 --model photos a.jpg b.png
  medattn make megapixel-mnist --out digits --size 1500   images in which three small digits decide
  medattn demo                                            all of it, on semi-synthetic views

exit codes: 0 done, 1 it failed or `check` found problems, 2 the command line is wrong, 130 stopped by Ctrl-C
This is no medical device. No network call is made unless a command says so."""

EXPORTS = ("saved_model", "litert", "litert_batch1", "litert_float16", "litert_int8", "onnx", "tensorrt")

Command = Callable[..., argparse.ArgumentParser]


def parser() -> argparse.ArgumentParser:
    """The parser of `medattn`; it answers options whose `command` is the command's name."""
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

    def command(name: str, text: str, example: str, extras: str = "train") -> argparse.ArgumentParser:
        one = commands.add_parser(
            name, help=text, description=f"{text}.", epilog=f"example:\n  {example}", formatter_class=raw
        )
        one.set_defaults(command=name, extras=extras)
        return one

    for add in (_check, _train, _tune, _calibrate, _evaluate, _compare, _explain):
        add(command)
    for add in (_export, _benchmark, _serve, _predict, _make, _demo):
        add(command)
    return parser


def _check(command: Command) -> None:
    one = command("check", "look at every image and label", "medattn check set.csv --json")
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


def _train(command: Command) -> None:
    one = command(
        "train",
        "train a recipe",
        "medattn train mims.toml --data set.csv --out runs/a --set model.k=3",
    )
    _recipe(one)
    one.add_argument("--out", type=Path, required=True, metavar="RUN", help="the run folder to make")
    one.add_argument("--folds", type=int, default=0, metavar="N", help="cross-validate over N folds")
    one.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        default=[],
        metavar="SEED",
        help="train once a seed; with --folds, repeat the cross validation, each time with other folds",
    )
    one.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    one.add_argument(
        "--save-every",
        type=int,
        default=0,
        metavar="N",
        help="checkpoints each N steps within epochs, too (after each epoch)",
    )
    one.add_argument(
        "--strategy", choices=("mirrored",), help="mirrored: all GPUs of this machine share each batch"
    )
    one.add_argument(
        "--log",
        choices=("mlflow", "wandb"),
        help="send settings and figures there, too (extras of these names)",
    )
    one.add_argument("--cache", type=Path, metavar="DIR", help="share cached features between runs")


def _recipe(one: argparse.ArgumentParser) -> None:
    one.add_argument("recipe", type=Path, metavar="RECIPE", help="a TOML file")
    one.add_argument(
        "--data",
        type=Path,
        required=True,
        help="a folder a class, or a CSV; or the root of the public set that the recipe names",
    )
    one.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a setting; repeatable; null is None",
    )


def _tune(command: Command) -> None:
    one = command(
        "tune",
        "search for a recipe's settings, on validation images alone",
        "medattn tune recipe.toml --data set.csv --out tuned --trials 20",
        "train,tune",
    )
    _recipe(one)
    one.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to make")
    one.add_argument("--trials", type=int, default=20, metavar="N", help="settings to try at most (20)")
    one.add_argument(
        "--inner",
        type=int,
        default=0,
        metavar="N",
        help="judge a trial by N folds of the training and validation images (the validation side)",
    )
    one.add_argument(
        "--folds",
        type=int,
        default=0,
        metavar="N",
        help="nested cross validation: search in each of N folds, then train the best on it",
    )
    one.add_argument("--resume", action="store_true", help="go on with a search that was stopped")
    one.add_argument("--cache", type=Path, metavar="DIR", help="share cached features between searches")


def _calibrate(command: Command) -> None:
    one = command(
        "calibrate",
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


def _evaluate(command: Command) -> None:
    one = command("evaluate", "figures on held-out images", "medattn evaluate runs/a --json")
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


def _compare(command: Command) -> None:
    one = command(
        "compare",
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


def _explain(command: Command) -> None:
    one = command("explain", "where a model looked", "medattn explain runs/a eye.jpg --class lesions")
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


def _export(command: Command) -> None:
    one = command(
        "export",
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
    one.add_argument(
        "--batches",
        type=int,
        nargs=3,
        default=(1, 8, 32),
        metavar=("LEAST", "BEST", "LARGEST"),
        help="that a TensorRT engine takes, and is tuned for (1 8 32)",
    )


def _benchmark(command: Command) -> None:
    one = command(
        "benchmark",
        "what each exported format of a model costs and answers",
        "medattn benchmark saved_models/eyes --data held_out.csv",
        "train,serve,litert,onnx",
    )
    one.add_argument("model", type=Path, metavar="MODEL", help="the folder that `export --to` wrote")
    one.add_argument(
        "--data", type=Path, help="labelled images that the model never saw, for the AUROC; else noise"
    )
    one.add_argument(
        "--split", default="test", choices=("train", "val", "test"), help="side of the data, if it has (test)"
    )
    one.add_argument("--runs", type=int, default=50, metavar="N", help="answers to time at least (50)")
    one.add_argument("--threads", type=int, default=2, metavar="N", help="that each runtime may use (2)")
    one.add_argument("--out", type=Path, metavar="DIR", help="where to write (MODEL/benchmark)")


def _serve(command: Command) -> None:
    one = command("serve", "serve exported models", "medattn serve saved_models --port 8500", "serve")
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


def _predict(command: Command) -> None:
    one = command(
        "predict",
        "ask a server about images",
        "medattn predict --server localhost:8500 --model eyes a.jpg",
        "serve",
    )
    one.add_argument("images", nargs="+", metavar="IMAGE")
    one.add_argument(
        "--server", required=True, metavar="HOST:PORT", help="of gRPC; http://HOST:PORT asks by REST"
    )
    one.add_argument("--model", default="default", metavar="NAME", help="by default the server's only model")
    one.add_argument("--signature", default="serving_default", help="serving_default or explain")
    one.add_argument("--window", type=float, nargs=2, metavar=("LOW", "HIGH"), help="of 16-bit TIFF images")
    one.add_argument("--timeout", type=float, default=30.0, help="seconds for an image, with retries (30)")
    one.add_argument("--json", action="store_true", help="print JSON, a line an image")


def _make(command: Command) -> None:
    one = command(
        "make",
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


def _demo(command: Command) -> None:
    one = command("demo", "train, evaluate, explain, export and serve", "medattn demo --out demo", "demo")
    one.add_argument("--out", type=Path, default=Path("demo"), metavar="DIR", help="folder to make (demo)")

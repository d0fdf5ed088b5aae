"""Does a server give its exports' numbers? `python -m keras_medattn.serve.verify HOST:PORT [REST_PORT]`.

Beside each exported model lie drawn images and the Keras model's answers to them (`assets.extra/verify`).
They are sent to every signature, one at a time and all at once, and the answers compared. The server may be
any that speaks TensorFlow Serving's gRPC and REST; TensorFlow is not needed here.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from keras_medattn.data import volumes
from keras_medattn.files import read_json
from keras_medattn.serve.channel import ServerError
from keras_medattn.serve.client import Client


@dataclass(frozen=True)
class Check:
    """One signature of a model, asked by gRPC or REST for `batch` images at a time.

    `difference` is the largest in a probability to the Keras model; `error` says what is wrong, or is empty.
    """

    model: str
    version: int
    signature: str
    door: str
    batch: int
    difference: float
    error: str = ""


def verify(folder: Path, target: str, rest: str | None = None, timeout: float = 60.0) -> list[Check]:
    """Compares what a server answers with what the Keras models answered.

    Args:
        folder: the exported models, NAME/VERSION; those that the server is to serve.
        target: the server's gRPC, "HOST:PORT".
        rest: its REST, "http://HOST:PORT"; None leaves it out.
        timeout: seconds for each request.

    Raises:
        ValueError: there is no exported model in the folder, or an address is none.
    """
    models = [path for path in sorted(folder.glob("[!.]*")) if any(path.glob("[0-9]*/saved_model.pb"))]
    if not models:
        raise ValueError(
            f"Expected NAME/VERSION/saved_model.pb in the models' folder. Received: {str(folder)!r}"
        )
    found = []
    for door, address in (("gRPC", target), ("REST", rest)):
        for path in models if address else ():
            with Client(str(address), path.name, timeout) as client:
                found += _of_model(client, path, door)
    return found


def table(checks: Sequence[Check]) -> str:
    """Answers the checks as text, a line each.

    Example:

    >>> print(table([Check("eyes", 2, "tensor", "gRPC", 3, 2e-7)]))
    model                 version  signature        door  images  largest difference
    eyes                        2  tensor           gRPC       3  2.0e-07  ok
    """
    lines = ["model                 version  signature        door  images  largest difference"]
    for one in checks:
        lines.append(
            f"{one.model:<20} {one.version:>8}  {one.signature:<16} {one.door:<5} {one.batch:>6}  "
            f"{one.difference:.1e}  {one.error or 'ok'}"
        )
    return "\n".join(lines)


def _of_model(client: Client, path: Path, door: str) -> list[Check]:
    try:
        served = [status.version for status in client.status() if status.state == "AVAILABLE"]
        if not served:
            raise ServerError("NOT_FOUND", "the server has no version of it")
        known = _Known(path / str(max(served)))
        return [
            known.check(client, door, signature, set(info.inputs), files)
            for signature, info in client.metadata().items()
            for files in known.batches()
        ]
    except ServerError as error:
        return [Check(path.name, 0, "", door, 0, np.nan, str(error))]


class _Known:
    """What an exported version says of itself: its drawn images, and Keras's answers to them."""

    def __init__(self, version: Path) -> None:
        folder = version / "assets.extra"
        if not (folder / "verify" / "answers.json").is_file():
            raise ServerError("NOT_FOUND", f"no {folder}/verify: export the model again, or give its folder")
        self._version = version
        self._about = read_json(folder / "medattn.json")
        answers = read_json(folder / "verify" / "answers.json")
        self._tolerance = answers["tolerance"]
        self._answers = {folder / "verify" / name: known for name, known in answers["probabilities"].items()}

    def batches(self) -> list[list[Path]]:
        """Answers the images one by one, then together."""
        files = list(self._answers)
        return [[file] for file in files] + ([files] if len(files) > 1 else [])

    def check(self, client: Client, door: str, signature: str, takes: set[str], files: list[Path]) -> Check:
        where = self._version.parent.name, int(self._version.name), signature, door, len(files)
        try:
            out = client.outputs(signature, self._inputs(takes, files))
        except ServerError as error:
            return Check(*where, np.nan, str(error))
        expected = np.array([self._answers[file] for file in files])
        if missing := {"probabilities", "label", "class_name"} - set(out):
            return Check(*where, np.nan, f"answers no {', '.join(sorted(missing))}")
        if out["probabilities"].shape != expected.shape:
            return Check(*where, np.nan, f"answers {out['probabilities'].shape}, not {expected.shape}")
        difference = float(np.abs(out["probabilities"] - expected).max())
        if not difference <= self._tolerance:
            return Check(*where, difference, f"more than {self._tolerance:g}")
        labels = self._labels(out["probabilities"])
        names = [self._about["class_names"][label].encode() for label in labels]
        if out["label"].tolist() != labels or out["class_name"].tolist() != names:
            return Check(*where, difference, "the label does not follow from the probabilities")
        return Check(*where, difference)

    def _inputs(self, takes: set[str], files: list[Path]) -> dict[str, np.ndarray]:
        if "image_bytes" in takes:
            return {"image_bytes": np.array([file.read_bytes() for file in files], object)}
        if "mask" in takes:
            [stack] = [volumes.read(file, central=self._about["central"] or 0) for file in files]
            return {"image": stack[None], "mask": np.ones((1, len(stack)), bool)}
        return {"image": np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])}

    def _labels(self, probabilities: np.ndarray) -> list[int]:
        threshold = self._about["threshold"]
        if threshold is None:
            return probabilities.argmax(axis=-1).tolist()
        return (probabilities[:, 1] >= threshold).astype(int).tolist()


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; answers 0 if all is well, 1 if not."""
    parser = argparse.ArgumentParser("verify", description=(__doc__ or "").partition("\n")[2])
    parser.add_argument("server", metavar="HOST:PORT", help="of gRPC")
    parser.add_argument(
        "rest", nargs="?", metavar="REST_PORT", help="of REST, on that host; left out: not asked"
    )
    parser.add_argument(
        "--models",
        type=Path,
        default=Path("saved_models"),
        metavar="DIR",
        help="what it serves (saved_models)",
    )
    options = parser.parse_args(arguments)
    rest = options.rest and f"http://{options.server.rpartition(':')[0]}:{options.rest}"
    try:
        checks = verify(options.models, options.server, rest)
    except ValueError as error:
        print(f"verify: error: {error}", file=sys.stderr)
        return 1
    print(table(checks))
    wrong = sum(bool(check.error) for check in checks)
    print(f"{wrong} of {len(checks)} checks failed" if wrong else f"all {len(checks)} checks hold")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

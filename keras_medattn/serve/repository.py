"""The models that answer: versions loaded aside, swapped in, and let go after their last request."""

import gc
import logging
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keras_medattn.serve.config import check_labels, checked, versions, wanted
from keras_medattn.serve.protos import grpc
from keras_medattn.serve.servables import RequestError, Servable, invalid, trimmed

log = logging.getLogger("keras_medattn.serve")


@dataclass
class Version:
    """What became of one version: `state` is TensorFlow Serving's name of it, `error` why it did not load."""

    path: Path
    stamp: tuple[int, int]
    state: str = "LOADING"
    error: str = ""

    def settled(self, stamp: tuple[int, int]) -> bool:
        """Whether it need not be loaded: it answers, or failed with the files that are there still."""
        return self.state == "AVAILABLE" or (bool(self.error) and self.stamp == stamp)

    def end(self) -> None:
        """Says that nobody uses it any more."""
        self.state = "END"


class Repository:
    """The models that are served; the same names and errors as TensorFlow Serving's.

    A version that does not load is reported, and leaves the others be: the old versions of its model stay
    until a wanted one answers. It is tried again when its files change.

    Args:
        source: answers the `ModelConfig`s of the models to serve, by name; asked at each `refresh`.

    Raises:
        OSError, ValueError: what `source` raises.
    """

    def __init__(self, source: Callable[[], Mapping[str, Any]]) -> None:
        self._source = source
        self._configs: Mapping[str, Any] = {}
        self._refreshing = threading.Lock()
        self._said: dict[str, str] = {}
        self.versions: dict[str, dict[int, Version]] = {}
        # Replaced, never changed: requests read it while versions come and go.
        self.served: dict[str, dict[int, Servable]] = {}
        self.refresh()

    @property
    def names(self) -> list[str]:
        """The models to serve that have a version, loaded or not."""
        return [name for name in self.versions if name in self._configs]

    @property
    def errors(self) -> list[str]:
        """What did not load, and why."""
        return [
            f"{name} version {number}: {version.error}"
            for name, numbers in self.versions.items()
            for number, version in numbers.items()
            if version.error
        ]

    def find(self, spec: Any) -> Servable:
        """Answers the model that a `ModelSpec` names: its newest version, or the one of a number or a label.

        "default", the name under which TensorFlow Serving serves when none was given, also finds a model that
        is alone.

        Raises:
            RequestError: nothing of that name is served.
        """
        served = self.served.get(self.resolve(spec.name), {})
        number = self.number(spec)
        asked = f"Latest({spec.name})" if number is None else f"Specific({spec.name}, {number})"
        if number is None:
            number = max(served, default=-1)
        if number not in served:
            raise RequestError(grpc.StatusCode.NOT_FOUND, f"Servable not found for request: {asked}")
        return served[number]

    def number(self, spec: Any) -> int | None:
        """Answers the version that a `ModelSpec` asks for by number or label; None for the newest.

        Raises:
            RequestError: the model has no such label.
        """
        if spec.HasField("version_label"):
            config = self._configs.get(self.resolve(spec.name))
            if config is None or spec.version_label not in config.version_labels:
                raise invalid(f"Unrecognized servable version label: {spec.version_label}")
            return config.version_labels[spec.version_label]
        return spec.version.value if spec.HasField("version") else None

    def resolve(self, name: str) -> str:
        """Answers the model's name: itself, or of the only model when "default" is asked for."""
        return self.names[0] if name == "default" and len(self.names) == 1 else name

    def refresh(self) -> list[str]:
        """Loads the versions that are wanted and not there, then lets go of those that are not wanted.

        Returns:
            What is wanted and not there now, and why.
        """
        with self._refreshing:
            configs = self._source()
            failures = [failure for config in configs.values() for failure in self._refresh(config)]
            self._configs = configs
            for name in set(self.served) - set(configs):
                self._retire(name, set(self.served[name]))
            return failures

    def watch(self, seconds: float, stop: threading.Event) -> None:
        """Refreshes every so many seconds until `stop`."""
        while not stop.wait(seconds):
            try:
                self.refresh()
            # Whatever is wrong with the folder or the file: what is served goes on.
            except Exception as error:
                self._say("", f"could not look for new versions: {error}")

    def reload(self, config: Any) -> None:
        """Serves what a `ModelServerConfig` says, and nothing else, from now on.

        Raises:
            RequestError: it cannot be served, or not all of it loads; what loads is served.
        """
        configs = checked(config)
        self._source = lambda: configs
        if failures := self.refresh():
            raise RequestError(
                grpc.StatusCode.UNKNOWN,
                f"{len(failures)} servable(s) did not become available: {', '.join(failures)}",
            )
        for name, model in configs.items():
            check_labels(model, self.served[name])

    def _refresh(self, config: Any) -> list[str]:
        name, folder = config.name, Path(config.base_path)
        try:
            found = versions(folder)
            chosen = {
                n: (found[n], _stamp(found[n])) for n in sorted(wanted(config.model_version_policy, found))
            }
        except OSError as error:
            self._say(name, f"left {name} as it is: {error}")
            return [f"{{name: {name}}} due to error: {error}"]
        for number, (path, stamp) in chosen.items():
            known = self.versions.get(name, {}).get(number)
            if not (known and known.path == path and known.settled(stamp)):
                self._load(name, number, Version(path, stamp))
        served = self.served.get(name, {})
        if not chosen or not served.keys().isdisjoint(chosen):
            self._retire(name, set(served) - set(chosen))
        if not chosen:
            text = f"no versions of {name} found under base path {folder}"
            self._say(name, text)
            return [f"{{name: {name}}} due to error: {text}"]
        return [
            f"{{name: {name} version: {number}}} due to error: {self.versions[name][number].error}"
            for number in chosen
            if self.versions[name][number].error
        ]

    def _load(self, name: str, number: int, version: Version) -> None:
        self.versions = {**self.versions, name: {**self.versions.get(name, {}), number: version}}
        try:
            servable = Servable(name, number, version.path)
        # Whatever a broken model raises while it loads: it must not take the others down.
        except Exception as error:
            version.error = f"{type(error).__name__}: {trimmed(str(error))}"
            version.state = "END"
            log.error("could not load %s version %d: %s", name, number, version.error)
            return
        weakref.finalize(servable, version.end).atexit = False
        version.state = "AVAILABLE"
        self.served = {**self.served, name: {**self.served.get(name, {}), number: servable}}
        log.info("loaded %s version %d: %s", name, number, ", ".join(servable.signature_defs))

    def _retire(self, name: str, numbers: set[int]) -> None:
        """Takes versions from the requests to come; the last of the requests that have one frees it."""
        if not numbers:
            return
        for number in numbers:
            self.versions[name][number].state = "UNLOADING"
            log.info("unloading %s version %d", name, number)
        left = {n: servable for n, servable in self.served[name].items() if n not in numbers}
        others = {other: served for other, served in self.served.items() if other != name}
        self.served = {**others, name: left} if left else others
        # TensorFlow's objects refer to each other.
        gc.collect()

    def _say(self, about: str, text: str) -> None:
        """Logs a complaint once, not at every look."""
        if self._said.get(about) != text:
            self._said[about] = text
            log.error("%s", text)


def _stamp(path: Path) -> tuple[int, int]:
    """Answers the newest change and the size of a version's files."""
    stats = [file.stat() for file in path.rglob("*") if file.is_file()]
    return max((s.st_mtime_ns for s in stats), default=0), sum(s.st_size for s in stats)

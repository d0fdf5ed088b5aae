"""Which models are served, and which of their versions: all in a folder, or what a models.config says."""

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from google.protobuf import text_format

from keras_medattn.serve.protos import model_server_config_pb2
from keras_medattn.serve.servables import RequestError, grpc, invalid


def in_folder(folder: Path) -> dict[str, Any]:
    """Answers a `ModelConfig` for each folder in `folder`, by name; its newest version is to be served.

    Names that start with "." or "tmp" are being written.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"The models' folder must exist. Received: {str(folder)!r}")
    return {
        path.name: model_server_config_pb2.ModelConfig(name=path.name, base_path=str(path))
        for path in sorted(folder.iterdir())
        if path.is_dir() and not path.name.startswith((".", "tmp"))
    }


def read(path: Path) -> dict[str, Any]:
    """Answers the `ModelConfig`s of a models.config, a `ModelServerConfig` as text, by name.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is none, or asks for what the server does not do.
    """
    try:
        text = path.read_text("utf-8")
        return checked(text_format.Parse(text, model_server_config_pb2.ModelServerConfig()))
    except (text_format.ParseError, UnicodeDecodeError, RequestError) as error:
        raise ValueError(f"{path}: not a models.config that can be served: {error}") from error


def checked(config: Any) -> dict[str, Any]:
    """Answers the `ModelConfig`s of a `ModelServerConfig`, by name.

    Raises:
        RequestError: it asks for what the server does not do.
    """
    if config.WhichOneof("config") != "model_config_list":
        raise invalid(
            "ServerModelConfig type not supported by HandleReloadConfigRequest. "
            "Only ModelConfigList is currently supported"
        )
    configs = {}
    for model in config.model_config_list.config:
        if not model.name or model.name in configs:
            raise invalid(
                f"Illegal to list model {model.name} multiple times in config list, or without a name"
            )
        # So TensorFlow Serving wants it, and a reload does not depend on where the server was started.
        if not model.base_path.startswith("/"):
            raise invalid(
                f"Expected model {model.name} to have an absolute path or URI; "
                f"got base_path()={model.base_path}"
            )
        if model.model_platform not in ("", "tensorflow"):
            raise invalid(
                f"Model {model.name}: model_platform must be tensorflow. Got: {model.model_platform}"
            )
        configs[model.name] = model
    return configs


def versions(folder: Path) -> dict[int, Path]:
    """Answers the versions of a model: folders whose name is a number, with a `saved_model.pb`."""
    return {
        int(path.name): path
        for path in folder.iterdir()
        # 18 digits are what surely fits the protocol's int64.
        if re.fullmatch("[0-9]{1,18}", path.name) and (path / "saved_model.pb").is_file()
    }


def wanted(policy: Any, numbers: Collection[int]) -> set[int]:
    """Answers which versions a `ServableVersionPolicy` chooses: the newest, unless it says otherwise.

    Example:

    >>> policy = model_server_config_pb2.ModelConfig().model_version_policy
    >>> policy.latest.num_versions = 2
    >>> sorted(wanted(policy, {1, 2, 10}))
    [2, 10]
    """
    kind = policy.WhichOneof("policy_choice")
    if kind == "all":
        return set(numbers)
    if kind == "specific":
        return set(numbers) & set(policy.specific.versions)
    return set(sorted(numbers)[-(policy.latest.num_versions or 1) :])


def check_labels(config: Any, available: Collection[int]) -> None:
    """Refuses a label of a version that does not answer.

    Raises:
        RequestError: there is one.
    """
    for label, number in config.version_labels.items():
        if number not in available:
            raise RequestError(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"Request to assign label {label} to version {number} of model {config.name}, which is not "
                "currently available for inference",
            )

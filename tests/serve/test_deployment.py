"""The files of serving/: TensorFlow Serving's own messages, Kubernetes' objects, clients that are run.

`tensorflow-serving-api` has no messages of batching and monitoring. They are built here, with the fields of
`session_bundle_config.proto` and `monitoring_config.proto` of the tensorflow/serving repository.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from google.protobuf import (
    descriptor_pb2,
    descriptor_pool,
    message_factory,
    text_format,
    wrappers_pb2,
)
from serve.conftest import CLASSES, expected, picture
from tensorflow_serving.config import model_server_config_pb2

ROOT = Path(__file__).resolve().parents[2]
SERVING = ROOT / "serving"
FILES = SERVING / "tf_serving"
INT64, BOOL, STRING, MESSAGE = 3, 8, 9, 11  # FieldDescriptorProto.Type
MESSAGES = {
    "PrometheusConfig": [("enable", BOOL, ""), ("path", STRING, "")],
    "MonitoringConfig": [("prometheus_config", MESSAGE, ".check.PrometheusConfig")],
    "BatchingParameters": [
        ("max_batch_size", MESSAGE, ".google.protobuf.Int64Value"),
        ("batch_timeout_micros", MESSAGE, ".google.protobuf.Int64Value"),
        ("max_enqueued_batches", MESSAGE, ".google.protobuf.Int64Value"),
        ("num_batch_threads", MESSAGE, ".google.protobuf.Int64Value"),
        ("thread_pool_name", MESSAGE, ".google.protobuf.StringValue"),
        ("allowed_batch_sizes", INT64, "repeated"),
        ("pad_variable_length_inputs", BOOL, ""),
    ],
}


def message(name: str):
    """An empty message of one of MESSAGES."""
    file = descriptor_pb2.FileDescriptorProto(name="check.proto", package="check", syntax="proto3")
    file.dependency.append(wrappers_pb2.DESCRIPTOR.name)
    for one, fields in MESSAGES.items():
        made = file.message_type.add(name=one)
        for number, (field, kind, more) in enumerate(fields, 1):
            added = made.field.add(name=field, number=number, type=kind, label=1)
            if kind == MESSAGE:
                added.type_name = more
            elif more == "repeated":
                added.label = 3
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(wrappers_pb2.DESCRIPTOR.serialized_pb)
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"check.{name}"))()


def test_models_config_parses():
    text = (FILES / "models.config").read_text()
    config = text_format.Parse(text, model_server_config_pb2.ModelServerConfig())
    [model] = config.model_config_list.config
    assert (model.name, model.base_path, model.model_platform) == ("demo", "/models/demo", "tensorflow")
    assert model.model_version_policy.latest.num_versions == 1


def test_batching_config_has_the_fields_and_keeps_their_rules():
    found = text_format.Parse((FILES / "batching.config").read_text(), message("BatchingParameters"))
    sizes = list(found.allowed_batch_sizes)
    # What the proto asks of them: increasing, and the last one the largest batch.
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == found.max_batch_size.value == 16
    assert found.batch_timeout_micros.value == 2000
    assert found.num_batch_threads.value >= 1
    assert found.max_enqueued_batches.value >= 1
    assert not found.pad_variable_length_inputs  # grey borders would change answers
    with pytest.raises(text_format.ParseError, match="max_batchsize"):
        text_format.Parse("max_batchsize { value: 1 }", message("BatchingParameters"))


def test_monitoring_config_has_the_fields():
    found = text_format.Parse((FILES / "monitoring.config").read_text(), message("MonitoringConfig"))
    assert found.prometheus_config.enable
    assert found.prometheus_config.path == "/monitoring/prometheus/metrics"


def test_dockerfile_takes_every_config_and_tensorflows_version():
    text = (FILES / "Dockerfile").read_text()
    [copied] = re.findall(r"(?m)^COPY (.+) /config/$", text)
    assert {ROOT / name for name in copied.split()} == set(FILES.glob("*.config"))
    [arguments] = re.findall(r"(?ms)^CMD (\[.*\])$", text.replace("\\\n", ""))
    flags = dict(flag.removeprefix("--").split("=") for flag in json.loads(arguments))
    assert flags == {
        "model_config_file": "/config/models.config",
        "model_config_file_poll_wait_seconds": "60",
        "enable_batching": "true",
        "batching_parameters_file": "/config/batching.config",
        "monitoring_config_file": "/config/monitoring.config",
    }
    [version] = re.findall(r"(?m)^ARG TF_SERVING_VERSION=(\d+\.\d+)\.\d+$", text)
    assert f"tensorflow>={version},<" in (ROOT / "setup.cfg").read_text()


def test_kubernetes_objects_fit_each_other():
    claim, deployment, service = yaml.safe_load_all((FILES / "kubernetes.yaml").read_text())
    assert [one["kind"] for one in (claim, deployment, service)] == [
        "PersistentVolumeClaim",
        "Deployment",
        "Service",
    ]
    assert [one["apiVersion"] for one in (claim, deployment, service)] == ["v1", "apps/v1", "v1"]
    pod = deployment["spec"]["template"]
    chosen = deployment["spec"]["selector"]["matchLabels"]
    assert chosen.items() <= pod["metadata"]["labels"].items()
    assert service["spec"]["selector"] == chosen
    [container], [volume] = pod["spec"]["containers"], pod["spec"]["volumes"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"grpc": 8500, "rest": 8501}
    assert {port["targetPort"]: port["port"] for port in service["spec"]["ports"]} == ports
    assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    [mount] = container["volumeMounts"]
    assert (mount["name"], mount["readOnly"]) == (volume["name"], True)
    config = text_format.Parse(
        (FILES / "models.config").read_text(), model_server_config_pb2.ModelServerConfig()
    )
    [model] = config.model_config_list.config
    assert model.base_path == f"{mount['mountPath']}/{model.name}"
    for name in ("startupProbe", "readinessProbe"):
        assert container[name]["httpGet"] == {"path": f"/v1/models/{model.name}/metadata", "port": "rest"}
    wait = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert 30 < wait < pod["spec"]["terminationGracePeriodSeconds"]  # the examples' deadline


def run(*command) -> subprocess.CompletedProcess:
    return subprocess.run([str(part) for part in command], capture_output=True, encoding="utf-8", check=False)


@pytest.fixture
def images(tmp_path) -> list[Path]:
    paths = [tmp_path / "a.png", tmp_path / "b c.bmp"]
    for seed, path in enumerate(paths):
        path.write_bytes(picture(seed, path.suffix[1:].upper()))
    return paths


@pytest.mark.parametrize("door", ["grpc", "rest"])
def test_the_python_examples(server, rest, images, door):
    address = {"grpc": server[0], "rest": f"http://{rest}"}[door]
    done = run(sys.executable, SERVING / "clients" / f"predict_{door}.py", address, "toy", *images)
    assert done.returncode == 0, done.stderr
    known = [expected(path.read_bytes()) for path in images]
    assert done.stdout.splitlines() == [
        f"{path}: {CLASSES[p.argmax()]} ({p.max():.4f})" for path, p in zip(images, known, strict=True)
    ]


def test_the_rest_example_says_what_the_server_says(rest, tmp_path):
    (tmp_path / "a.gif").write_bytes(b"GIF89a")
    done = run(
        sys.executable, SERVING / "clients/predict_rest.py", f"http://{rest}", "toy", tmp_path / "a.gif"
    )
    assert done.returncode == 1
    assert done.stderr.startswith(f"http://{rest}/v1/models/toy:predict answers 400")
    assert "not an image of a known kind" in done.stderr


def test_the_curl_example(rest, images):
    done = run(SERVING / "clients" / "predict_curl.sh", f"http://{rest}", "toy", images[1], "explain")
    assert done.returncode == 0, done.stderr
    [row] = json.loads(done.stdout)["predictions"]
    assert row["probabilities"] == pytest.approx(expected(images[1].read_bytes()), abs=1e-6)
    assert row["boxes"] == [[1, 2, 9, 8]]
    done = run(SERVING / "clients" / "predict_curl.sh", f"http://{rest}", "nobody", images[1])
    assert done.returncode == 22
    assert json.loads(done.stdout) == {"error": "Servable not found for request: Latest(nobody)"}

"""Versions that come and go while the server answers."""

import gc
import shutil
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
import tensorflow as tf
from google.protobuf import text_format
from serve.conftest import expected, picture, start, warm_up
from serve.test_server import Code, refusal, request
from tensorflow_serving.apis import (
    get_model_status_pb2,
    model_management_pb2,
    model_service_pb2_grpc,
    prediction_service_pb2_grpc,
)
from tensorflow_serving.config import model_server_config_pb2

from keras_medattn.serve import serve
from keras_medattn.serve.config import in_folder, read
from keras_medattn.serve.protos import prediction_log_pb2
from keras_medattn.serve.repository import Repository
from keras_medattn.serve.servables import RequestError, Servable


def spec(version=None):
    return request(version=version).model_spec


def config(text: str):
    return text_format.Parse(text, model_server_config_pb2.ModelServerConfig())


def toy(folder, policy="", more="") -> str:
    return (
        f'config {{ name: "toy" base_path: "{folder}/toy" model_platform: "tensorflow" '
        f"model_version_policy {{ {policy} }} {more} }}"
    )


@pytest.fixture
def folder(models, tmp_path):
    """Versions 1 and 2 of the toy, ours to change."""
    for version in ("1", "2"):
        shutil.copytree(models / "toy" / version, tmp_path / "toy" / version)
    return tmp_path


def publish(folder, version: str, source) -> None:
    aside = folder / "toy" / f".{version}"
    shutil.copytree(source, aside)
    aside.rename(folder / "toy" / version)


def states(repository) -> dict[int, str]:
    return {number: version.state for number, version in repository.versions["toy"].items()}


def test_a_version_is_let_go_after_its_last_request(folder, models):
    repository = Repository(lambda: in_folder(folder))
    shutil.copytree(models / "toy" / "1", folder / "toy" / "5")
    held = repository.find(spec())
    gone = weakref.ref(held)
    repository.refresh()
    assert repository.find(spec()).version == 5
    assert states(repository) == {2: "UNLOADING", 5: "AVAILABLE"}
    np.testing.assert_allclose(
        tf.make_ndarray(held.predict(request(image_bytes=[picture(1)])).outputs["probabilities"])[0],
        expected(picture(1), 2),
        atol=1e-6,
    )
    del held
    gc.collect()
    assert gone() is None
    assert states(repository) == {2: "END", 5: "AVAILABLE"}
    # Back to the old one, as one does after a bad release.
    shutil.rmtree(folder / "toy" / "5")
    repository.refresh()
    assert repository.find(spec()).version == 2
    shutil.rmtree(folder / "toy")
    repository.refresh()
    with pytest.raises(RequestError, match=r"Latest\(toy\)"):
        repository.find(spec())


def test_a_corrupt_version_is_tried_again_when_its_files_change(folder, models, caplog):
    repository = Repository(lambda: in_folder(folder))
    (folder / "toy" / "3").mkdir()
    (folder / "toy" / "3" / "saved_model.pb").write_bytes(b"not a model")
    for _ in range(3):
        repository.refresh()
    assert repository.find(spec()).version == 2
    assert states(repository) == {2: "AVAILABLE", 3: "END"}
    assert caplog.text.count("could not load toy version 3") == 1
    shutil.copytree(models / "toy" / "1", folder / "toy" / "3", dirs_exist_ok=True)
    repository.refresh()
    assert repository.find(spec()).version == 3
    assert not repository.errors


@pytest.mark.parametrize(
    ("policy", "numbers"),
    [
        ("", {2}),
        ("latest {}", {2}),
        ("latest { num_versions: 2 }", {1, 2}),
        ("all {}", {1, 2}),
        ("specific { versions: 1 }", {1}),
        ("specific { versions: 1 versions: 9 }", {1}),
    ],
)
def test_policies(folder, policy, numbers):
    path = folder / "models.config"
    path.write_text(f"model_config_list {{ {toy(folder, policy)} }}")
    repository = Repository(lambda: read(path))
    assert set(repository.served["toy"]) == numbers
    for number in (1, 2):
        if number in numbers:
            assert repository.find(spec(number)).version == number
        else:
            with pytest.raises(RequestError, match=rf"Specific\(toy, {number}\)"):
                repository.find(spec(number))


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("model_config_list {", "models.config: not a models.config"),
        ("custom_model_config {}", "Only ModelConfigList is currently supported"),
        ('model_config_list { config { name: "a" base_path: "here" } }', "model a to have an absolute path"),
        ('model_config_list { config { base_path: "/here" } }', "without a name"),
        (
            'model_config_list { config { name: "a" base_path: "/x" model_platform: "jax" } }',
            "model_platform must be tensorflow",
        ),
    ],
)
def test_bad_configs(tmp_path, caplog, text, match):
    path = tmp_path / "models.config"
    path.write_text(text)
    assert serve(None, config=path) == 2
    assert match in caplog.text


def test_warmup_that_is_none_of_ours(folder):
    path = folder / "toy" / "2"
    with tf.io.TFRecordWriter(str(path / "assets.extra" / "tf_serving_warmup_requests")) as writer:
        log = prediction_log_pb2.PredictionLog()
        log.classify_log.request.model_spec.name = "toy"
        writer.write(log.SerializeToString())
    with pytest.raises(ValueError, match="Unsupported log_type for warmup: classify_log"):
        Servable("toy", 2, path)
    with tf.io.TFRecordWriter(str(path / "assets.extra" / "tf_serving_warmup_requests")) as writer:
        log.predict_log.request.CopyFrom(request(signature="slow", seconds=[0.0]))
        for _ in range(1001):
            writer.write(log.SerializeToString())
    with pytest.raises(ValueError, match="Number of warmup records exceeds the maximum"):
        Servable("toy", 2, path)


@pytest.mark.parametrize(("count", "each"), [(4, 50), pytest.param(8, 250, marks=pytest.mark.slow)])
def test_versions_are_swapped_under_load_and_the_config_reloaded(folder, models, tmp_path, count, each):
    """Many clients ask while a corrupt version and a good one come: no request fails."""
    warm_up(folder / "toy" / "1", picture(0))
    path = folder / "models.config"
    path.write_text(f"model_config_list {{ {toy(folder)} }}")
    process, port = start(None, tmp_path / "log", config=str(path), poll=0.1)
    seen, enough = [], threading.Barrier(count + 1)

    def client(number):
        with grpc.insecure_channel(target, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
            stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
            for turn in range(each):
                if turn == each // 2:
                    enough.wait(60)
                answer = stub.Predict(
                    request(image_bytes=[(data := picture(100 * number + turn))]), timeout=30
                )
                version = answer.model_spec.version.value
                # The toy of version 1 or 2, under whatever number it is published.
                reference = expected(data, 2 if version == 2 else 1)
                np.testing.assert_allclose(
                    tf.make_ndarray(answer.outputs["probabilities"])[0], reference, atol=1e-6
                )
                seen.append(version)
                time.sleep(0.02)

    target = f"127.0.0.1:{port}"
    with grpc.insecure_channel(target) as channel, ThreadPoolExecutor(count) as pool:
        service = model_service_pb2_grpc.ModelServiceStub(channel)
        ask = get_model_status_pb2.GetModelStatusRequest()
        ask.model_spec.name = "toy"

        def wait_for(version, state):
            names = get_model_status_pb2.ModelVersionStatus.State
            for _ in range(300):
                found = service.GetModelStatus(ask).model_version_status
                if (version, state) in [(s.version, names.Name(s.state)) for s in found]:
                    return
                time.sleep(0.05)
            raise AssertionError(f"version {version} is not {state}: {found}")

        clients = [pool.submit(client, number) for number in range(count)]
        (folder / "toy" / "3").mkdir()
        (folder / "toy" / "3" / "saved_model.pb").write_bytes(b"not a model")
        wait_for(3, "END")
        publish(folder, "4", models / "toy" / "1")
        enough.wait(60)
        wait_for(4, "AVAILABLE")
        wait_for(2, "END")
        for one in clients:
            one.result()
        assert len(seen) == count * each
        assert seen[0] == 2
        assert seen[-1] == 4
        assert set(seen) == {2, 4}

        reload = model_management_pb2.ReloadConfigRequest()
        labels = 'version_labels { key: "stable" value: 1 } version_labels { key: "next" value: 4 }'
        both = toy(folder, "specific { versions: 1 versions: 4 }", labels)
        reload.config.CopyFrom(config(f"model_config_list {{ {both} }}"))
        assert service.HandleReloadConfigRequest(reload, timeout=30).status.error_code == 0
        stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
        asked = request(image_bytes=[picture(1)])
        for label, version in (("stable", 1), ("next", 4)):
            asked.model_spec.version_label = label
            assert stub.Predict(asked).model_spec.version.value == version
        asked.model_spec.version_label = "old"
        code, text = refusal(stub.Predict, asked)
        assert (code, text) == (Code.INVALID_ARGUMENT, "Unrecognized servable version label: old")

        reload.config.model_config_list.config[0].version_labels["next"] = 2
        code, text = refusal(service.HandleReloadConfigRequest, reload)
        assert code == Code.FAILED_PRECONDITION
        assert text.startswith("Request to assign label next to version 2 of model toy")
        del reload.config.model_config_list.config[0].model_version_policy.specific.versions[:]
        reload.config.model_config_list.config[0].model_version_policy.specific.versions.append(3)
        code, text = refusal(service.HandleReloadConfigRequest, reload)
        assert (code, text[:70]) == (
            Code.UNKNOWN,
            "1 servable(s) did not become available: {name: toy version: 3} due to "[:70],
        )
        # A wanted version that does not load leaves those that answer.
        asked.model_spec.ClearField("version_label")
        assert stub.Predict(asked).model_spec.version.value == 4
        code, _ = refusal(service.HandleReloadConfigRequest, model_management_pb2.ReloadConfigRequest())
        assert code == Code.INVALID_ARGUMENT
    process.terminate()
    assert process.wait(20) == 0
    log = (tmp_path / "log").read_text()
    assert log.count("could not load toy version 3") == 1
    assert "unloading toy version 2" in log

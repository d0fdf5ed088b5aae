"""What starts several workers: `TF_CONFIG` from Slurm's and Kubernetes' variables, the launch files."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from keras_medattn.train import cluster, strategy
from keras_medattn.train.strategy import StrategyError

LAUNCH = ROOT / "training" / "launch"


@pytest.fixture
def told(tmp_path):
    """Runs a command with a `medattn` that writes down its arguments and TF_CONFIG; answers these."""
    tools = tmp_path / "tools"
    tools.mkdir()

    def tool(name, text):
        (tools / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tools / name).chmod(0o755)

    tool("medattn", '{ echo "$@"; echo "$TF_CONFIG"; } > "$TOLD/$SLURM_PROCID$JOB_COMPLETION_INDEX.txt"')
    tool("python", f'exec "{sys.executable}" "$@"')
    # one task after another, as srun starts them on their nodes
    tool("srun", 'shift; for SLURM_PROCID in 0 1; do export SLURM_PROCID; "$@" || exit 1; done')

    def run(command, **variables):
        path = f"{tools}:{os.environ['PATH']}"
        environ = os.environ | {"PATH": path, "TOLD": str(tmp_path)} | variables
        subprocess.run(["bash", *command], check=True, env=environ, cwd=ROOT, timeout=60)
        answers = [path.read_text().splitlines() for path in sorted(tmp_path.glob("*.txt"))]
        return [(arguments.split(), json.loads(config)) for arguments, config in answers]

    return run


def test_slurm_script_tells_each_task_where_all_are(told, tmp_path):
    slurm = {"SLURM_JOB_NODELIST": "gpu[09-10]", "SLURM_NTASKS": "2"}
    arguments = ["recipe.toml", "--data", "set.csv", "--out", str(tmp_path)]
    first, second = told([LAUNCH / "slurm.sh", *arguments], **slurm)
    hosts = {"worker": [f"gpu09:{cluster.PORT}", f"gpu10:{cluster.PORT}"]}
    assert first == (["train", *arguments], {"cluster": hosts, "task": {"type": "worker", "index": 0}})
    assert second == (["train", *arguments], {"cluster": hosts, "task": {"type": "worker", "index": 1}})
    (tmp_path / "run.json").write_text("{}")
    again = told([LAUNCH / "slurm.sh", *arguments], **slurm)
    assert [each[-1] for each, _ in again] == ["--resume"] * 2


def test_kubernetes_manifest_gives_each_pod_its_place(told):
    yaml = pytest.importorskip("yaml", reason="PyYAML comes with other packages, and is not here")
    service, job = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    [container] = pod["containers"]
    count, name = job["spec"]["completions"], job["metadata"]["name"]
    assert (service["kind"], job["kind"], job["spec"]["completionMode"]) == ("Service", "Job", "Indexed")
    assert job["spec"]["parallelism"] == count  # all at once, or the first would wait forever
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"job-name": name}
    assert pod["subdomain"] == service["metadata"]["name"]
    assert {one["name"] for one in container["volumeMounts"]} == {one["name"] for one in pod["volumes"]}
    bash, *command = container["command"]
    assert bash == "bash"
    variables = {one["name"]: one["value"] for one in container["env"]}
    [(arguments, config)] = told(command, **variables, JOB_COMPLETION_INDEX="1")
    port = container["ports"][0]["containerPort"]
    hosts = [f"{name}-{index}.{pod['subdomain']}:{port}" for index in range(count)]
    assert config == {"cluster": {"worker": hosts}, "task": {"type": "worker", "index": 1}}
    mounted = [Path(one["mountPath"]) for one in container["volumeMounts"]]
    assert all(Path(each).parent in mounted for each in (arguments[1], arguments[3], arguments[5]))


def test_wrong_variables_are_named(monkeypatch):
    two = {"SLURM_JOB_NODELIST": "a,b", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"}
    with pytest.raises(ValueError, match="Received: 4 tasks on 2 nodes"):
        cluster.tf_config(two)
    with pytest.raises(ValueError, match="neither a task of Slurm"):
        cluster.tf_config({})
    for text in ("{", '{"cluster": {"worker": ["a:1"]}, "task": {"type": "ps", "index": 0}}'):
        monkeypatch.setenv("TF_CONFIG", text)
        with pytest.raises(StrategyError, match="TF_CONFIG must be like"):
            strategy.workers()
    monkeypatch.setenv(
        "TF_CONFIG", '{"cluster": {"worker": ["a:1"]}, "task": {"type": "worker", "index": 1}}'
    )
    with pytest.raises(StrategyError, match="its task is none of them"):
        strategy.workers()
    config = '{"cluster": {"chief": ["a:1"], "worker": ["b:1"]}, "task": {"type": "worker", "index": 0}}'
    monkeypatch.setenv("TF_CONFIG", config)
    assert strategy.workers() == (1, 2)
    assert not strategy.chief()

"""`TF_CONFIG`, which tells a worker where all of them are, from what Slurm or Kubernetes tells a task.

`export TF_CONFIG="$(python -m keras_medattn.train.cluster)"` in a task of either.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Mapping

PORT = 23450


def tf_config(environ: Mapping[str, str]) -> str:
    """The `TF_CONFIG` of a task: of Slurm one a node, of Kubernetes one a pod of an indexed job.

    Of Kubernetes it needs `WORKERS`, their number, and `WORKER_ADDRESS`, with `{}` for a worker's number.

    Raises:
        ValueError: these are not variables of such a task.

    Example:
        >>> tf_config({"SLURM_JOB_NODELIST": "a1", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"})
        '{"cluster": {"worker": ["a1:23450"]}, "task": {"type": "worker", "index": 0}}'
    """
    if "SLURM_PROCID" in environ:
        index, count = int(environ["SLURM_PROCID"]), int(environ["SLURM_NTASKS"])
        hosts = expanded(environ["SLURM_JOB_NODELIST"])
        if len(hosts) != count:
            raise ValueError(
                "a worker takes all GPUs of its node: start one task a node (--ntasks-per-node=1). "
                f"Received: {count} tasks on {len(hosts)} nodes"
            )
        addresses = [f"{host}:{PORT}" for host in hosts]
    elif "JOB_COMPLETION_INDEX" in environ:
        index = int(environ["JOB_COMPLETION_INDEX"])
        addresses = [environ["WORKER_ADDRESS"].format(one) for one in range(int(environ["WORKERS"]))]
    else:
        raise ValueError(
            "neither a task of Slurm (SLURM_PROCID; start it by srun) nor of an indexed job of Kubernetes "
            "(JOB_COMPLETION_INDEX)"
        )
    task = {"type": "worker", "index": index}
    return json.dumps({"cluster": {"worker": addresses}, "task": task})


def expanded(nodes: str) -> list[str]:
    """The hosts of a list of Slurm's.

    Example:
        >>> expanded("gpu[08-10,12],login")
        ['gpu08', 'gpu09', 'gpu10', 'gpu12', 'login']
    """
    hosts = []
    for one in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", nodes):
        before, bracket, rest = one.partition("[")
        inside, _, after = rest.partition("]")
        for span in inside.split(",") if bracket else [""]:
            first, _, last = span.partition("-")
            numbers = range(int(first), int(last or first) + 1) if bracket else [None]
            middle = ["" if number is None else f"{number:0{len(first)}d}" for number in numbers]
            # a second bracket in a name is expanded in its turn
            hosts += [host for name in middle for host in _rest(before + name, after)]
    return hosts


def _rest(before: str, after: str) -> list[str]:
    return [before + host for host in expanded(after)] if after else [before]


if __name__ == "__main__":
    try:
        print(tf_config(os.environ))
    except (ValueError, KeyError) as error:
        sys.exit(f"TF_CONFIG cannot be made: {error}")

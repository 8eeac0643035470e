"""What a job of `phi3v launch slurm` does on each node: it checks the node, runs the ranks, and requeues the
job.

In: config, overrides, Slurm's environment variables. Out: the exit code of the run as submitit's result. The
ranks are started by launch.cluster, as under slurm/train.sh. Requeueing is done here after all ranks have
saved; submitit's own way would save on rank 0 alone, inside a signal handler, while the other ranks wait in a
collective.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from launch import health
from launch.cluster import run_cluster_node
from phi3v_dist.config import load_config
from phi3v_dist.exits import DONE, PREEMPTED, UNHEALTHY, USAGE
from shards.common.errors import BadInputError

REQUEUE = Path(__file__).with_name("requeue.sh")
"""Decides whether the job may be requeued, and requeues it; slurm/train.sh uses the same script."""
END_OF_JOB_S = 120
"""Seconds that a task waits for Slurm to end it after the job was requeued."""


@dataclass(frozen=True)
class NodeTask:
    """What submitit runs on each node; it is pickled, so it holds plain values only."""

    config: str
    overrides: tuple[str, ...]

    def __call__(self) -> int:
        """Runs this node's ranks; returns their exit code. After a stop signal it requeues the job."""
        environment = dict(os.environ)
        environment["PHI3V_HEAD"] = head_address(environment)
        try:
            if faults := health.faults_here(load_config(self.config, self.overrides), environment):
                node = health.node_name(environment)
                print(f"phi3v: {node} is not healthy: {'; '.join(faults)}", file=sys.stderr, flush=True)
                return requeue_or_end(UNHEALTHY, environment, exclude=node)
            code = run_cluster_node(self.config, self.overrides, environment)
        except BadInputError as error:
            print(f"phi3v: {error}", file=sys.stderr, flush=True)
            return _end(USAGE)
        return requeue_or_end(code, environment) if code == PREEMPTED else _end(code)


def requeue_or_end(code: int, environment: Mapping[str, str], exclude: str = "") -> int:
    """Requeues the job, without the node `exclude` if one is given. If launch/requeue.sh says that the job
    must not be requeued, the task ends with `code`.
    """
    _on_stop_signals(signal.SIG_IGN)  # Slurm now ends this task, and kills it after KillWait seconds
    if subprocess.run(["bash", str(REQUEUE), "may"], env=environment, check=False).returncode:
        return _end(code)
    if exclude or environment.get("SLURM_NODEID") == "0":  # one node is enough
        subprocess.run(["bash", str(REQUEUE), "now", exclude], env=environment, check=True)
    # A result would tell submitit that the run is over: wait until Slurm ends this task.
    _on_stop_signals(signal.SIG_DFL)
    time.sleep(END_OF_JOB_S)
    return PREEMPTED


def _on_stop_signals(action: signal.Handlers) -> None:
    for each in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(each, action)


def _end(code: int) -> int:
    """Makes `code` the task's result. If it is not 0, the process exits with it here: Slurm shows a job whose
    function returns as COMPLETED.
    """
    if code == DONE:
        return code
    from submitit import JobEnvironment
    from submitit.core.utils import cloudpickle_dump, temporary_save_path  # not documented; as in 1.5.4

    with temporary_save_path(JobEnvironment().paths.result_pickle) as file:
        cloudpickle_dump(("success", code), file)
    raise SystemExit(code)


def head_address(environment: Mapping[str, str]) -> str:
    """Address of the job's first node, as Slurm itself reaches it."""
    listed = ["scontrol", "show", "hostnames", environment["SLURM_JOB_NODELIST"]]
    first = subprocess.run(listed, capture_output=True, text=True, check=True).stdout.split()[0]
    shown = subprocess.run(
        ["scontrol", "show", "node", first], capture_output=True, text=True, check=True
    ).stdout
    addresses = [word.removeprefix("NodeAddr=") for word in shown.split() if word.startswith("NodeAddr=")]
    return addresses[0] if addresses else first

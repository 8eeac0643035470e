"""One node of a cluster job: `phi3v launch node CONFIG [key=value ...]`, started once per node by Slurm or as
the first process of a pod.

In: config, overrides, the scheduler's environment. Out: an exit code. It finds this node's place among the
nodes, runs torchrun, and starts it again after a crash or when a lost peer has been replaced: only a node
that received a stop signal itself leaves. Starts without a new checkpoint are counted in the run directory
and limited.
"""

from __future__ import annotations

import json
import math
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from launch.description import (
    GRACE_S,
    JOIN_TIMEOUT_S,
    MAX_STARTS,
    Membership,
    rank_command,
    rank_environment,
    torchrun_options,
    unset_here,
)
from launch.local import cores, visible_gpus
from launch.stage import stage_overrides
from launch.torchrun.agent import NO_RENDEZVOUS, STOP_SIGNALS
from launch.torchrun.node import NodeResult, run_node
from phi3v_dist.config import load_config
from phi3v_dist.exits import CRASHED, DIVERGED, DONE, PREEMPTED, USAGE
from shards.common.errors import BadInputError
from shards.common.files import write_atomically

POD_RETRIED = 143
"""The exit code at which the training operator replaces the pod: 128 + SIGTERM. Codes below 128 fail the job.
"""
_FIRST_PORT, _PORTS = 20000, 10000
"""A Slurm job's rendezvous port is the first plus the job's number modulo the count."""


def run_cluster_node(config_path: str, overrides: Sequence[str], environment: Mapping[str, str]) -> int:
    """Runs this node's part of the job; returns the exit code for the scheduler.

    environment: of this process. Raises BadInputError: config not usable, no scheduler's variables, no GPUs,
    too many starts without a new checkpoint.
    """
    config = load_config(config_path, overrides)
    member = membership(environment)
    on_gpu = uses_gpus(environment)
    if on_gpu and (fault := gpu_fault(member.processes)):
        raise BadInputError(fault)
    ranks = unset_here(rank_environment(member.processes, on_gpu, cores(), nodes=member.nodes))
    grace_s = seconds(environment, "PHI3V_GRACE_S", GRACE_S)
    in_pod = "PET_NPROC_PER_NODE" in environment
    if stage_dir := environment.get("PHI3V_STAGE_DIR"):
        overrides = [*overrides, *stage_overrides(config.data, Path(stage_dir))]
    command = rank_command(config_path, overrides)
    options = torchrun_options(member)
    attempts = Attempts(config.run_dir, member.node_rank)
    stops: list[int] = []
    # For signals between two runs of torchrun; while it runs, launch.torchrun.node forwards them.
    for each in STOP_SIGNALS:
        signal.signal(each, lambda signum, frame: stops.append(signum))
    while True:
        attempts.begin()
        result = _until_joined(
            lambda: run_node(options, command, config.run_dir, environment=ranks, grace_s=grace_s), stops
        )
        if result.code in (DONE, USAGE, PREEMPTED, DIVERGED):
            attempts.forget()
        # After a stop signal this node leaves. If it received none, yet rank 0 recorded 3, another pod was
        # stopped: wait for its replacement.
        if (
            result.stopped
            or result.code in (DONE, USAGE, DIVERGED)
            or (result.code == PREEMPTED and not in_pod)
        ):
            return pod_exit_code(result.code) if in_pod else result.code
        print(
            f"node {member.node_rank}: ranks ended with exit code {result.code}; starting again",
            file=sys.stderr,
        )


def seconds(environment: Mapping[str, str], name: str, default: float) -> float:
    """The seconds that a variable holds, else `default`. Raises BadInputError if it holds anything else."""
    text = environment.get(name) or str(default)
    try:
        found = float(text)
    except ValueError:
        found = -1.0
    if not 0 <= found < math.inf:
        raise BadInputError(f"{name}={text!r} is not a number of seconds; set one such as {default:g}")
    return found


def cpu_processes(environment: Mapping[str, str]) -> int:
    """PHI3V_CPU_PROCESSES, 0 if it is not set. Raises BadInputError if it is not a number."""
    text = environment.get("PHI3V_CPU_PROCESSES") or "0"
    if not text.isdecimal():
        raise BadInputError(f"PHI3V_CPU_PROCESSES={text!r}; set it to the ranks on each node, such as 2")
    return int(text)


def pod_exit_code(code: int) -> int:
    """The code that makes the training operator do what `code` means: 3 replaces the pod, others end the
    job.
    """
    return POD_RETRIED if code == PREEMPTED else code


def membership(environment: Mapping[str, str]) -> Membership:
    """This node's place, from the variables of the training operator (PET_*) or of Slurm (slurm/train.sh).

    Raises BadInputError if neither is there, or no GPUs were granted.
    """
    if "PET_NPROC_PER_NODE" in environment:
        return _pod_membership(environment)
    if "SLURM_JOB_ID" in environment:
        return _slurm_membership(environment)
    raise BadInputError("neither a Slurm job nor a PyTorchJob pod; on one machine use `phi3v launch local`")


def _pod_membership(environment: Mapping[str, str]) -> Membership:
    host = environment.get("PET_MASTER_ADDR") or environment.get("MASTER_ADDR", "")
    port = environment.get("PET_MASTER_PORT") or environment.get("MASTER_PORT", "29500")
    node_rank = int(environment.get("PET_NODE_RANK") or environment.get("RANK", "0"))
    nodes = int(environment.get("PET_NNODES", "1").split(":")[-1])
    processes = cpu_processes(environment) or _pod_processes(environment["PET_NPROC_PER_NODE"])
    run_id = environment.get("PHI3V_RUN_ID") or host.removesuffix("-master-0") or "job"
    # While the first pod is new, its Service may not lead to it yet; the pod itself knows its address.
    address = environment.get("POD_IP")
    if node_rank == 0 and address:
        host = address
    return Membership(
        nodes=nodes,
        node_rank=node_rank,
        processes=processes,
        host=host,
        port=int(port),
        run_id=run_id,
        address=address,
    )


def _pod_processes(text: str) -> int:
    """Ranks of a pod. text: a number, or the words that operators pass to torchrun: auto, gpu, cpu."""
    if text.isdigit() and int(text) > 0:
        return int(text)
    if text not in ("auto", "gpu", "cpu"):
        raise BadInputError(f"PET_NPROC_PER_NODE={text!r}; set nprocPerNode to the GPUs of a pod")
    gpus = visible_gpus()
    if text == "gpu" and not gpus:
        raise BadInputError("PET_NPROC_PER_NODE=gpu, but this pod has no GPU; see resources.limits")
    return gpus if gpus and text != "cpu" else cores()


def _slurm_membership(environment: Mapping[str, str]) -> Membership:
    job = environment["SLURM_JOB_ID"]
    nodes = int(environment.get("SLURM_STEP_NUM_NODES") or environment.get("SLURM_JOB_NUM_NODES", "1"))
    granted = environment.get("SLURM_GPUS_ON_NODE", "0")
    processes = cpu_processes(environment) or (int(granted) if granted.isdecimal() else 0)
    if processes == 0:
        raise BadInputError(
            f"job {job}: Slurm granted no GPUs on {socket.gethostname()}; submit with --gpus-per-node=8 "
            "(or set PHI3V_CPU_PROCESSES=2 for a run without GPUs)"
        )
    host = environment.get("PHI3V_HEAD", "")
    if nodes > 1 and not host:
        raise BadInputError(
            f"job {job}: PHI3V_HEAD (address of the first node) is not set; use slurm/train.sh"
        )
    node_rank = int(environment.get("SLURM_NODEID", "0"))
    port = _FIRST_PORT + int(job) % _PORTS
    run_id = f"{job}.{environment.get('SLURM_RESTART_COUNT', '0')}"
    address = host if node_rank == 0 else _address_towards(host, port)
    return Membership(
        nodes=nodes,
        node_rank=node_rank,
        processes=processes,
        host=host,
        port=port,
        run_id=run_id,
        address=address or None,
    )


def _address_towards(host: str, port: int) -> str:
    """This machine's address on the network through which it reaches `host`; "" if it is not known."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, port))  # a datagram socket: looks up the route and sends nothing
            return str(probe.getsockname()[0])
    except OSError:
        return ""


class Attempts:
    """RUN/attempts/node-N.json: how often this node has started since the newest checkpoint, over all its
    processes.

    Limits crash loops that no scheduler recognizes: a pod that runs out of memory would be replaced for ever.
    """

    def __init__(self, run_dir: Path, node_rank: int, limit: int = MAX_STARTS) -> None:
        self._run_dir, self._limit = run_dir, limit
        self._file = run_dir / "attempts" / f"node-{node_rank}.json"

    def begin(self) -> None:
        """Counts one more start. Raises BadInputError after too many without a new checkpoint."""
        checkpoint = newest_checkpoint(self._run_dir)
        count = self._count(checkpoint) + 1
        if count > self._limit:
            raise BadInputError(
                f"{self._run_dir}: {self._limit} starts without a new checkpoint "
                f"(newest: {checkpoint or 'none'}); read {self._run_dir}/logs, then remove "
                f"{self._file.parent} to try again"
            )
        self._file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self._file, json.dumps({"checkpoint": checkpoint, "count": count}).encode())

    def forget(self) -> None:
        """Forgets the starts so far: the run ended in order."""
        self._file.unlink(missing_ok=True)

    def _count(self, checkpoint: str | None) -> int:
        try:
            fields = json.loads(self._file.read_text())
            return int(fields["count"]) if fields["checkpoint"] == checkpoint else 0
        except (OSError, ValueError, KeyError, TypeError):
            return 0


def newest_checkpoint(run_dir: Path) -> str | None:
    """Name of the newest complete checkpoint of a run, None without one."""
    names = [
        entry.name for entry in run_dir.glob("checkpoints/step-*") if re.fullmatch(r"step-\d+", entry.name)
    ]
    return max(names, default=None, key=lambda name: int(name.removeprefix("step-")))


def _until_joined(run: Callable[[], NodeResult], stops: Sequence[int]) -> NodeResult:
    """Runs torchrun, again and again while the nodes do not find each other: the first node may not be there
    yet, or the rendezvous may still be the one that a lost run has closed.

    run: runs torchrun once. stops: stop signals that came meanwhile.
    """
    deadline = time.monotonic() + JOIN_TIMEOUT_S
    pause_s = 1.0
    while not stops:
        result = run()
        if result.stopped or result.code != NO_RENDEZVOUS:
            return result
        if time.monotonic() > deadline:
            return NodeResult(CRASHED, stopped=False)
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 15.0)
    return NodeResult(PREEMPTED, stopped=True)


def uses_gpus(environment: Mapping[str, str]) -> bool:
    """False where PHI3V_CPU_PROCESSES is set, or torch is a build that has no GPU code at all."""
    return not cpu_processes(environment) and not version("torch").endswith("+cpu")


def gpu_fault(granted: int) -> str | None:
    """One line if the driver shows fewer GPUs than the scheduler granted, else None."""
    gpus = visible_gpus()
    if gpus >= granted:
        return None
    return (
        f"{socket.gethostname()}: {granted} GPU(s) were granted, the driver shows {gpus}; "
        "the node is not healthy (nvidia-smi -L), exclude it"
    )

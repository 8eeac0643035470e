"""Is this node fit to train? `phi3v launch check-node CONFIG`, one short look on every node before the ranks
start.

In: config, overrides, the scheduler's environment. Out: lines on standard output that slurm/train.sh reads
(`run_dir PATH` and `refused` from the first node, `unhealthy NODE REASON`), and an exit code. No torch: it
takes a second. Called by slurm/train.sh through the command line, and by launch.slurm.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

from launch.cluster import gpu_fault, membership, uses_gpus
from launch.local import cores
from phi3v_dist.config import RunConfig
from phi3v_dist.exits import DONE, USAGE
from phi3v_dist.run.inputs import load_run
from shards.common.errors import BadInputError

UNHEALTHY = 5
"""Exit code: config and job are fine, this node is not; run elsewhere."""
MIN_SHM_BYTES = 1 << 30
"""NCCL and data workers share memory through /dev/shm; with the 64 MB of a bare container they die of
SIGBUS."""


def check_node(config_path: str, overrides: Sequence[str], environment: Mapping[str, str]) -> int:
    """Prints what is wrong with the job (first node alone) or with this node; returns 0, 2 or UNHEALTHY."""
    is_first = environment.get("SLURM_NODEID", "0") == "0"
    try:
        config = load_run(config_path, overrides)
        if is_first:
            print(f"run_dir {config.run_dir}", flush=True)
        faults = faults_here(config, environment)
        few = few_cores(environment)
    except BadInputError as error:
        if is_first:
            print("refused", flush=True)
            print(f"phi3v: {error}", file=sys.stderr, flush=True)
        return USAGE
    if few and is_first:
        print(f"phi3v: {few}", file=sys.stderr, flush=True)
    for fault in faults:
        print(f"unhealthy {node_name(environment)} {fault}", flush=True)
    return UNHEALTHY if faults else DONE


def node_name(environment: Mapping[str, str]) -> str:
    """This node as Slurm calls it."""
    return environment.get("SLURMD_NODENAME") or socket.gethostname()


def faults_here(config: RunConfig, environment: Mapping[str, str]) -> list[str]:
    """One line for each thing that keeps this node from training.

    Raises BadInputError if nothing is wrong with the node but with the job: no GPUs were granted, or the
    first node cannot write to the run directory, so that another in its place could not either.
    """
    gpus = membership(environment).processes if uses_gpus(environment) else 0
    faults = []
    if gpus and (fault := gpu_fault(gpus)):
        faults.append(fault)
    if gpus and (shm := shutil.disk_usage("/dev/shm").total) < MIN_SHM_BYTES:
        faults.append(f"/dev/shm holds {shm >> 20} MB, {MIN_SHM_BYTES >> 20} are needed")
    if fault := unwritable(config.run_dir):
        if environment.get("SLURM_NODEID", "0") == "0":
            raise BadInputError(f"{node_name(environment)}: {fault}; choose another runs_dir")
        faults.append(fault)
    if (command := environment.get("PHI3V_HEALTH_CHECK")) and (fault := command_fault(command)):
        faults.append(f"health check: {fault}")
    return faults


def command_fault(command: str, limit_s: float = 120.0) -> str | None:
    """What a shell command says that fails, or does not end; None if all is well."""
    process = subprocess.Popen(
        ["bash", "-c", command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        # Not waited for: what hangs in a driver does not even end when it is killed.
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
        return f"no answer within {limit_s:g} s"
    return (" ".join(said.split()) or f"exit code {process.returncode}") if process.returncode else None


def few_cores(environment: Mapping[str, str]) -> str | None:
    """One line if this node's ranks have less than a core each, else None."""
    processes = membership(environment).processes
    if cores() >= processes:
        return None
    return (
        f"{processes} ranks share {cores()} core(s) on {node_name(environment)}, which is slow: Slurm gives "
        "one core if it is not asked for more; submit with --exclusive or --cpus-per-task"
    )


def unwritable(run_dir: Path) -> str | None:
    """One line if no file can be written to the run directory, else None. Leaves nothing behind."""
    probe = run_dir / f".probe-{uuid.uuid4().hex}"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"x" * 4096)
        probe.unlink()
    except OSError as error:
        return f"run directory {run_dir} is not writable: {error.strerror or error}"
    return None if os.access(run_dir, os.W_OK) else f"run directory {run_dir} is not writable"

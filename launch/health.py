"""`phi3v launch check-node CONFIG`: a short check on every node, before the ranks start, that it can train.

In: config, overrides, the scheduler's environment. Out: lines on standard output that slurm/train.sh reads
(`run_dir PATH` and `refused` from the first node, `unhealthy NODE REASON`), and an exit code. It does not
import torch, so it takes about a second.
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
from phi3v_dist.exits import DONE, UNHEALTHY, USAGE
from phi3v_dist.run.inputs import load_run
from shards.common.errors import BadInputError

MIN_SHM_BYTES = 1 << 30
"""NCCL and data workers share memory through /dev/shm. With the 64 MB of a container's default they end with
SIGBUS."""


def check_node(config_path: str, overrides: Sequence[str], environment: Mapping[str, str]) -> int:
    """Prints what is wrong with the job (only on the first node) or with this node; returns DONE, USAGE or
    UNHEALTHY.
    """
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
    """The name by which Slurm knows this node, else its host name."""
    return environment.get("SLURMD_NODENAME") or socket.gethostname()


def faults_here(config: RunConfig, environment: Mapping[str, str]) -> list[str]:
    """One line for each fault of this node because of which it cannot train.

    Raises BadInputError for a fault of the job, which another node would not fix: no GPUs were granted, or
    the first node cannot write to the run directory.
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
    """What a shell command prints if it fails, or that it did not end within `limit_s` seconds; None if it
    succeeds.
    """
    process = subprocess.Popen(
        ["bash", "-c", command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        # Not waited for: a process that hangs in a driver does not end even when it is killed.
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
        return f"no answer within {limit_s:g} s"
    return (" ".join(output.split()) or f"exit code {process.returncode}") if process.returncode else None


def few_cores(environment: Mapping[str, str]) -> str | None:
    """One line if this node has fewer cores than ranks, else None."""
    processes = membership(environment).processes
    if cores() >= processes:
        return None
    return (
        f"{processes} ranks share {cores()} core(s) on {node_name(environment)}, which is slow: Slurm grants "
        "one core unless more are requested; submit with --exclusive or --cpus-per-task"
    )


def unwritable(run_dir: Path) -> str | None:
    """One line if no file can be written to the run directory, else None. Leaves no file behind."""
    probe = run_dir / f".probe-{uuid.uuid4().hex}"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"x" * 4096)
        probe.unlink()
    except OSError as error:
        return f"run directory {run_dir} is not writable: {error.strerror or error}"
    return None if os.access(run_dir, os.W_OK) else f"run directory {run_dir} is not writable"

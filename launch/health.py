"""Is this node fit to train? `phi3v launch check-node CONFIG`, one short look on every node before the ranks
start.

In: config, overrides, the scheduler's environment. Out: lines on standard output that slurm/train.sh reads
(`run_dir PATH` from the first node, `unhealthy NODE REASON`), and an exit code. No torch: it takes a second.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

from launch.cluster import gpu_fault, membership, uses_gpus
from phi3v_dist.exits import DONE, USAGE
from phi3v_dist.inputs import load_run
from shards.format import BadInputError

UNHEALTHY = 5
"""Exit code: config and job are fine, this node is not; run elsewhere."""
MIN_SHM_BYTES = 1 << 30
"""NCCL and data workers share memory through /dev/shm; with the 64 MB of a bare container they die of
SIGBUS."""


def check_node(config_path: str, overrides: Sequence[str], environment: Mapping[str, str]) -> int:
    """Prints what is wrong with the job (first node alone) or with this node; returns 0, 2 or UNHEALTHY."""
    node = environment.get("SLURMD_NODENAME") or socket.gethostname()
    is_first = environment.get("SLURM_NODEID", "0") == "0"
    try:
        run_dir = load_run(config_path, overrides).run_dir
        processes = membership(environment).processes
    except BadInputError as error:
        if is_first:
            print(f"phi3v: {error}", file=sys.stderr, flush=True)
        return USAGE
    if is_first:
        print(f"run_dir {run_dir}", flush=True)
    faults = node_faults(run_dir, processes if uses_gpus(environment) else 0, environment)
    for fault in faults:
        print(f"unhealthy {node} {fault}", flush=True)
    return UNHEALTHY if faults else DONE


def node_faults(run_dir: Path, gpus: int, environment: Mapping[str, str]) -> list[str]:
    """One line for each thing that keeps this node from training. gpus: how many it must have."""
    faults = []
    if gpus and (fault := gpu_fault(gpus)):
        faults.append(fault)
    if gpus and (shm := shutil.disk_usage("/dev/shm").total) < MIN_SHM_BYTES:
        faults.append(f"/dev/shm holds {shm >> 20} MB, {MIN_SHM_BYTES >> 20} are needed")
    if fault := unwritable(run_dir):
        faults.append(fault)
    if command := environment.get("PHI3V_HEALTH_CHECK"):
        done = subprocess.run(
            ["bash", "-c", command], capture_output=True, text=True, timeout=120, check=False
        )
        if done.returncode:
            said = " ".join((done.stdout + done.stderr).split()) or f"exit code {done.returncode}"
            faults.append(f"health check: {said}")
    return faults


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

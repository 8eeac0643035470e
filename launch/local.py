"""`phi3v launch local`: the run of one config on this machine, on its GPUs or on CPU processes.

In: config path, overrides, number of processes. Out: an exit code of phi3v_dist.exits. No process is left
running, however the run ends.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from launch.description import (
    GRACE_S,
    rank_command,
    rank_environment,
    single_node,
    torchrun_options,
    unset_here,
)
from launch.torchrun.node import run_node
from launch.torchrun.watch import PARENT_VARIABLE
from phi3v_dist.run.inputs import load_run
from shards.common.errors import BadInputError

CPU_PROCESSES = 2
"""Ranks of a run without GPUs where no number is given."""


def launch_local(
    config_path: str, overrides: Sequence[str], processes: int | None = None, *, debug: bool = False
) -> int:
    """Trains on this machine; returns the exit code.

    processes: ranks to start; default: one per visible GPU, else CPU_PROCESSES, at most one per core. debug:
    one process without torchrun that keeps the standard input, so that `breakpoint()` works. Raises
    BadInputError: config not usable, more processes than GPUs.
    """
    config = load_run(config_path, overrides)
    gpus = visible_gpus()
    if processes is not None and processes < 1:
        raise BadInputError(f"{processes} processes: at least one is needed")
    if gpus and processes is not None and processes > gpus:
        raise BadInputError(
            f"{processes} processes asked for, but {gpus} GPU(s) are visible; ask for at most {gpus}"
        )
    count = 1 if debug else processes or gpus or min(CPU_PROCESSES, cores())
    environment = unset_here(rank_environment(count, gpus > 0, cores()))
    train = rank_command(config_path, overrides)
    if debug:
        return _run_in_foreground(train, environment)
    options = torchrun_options(single_node(count))
    return run_node(options, train, config.run_dir, environment=environment, grace_s=GRACE_S).code


def launch_here(arguments: Sequence[str], processes: int) -> int:
    """Runs `phi3v ARGUMENTS` as `processes` ranks on this machine; returns the exit code of the first rank
    that failed, else 0. Raises BadInputError for more processes than GPUs, if there are GPUs.
    """
    gpus = visible_gpus()
    if gpus and processes > gpus:
        raise BadInputError(f"{processes} processes asked for, but {gpus} GPU(s) are visible")
    options = torchrun_options(single_node(processes))
    environment = unset_here(rank_environment(processes, gpus > 0, cores()))
    command = ["-m", "launch.torchrun.rank", *arguments]
    nowhere = Path(os.devnull)  # no run directory: the exit code is that of the ranks
    return run_node(options, command, nowhere, environment=environment, grace_s=GRACE_S).code


def visible_gpus() -> int:
    """Number of GPUs this process may use: those of CUDA_VISIBLE_DEVICES if set, else all that the driver
    lists.
    """
    try:
        listed = subprocess.run(
            ["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return 0
    present = sum(line.startswith("GPU ") for line in listed.splitlines())
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return present
    return sum(bool(name.strip()) and name.strip() != "-1" for name in chosen.split(","))


def cores() -> int:
    """Number of CPU cores this process may run on."""
    return len(os.sched_getaffinity(0))


def _run_in_foreground(command: Sequence[str], environment: dict[str, str]) -> int:
    """Runs one rank in this terminal. Ctrl-C reaches the rank directly; this process only waits for it."""
    rank = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "PYTHONSAFEPATH": "1",
        PARENT_VARIABLE: str(os.getpid()),
    }
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        child = subprocess.Popen(
            [sys.executable, *command],
            env={**os.environ, **environment, **rank},
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        code = child.wait()
    finally:
        signal.signal(signal.SIGINT, previous)
    return code if code >= 0 else 128 - code


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

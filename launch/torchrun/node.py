"""One node's part of a run: starts torchrun, forwards stop signals, waits, and returns how the run ended.

In: torchrun's options, the rank command, the run directory. Out: an exit code of phi3v_dist.exits. All
launchers use it: `phi3v launch local` in its own process, Slurm and Kubernetes once on each node.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import psutil

from launch.torchrun.agent import NO_RENDEZVOUS
from launch.torchrun.watch import GRACE_VARIABLE, PARENT_VARIABLE
from phi3v_dist.exits import CRASHED, PREEMPTED, recorded_exit

KILL_MARGIN_S = 15.0
"""Seconds after the grace period until the agent itself is considered to hang and is killed."""


@dataclass(frozen=True)
class NodeResult:
    """How the ranks ended. code: of phi3v_dist.exits, or launch.torchrun.agent.NO_RENDEZVOUS. stopped:
    whether this process received a stop signal.
    """

    code: int
    stopped: bool


def run_node(
    torchrun_options: Sequence[str],
    rank_command: Sequence[str],
    run_dir: Path,
    *,
    environment: Mapping[str, str],
    grace_s: float,
) -> NodeResult:
    """Runs the ranks of this node to their end. The code is the one that rank 0 recorded in `run_dir`, else
    the exit code of torchrun's process.

    environment: variables added to those of this process. grace_s: seconds from the first stop signal
    (SIGUSR1, SIGTERM, SIGINT) until the ranks are killed; a second SIGINT kills them at once. Leaves no
    process behind.
    """
    started = time.time()
    signals: list[int] = []
    child_environment = {
        **os.environ,
        **environment,
        GRACE_VARIABLE: f"{grace_s:g}",
        PARENT_VARIABLE: str(os.getpid()),
        "PYTHONSAFEPATH": "1",  # a directory launch/ in the working directory must not shadow this package
    }
    stop_signals = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
    # Blocked until the agent exists to forward them to; a signal in the first milliseconds waits.
    signal.pthread_sigmask(signal.SIG_BLOCK, stop_signals)
    # Its own session: Ctrl-C in the terminal reaches only this process, which forwards it.
    agent = subprocess.Popen(
        [sys.executable, "-m", "launch.torchrun.agent", *torchrun_options, *rank_command],
        env=child_environment,
        start_new_session=True,
        preexec_fn=_unblock_signals,
    )

    def stop(signum: int, frame: FrameType | None) -> None:
        # A second SIGTERM does not count: Slurm signals some steps of a job that it ends twice.
        again = signum == signal.SIGINT and signal.SIGINT in signals
        signals.append(signum)
        if again:
            _kill_tree(agent.pid)
        elif agent.poll() is None:
            agent.send_signal(signal.SIGUSR1)

    previous = {each: signal.signal(each, stop) for each in stop_signals}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, stop_signals)
    try:
        code = _wait(agent, signals, grace_s)
    finally:
        _kill_tree(agent.pid)
        for each, handler in previous.items():
            signal.signal(each, handler)
    if code == NO_RENDEZVOUS and not signals:
        return NodeResult(NO_RENDEZVOUS, stopped=False)
    recorded = recorded_exit(run_dir, started)
    if recorded is not None:
        code = recorded
    elif signals:
        code = PREEMPTED
    return NodeResult(code if code >= 0 else CRASHED, stopped=bool(signals))


def _unblock_signals() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT))


def _wait(agent: subprocess.Popen[bytes], signals: Sequence[int], grace_s: float) -> int:
    stopped_at: float | None = None
    while True:
        try:
            return agent.wait(timeout=0.5)
        except subprocess.TimeoutExpired:
            if signals and stopped_at is None:
                stopped_at = time.monotonic()
            if stopped_at is not None and time.monotonic() - stopped_at > grace_s + KILL_MARGIN_S:
                _kill_tree(agent.pid)


def _kill_tree(pid: int) -> None:
    """Sends SIGKILL to all descendants of a process, then to the process."""
    try:
        root = psutil.Process(pid)
        processes = [*root.children(recursive=True), root]
    except psutil.NoSuchProcess:
        return
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue

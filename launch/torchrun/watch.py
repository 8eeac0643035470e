"""Ends a process when the process that started it is gone.

torchrun starts every rank in its own session. If a launcher is killed with SIGKILL, the ranks would live on
and keep their GPUs. Therefore every process of a run watches its parent: the ranks (launch.torchrun.rank) and
each node's torchrun (launch.torchrun.agent) call `watch_parent` first; the parent passes its pid in
PARENT_VARIABLE.
"""

from __future__ import annotations

import os
import signal
import threading
import time

PARENT_VARIABLE = "PHI3V_PARENT_PID"
GRACE_VARIABLE = "PHI3V_STOP_GRACE_S"
DEFAULT_GRACE_S = 120.0
POLL_S = 0.5


def stop_grace_s() -> float:
    """Seconds from a stop signal until SIGKILL, from the environment that the launcher made."""
    return float(os.environ.get(GRACE_VARIABLE, DEFAULT_GRACE_S))


def watch_parent() -> None:
    """When the parent of this process is gone, sends SIGUSR1 to this process (finish the step, write a
    checkpoint), and SIGKILL after the grace period.

    This is a thread that polls, not the kernel's parent-death signal: torchrun offers no place between fork
    and exec to request that signal.
    """
    parent = int(os.environ.get(PARENT_VARIABLE) or os.getppid())
    threading.Thread(target=_watch, args=(parent, stop_grace_s()), name="watch-parent", daemon=True).start()


def _watch(parent: int, grace_s: float) -> None:
    while os.getppid() == parent:
        time.sleep(POLL_S)
    os.kill(os.getpid(), signal.SIGUSR1)
    time.sleep(grace_s)
    os.kill(os.getpid(), signal.SIGKILL)

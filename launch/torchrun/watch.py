"""A process that does not outlive the one that started it.

torchrun starts every rank in a session of its own, so a launcher that is killed outright takes nothing with
it: the ranks would keep their GPUs. Here every process of a run watches its parent. The ranks
(launch.torchrun.rank) and each node's torchrun (launch.torchrun.agent) call `watch_parent` first thing; the
parent passes its pid in PARENT_VARIABLE.
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
    """Seconds between a stop signal and the hard end, from the environment that the launcher made."""
    return float(os.environ.get(GRACE_VARIABLE, DEFAULT_GRACE_S))


def watch_parent() -> None:
    """Ends this process when its parent is gone: SIGUSR1 (finish the step, checkpoint), SIGKILL after the
    grace.

    A thread that polls, and not the kernel's parent-death signal, because torchrun offers no place between
    fork and exec to ask for that signal.
    """
    parent = int(os.environ.get(PARENT_VARIABLE) or os.getppid())
    threading.Thread(target=_watch, args=(parent, stop_grace_s()), name="watch-parent", daemon=True).start()


def _watch(parent: int, grace_s: float) -> None:
    while os.getppid() == parent:
        time.sleep(POLL_S)
    os.kill(os.getpid(), signal.SIGUSR1)
    time.sleep(grace_s)
    os.kill(os.getpid(), signal.SIGKILL)

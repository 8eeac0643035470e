"""Exit codes of every phi3v process, the exceptions that end a run with one of them, and how a launcher
learns it.

torchrun exits 1 whatever its ranks exit with, so rank 0 leaves its code in the run directory; launchers and
the container's first process read it there.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

from shards.common.files import write_atomically

DONE = 0
CRASHED = 1
USAGE = 2  # bad config or usage, or storage that fails: one line says what and how to mend it
PREEMPTED = 3  # stopped by a signal after a checkpoint: requeue me
DIVERGED = 4  # training diverged, or the data is unusable

EXIT_FILE = "exit.json"


class DivergedError(RuntimeError):
    """Loss or gradients are not finite, or the data is unusable: running again would not help."""


class PreemptedError(RuntimeError):
    """Stopped by a signal, with a checkpoint written: the same command goes on from it."""


class LostRankError(RuntimeError):
    """A peer died or does not answer; its message names it. Running again goes on from the last
    checkpoint.
    """


def record_exit(run_dir: Path, code: int, reason: str) -> None:
    """Writes RUN/exit.json: {"code", "reason", "time" (seconds since the epoch)}."""
    fields = {"code": code, "reason": reason, "time": time.time()}
    write_atomically(run_dir / EXIT_FILE, (json.dumps(fields) + "\n").encode())


def recorded_exit(run_dir: Path, since: float) -> int | None:
    """The code that rank 0 recorded at or after `since` (seconds since the epoch), None if it recorded
    none.
    """
    try:
        fields = json.loads((run_dir / EXIT_FILE).read_text())
        return int(fields["code"]) if fields["time"] >= since else None
    except (OSError, ValueError, KeyError, TypeError):
        return None

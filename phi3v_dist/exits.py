"""Exit codes of every phi3v process, the exceptions that end a run with one of them, and the file from which
a launcher reads the code.

torchrun exits with 1 whatever the exit codes of its ranks are. Therefore rank 0 writes its code into the run
directory, and launchers read it there.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

from shards.common.files import write_atomically

DONE = 0
CRASHED = 1
USAGE = 2  # bad config or usage, or storage that fails; one line says what is wrong and how to fix it
PREEMPTED = 3  # stopped by a signal after a checkpoint: requeue the run
DIVERGED = 4  # training diverged, or the data is unusable
UNHEALTHY = 5  # config and job are fine, this node is not: run elsewhere

EXIT_FILE = "exit.json"


class DivergedError(RuntimeError):
    """Loss or gradients are not finite, or the data is unusable: a restart would not help."""


class PreemptedError(RuntimeError):
    """Stopped by a signal after a checkpoint was written: the same command resumes from it."""


class LostRankError(RuntimeError):
    """A peer died or does not answer; the message names its rank. A restart resumes from the last
    checkpoint.
    """


def record_exit(run_dir: Path, code: int, reason: str) -> None:
    """Writes RUN/exit.json: {"code", "reason", "time" (seconds since the epoch)}."""
    fields = {"code": code, "reason": reason, "time": time.time()}
    write_atomically(run_dir / EXIT_FILE, (json.dumps(fields) + "\n").encode())


def recorded_exit(run_dir: Path, since: float) -> int | None:
    """The code that rank 0 recorded at or after `since` (seconds since the epoch); None if there is none."""
    try:
        fields = json.loads((run_dir / EXIT_FILE).read_text())
        return int(fields["code"]) if fields["time"] >= since else None
    except (OSError, ValueError, KeyError, TypeError):
        return None

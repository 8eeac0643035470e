"""The process around torchrun: a stop signal before there are ranks."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from phi3v_dist.exits import PREEMPTED

pytestmark = pytest.mark.ranks


def catches(pid: int, number: int) -> bool:
    """Whether the process has a handler for the signal."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    caught = next(line for line in lines if line.startswith("SigCgt"))
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)


def test_a_signal_while_torch_is_imported_ends_as_a_stop() -> None:
    """Not as a crash, which would not be requeued. Handlers are there before torch is imported."""
    command = [
        sys.executable,
        "-m",
        "launch.torchrun.agent",
        "--standalone",
        "--nproc-per-node=1",
        "-m",
        "no.such",
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not catches(process.pid, signal.SIGTERM):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.001)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == PREEMPTED and "Traceback" not in errors, errors

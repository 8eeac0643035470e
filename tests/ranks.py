"""Starts real ranks for tests: torchrun over gloo, with a time limit; nothing outlives the call. Reads what
they logged.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

WARM = Path(__file__).with_name("warm.py")


def start_ranks(config: Path, ranks: int, *overrides: str) -> subprocess.Popen[str]:
    return start(ranks, "-m", "launch.cli.main", "train", str(config), *overrides)


def start(ranks: int, *rank_command: str, warm: bool = True, **environment: str) -> subprocess.Popen[str]:
    """torchrun with this program; warm: the ranks are forks of an agent that has imported once (warm.py)."""
    agent = [str(WARM)] if warm else ["-m", "torch.distributed.run"]
    command = [sys.executable, *agent, "--standalone", f"--nproc-per-node={ranks}"]
    command += rank_command
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "DS_ACCELERATOR": "cpu", **environment},
    )


def finish(process: subprocess.Popen[str], timeout: float = 120.0) -> tuple[int, str]:
    """torchrun's exit code and all output."""
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise AssertionError(f"still running after {timeout} s:\n{output[-3000:]}") from None
    return process.returncode, output


def logged(run_dir: Path, key: str) -> dict[int, float]:
    """By step what a run has logged as `key`; no step twice."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    found = [(line["train/global_step"], line[key]) for line in lines if key in line]
    assert len(dict(found)) == len(found), "a step was logged twice"
    return dict(found)


def run_ranks(config: Path, ranks: int, *overrides: str, limit: float = 120.0) -> str:
    """Trains to the end, within `limit` seconds; returns the output."""
    code, output = finish(start_ranks(config, ranks, *overrides), limit)
    assert code == 0, output[-3000:]
    return output

"""A node's torchrun: exit codes come through, signals reach the ranks, nothing is left running."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.waiting import wait_for

pytestmark = pytest.mark.ranks

STANDIN = Path(__file__).with_name("standin_rank.py")
LAUNCHER = """
import sys
from pathlib import Path
from launch.torchrun.node import run_node
run_dir, grace, *command = sys.argv[1:]
options = ["--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2"]
environment = {"OMP_NUM_THREADS": "1"}
ended = run_node(options, command, Path(run_dir), environment=environment, grace_s=float(grace))
sys.exit(ended.code)
"""


def start(run_dir: Path, *behaviour: str, grace_s: float = 20) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-c",
        LAUNCHER,
        str(run_dir),
        str(grace_s),
        str(STANDIN),
        str(run_dir),
        *behaviour,
    ]
    return subprocess.Popen(command, text=True, stderr=subprocess.PIPE)


def rank_pids(run_dir: Path) -> list[int]:
    files = [run_dir / "pid-0", run_dir / "pid-1"]
    wait_for(lambda: all(file.exists() and file.read_text() for file in files), 60, "two ranks")
    return [int(file.read_text()) for file in files]


def gone(pids: list[int]) -> bool:
    return not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in pids)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    directory = tmp_path / "runs with space" / "a run"
    directory.mkdir(parents=True)
    return directory


def test_done_is_zero_and_arguments_with_spaces_arrive_whole(run_dir: Path) -> None:
    launcher = start(run_dir, "finish", "key=two words", "", "end")
    assert launcher.wait(60) == 0
    assert (run_dir / "arguments-1").read_text().splitlines()[1:] == ["finish", "key=two words", "", "end"]


@pytest.mark.parametrize("code", [2, 4])
def test_exit_code_of_a_rank_comes_through_torchrun(run_dir: Path, code: int) -> None:
    launcher = start(run_dir, "exit", str(code))
    assert launcher.wait(60) == code


def test_crash_of_a_rank_is_neither_done_nor_resumable(run_dir: Path) -> None:
    launcher = start(run_dir, "crash")
    _, error = launcher.communicate(timeout=60)
    assert launcher.returncode not in (0, 2, 3, 4)
    assert "rank 1 was killed by SIGSEGV" in error
    assert gone(rank_pids(run_dir))


@pytest.mark.parametrize("stop", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
def test_stop_signal_reaches_every_rank_and_gives_three(run_dir: Path, stop: signal.Signals) -> None:
    launcher = start(run_dir, "work")
    pids = rank_pids(run_dir)
    launcher.send_signal(stop)
    assert launcher.wait(30) == 3
    assert (run_dir / "checkpoint-0").exists() and gone(pids)


def test_a_stop_signal_sent_more_than_once_leaves_the_time_for_a_checkpoint(run_dir: Path) -> None:
    """Slurm signals the processes of a job that it ends, and so does its srun."""
    launcher = start(run_dir, "work")
    rank_pids(run_dir)
    for _ in range(4):
        launcher.send_signal(signal.SIGTERM)
        time.sleep(0.002)
    assert launcher.wait(30) == 3
    assert {path.name for path in run_dir.glob("checkpoint-*")} == {"checkpoint-0", "checkpoint-1"}


def test_ranks_that_do_not_stop_are_ended_after_the_grace(run_dir: Path) -> None:
    launcher = start(run_dir, "deaf", grace_s=2)
    pids = rank_pids(run_dir)
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(20) == 3
    assert gone(pids)


def test_second_interrupt_ends_at_once(run_dir: Path) -> None:
    launcher = start(run_dir, "deaf", grace_s=600)
    pids = rank_pids(run_dir)
    launcher.send_signal(signal.SIGINT)
    time.sleep(0.5)
    launcher.send_signal(signal.SIGINT)
    assert launcher.wait(10) == 3
    wait_for(lambda: gone(pids), 5, "ranks to end")


@pytest.mark.parametrize("victim", ["launcher", "agent"])
def test_nothing_outlives_a_killed_launcher(run_dir: Path, victim: str) -> None:
    launcher = start(run_dir, "work")
    pids = rank_pids(run_dir)
    agents = [child.pid for child in psutil.Process(launcher.pid).children()]
    os.kill(launcher.pid if victim == "launcher" else agents[0], signal.SIGKILL)
    wait_for(lambda: gone([*pids, *agents]), 20, "agent and ranks to end")
    launcher.wait(10)
    assert (run_dir / "checkpoint-0").exists() or victim == "agent", "ranks checkpoint before they end"


def test_nothing_outlives_a_killed_launcher_even_if_ranks_are_deaf(run_dir: Path) -> None:
    launcher = start(run_dir, "deaf", grace_s=2)
    pids = rank_pids(run_dir)
    launcher.kill()
    wait_for(lambda: gone(pids), 20, "ranks to end")

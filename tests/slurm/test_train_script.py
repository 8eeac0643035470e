"""`sbatch slurm/train.sh` on a cluster of three nodes, with ranks that only count steps: what Slurm does to a
run."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.slurm.slurm_cluster import SlurmCluster
from tests.waiting import wait_for

pytestmark = pytest.mark.system

REPOSITORY = Path(__file__).resolve().parents[2]
TRAIN = str(REPOSITORY / "slurm" / "train.sh")
CONFIG = """
name: a-run
runs_dir: "{runs}"
model: {{config: {{}}}}
data: {{path: "{data}"}}
train: {{steps: 1}}
"""


class Run:
    """A run of the stand-in: its config, its directory, and how it is submitted."""

    def __init__(self, cluster: SlurmCluster, directory: Path, data: Path, steps: int) -> None:
        self.cluster, self.cwd = cluster, directory / "submitted from here"
        self.cwd.mkdir()
        self.run_dir = directory / "runs with space" / "a-run"
        self.run_dir.mkdir(parents=True)
        (self.run_dir / "steps").write_text(str(steps))
        self.config = directory / "a config.yaml"
        self.config.write_text(CONFIG.format(runs=self.run_dir.parent, data=data))
        # A command line with a space in its path, as a user's may have.
        command = directory / "bin with space" / "phi3v"
        command.parent.mkdir()
        standin = REPOSITORY / "tests" / "slurm" / "standin_phi3v.py"
        command.write_text(
            f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {shlex.quote(str(standin))} "$@"\n'
        )
        command.chmod(0o755)
        self.environment = {"PHI3V": str(command)}

    def submit(self, *flags: str, config: str | None = None, overrides: tuple[str, ...] = ()) -> int:
        arguments = [*flags, TRAIN, config or str(self.config), "track.group=two words", *overrides]
        return self.cluster.submit(*arguments, cwd=self.cwd, environment=self.environment)

    def starts(self) -> list[tuple[int, str, int, int]]:
        """Of all ranks so far: rank, node, world size, first step."""
        file = self.run_dir / "started"
        lines = file.read_text().splitlines() if file.exists() else []
        return [(int(a), b, int(c), int(d)) for a, b, c, d in (line.split() for line in lines)]

    def wait_for_ranks(self, job: int, count: int) -> None:
        wait_for(
            lambda: len(self.starts()) >= count,
            60,
            f"{count} ranks to start, have {self.starts()}",
            lambda: self.cluster.output(job) + self.cluster.logs(),
        )


MakeRun = Callable[[int], Run]


@pytest.fixture
def make_run(cluster: SlurmCluster, tmp_path: Path, products: Path) -> MakeRun:
    """Makes the test's run, of so many steps."""
    return lambda steps: Run(cluster, tmp_path, products, steps)


def test_one_torchrun_a_node_and_as_many_ranks_as_gpus(cluster: SlurmCluster, make_run: MakeRun) -> None:
    run = make_run(5)
    job = run.submit("--nodes=2", "--gpus-per-node=2")
    cluster.wait_for_state(job, "COMPLETED", 60)
    starts = run.starts()
    assert sorted(rank for rank, *_ in starts) == [0, 1, 2, 3]
    assert {node for _, node, *_ in starts} == {"node1", "node2"}
    assert {world for _, _, world, _ in starts} == {4}
    assert "exit code 0" in cluster.output(job)


def test_requeue_by_hand_goes_on_from_the_checkpoint_in_the_same_log(
    cluster: SlurmCluster, make_run: MakeRun
) -> None:
    run = make_run(60)
    job = run.submit("--nodes=2", "--gpus-per-node=1")
    run.wait_for_ranks(job, 2)
    cluster.run("scontrol", "requeue", str(job))
    cluster.wait_for_state(job, "PENDING", 40)
    assert list((run.run_dir / "checkpoints").iterdir()), "ranks checkpoint before they are killed"
    cluster.resume(job)
    cluster.wait_for_state(job, "COMPLETED", 60)
    assert all(first > 0 for *_, first in run.starts()[2:])
    log = cluster.output(job)
    assert "start 1:" in log and "start 2:" in log


def test_preemption_by_a_more_urgent_job_ends_in_a_checkpoint_and_the_queue(
    cluster: SlurmCluster, make_run: MakeRun
) -> None:
    run = make_run(60)
    job = run.submit("--nodes=3", "--gpus-per-node=1", "--exclusive")
    run.wait_for_ranks(job, 3)
    urgent = cluster.submit(
        "--partition=urgent", "--nodes=3", "--exclusive", "--time=2", "--wrap=sleep 1", cwd=run.cwd
    )
    cluster.wait_for_state(urgent, "COMPLETED", 60)
    assert list((run.run_dir / "checkpoints").iterdir())
    cluster.resume(job)
    cluster.wait_for_state(job, "COMPLETED", 60)
    assert {first > 0 for *_, first in run.starts()[3:]} == {True}


def test_a_cancelled_job_saves_and_stays_out_of_the_queue(cluster: SlurmCluster, make_run: MakeRun) -> None:
    """While Slurm ends it for that or for a requeue it says the same of it, and it would requeue either."""
    run = make_run(100_000)
    job = run.submit("--nodes=2", "--gpus-per-node=1")
    run.wait_for_ranks(job, 2)
    cluster.run("scancel", str(job))
    assert cluster.wait_for_state(job, ("CANCELLED", "PENDING"), 40) == "CANCELLED"
    assert not cluster.run("squeue", "--noheader")
    assert list((run.run_dir / "checkpoints").iterdir())
    assert "cancelled; submit the same command to resume" in cluster.output(job)


def test_a_job_that_saves_only_after_its_time_limit_comes_back(
    cluster: SlurmCluster, make_run: MakeRun
) -> None:
    run = make_run(100_000)
    job = run.submit("--gpus-per-node=1", "--time=1", "--signal=URG@1")
    run.wait_for_ranks(job, 1)
    cluster.wait_for_state(job, "PENDING", 150)
    assert list((run.run_dir / "checkpoints").iterdir()) and cluster.job(job)["Restarts"] == "1"


def test_signal_before_the_time_limit_checkpoints_and_requeues_up_to_the_limit(
    cluster: SlurmCluster, make_run: MakeRun
) -> None:
    run = make_run(100_000)
    run.environment["PHI3V_MAX_REQUEUES"] = "1"
    job = run.submit("--nodes=1", "--gpus-per-node=2")
    run.wait_for_ranks(job, 2)
    cluster.run("scancel", "--signal=USR1", str(job))  # what --signal=USR1@300 sends
    cluster.wait_for_state(job, "PENDING", 40)
    cluster.resume(job)
    run.wait_for_ranks(job, 4)
    cluster.run("scancel", "--signal=USR1", str(job))
    assert cluster.wait_for_state(job, ("FAILED",), 40)
    assert "requeued 1 times" in cluster.output(job)
    assert cluster.job(job)["ExitCode"] == "3:0"


def test_slurm_sends_the_signal_before_the_time_limit(cluster: SlurmCluster, make_run: MakeRun) -> None:
    """Slurm sends it up to a minute early, so 15 to 75 s after the start."""
    run = make_run(100_000)
    job = run.submit("--gpus-per-node=1", "--time=2", "--signal=USR1@45")
    run.wait_for_ranks(job, 1)
    cluster.wait_for_state(job, "PENDING", 120)
    assert list((run.run_dir / "checkpoints").iterdir())
    assert cluster.job(job)["Restarts"] == "1"


def test_a_signal_before_there_are_ranks_puts_the_job_back(
    cluster: SlurmCluster, make_run: MakeRun, tmp_path: Path
) -> None:
    run = make_run(3)
    flag = tmp_path / "signalled"
    run.environment["PHI3V_HEALTH_CHECK"] = f"test -e {flag} || {{ touch {flag}; kill -USR1 $PPID; }}"
    job = run.submit("--gpus-per-node=1")
    wait_for(flag.exists, 30, "the signal")  # it has begun: PENDING now means that it is back in the queue
    cluster.wait_for_state(job, "PENDING", 30)
    cluster.resume(job)
    cluster.wait_for_state(job, "COMPLETED", 60)
    assert cluster.job(job)["Restarts"] == "1" and len(run.starts()) == 1


def test_an_unhealthy_node_is_left_out_from_then_on(cluster: SlurmCluster, make_run: MakeRun) -> None:
    run = make_run(5)
    run.environment["PHI3V_HEALTH_CHECK"] = 'test "$SLURMD_NODENAME" != node1 || { echo broken link; false; }'
    job = run.submit("--nodes=2", "--gpus-per-node=1")
    cluster.wait_for_state(job, "PENDING", 30)
    wait_for(
        lambda: cluster.job(job)["ExcNodeList"] == "node1", 20, "node1 excluded", lambda: cluster.output(job)
    )
    cluster.resume(job)
    cluster.wait_for_state(job, "COMPLETED", 60)
    assert {node for _, node, *_ in run.starts()} == {"node2", "node3"}
    assert "unhealthy node1 health check: broken link" in cluster.output(job)


def test_a_run_directory_that_cannot_be_written_ends_the_job(
    cluster: SlurmCluster, make_run: MakeRun
) -> None:
    """Every node would fail alike: none is to be left out."""
    run = make_run(5)
    run.run_dir.rename(run.run_dir.with_name("away"))
    run.run_dir.write_text("a file, which not even root can write a directory into")
    job = run.submit("--nodes=2", "--gpus-per-node=1")
    cluster.wait_for_state(job, "FAILED", 40)
    assert cluster.job(job)["ExitCode"] == "2:0" and cluster.job(job)["ExcNodeList"] == "(null)"
    assert "is not writable" in cluster.output(job)


@pytest.mark.parametrize(
    ("flags", "config", "overrides", "message"),
    [
        (("--gpus-per-node=1",), None, ("data.path=nowhere",), "nowhere: no such dataset directory"),
        ((), None, (), "Slurm granted no GPUs on"),
        (("--gpus-per-node=1",), "no such.yaml", (), "no such.yaml: no such config file"),
        (("--gpus-per-node=1", "--nodes=2"), None, ("train.lrr=1",), "did you mean train.lr"),
    ],
)
def test_wrong_input_ends_with_one_line_and_exit_code_2(
    cluster: SlurmCluster,
    make_run: MakeRun,
    flags: tuple[str, ...],
    config: str | None,
    overrides: tuple[str, ...],
    message: str,
) -> None:
    run = make_run(1)
    job = run.submit(*flags, config=config, overrides=overrides)
    cluster.wait_for_state(job, "FAILED", 40)
    assert cluster.job(job)["ExitCode"] == "2:0"
    said = [line for line in cluster.output(job).splitlines() if line.startswith("phi3v:")]
    assert len(said) == 1 and message in said[0]

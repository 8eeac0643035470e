"""Real training on the cluster of three nodes: it trains, stops, goes on elsewhere, and stays one run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from phi3v_dist.tracking.wandb_file import last_step
from tests.slurm.slurm_cluster import SlurmCluster
from tests.waiting import wait_for

pytestmark = [pytest.mark.system, pytest.mark.timeout(420)]

REPOSITORY = Path(__file__).resolve().parents[2]
TRAIN = str(REPOSITORY / "slurm" / "train.sh")
PHI3V = Path(sys.executable).with_name("phi3v")
ENVIRONMENT = {"PHI3V": str(PHI3V)}


@pytest.fixture
def submit_dir(tmp_path: Path) -> Path:
    directory = tmp_path / "submitted from here"
    directory.mkdir()
    return directory


@contextmanager
def launched(
    cluster: SlurmCluster, cwd: Path, arguments: list[str]
) -> Iterator[tuple[subprocess.Popen[bytes], Callable[[], str]]]:
    """`phi3v launch slurm ARGUMENTS --wait`, ended with the block; and what it has said so far."""
    file = cwd.with_name("launcher.log")
    # A shell's background jobs, as which CI may run the tests, ignore Ctrl-C.
    command = ["env", "--default-signal=INT", str(PHI3V), "launch", "slurm", *arguments, "--wait"]
    with file.open("w") as log:
        launcher = subprocess.Popen(command, env=cluster.environment, cwd=cwd, stdout=log, stderr=log)
    try:
        yield launcher, file.read_text
    finally:
        launcher.kill()


def metrics(run_dir: Path) -> list[dict[str, float]]:
    """The training lines of RUN/metrics.jsonl."""
    file = run_dir / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [entry for entry in map(json.loads, lines) if "train/loss" in entry]


def steps(run_dir: Path) -> list[int]:
    return [int(entry["train/global_step"]) for entry in metrics(run_dir)]


def wandb_ids(run_dir: Path) -> set[str]:
    """Ids of the offline W&B runs of a run directory, from the names of their files."""
    return {file.stem.removeprefix("run-") for file in run_dir.glob("wandb/**/run-*.wandb")}


def test_two_nodes_of_two_train_are_stopped_and_finish_as_one_run(
    cluster: SlurmCluster, submit_dir: Path, tiny_config: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "runs" / "tiny"
    overrides = ["train.steps=40", "track.mode=offline", "train.global_batch=4", "eval.generate_samples=0"]
    arguments = [TRAIN, str(tiny_config), *overrides]
    environment = {"PHI3V": str(PHI3V)}
    job = cluster.submit(
        "--nodes=2", "--gpus-per-node=2", *arguments, cwd=submit_dir, environment=environment
    )
    wait_for(
        lambda: len(steps(run_dir)) >= 4, 120, "some steps", lambda: cluster.output(job) + cluster.logs()
    )
    cluster.run("scancel", "--signal=USR1", str(job))
    cluster.wait_for_state(job, "PENDING", 60)
    stopped_at = steps(run_dir)[-1]
    assert 4 <= stopped_at < 40
    cluster.resume(job)
    cluster.wait_for_state(job, "COMPLETED", 240)
    assert steps(run_dir) == list(range(1, 41)), "every step once"
    assert len(wandb_ids(run_dir)) == 1, "the same W&B run before and after"
    log = cluster.output(job)
    assert "4 ranks" in log and "resuming from" in log and "start 2:" in log
    assert sorted(path.name for path in (run_dir / "logs").iterdir()) == [
        f"rank-{rank}.log" for rank in range(4)
    ]
    assert json.loads((run_dir / "exit.json").read_text())["code"] == 0


def test_a_node_that_dies_is_replaced_and_the_run_finishes(
    cluster: SlurmCluster, submit_dir: Path, tiny_config: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "runs" / "tiny"
    overrides = ["train.steps=30", "checkpoint.every_steps=5", "eval.generate_samples=0"]
    arguments = [TRAIN, str(tiny_config), *overrides]
    environment = {"PHI3V": str(PHI3V)}
    job = cluster.submit(
        "--nodes=2", "--gpus-per-node=1", *arguments, cwd=submit_dir, environment=environment
    )
    wait_for(
        lambda: len(steps(run_dir)) >= 6, 120, "some steps", lambda: cluster.output(job) + cluster.logs()
    )
    nodes = cluster.run("scontrol", "show", "hostnames", cluster.job(job)["NodeList"]).split()
    victim = nodes[-1]
    cluster.kill_node(victim)
    try:
        wait_for(lambda: cluster.job(job)["Restarts"] == "1", 90, "requeue", lambda: cluster.output(job))
        cluster.resume(job)
        cluster.wait_for_state(job, "COMPLETED", 240)
        again = cluster.run("scontrol", "show", "hostnames", cluster.job(job)["NodeList"]).split()
        assert victim not in again and len(again) == 2
    finally:
        cluster.restart_node(victim)
    done = steps(run_dir)
    assert done[-1] == 30 and set(done) == set(range(1, 31))
    assert "resuming from" in cluster.output(job)


def test_submitit_preempted_goes_on_with_the_code_it_was_submitted_with(
    cluster: SlurmCluster, submit_dir: Path, tiny_config: Path, tmp_path: Path
) -> None:
    runs = tmp_path / "runs with space"
    run_dir = runs / "tiny"
    arguments = [
        str(tiny_config), "train.steps=60", f"runs_dir={runs}", "eval.generate_samples=0",
        "--nodes=2", "--gpus-per-node=1", "--minutes=30", "--sbatch=exclusive=user",
    ]  # fmt: skip
    with launched(cluster, submit_dir, arguments) as (launcher, said):
        explain = lambda: said() + cluster.logs()  # noqa: E731
        wait_for(lambda: len(steps(run_dir)) >= 4 or launcher.poll() is not None, 120, "some steps", explain)
        assert launcher.poll() is None, explain()
        job = int(cluster.run("squeue", "--noheader", "--format=%A").split()[0])
        urgent = cluster.submit(
            "--partition=urgent", "--nodes=3", "--exclusive", "--time=2", "--wrap=sleep 1", cwd=submit_dir
        )
        cluster.wait_for_state(urgent, "COMPLETED", 90)
        assert 4 <= steps(run_dir)[-1] < 60
        cluster.resume(job)
        assert launcher.wait(240) == 0, explain()
    assert steps(run_dir) == list(range(1, 61))
    assert [path.name for path in (run_dir / "code").glob("*/launch/slurm.py")] == ["slurm.py"]
    assert "resuming from" in said()


def test_one_run_of_a_sweep_is_stopped_and_goes_on_alone(
    cluster: SlurmCluster, submit_dir: Path, tiny_config: Path, tmp_path: Path
) -> None:
    """That of the two whose number is the whole array's."""
    arguments = [
        str(tiny_config), "train.steps=40", "eval.generate_samples=0",
        "--sweep", "train.lr=1e-3,2e-3", "--gpus-per-node=1", "--minutes=30",
    ]  # fmt: skip
    runs = [tmp_path / "runs" / f"tiny-{number}" for number in (0, 1)]
    with launched(cluster, submit_dir, arguments) as (launcher, said):
        explain = lambda: said() + cluster.logs()  # noqa: E731
        wait_for(lambda: all(len(steps(run)) >= 3 for run in runs), 120, "some steps of both", explain)
        shown = cluster.run("squeue", "--noheader", "--format=%A %F %K")
        jobs = [tuple(map(int, line.split())) for line in shown.splitlines()]
        ((_, array, task),) = [each for each in jobs if each[0] == each[1]]
        cluster.run("scancel", "--signal=USR1", f"{array}_{task}")
        cluster.wait_for_state(f"{array}_{task}", "PENDING", 60)
        cluster.resume(f"{array}_{task}")
        assert launcher.wait(240) == 0, explain()
    starts = [len((run / "starts.jsonl").read_text().splitlines()) for run in runs]
    assert starts == [2 if number == task else 1 for number in (0, 1)]
    assert [steps(run)[-1] for run in runs] == [40, 40]


def test_a_cancelled_run_has_saved_and_goes_on_when_it_is_submitted_again(
    cluster: SlurmCluster, submit_dir: Path, tiny_config: Path, tmp_path: Path
) -> None:
    """Slurm's SIGTERM reaches every process of the run, W&B's and the data workers' too."""
    run_dir = tmp_path / "runs" / "tiny"
    arguments = [
        str(tiny_config), "train.steps=40", "eval.generate_samples=0", "track.mode=offline",
        "--nodes=2", "--gpus-per-node=1", "--minutes=30",
    ]  # fmt: skip
    with launched(cluster, submit_dir, arguments) as (launcher, said):
        explain = lambda: said() + cluster.logs()  # noqa: E731
        wait_for(lambda: len(steps(run_dir)) >= 4 or launcher.poll() is not None, 120, "some steps", explain)
        job = int(cluster.run("squeue", "--noheader", "--format=%A").split()[0])
        launcher.send_signal(signal.SIGINT)
        assert launcher.wait(30) == 128 + signal.SIGINT and f"cancelled: job {job}" in said()
    assert cluster.wait_for_state(job, ("CANCELLED", "PENDING"), 60) == "CANCELLED", said()
    assert not cluster.run("squeue", "--noheader")
    stopped_at = steps(run_dir)[-1]
    assert (run_dir / "checkpoints" / f"step-{stopped_at:06d}" / "COMPLETE").exists()
    logs = "".join(each.read_text() for each in (run_dir / "slurm").glob(f"{job}_*_log.out"))
    assert "cancelled; submit the same command to resume" in logs
    with launched(cluster, submit_dir, arguments) as (launcher, said):
        assert launcher.wait(240) == 0, said()
    assert steps(run_dir) == list(range(1, 41)) and len(wandb_ids(run_dir)) == 1
    assert last_step(run_dir / "wandb", *wandb_ids(run_dir)) == 40


def test_submitit_goes_on_without_a_node_that_is_not_healthy(
    cluster: SlurmCluster,
    submit_dir: Path,
    tiny_config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check = 'test "$SLURMD_NODENAME" != node1 || { echo broken link; false; }'
    monkeypatch.setitem(cluster.environment, "PHI3V_HEALTH_CHECK", check)
    size = ["--nodes=2", "--gpus-per-node=1", "--minutes=30"]
    with launched(cluster, submit_dir, [str(tiny_config), "eval.generate_samples=0", *size]) as (
        launcher,
        said,
    ):
        explain = lambda: said() + cluster.logs()  # noqa: E731
        wait_for(lambda: "broken link" in said() or launcher.poll() is not None, 60, "the fault", explain)
        job = int(cluster.run("squeue", "--noheader", "--format=%A").split()[0])
        wait_for(lambda: cluster.job(job)["ExcNodeList"] == "node1", 60, "node1 excluded", explain)
        cluster.wait_for_state(job, "PENDING", 60)
        cluster.resume(job)
        assert launcher.wait(240) == 0, explain()
    assert steps(tmp_path / "runs" / "tiny") == list(range(1, 7))


def test_a_run_that_fails_is_a_failed_job(
    cluster: SlurmCluster, submit_dir: Path, tiny_config: Path, tmp_path: Path
) -> None:
    size = ["--gpus-per-node=1", "--minutes=30", "--wait"]
    command = [str(PHI3V), "launch", "slurm", str(tiny_config), f"data.path={tmp_path / 'nowhere'}", *size]
    done = subprocess.run(
        command, env=cluster.environment, cwd=submit_dir, capture_output=True, text=True, timeout=90
    )
    assert done.returncode == 2 and "no such dataset directory" in done.stdout
    job = int(done.stdout.split("job ")[1].split(":")[0])
    assert cluster.job(job)["JobState"] == "FAILED" and cluster.job(job)["ExitCode"] == "2:0"


def test_what_slurm_refuses_is_one_line(cluster: SlurmCluster, tiny_config: Path, submit_dir: Path) -> None:
    size = ["--gpus-per-node=2", "--partition=nowhere", "--minutes=30"]
    command = [str(PHI3V), "launch", "slurm", str(tiny_config), *size]
    done = subprocess.run(
        command,
        env=cluster.environment,
        cwd=submit_dir,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    said = [line for line in done.stderr.splitlines() if line.startswith("phi3v: ")]
    assert len(said) == 1 and "invalid partition specified: nowhere" in said[0]
    assert os.listdir(submit_dir) == []

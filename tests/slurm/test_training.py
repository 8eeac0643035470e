"""Real training on the cluster of three nodes: it trains, stops, goes on elsewhere, and stays one run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.slurm_cluster import SlurmCluster, wait_for

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]

REPOSITORY = Path(__file__).resolve().parents[2]
TRAIN = str(REPOSITORY / "slurm" / "train.sh")
PHI3V = Path(sys.executable).with_name("phi3v")
ENVIRONMENT = {"PHI3V": str(PHI3V)}


@pytest.fixture
def submit_dir(tmp_path: Path) -> Path:
    directory = tmp_path / "submitted from here"
    directory.mkdir()
    return directory


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
    cluster.wait_for_state(job, "COMPLETED", 120)
    assert steps(run_dir) == list(range(1, 41)), "every step once"
    assert len(wandb_ids(run_dir)) == 1, "the same W&B run before and after"
    log = cluster.output(job)
    assert "4 ranks" in log and "going on from" in log and "start 2:" in log
    assert sorted(path.name for path in (run_dir / "logs").iterdir()) == [
        f"rank-{rank}.log" for rank in range(4)
    ]
    assert json.loads((run_dir / "exit.json").read_text())["code"] == 0


def test_a_node_that_dies_is_replaced_and_the_run_finishes(
    cluster: SlurmCluster, submit_dir: Path, tiny_config: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "runs" / "tiny"
    overrides = ["train.steps=120", "checkpoint.every_steps=5", "eval.generate_samples=0"]
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
        cluster.wait_for_state(job, "COMPLETED", 150)
        again = cluster.run("scontrol", "show", "hostnames", cluster.job(job)["NodeList"]).split()
        assert victim not in again and len(again) == 2
    finally:
        cluster.restart_node(victim)
    done = steps(run_dir)
    assert done[-1] == 120 and set(done) == set(range(1, 121))
    assert "going on from" in cluster.output(job)


def test_submitit_preempted_goes_on_with_the_code_it_was_submitted_with(
    cluster: SlurmCluster, submit_dir: Path, tiny_config: Path, tmp_path: Path
) -> None:
    runs = tmp_path / "runs with space"
    run_dir = runs / "tiny"
    command = [
        str(PHI3V), "launch", "slurm", str(tiny_config), "train.steps=60", f"runs_dir={runs}",
        "eval.generate_samples=0", "--nodes=2", "--gpus-per-node=1", "--minutes=30",
        "--sbatch=exclusive=user", "--wait",
    ]  # fmt: skip
    with (tmp_path / "launcher.log").open("w") as log:
        launcher = subprocess.Popen(command, env=cluster.environment, cwd=submit_dir, stdout=log, stderr=log)
    explain = lambda: (tmp_path / "launcher.log").read_text() + cluster.logs()  # noqa: E731
    try:
        wait_for(lambda: len(steps(run_dir)) >= 4 or launcher.poll() is not None, 120, "some steps", explain)
        assert launcher.poll() is None, explain()
        job = int(cluster.run("squeue", "--noheader", "--format=%A").split()[0])
        urgent = cluster.submit(
            "--partition=urgent", "--nodes=3", "--exclusive", "--time=2", "--wrap=sleep 1", cwd=submit_dir
        )
        cluster.wait_for_state(urgent, "COMPLETED", 90)
        assert 4 <= steps(run_dir)[-1] < 60
        cluster.resume(job)
        assert launcher.wait(120) == 0, explain()
    finally:
        launcher.kill()
    assert steps(run_dir) == list(range(1, 61))
    assert [path.name for path in (run_dir / "code").glob("*/launch/slurm.py")] == ["slurm.py"]
    assert "going on from" in (tmp_path / "launcher.log").read_text()


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

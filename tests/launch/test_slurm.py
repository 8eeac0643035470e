"""`phi3v launch slurm` before anything reaches a cluster: the batch script, sweeps, what is refused."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from launch.description import STOP_LEAD_S, JobSize, job_name, rank_environment
from launch.health import command_fault
from launch.slurm import SlurmOptions, combinations, in_queue, launch_slurm
from launch.slurm_task import REQUEUE
from shards.common.errors import BadInputError

TRAIN_SH = Path(__file__).resolve().parents[2] / "slurm" / "train.sh"

SCRIPT = """#!/bin/bash

# Parameters
#SBATCH --account=vision
#SBATCH --constraint=h100
#SBATCH --cpus-per-task=64
#SBATCH --gpus-per-node=8
#SBATCH --job-name=tiny
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --output='RUN/slurm/%j_0_log.out'
#SBATCH --partition=gpu
#SBATCH --requeue
#SBATCH --signal=USR1@300
#SBATCH --time=60
#SBATCH --wckey=submitit

# setup
trap : TERM USR1
export SUBMITIT_PREEMPT_SIGNAL=USR1
export PYTHONPATH='RUN/code'${PYTHONPATH:+:$PYTHONPATH}

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output 'RUN/slurm/%j_%t_log.out' --mpi=none --kill-on-bad-exit=0 --wait=300 CORES COMMAND
"""


def test_the_batch_script_is_printed_and_nothing_is_submitted(
    tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    runs = tmp_path / "runs with space"
    options = SlurmOptions(partition="gpu", account="vision", more={"constraint": "h100"})
    overrides = [f"runs_dir={runs}", "train.global_batch=32"]
    assert launch_slurm(str(tiny_config), overrides, JobSize(4, minutes=60), options=options, show=True) == 0
    said = capsys.readouterr().out.replace(str(runs / "tiny"), "RUN")
    said = said.replace("--cpus-per-task=64 python", "CORES python")
    assert re.sub(r"python -u .*", "COMMAND", said) == SCRIPT
    assert not (runs / "tiny" / "code").exists()


def test_what_never_changes_on_the_cluster_reaches_the_job(
    tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm/cluster.env").write_text("NCCL_IB_HCA=mlx5\n")
    assert launch_slurm(str(tiny_config), ["train.global_batch=32"], JobSize(), show=True) == 0
    assert f"\nset -a; source {tmp_path}/slurm/cluster.env; set +a\n" in capsys.readouterr().out


def test_a_controller_that_does_not_answer_has_not_forgotten_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    squeue = tmp_path / "squeue"
    for says, code, expected in (
        ("slurm_load_jobs error: Unable to contact slurm controller", 1, True),
        ("slurm_load_jobs error: Invalid job id specified", 1, False),
        ("", 0, False),
    ):
        squeue.write_text(f"#!/bin/sh\necho '{says}' >&2\nexit {code}\n")
        squeue.chmod(0o755)
        assert in_queue("7") is expected


def requeue(
    directory: Path, shown: str, *words: str, environment: dict[str, str]
) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """launch/requeue.sh with a stand-in for scontrol that answers `show` with a text; and what it was
    asked.
    """
    calls = directory / "calls"
    calls.unlink(missing_ok=True)
    (directory / "scontrol").write_text(
        f"#!/bin/sh\necho \"$@\" >> '{calls}'\nif [ \"$1\" = show ]; then echo '{shown}'; fi\n"
    )
    (directory / "scontrol").chmod(0o755)
    done = subprocess.run(
        ["bash", str(REQUEUE), *words],
        env={"PATH": f"{directory}:/usr/bin:/bin", "SLURM_JOB_ID": "7", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    return done, calls.read_text().splitlines()


@pytest.mark.parametrize(
    ("shown", "cancelled"),
    [
        ("JobState=COMPLETING Reason=None Restarts=1 PreemptTime=None", True),
        ("JobState=CANCELLED Reason=None Restarts=1 PreemptTime=None", True),
        ("JobState=COMPLETING Reason=None Restarts=2", False),  # requeued
        ("JobState=COMPLETING Reason=TimeLimit Restarts=1 PreemptTime=None", False),
        ("JobState=COMPLETING Reason=None Restarts=1 PreemptTime=2026-11-25T21:36:10", False),
        ("JobState=RUNNING Reason=None Restarts=1 PreemptTime=None", False),
        ("", False),  # no answer
    ],
)
def test_a_cancelled_job_is_told_from_the_others_that_end(
    tmp_path: Path, shown: str, cancelled: bool
) -> None:
    done, _ = requeue(tmp_path, shown, "may", environment={"SLURM_RESTART_COUNT": "1"})
    assert (done.returncode != 0) is cancelled
    assert ("cancelled; submit the same command" in done.stderr) is cancelled


def test_a_job_is_requeued_only_so_often(tmp_path: Path) -> None:
    running = "JobState=RUNNING Reason=None Restarts=2 PreemptTime=None"
    counts = {"SLURM_RESTART_COUNT": "2", "PHI3V_MAX_REQUEUES": "2"}
    done, _ = requeue(tmp_path, running, "may", environment=counts)
    assert done.returncode and "requeued 2 times" in done.stderr
    done, _ = requeue(tmp_path, running, "may", environment={**counts, "PHI3V_MAX_REQUEUES": "3"})
    assert done.returncode == 0


def test_a_task_of_an_array_requeues_itself_alone_and_adds_to_the_excluded_nodes(tmp_path: Path) -> None:
    task = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"}
    done, calls = requeue(tmp_path, "ExcNodeList=node1 JobState=PENDING", "now", "node3", environment=task)
    assert done.returncode == 0
    assert calls == ["requeue 7_2", "show job 7_2", "update JobId=7_2 ExcNodeList=node1,node3"]
    _, calls = requeue(tmp_path, "ExcNodeList=(null)", "now", "node3", environment={})
    assert calls[-1] == "update JobId=7 ExcNodeList=node3"
    _, calls = requeue(tmp_path, "", "now", "", environment={})
    assert calls == ["requeue 7"]


@pytest.mark.parametrize(
    ("gpus", "said"),
    [("0\n0", None), ("0\n3", "3"), ("[N/A]", None), ("", "exit code 9")],
)
def test_the_health_check_of_the_sample_finds_one_sick_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpus: str, said: str | None
) -> None:
    sample = (TRAIN_SH.parent / "cluster.env.example").read_text()
    line = next(line for line in sample.splitlines() if line.startswith("#PHI3V_HEALTH_CHECK="))
    command = shlex.split(line[1:])[0].partition("=")[2]
    nvidia_smi = tmp_path / "nvidia-smi"
    nvidia_smi.write_text(f"#!/bin/sh\nprintf '{gpus}\n'\n" + ("" if gpus else "exit 9\n"))
    nvidia_smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert command_fault(command) == said


@pytest.mark.parametrize(
    ("script", "words", "inside"),
    [
        ("shards.sh", ["t.csv", "--out", "d"], "phi3v shards build t.csv --out d"),
        ("shards.sh", ["--close", "d"], "phi3v shards verify d"),
        ("evaluate.sh", ["runs/x", "d"], "phi3v evaluate runs/x d"),
    ],
)
def test_the_other_scripts_run_in_the_container_too(
    tmp_path: Path, script: str, words: list[str], inside: str
) -> None:
    for name in ("apptainer", "srun"):
        (tmp_path / name).write_text(f'#!/bin/sh\necho {name} "$@"\n')
        (tmp_path / name).chmod(0o755)
    for container, begins in (("x.sif", "apptainer exec "), ("hub/image:1", "srun --ntasks=1 ")):
        done = subprocess.run(
            ["bash", str(TRAIN_SH.parent / script), *words],
            env={"PATH": f"{tmp_path}:/usr/bin:/bin", "PHI3V_CONTAINER": container, "PHI3V_MOUNTS": "/data"},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.startswith(begins) and done.stdout.endswith(f"{inside}\n"), done.stdout
        assert container in done.stdout and "/data" in done.stdout


def test_a_health_check_that_hangs_is_a_fault() -> None:
    assert command_fault("sleep 60 & wait", 0.2) == "no answer within 0.2 s"


def test_the_script_for_sbatch_gives_the_same_time_to_stop() -> None:
    assert f"#SBATCH --signal=USR1@{STOP_LEAD_S}\n" in TRAIN_SH.read_text()


def test_a_sweep_is_every_combination_each_a_run_of_its_own(tiny_config: Path) -> None:
    runs = combinations(str(tiny_config), ["seed=1"], ["train.lr=1e-5,2e-5", "train.weight_decay=0.0,0.1"])
    assert [run[1:4] for run in runs] == [
        ("train.lr=1e-5", "train.weight_decay=0.0", "name=tiny-0"),
        ("train.lr=1e-5", "train.weight_decay=0.1", "name=tiny-1"),
        ("train.lr=2e-5", "train.weight_decay=0.0", "name=tiny-2"),
        ("train.lr=2e-5", "train.weight_decay=0.1", "name=tiny-3"),
    ]
    assert {run[-1] for run in runs} == {"track.group=tiny"}
    assert combinations(str(tiny_config), ["seed=1"], []) == [("seed=1",)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sweep": ["train.lr"]}, "not of the form key=value,value"),
        ({"sweep": ["train.lrr=1,2"]}, "did you mean"),
        ({"nodes": 0}, "at least one is needed"),
        ({"gpus_per_node": 0}, "no GPUs per node"),
        ({"minutes": 5}, "leaves no time to train"),
        ({}, "4 rows cannot be shared by 1 x 8 = 8 ranks"),
        ({"gpus_per_node": 6, "sweep": ["parallel.sp=1,4"]}, "4 rows cannot be shared by 1 x 6"),
        (
            {"gpus_per_node": 6, "sweep": ["parallel.sp=4"]},
            "parallel.sp=4 does not divide the 1 x 6 = 6 ranks",
        ),
        ({"gpus_per_node": 4}, "no sbatch on the PATH"),
    ],
)
def test_what_cannot_be_submitted_is_one_line(
    tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: dict, message: str
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BadInputError, match=message) as caught:
        sweep = arguments.pop("sweep", ())
        launch_slurm(str(tiny_config), [], JobSize(**arguments), sweep=sweep)
    assert "\n" not in str(caught.value)


def test_job_names_are_fit_for_slurm_and_kubernetes() -> None:
    assert [job_name(name) for name in ("burberry", "My_Run.2", "2nd")] == ["burberry", "my-run-2", "run-2nd"]
    with pytest.raises(BadInputError, match="at most 40 are allowed"):
        job_name("x" * 41)


def test_ranks_share_the_cores_and_a_cpu_run_says_so() -> None:
    assert rank_environment(2, on_gpu=False, cores=8) == {"OMP_NUM_THREADS": "4", "DS_ACCELERATOR": "cpu"}
    on_cluster = rank_environment(8, on_gpu=True, cores=64, nodes=4)
    assert on_cluster["OMP_NUM_THREADS"] == "8" and on_cluster["HF_HUB_OFFLINE"] == "1"
    assert JobSize(gpus_per_node=0, cpu_processes=2).processes_per_node == 2

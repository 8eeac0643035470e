"""What the pods of a PyTorchJob do, as processes with the operator's environment: how they end, and how a
replaced pod finds the others.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from launch import k8s, manifests
from launch.cluster import Attempts, membership, pod_exit_code
from launch.description import JobSize, torchrun_options
from launch.local import cores
from shards.common.errors import BadInputError
from tests.waiting import wait_for

STANDIN = Path(__file__).with_name("standin_phi3v.py")
CONFIG = """
name: a-run
runs_dir: runs here
model: {config: {}}
data: {path: no shards here}
train: {steps: 1}
"""


class Job:
    """A PyTorchJob of two nodes with one rank each."""

    def __init__(self, directory: Path, steps: int) -> None:
        self.run_dir = directory / "runs with space" / "a-run"
        self.run_dir.mkdir(parents=True)
        (self.run_dir / "steps").write_text(str(steps))
        self.config = directory / "a config.yaml"
        self.config.write_text(CONFIG)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.pods: dict[int, subprocess.Popen[bytes]] = {}

    def start(self, node: int) -> None:
        """The container's command and environment, as the operator makes them."""
        overrides = [f"runs_dir={self.run_dir.parent}", "track.group=two words"]
        description = k8s.describe(str(self.config), overrides, JobSize(2, 1))
        container = manifests.container(description, "pytorch")
        own = {each["name"]: each["value"] for each in container["env"] if "value" in each}
        assert container["command"][0] == "phi3v"
        command = [
            sys.executable,
            str(STANDIN),
            *container["command"][1:],
            str(self.config),
            *container["args"][1:],
        ]
        operator = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self.port),
            "WORLD_SIZE": "2",
            "RANK": str(node),
            "PET_MASTER_ADDR": "127.0.0.1",
            "PET_MASTER_PORT": str(self.port),
            "PET_NPROC_PER_NODE": "1",
            "PET_NNODES": "2",
            "PET_NODE_RANK": str(node),
            "POD_IP": "127.0.0.1",
        }
        environment = {**os.environ, **own, **operator, "PHI3V_GRACE_S": "20"}
        self.pods[node] = subprocess.Popen(command, env=environment, start_new_session=True)

    def kill(self, node: int) -> None:
        """The end of a machine: every process of the pod at once."""
        processes = [
            psutil.Process(self.pods[node].pid),
            *psutil.Process(self.pods[node].pid).children(recursive=True),
        ]
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.pods.pop(node).wait(10)

    def starts(self) -> list[tuple[int, int, int]]:
        """Of the ranks so far: rank, world size, first step."""
        file = self.run_dir / "started"
        lines = file.read_text().splitlines() if file.exists() else []
        return [(int(a), int(b), int(c)) for a, b, c in (line.split() for line in lines)]

    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in self.run_dir.glob("checkpoints/step-*"))

    def exit_codes(self, seconds: float) -> list[int]:
        return [self.pods[node].wait(seconds) for node in sorted(self.pods)]


@pytest.fixture
def two_pods(tmp_path: Path) -> Iterator[Job]:
    job = Job(tmp_path, steps=60)
    job.start(0)
    job.start(1)
    wait_for(lambda: len(job.checkpoints()) >= 1, 60, "a checkpoint")
    yield job
    for node in list(job.pods):
        if job.pods[node].poll() is None:
            job.kill(node)


@pytest.mark.ranks
def test_a_preempted_pod_saves_leaves_with_143_and_its_replacement_goes_on(two_pods: Job) -> None:
    job = two_pods
    job.pods[1].send_signal(signal.SIGTERM)
    assert job.pods[1].wait(20) == 143, "the operator replaces a pod that ends with 128 or more"
    saved = int(job.checkpoints()[-1].removeprefix("step-"))
    assert job.pods[0].poll() is None, "the other pod waits for the replacement"
    job.start(1)
    assert job.exit_codes(90) == [0, 0]
    assert sorted(job.starts()[2:]) == [(0, 2, saved), (1, 2, saved)]


@pytest.mark.ranks
@pytest.mark.parametrize("node", [0, 1])
def test_a_lost_pod_is_noticed_and_its_replacement_goes_on(two_pods: Job, node: int) -> None:
    job = two_pods
    job.kill(node)
    time.sleep(1)
    job.start(node)
    assert job.exit_codes(120) == [0, 0]
    assert sorted(rank for rank, *_ in job.starts()[-2:]) == [0, 1]
    assert all(world == 2 and first >= 5 for _, world, first in job.starts()[-2:])


@pytest.mark.ranks
def test_a_job_that_diverged_is_not_tried_again(tmp_path: Path) -> None:
    job = Job(tmp_path, steps=60)
    (job.run_dir / "diverge").touch()
    job.start(0)
    job.start(1)
    assert job.exit_codes(60) == [4, 4], "codes below 128 fail the job for good"
    assert len(job.starts()) == 2


def test_exit_codes_of_a_pod() -> None:
    assert [pod_exit_code(code) for code in (0, 1, 2, 3, 4)] == [0, 1, 2, 143, 4]


def test_starts_without_progress_are_bounded_over_all_lives_of_a_pod(tmp_path: Path) -> None:
    for _ in range(3):
        Attempts(tmp_path, 0, limit=3).begin()
    with pytest.raises(BadInputError, match=r"3 starts without a new checkpoint \(newest: none\)"):
        Attempts(tmp_path, 0, limit=3).begin()
    (tmp_path / "checkpoints" / "step-000010").mkdir(parents=True)
    Attempts(tmp_path, 0, limit=3).begin()


def test_places_come_from_the_operator_or_from_slurm() -> None:
    operator = {"PET_NNODES": "4", "PET_NPROC_PER_NODE": "8", "PET_MASTER_PORT": "23456", "RANK": "2"}
    pod = membership(
        {**operator, "PET_NODE_RANK": "2", "PET_MASTER_ADDR": "run-master-0", "POD_IP": "10.0.0.7"}
    )
    assert (pod.nodes, pod.node_rank, pod.processes, pod.address) == (4, 2, 8, "10.0.0.7")
    assert "run-master-0:23456" in torchrun_options(pod) and pod.run_id == "run"
    first = membership(
        {**operator, "PET_NODE_RANK": "0", "PET_MASTER_ADDR": "run-master-0", "POD_IP": "10.0.0.5"}
    )
    assert first.host == "10.0.0.5" and first.run_id == "run"
    trainer = {
        "PET_NNODES": "2",
        "PET_NPROC_PER_NODE": "4",
        "PET_NODE_RANK": "1",
        "PET_MASTER_ADDR": "run-node-0-0.run",
        "PET_MASTER_PORT": "29400",
        "PHI3V_RUN_ID": "run",
    }
    second = membership(trainer)
    assert (second.nodes, second.node_rank, second.processes) == (2, 1, 4)
    assert "run-node-0-0.run:29400" in torchrun_options(second)
    assert membership({**trainer, "PET_NPROC_PER_NODE": "cpu"}).processes == cores()
    with pytest.raises(BadInputError, match="no GPU"):
        membership({**trainer, "PET_NPROC_PER_NODE": "gpu", "CUDA_VISIBLE_DEVICES": ""})
    with pytest.raises(BadInputError, match="PET_NPROC_PER_NODE='0'"):
        membership({**trainer, "PET_NPROC_PER_NODE": "0"})
    slurm = {"SLURM_JOB_ID": "12", "SLURM_JOB_NUM_NODES": "2", "SLURM_NODEID": "1", "SLURM_GPUS_ON_NODE": "8"}
    task = membership({**slurm, "PHI3V_HEAD": "127.0.0.1", "SLURM_RESTART_COUNT": "3"})
    assert (task.nodes, task.node_rank, task.processes, task.run_id) == (2, 1, 8, "12.3")
    with pytest.raises(BadInputError, match="granted no GPUs"):
        membership({**slurm, "SLURM_GPUS_ON_NODE": "0"})
    with pytest.raises(BadInputError, match="phi3v launch local"):
        membership({})

"""The one description of a job that every launcher renders from, and what all of them render alike.

In: a config with its overrides, the size of the job, its limits. Out: torchrun's options, the environment of
the ranks, names. Nothing is started here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from phi3v_dist.config import TrainConfig, load_config
from shards.common.errors import BadInputError

STOP_LEAD_S = 300
"""Seconds before the time limit at which Slurm sends SIGUSR1: at least the longest step plus the longest
save.
"""
GRACE_S = 240
"""Seconds that ranks have after a stop signal; less than STOP_LEAD_S and POD_GRACE_S."""
POD_GRACE_S = 300
"""Seconds that Kubernetes waits between SIGTERM and SIGKILL."""
JOIN_TIMEOUT_S = 3600
"""Seconds that a node waits for the others, for instance for a pod whose machine is still being provisioned.
"""
MAX_STARTS = 4
"""A node gives up after this many starts without a new checkpoint."""
NAME_LIMIT = 40
"""Most characters of a job name: pod and service names add a suffix, and a label may have 63."""


@dataclass(frozen=True)
class JobSize:
    """How large a job is, the same for every scheduler.

    nodes: machines. gpus_per_node: ranks on each node. cpu_processes: ranks on each node of a run without
    GPUs; if it is not 0, gpus_per_node does not count. memory_gb_per_node: GiB of host memory, None for the
    default of `memory_gb`. minutes: time limit, None for that of the scheduler.
    """

    nodes: int = 1
    gpus_per_node: int = 8
    cpu_processes: int = 0
    cpus_per_gpu: int = 8
    memory_gb_per_node: int | None = None
    minutes: int | None = None

    def __post_init__(self) -> None:
        """Raises BadInputError for a size that cannot be started."""
        if self.nodes < 1:
            raise BadInputError(f"{self.nodes} nodes: at least one is needed (--nodes)")
        if self.gpus_per_node < 0 or self.cpu_processes < 0 or not self.processes_per_node:
            raise BadInputError(
                "no GPUs per node: ask for some (--gpus-per-node 8), or for --cpu-processes N"
            )
        if self.minutes is not None and self.minutes * 60 <= STOP_LEAD_S:
            raise BadInputError(
                f"a time limit of {self.minutes} min leaves no time to train: "
                f"the run is told to stop {STOP_LEAD_S} s before it"
            )

    @property
    def gpus(self) -> int:
        """GPUs of each node; 0 for a run on CPU processes."""
        return 0 if self.cpu_processes else self.gpus_per_node

    @property
    def processes_per_node(self) -> int:
        """Ranks on each node."""
        return self.cpu_processes or self.gpus_per_node

    @property
    def cpus_per_node(self) -> int:
        """CPU cores of each node."""
        return self.cpu_processes or self.gpus_per_node * self.cpus_per_gpu

    @property
    def memory_gb(self) -> int:
        """GiB of host memory of a node. Default: 100, and 100 for each rank (data workers, /dev/shm, the copy
        of a checkpoint that is being written).
        """
        return self.memory_gb_per_node or 100 * (1 + self.processes_per_node)


@dataclass(frozen=True)
class JobDescription:
    """A training job as every scheduler is told about it.

    name: of the job, as `job_name` makes it. config, overrides: as for `phi3v train`. image: container image,
    None where the scheduler starts no container.
    """

    name: str
    config: str
    overrides: tuple[str, ...]
    size: JobSize
    image: str | None = None


def describe_job(
    config_path: str, overrides: Sequence[str], size: JobSize, *, image: str | None = None
) -> JobDescription:
    """The job of a config at a size.

    Raises BadInputError: config not usable, no job name in it, or a batch that the ranks cannot share.
    """
    config = load_config(config_path, overrides)
    check_batch(size, config.train, config.parallel.sp)
    return JobDescription(job_name(config.name), config_path, tuple(overrides), size, image=image)


def check_batch(size: JobSize, train: TrainConfig, sp: int) -> None:
    """Raises BadInputError if the rows of a step cannot be shared by the job's groups of `sp` ranks. It is
    better to know that now than after a wait in the queue.
    """
    ranks = size.nodes * size.processes_per_node
    shown = f"{size.nodes} x {size.processes_per_node} = {ranks} ranks"
    if ranks % sp:
        raise BadInputError(f"parallel.sp={sp} does not divide the {shown}; choose one that does")
    train.rows_each(ranks // sp, shown if sp == 1 else f"{shown}, {sp} to a row")


@dataclass(frozen=True)
class Membership:
    """A node's place in a job.

    nodes: machines of the job. node_rank: of this one; 0 hosts the rendezvous. processes: ranks on each node.
    host, port: of the rendezvous. run_id: equal on all nodes of a job, different between jobs. address: of
    this node as the others reach it, None for its host name.
    """

    nodes: int
    node_rank: int
    processes: int
    host: str
    port: int
    run_id: str
    address: str | None = None


def single_node(processes: int) -> Membership:
    """The place of this machine in a job of its own with so many ranks; torchrun chooses the port."""
    return Membership(nodes=1, node_rank=0, processes=processes, host="127.0.0.1", port=0, run_id="local")


def torchrun_options(member: Membership) -> list[str]:
    """torchrun's options for one node. torchrun does not restart the ranks, launch.cluster does: torchrun
    would also restart a run that diverged or that asked to be requeued.
    """
    if member.nodes == 1:
        local = ["--standalone", "--local-addr", "127.0.0.1"]
        return [*local, "--nproc-per-node", str(member.processes)]
    is_host = "1" if member.node_rank == 0 else "0"
    options = [
        "--nnodes",
        str(member.nodes),
        "--nproc-per-node",
        str(member.processes),
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        f"{member.host}:{member.port}",
        "--rdzv-id",
        member.run_id,
        "--rdzv-conf",
        f"is_host={is_host},join_timeout={JOIN_TIMEOUT_S},last_call_timeout=1,read_timeout=60",
    ]
    return options + (["--local-addr", member.address] if member.address else [])


def rank_command(config: str, overrides: Sequence[str]) -> list[str]:
    """The arguments of the Python that torchrun starts for each rank."""
    return ["-m", "launch.torchrun.rank", "train", config, *overrides]


def rank_environment(processes: int, on_gpu: bool, cores: int, *, nodes: int = 1) -> dict[str, str]:
    """Environment variables of the ranks; those that are set already are kept (see `unset_here`).

    processes: ranks on this node. cores: CPU cores that they share. nodes: machines of the job.
    """
    variables = {"OMP_NUM_THREADS": str(max(1, cores // processes))}
    if not on_gpu:
        variables["DS_ACCELERATOR"] = "cpu"
        return variables
    # When a peer is lost, its collective ends with an error instead of blocking the other ranks for ever.
    variables |= {
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    }
    if nodes > 1:
        # Weights and tokenizer are on shared storage; a hundred ranks must not ask the Hub for them.
        variables |= {"HF_HUB_OFFLINE": "1", "NCCL_DEBUG": "WARN"}
    return variables


def unset_here(variables: Mapping[str, str]) -> dict[str, str]:
    """Those of the variables that are not set in this process's environment."""
    return {name: value for name, value in variables.items() if name not in os.environ}


def job_name(run_name: str) -> str:
    """A run's name as Slurm and Kubernetes accept it: lower-case letters, digits and dashes, a letter first.

    Raises BadInputError if it is longer than NAME_LIMIT.
    """
    name = re.sub(r"[^a-z0-9]+", "-", run_name.lower()).strip("-")
    if not re.match(r"[a-z]", name):
        name = f"run-{name}".rstrip("-")
    if len(name) > NAME_LIMIT:
        raise BadInputError(
            f"name {run_name!r} gives a job name of {len(name)} characters; at most {NAME_LIMIT} are allowed"
        )
    return name

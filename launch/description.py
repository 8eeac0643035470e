"""The one description of a job that every launcher renders from, and what all of them render alike.

In: a config with its overrides, the size of the job, its limits. Out: torchrun's options, the environment of
the ranks, names. Pure: nothing is read or started here. Called by the launchers, local, Slurm and
Kubernetes, and by launch.doctor.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from phi3v_dist.config import TrainConfig
from shards.common.errors import BadInputError

STOP_LEAD_S = 300
"""Seconds before the time limit at which Slurm sends SIGUSR1: the longest step plus the longest save."""
GRACE_S = 240
"""Seconds that ranks have after a stop signal: less than STOP_LEAD_S and than a pod's termination grace."""
POD_GRACE_S = 300
"""Seconds that Kubernetes waits between SIGTERM and SIGKILL."""
JOIN_TIMEOUT_S = 3600
"""Seconds that a node waits for the others, such as for a pod whose node is still being provided."""
MAX_STARTS = 4
"""Starts without a new checkpoint after which a job gives up."""
MAX_REQUEUES = 50
"""Times that one Slurm job puts itself back into the queue."""
NAME_LIMIT = 40
"""Characters of a job name: pod and service names add a suffix, and a label holds 63."""


@dataclass(frozen=True)
class JobDescription:
    """A training job as every scheduler is told about it.

    config, overrides: as for `phi3v train`. nodes: machines. gpus_per_node: ranks on each; 0 with
    cpu_processes for a run without GPUs. memory_gb_per_node: GiB; None: as `memory_gb` has it. minutes: time
    limit, None for the scheduler's. image: container image or file. environment: variables for the ranks, on
    top of `rank_environment`.
    """

    name: str
    config: str
    overrides: tuple[str, ...] = ()
    nodes: int = 1
    gpus_per_node: int = 8
    cpu_processes: int = 0
    cpus_per_gpu: int = 8
    memory_gb_per_node: int | None = None
    minutes: int | None = None
    image: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises BadInputError for a size that cannot be started."""
        if self.nodes < 1:
            raise BadInputError(f"{self.nodes} nodes: at least one is needed (--nodes)")
        if self.gpus_per_node < 0 or self.cpu_processes < 0 or not (self.gpus_per_node or self.cpu_processes):
            raise BadInputError(
                "no GPUs per node: ask for some (--gpus-per-node 8), or for --cpu-processes N"
            )
        if self.minutes is not None and self.minutes * 60 <= STOP_LEAD_S:
            raise BadInputError(
                f"a time limit of {self.minutes} min leaves no time to train: "
                f"the run is told to stop {STOP_LEAD_S} s before it"
            )

    @property
    def memory_gb(self) -> int:
        """GiB of host memory of a node: as asked for, else 100 and 100 for each rank (data workers, /dev/shm,
        the copy of a checkpoint that is being written)."""
        return self.memory_gb_per_node or 100 * (1 + self.processes_per_node)

    @property
    def processes_per_node(self) -> int:
        """Ranks on each node."""
        return self.cpu_processes or self.gpus_per_node


def check_batch(job: JobDescription, train: TrainConfig, sp: int) -> None:
    """Raises BadInputError if the rows of a step cannot be shared by the job's groups of `sp` ranks: better
    now than after a wait in the queue.
    """
    ranks = job.nodes * job.processes_per_node
    size = f"{job.nodes} x {job.processes_per_node} = {ranks} ranks"
    if ranks % sp:
        raise BadInputError(f"parallel.sp={sp} does not divide the {size}; choose one that does")
    train.rows_each(ranks // sp, size if sp == 1 else f"{size}, {sp} to a row")


@dataclass(frozen=True)
class Membership:
    """A node's place in a job. node_rank: 0 hosts the rendezvous. host, port: where that is. address: of this
    node as the others reach it, None for its host name. run_id: equal on all nodes of a job, different for
    others.
    """

    nodes: int
    node_rank: int
    processes: int
    host: str
    port: int
    run_id: str
    address: str | None = None


def torchrun_options(member: Membership) -> list[str]:
    """torchrun's options for one node. Restarts are launch.cluster's own: torchrun would also restart a run
    that diverged, and a run that asked to be requeued.
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
    """What torchrun runs once per rank."""
    return ["-m", "launch.torchrun.rank", "train", config, *overrides]


def rank_environment(processes: int, on_gpu: bool, cores: int, nodes: int = 1) -> dict[str, str]:
    """Variables of the ranks; what is set already where they start wins.

    processes: ranks on this node. cores: CPU cores they share.
    """
    variables = {"OMP_NUM_THREADS": str(max(1, cores // processes))}
    if not on_gpu:
        variables["DS_ACCELERATOR"] = "cpu"
        return variables
    # A lost peer ends its collective with an error instead of holding the others for ever.
    variables |= {
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    }
    if nodes > 1:
        # Weights and tokenizer lie on shared storage; a hundred ranks must not ask a hub for them.
        variables |= {"HF_HUB_OFFLINE": "1", "NCCL_DEBUG": "WARN"}
    return variables


def unset_here(variables: Mapping[str, str]) -> dict[str, str]:
    """The variables that this process's environment does not have."""
    return {name: value for name, value in variables.items() if name not in os.environ}


def job_name(run_name: str) -> str:
    """A run's name as Slurm and Kubernetes take it: lower-case letters, digits and dashes, a letter first.

    Raises BadInputError if nothing is left of it or it is too long.
    """
    name = re.sub(r"[^a-z0-9]+", "-", run_name.lower()).strip("-")
    if not re.match(r"[a-z]", name):
        name = f"run-{name}".rstrip("-")
    if len(name) > NAME_LIMIT:
        raise BadInputError(
            f"name {run_name!r} gives a job name of {len(name)} characters; {NAME_LIMIT} are the most"
        )
    return name

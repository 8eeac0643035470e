"""The process group of a run, and which rank this process is. No other module reads a rank from torchrun's
environment.

The ranks form a grid of dp x sp: `sp` neighbouring ranks share a packed row (sequence parallelism), and the
groups of such ranks take different rows (data parallelism).
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import logging
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from phi3v_dist.parallel.sequence import SequenceGroup
from phi3v_dist.parallel.start import agree_on_start
from shards.common.errors import BadInputError

_log = logging.getLogger(__name__)

Result = TypeVar("Result")


@dataclass(frozen=True)
class Mesh:
    """The ranks of a run, and this one among them.

    rank, size: among all processes. local_rank: on this node. store: key-value store of the ranks of this
    start. timeout_s: seconds until a collective fails. sequence: the ranks that share a row with this one,
    None without sequence parallelism.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device
    store: Any = None
    timeout_s: float = 600.0
    sequence: SequenceGroup | None = None

    @property
    def sp_rank(self) -> int:
        """This rank among those that share a row."""
        return 0 if self.sequence is None else self.sequence.rank

    @property
    def sp_size(self) -> int:
        """The number of ranks that share a row."""
        return 1 if self.sequence is None else self.sequence.size

    @property
    def dp_rank(self) -> int:
        """The group of this rank among the groups that take different rows."""
        return self.rank // self.sp_size

    @property
    def dp_size(self) -> int:
        """The number of groups that take different rows."""
        return self.size // self.sp_size

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the main rank."""
        return self.rank == 0

    def barrier(self) -> None:
        """Waits until all ranks have called it."""
        dist.barrier()

    def sum(self, values: list[float]) -> list[float]:
        """Element-wise sums over all ranks, in float64. All ranks call it."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return [float(value) for value in tensor]

    def sum_of_row(self, values: list[float]) -> list[float]:
        """Element-wise sums over the ranks that share a row with this one, in float64. These all call it."""
        if self.sequence is None:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, group=self.sequence.group)
        return [float(value) for value in tensor]

    def gather(self, value: Any) -> list[Any]:
        """The `value` of every rank, in rank order, on every rank. All ranks call it."""
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, value)
        return gathered

    def on_main(self, work: Callable[[], Result]) -> Result:
        """Runs `work` on the main rank; returns its result on every rank. All ranks call it.

        Raises BadInputError on every rank if `work` raises it, or cannot read or write a file.
        """
        box: list[Any] = [None, None]
        if self.is_main:
            try:
                box = [work(), None]
            except (BadInputError, OSError) as error:
                box = [None, _fault_text(error)]
        dist.broadcast_object_list(box, src=0)
        if box[1] is not None:
            raise BadInputError(box[1])
        result: Result = box[0]
        return result

    def everywhere(self, work: Callable[[], Result]) -> Result:
        """Runs `work` on every rank; returns this rank's result after all ranks have finished.

        `work` must not wait for other ranks. Raises BadInputError on every rank, with the failed rank and its
        host, if `work` raises it on any rank, or cannot read or write a file there.
        """
        results, fault = [], None
        try:
            results.append(work())
        except (BadInputError, OSError) as error:
            place = "" if self.is_main else f"rank {self.rank} ({socket.gethostname()}): "
            fault = f"{place}{_fault_text(error)}"
        for each in self.gather(fault):
            if each is not None:
                raise BadInputError(each)
        return results[0]


def _fault_text(error: BadInputError | OSError) -> str:
    """The error as one line for the user. Raises `error` again if it is an OSError without a file."""
    if isinstance(error, BadInputError):
        return str(error)
    if error.filename is None:
        raise error
    return f"{error.filename}: {error.strerror}; fix the storage, then the same command resumes"


def sequence_group(rank: int, size: int, sp: int) -> SequenceGroup | None:
    """The group of `sp` neighbouring ranks that `rank` belongs to, None for sp = 1. All ranks call it.

    The ranks of a group are on one node if sp divides the number of ranks of a node. Raises BadInputError if
    sp does not divide `size`.
    """
    if size % sp:
        raise BadInputError(
            f"parallel.sp={sp} does not divide the {size} ranks of this job; use {_divisor(size, sp)}, or "
            f"another number of GPUs"
        )
    if sp == 1:
        return None
    groups = [dist.new_group(list(range(first, first + sp))) for first in range(0, size, sp)]
    return SequenceGroup(groups[rank // sp], rank % sp, sp)


def _divisor(size: int, sp: int) -> int:
    """The largest divisor of `size` that is at most `sp`."""
    return next(n for n in range(min(sp, size), 0, -1) if size % n == 0)


def _record_flight(logs: Path) -> None:
    """Turns on NCCL's flight recorder by variables that torch reads when the process group is created. It
    does not change those that the user has set.
    """
    logs.mkdir(parents=True, exist_ok=True)
    for name, value in {
        "TORCH_FR_BUFFER_SIZE": "2000",
        "TORCH_FR_DUMP_TEMP_FILE": str(logs / "flight-recorder-rank-"),
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    }.items():
        os.environ.setdefault(name, value)


@contextlib.contextmanager
def open_mesh(timeout_s: float, sp: int = 1, logs: Path | None = None) -> Iterator[Mesh]:
    """Joins the process group that torchrun describes, and leaves it at the end. Without torchrun the group
    is this process.

    It uses NCCL on CUDA, gloo on the CPU. timeout_s: seconds until a collective that waits for a lost rank
    fails. sp: number of ranks that share a row. logs: directory for NCCL's flight recorder, which records
    what every rank was waiting for; None to leave it off. Raises BadInputError if this node has fewer GPUs
    than processes, or if sp does not divide the number of ranks.
    """
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    on_node = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise BadInputError(
                f"process {local_rank} of this node has no GPU, there are {torch.cuda.device_count()}; start "
                "one process per GPU"
            )
        device, backend = torch.device("cuda", local_rank), "nccl"
        torch.cuda.set_device(device)
        if logs is not None:
            _record_flight(logs)
    else:
        device, backend = torch.device("cpu"), "gloo"
    limit = datetime.timedelta(seconds=timeout_s)
    alone = {} if "RANK" in os.environ else {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    if alone:
        os.environ.update(alone)  # DeepSpeed reads them
        store: Any = dist.HashStore()
    else:
        store, rank, size = next(dist.rendezvous("env://", timeout=limit))
        store = dist.PrefixStore(agree_on_start(store, rank, size, timeout_s=timeout_s), store)
    dist.init_process_group(backend, rank=rank, world_size=size, timeout=limit, store=store)
    try:
        sequence = sequence_group(rank, size, sp)
        if rank == 0 and on_node % sp:
            _log.warning(
                "parallel.sp=%d does not divide the %d ranks of a node: rows are exchanged between nodes in "
                "every layer, which is slow", sp, on_node,
            )  # fmt: skip
        yield Mesh(rank, size, local_rank, device=device, store=store, timeout_s=timeout_s, sequence=sequence)
        # A rank that leaves closes connections that others may still use. After an exception it cannot wait.
        dist.barrier()
    finally:
        gc.collect()
        dist.destroy_process_group()
        for name in alone:
            os.environ.pop(name, None)  # this process may join another group later

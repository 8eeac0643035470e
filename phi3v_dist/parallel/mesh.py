"""Who this process is among its ranks, read once from torchrun's environment. Nothing else asks for a rank.

Called by the entry points of train and evaluate.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from shards.format import BadInputError

Result = TypeVar("Result")


@dataclass(frozen=True)
class Mesh:
    """rank, size: of all processes; local_rank: on this node. dp_rank, dp_size: the data-parallel ones
    (all).
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def dp_rank(self) -> int:
        return self.rank

    @property
    def dp_size(self) -> int:
        return self.size

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        dist.barrier()

    def sum(self, values: list[float]) -> list[float]:
        """Element-wise sums over all ranks, in float64."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return [float(value) for value in tensor]

    def gather(self, value: Any) -> list[Any]:
        """`value` of every rank, in rank order, on every rank."""
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, value)
        return gathered

    def on_main(self, work: Callable[[], Result]) -> Result:
        """What `work` returns on the main rank, on every rank. A BadInputError there is raised on every
        rank.
        """
        box: list[Any] = [None, None]
        if self.is_main:
            try:
                box = [work(), None]
            except BadInputError as error:
                box = [None, str(error)]
        dist.broadcast_object_list(box, src=0)
        if box[1] is not None:
            raise BadInputError(box[1])
        result: Result = box[0]
        return result


@contextlib.contextmanager
def open_mesh(timeout_s: float) -> Iterator[Mesh]:
    """Joins the process group that torchrun describes (a single process without it) and leaves it at the end.

    NCCL on CUDA, gloo on the CPU. timeout_s: seconds before a collective that waits for a lost rank fails.
    Raises BadInputError if there are more processes on this node than GPUs.
    """
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise BadInputError(
                f"process {local_rank} of this node has no GPU of its own (of {torch.cuda.device_count()}), "
                "start one process per GPU"
            )
        device, backend = torch.device("cuda", local_rank), "nccl"
        torch.cuda.set_device(device)
    else:
        device, backend = torch.device("cpu"), "gloo"
        os.environ["DS_ACCELERATOR"] = "cpu"  # read by deepspeed at import
    if "RANK" not in os.environ:
        os.environ.update({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"})
        store: dict[str, Any] = {"store": dist.HashStore()}
    else:
        store = {}
    dist.init_process_group(
        backend, rank=rank, world_size=size, timeout=datetime.timedelta(seconds=timeout_s), **store
    )
    try:
        yield Mesh(rank, size, local_rank, device)
        # Leaving while a peer still works tears its connections down; an exception must not wait here.
        dist.barrier()
    finally:
        gc.collect()
        dist.destroy_process_group()

"""The slice rule of ZeRO-3, written once: a parameter is flattened and cut into equal slices, one per rank in
rank order; the last slices are padded at the end (DeepSpeed 0.19.8).

Example: 10 elements on 4 ranks are slices of width 3; rank 3 holds element 9 and two elements of padding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Partition:
    """One rank's slice of a flattened tensor. numel: elements of the whole tensor; rank: which slice this is;
    width: elements of every slice, padding included.
    """

    numel: int
    rank: int
    width: int

    @classmethod
    def of(cls, parameter: Any) -> Partition:
        """This rank's slice of a parameter that ZeRO-3 has partitioned."""
        return cls(parameter.ds_numel, parameter.ds_zero_partition_rank, parameter.ds_tensor.numel())

    @property
    def start(self) -> int:
        """The first element of the slice in the flattened tensor; `numel` if the slice is padding alone."""
        return min(self.rank * self.width, self.numel)

    @property
    def stop(self) -> int:
        """The element after the last real one of the slice."""
        return min((self.rank + 1) * self.width, self.numel)

    @property
    def count(self) -> int:
        """Real elements of the slice."""
        return self.stop - self.start

    @property
    def padding(self) -> int:
        """Elements at the end of the slice that belong to no parameter."""
        return self.width - self.count


def join(slices: torch.Tensor, numel: int) -> torch.Tensor:
    """The flattened tensor [numel] from the slices of all ranks [ranks, width]."""
    return slices.reshape(-1)[:numel]


def is_partitioned(parameter: Any) -> bool:
    """Whether ZeRO-3 has partitioned `parameter`; else it is an ordinary, whole one."""
    return hasattr(parameter, "ds_tensor")


def full_shape(parameter: Any) -> tuple[int, ...]:
    """The shape of the whole parameter, partitioned or not."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def full_numel(parameter: Any) -> int:
    """The number of elements of the whole parameter, partitioned or not."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def local_slice(parameter: Any) -> torch.Tensor:
    """This rank's slice of a partitioned parameter, padding included: [width], a view that may be written. It
    is in host memory under parallel.offload_params.
    """
    flat: torch.Tensor = parameter.ds_tensor.data.view(-1)
    return flat


def fill_slice(parameter: Any, read: Callable[[Partition], torch.Tensor]) -> None:
    """Fills this rank's slice of a partitioned parameter; the padding becomes zero.

    read: gets the partition, returns its real elements [count]; it is not called if there are none.
    """
    partition, own = Partition.of(parameter), local_slice(parameter)
    own.zero_()
    if partition.count:
        own.narrow(0, 0, partition.count).copy_(read(partition))

"""The content of checkpoints: the slices of weights and optimizer state that a rank of a ZeRO-3 engine keeps,
under their names in the checkpoint.

In: an engine. Out: the slots of its slices in the rank's file, and their data in that order, as one copy or
slice by slice, also where the optimizer swaps its state to files.

Names: master/NAME for float32 master weights, STATE/NAME for what the optimizer keeps per element (AdamW:
exp_avg, exp_avg_sq), frozen/NAME; NAME is `lora.plain_name` of the parameter.
"""

from __future__ import annotations

import itertools
import logging
import queue
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import psutil
import torch
import torch.distributed as dist

from phi3v_dist.checkpoint.manifest import Slot, lay_out
from phi3v_dist.checkpoint.meta import StoredParameter
from phi3v_dist.engine.partition import Partition, full_numel, local_slice
from phi3v_dist.engine.state import (
    OptimizerState,
    StateTensor,
    TrainedSlice,
    frozen_parameters,
    parameter_shapes,
    trained_slices,
)
from phi3v_dist.model.lora import plain_name
from phi3v_dist.parallel.mesh import Mesh

_POLL_S = 0.02
_log = logging.getLogger(__name__)


def master_key(trained: TrainedSlice) -> str:
    """The name in the file of the master weights of a slice."""
    return f"master/{plain_name(trained.name)}"


def state_key(trained: TrainedSlice, kind: StateTensor) -> str:
    """The name in the file of a slice's tensor of optimizer state."""
    return f"{kind.name}/{plain_name(trained.name)}"


def frozen_key(name: str) -> str:
    """The name in the file of a frozen weight. name: of `module.named_parameters()`."""
    return f"frozen/{plain_name(name)}"


def stored_parameters(engine: Any) -> dict[str, StoredParameter]:
    """Plain name -> what a checkpoint records of each parameter of `engine`."""
    return {
        plain_name(name): StoredParameter(shape, frozen)
        for name, (shape, frozen) in parameter_shapes(engine).items()
    }


def frozen_sums(engine: Any, mesh: Mesh) -> dict[str, int]:
    """Plain name -> sum of the elements of each frozen parameter, read as integers, modulo 2^64. All ranks
    call it.

    The sums do not depend on the number of ranks. Other weights are very unlikely to have the same sums.
    """
    names, sums = [], []
    for name, parameter in frozen_parameters(engine):
        own = local_slice(parameter)[: Partition.of(parameter).count]
        names.append(plain_name(name))
        sums.append(bit_sum(own).to(mesh.device))  # it may be in host memory: parallel.offload_params
    if not names:
        return {}
    total = torch.stack(sums)
    dist.all_reduce(total)
    return dict(zip(names, total.tolist(), strict=True))


def bit_sum(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of the elements, read as integers of the same width: int64 [], modulo 2^64."""
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.dtype.itemsize]
    return tensor.contiguous().view(kind).sum(dtype=torch.int64)


@dataclass(frozen=True)
class _Piece:
    """A slice for the rank's file. get: returns its present data, [numel]."""

    name: str
    dtype: torch.dtype
    numel: int
    get: Callable[[], torch.Tensor]


class KeptState:
    """The slices that this rank keeps of `engine`. buffered: allocate host memory for a copy of them.

    slots: their places in the rank's file. frozen_sums: sums of the frozen weights, where these are more than
    the trained ones, so that a checkpoint does not hold them; else None.
    """

    def __init__(self, engine: Any, mesh: Mesh, *, buffered: bool) -> None:
        self._engine, self._mesh = engine, mesh
        self._optimizer = OptimizerState(engine)
        frozen = sum(full_numel(parameter) for _, parameter in frozen_parameters(engine))
        trained = sum(full_numel(each.parameter) for each in trained_slices(engine))
        self.frozen_sums = None if frozen <= trained else frozen_sums(engine, mesh)
        self.slots = lay_out([(each.name, each.dtype, each.numel) for each in self._pieces()])
        self._buffer: torch.Tensor | None = None
        if buffered:
            self._buffer = _host_buffer(sum(slot.size for slot in self.slots), mesh)

    @property
    def is_swapped(self) -> bool:
        """Whether some state is in files. Then the training thread must read it: use `hand`, not `stream`."""
        return self._optimizer.is_swapped

    def copy(self) -> torch.Tensor | None:
        """A copy of all slices in host memory, uint8 [bytes]; None without a buffer."""
        if self._buffer is None:
            return None
        for slot, get in self._in_order():
            place = self._buffer[slot.offset : slot.offset + slot.size].view(slot.dtype)
            place.copy_(get(), non_blocking=True)
        self._optimizer.release()
        if self._mesh.device.type == "cuda":
            torch.cuda.synchronize(self._mesh.device)
        return self._buffer

    def stream(self) -> Iterator[torch.Tensor]:
        """The data of all slots in order, one slice at a time, as CPU tensors."""
        for _, get in self._in_order():
            yield get().cpu().contiguous()
        self._optimizer.release()

    def hand(self, handed: queue.Queue[torch.Tensor | None], is_over: Callable[[], bool]) -> None:
        """Puts copies of what `stream` yields, then None, into a queue for the writing thread, because only
        the training thread may swap. is_over: whether the writer has ended; then this ends early.
        """
        stream: Iterator[torch.Tensor | None] = itertools.chain(map(torch.clone, self.stream()), [None])
        for tensor in stream:
            while not is_over():
                try:
                    handed.put(tensor, timeout=_POLL_S)
                    break
                except queue.Full:
                    continue
            else:  # the writer failed or took too long: None ends its thread
                while not handed.empty():
                    handed.get_nowait()
                handed.put(None)
                break
        self._optimizer.release()

    def steps(self) -> list[float]:
        """The optimizer's step count of each parameter group; 0 before its first step."""
        return self._optimizer.steps(list(trained_slices(self._engine)))

    def hyper_parameters(self) -> list[dict[str, Any]]:
        """The settings of each parameter group: name, lr, weight_decay and so on."""
        return self._optimizer.hyper_parameters()

    def parameters(self) -> dict[str, StoredParameter]:
        """Plain name -> shape of each parameter, and whether it is frozen."""
        return stored_parameters(self._engine)

    def _in_order(self) -> Iterator[tuple[Slot, Callable[[], torch.Tensor]]]:
        """Every slot, and the function that returns its data."""
        data = {piece.name: piece.get for piece in self._pieces()}
        for slot in self.slots:
            yield slot, data[slot.name]

    def _pieces(self) -> Iterator[_Piece]:
        """Every slice that this rank keeps."""
        for trained in trained_slices(self._engine):
            dtype, count = trained.master.dtype, trained.count
            yield _Piece(master_key(trained), dtype, count, partial(self._master, trained))
            for kind in self._optimizer.tensors:
                get = partial(self._state, trained, kind)
                yield _Piece(state_key(trained, kind), kind.dtype, count, get)
        if self.frozen_sums is None:
            for name, parameter in frozen_parameters(self._engine):
                data = local_slice(parameter)
                yield _Piece(frozen_key(name), data.dtype, data.numel(), partial(_as_it_is, data))

    def _master(self, trained: TrainedSlice) -> torch.Tensor:
        self._optimizer.hold(trained)
        return trained.of(trained.master.data)

    def _state(self, trained: TrainedSlice, kind: StateTensor) -> torch.Tensor:
        self._optimizer.hold(trained)
        return self._optimizer.read(trained, kind)


def _as_it_is(data: torch.Tensor) -> torch.Tensor:
    return data


def _host_buffer(size: int, mesh: Mesh) -> torch.Tensor | None:
    """`size` bytes of host memory; None, with a warning, if there is not enough. All ranks call it.

    The buffer is filled at once, so that the system allocates its pages now.
    """
    node = socket.gethostname()
    available = psutil.virtual_memory().available / mesh.gather(node).count(node)
    if size > 0.8 * available:
        _log.warning(
            "checkpoint.async: a copy of this rank's state needs %.1f GB of host memory, %.1f GB are free; "
            "the run will wait for its checkpoints instead", size / 1e9, available / 1e9,
        )  # fmt: skip
        return None
    try:
        return torch.empty(size, dtype=torch.uint8, pin_memory=mesh.device.type == "cuda").fill_(0)
    except RuntimeError as error:
        _log.warning("checkpoint.async: no host memory for a copy (%s); the run will wait instead", error)
        return None

"""What checkpoints are made of: the slices of weights and optimizer that a rank of a ZeRO-3 engine keeps, by
name.

In: an engine. Out: the places of its slices to be filled, or their data to be written, in one order: all at
once as a copy, or one after the other, also where the optimizer swaps them to files. Called by `checkpoint`
and `saving`. It uses DeepSpeed's internals, so DeepSpeed is pinned exactly (0.19.8).
"""

from __future__ import annotations

import itertools
import logging
import queue
import socket
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import psutil
import torch
import torch.distributed as dist

from phi3v_dist.checkpoint.manifest import Slot, lay_out
from phi3v_dist.engine.nvme import SwappedState
from phi3v_dist.model.lora import plain_name
from phi3v_dist.parallel.mesh import Mesh

MOMENTS = ("exp_avg", "exp_avg_sq")
_POLL_S = 0.02
_log = logging.getLogger(__name__)


def named_parameters(engine: Any) -> Iterator[tuple[str, Any]]:
    """(name, parameter) of all: the published names, and those of adapters as `lora.plain_name` has them."""
    for name, parameter in engine.module.named_parameters():
        yield plain_name(name), parameter


def trainable(engine: Any) -> Iterator[tuple[str, Any, torch.Tensor, int, int, int]]:
    """(name, parameter, flat float32 partition, offset of its slice in it, elements of the slice, sub-group)
    of each parameter that learns.
    """
    zero = engine.optimizer
    names = {parameter: name for name, parameter in named_parameters(engine)}
    for number, group in enumerate(zero.fp16_groups):
        offset = 0
        for parameter in group:
            count = parameter.partition_numel()
            yield (
                names[parameter],
                parameter,
                zero.fp32_partitioned_groups_flat[number],
                offset,
                count,
                number,
            )
            offset += count


def frozen(engine: Any) -> Iterator[tuple[str, Any]]:
    """(name, parameter) of each that does not learn."""
    for name, parameter in named_parameters(engine):
        if not parameter.requires_grad:
            yield name, parameter


def frozen_sums(engine: Any, mesh: Mesh) -> dict[str, int]:
    """Of each frozen parameter, the sum of its elements read as integers, modulo 2^64: the same at any number
    of ranks, and of any weights but the same ones most unlikely to be.
    """
    names, sums = [], []
    for name, parameter in frozen(engine):
        part = parameter.ds_tensor.data.view(-1)
        # behind these comes padding
        count = min(max(0, parameter.ds_numel - mesh.rank * part.numel()), part.numel())
        names.append(name)
        sums.append(bit_sum(part[:count]).to(mesh.device))  # from host memory: parallel.offload_params
    if not names:
        return {}
    total = torch.stack(sums)
    dist.all_reduce(total)
    return dict(zip(names, total.tolist(), strict=True))


def bit_sum(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of the elements read as integers of their width: int64, modulo 2^64."""
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.dtype.itemsize]
    return tensor.contiguous().view(kind).sum(dtype=torch.int64)


class KeptState:
    """The slices that this rank keeps of `engine`. buffered: with room in host memory for a copy of them.

    slots: their places in the rank's file. frozen_sums: of the frozen weights, where these are so many that
    a checkpoint leaves them in the model directory; else None.
    """

    def __init__(self, engine: Any, mesh: Mesh, buffered: bool) -> None:
        self._engine, self._mesh = engine, mesh
        self._swapped = SwappedState(engine.optimizer)
        few = sum(p.ds_numel for _, p in frozen(engine)) <= sum(p.ds_numel for _, p, *_ in trainable(engine))
        self.frozen_sums = None if few else frozen_sums(engine, mesh)
        self.slots = lay_out([(name, dtype, numel) for name, dtype, numel, _ in self._sources()])
        self._buffer: torch.Tensor | None = None
        if buffered:
            self._buffer = _host_buffer(sum(slot.size for slot in self.slots), mesh)

    @property
    def is_swapped(self) -> bool:
        """Whether some of it is in files; then the thread that trains must read it: `hand`, not `stream`."""
        return self._swapped.is_used

    def copy(self) -> torch.Tensor | None:
        """A copy of all slices in host memory as one block of bytes; None if it has no room for one."""
        if self._buffer is None:
            return None
        for slot, get in self._in_order():
            place = self._buffer[slot.offset : slot.offset + slot.size].view(slot.dtype)
            place.copy_(get(), non_blocking=True)
        self._swapped.release()
        if self._mesh.device.type == "cuda":
            torch.cuda.synchronize(self._mesh.device)
        return self._buffer

    def stream(self) -> Iterator[torch.Tensor]:
        """The data of all slots in order, one slice at a time."""
        for _, get in self._in_order():
            yield get().cpu().contiguous()
        self._swapped.release()

    def hand(self, handed: queue.Queue[torch.Tensor | None], is_over: Callable[[], bool]) -> None:
        """Puts copies of what `stream` yields, then None, into a queue for the thread that writes: only this
        thread may swap. is_over: whether nobody takes them any more; then they end early.
        """
        stream: Iterator[torch.Tensor | None] = itertools.chain(map(torch.clone, self.stream()), [None])
        for tensor in stream:
            while not is_over():
                try:
                    handed.put(tensor, timeout=_POLL_S)
                    break
                except queue.Full:
                    continue
            else:  # it has failed, or took too long: the thread shall end
                while not handed.empty():
                    handed.get_nowait()
                handed.put(None)
                break
        self._swapped.release()

    def about(self) -> dict[str, Any]:
        """What a checkpoint says of it: parameters, AdamW's groups and steps, sums of the frozen weights."""
        groups = [
            {
                k: v
                for k, v in group.items()
                if k != "params" and isinstance(v, int | float | str | list | tuple | None)
            }
            for group in self._engine.optimizer.optimizer.param_groups
        ]
        return {
            "adam_steps": self._adam_steps(),
            "groups": groups,
            "parameters": {
                name: {"shape": list(p.ds_shape), "frozen": not p.requires_grad}
                for name, p in named_parameters(self._engine)
            },
            "frozen_sums": self.frozen_sums,
        }

    def _adam_steps(self) -> list[float]:
        """Adam's step of each parameter group; 0 for one that has not moved yet."""
        zero = self._engine.optimizer
        steps: list[set[float]] = [set() for _ in zero.optimizer.param_groups]
        for _, _, flat, _, _, number in trainable(self._engine):
            state = zero.optimizer.state.get(flat, {})
            steps[zero.sub_group_to_group_id[number]].add(float(state.get("step", 0.0)))
        for group, found in enumerate(steps):
            if len(found) > 1:
                raise RuntimeError(f"Adam's step differs within parameter group {group}: {sorted(found)}")
        return [max(found, default=0.0) for found in steps]

    def _in_order(self) -> Iterator[tuple[Slot, Callable[[], torch.Tensor]]]:
        """Every slot and what gets its data."""
        data = {name: get for name, _, _, get in self._sources()}
        for slot in self.slots:
            yield slot, data[slot.name]

    def _sources(self) -> Iterator[tuple[str, torch.dtype, int, Callable[[], torch.Tensor]]]:
        """(name, dtype, elements, the data now) of every slice that this rank keeps."""
        for name, _, flat, offset, count, group in trainable(self._engine):
            place = (group, flat, offset, count)
            yield f"master/{name}", flat.dtype, count, partial(self._master, *place)
            for kind in MOMENTS:
                yield f"{kind}/{name}", flat.dtype, count, partial(self._moment, kind, *place)
        if self.frozen_sums is None:
            for name, parameter in frozen(self._engine):
                data = parameter.ds_tensor.data.view(-1)
                yield f"frozen/{name}", data.dtype, data.numel(), partial(_part, data, 0, data.numel())

    def _master(self, group: int, flat: torch.Tensor, offset: int, count: int) -> torch.Tensor:
        self._swapped.hold(group)
        return _part(flat.data, offset, count)

    def _moment(self, kind: str, group: int, flat: torch.Tensor, offset: int, count: int) -> torch.Tensor:
        self._swapped.hold(group)
        found = self._engine.optimizer.optimizer.state[flat].get(kind)
        return torch.zeros(count, dtype=flat.dtype) if found is None else _part(found, offset, count)


def _part(tensor: torch.Tensor, offset: int, count: int) -> torch.Tensor:
    return tensor.narrow(0, offset, count)


def _host_buffer(size: int, mesh: Mesh) -> torch.Tensor | None:
    """`size` bytes of host memory, all of it taken from the system at once; None, aloud, if there is no
    room.
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

"""What a rank of a ZeRO-3 engine keeps: slices of the trained weights, of the optimizer's state and of the
frozen weights; also the optimizer's hyper-parameters and step counts.

In: an engine. Out: views that may be read or filled, under the names of `module.named_parameters()`. It uses
internals of DeepSpeed, which is therefore pinned to an exact version (0.19.8). It works with any optimizer of
torch: a trial step on a parameter of two elements shows which tensors the optimizer keeps.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from phi3v_dist.engine.nvme import SwappedState
from phi3v_dist.engine.partition import full_shape

_STEP = "step"  # torch.optim's name of the step count, the only state that is not per element


@dataclass(frozen=True)
class TrainedSlice:
    """This rank's slice of a trained parameter.

    master: the flat float32 partition of its sub-group, that is of the parameters that the optimizer updates
        together. The slice is [offset, offset + count) of it, padding included.
    group: number of the optimizer's parameter group.
    """

    name: str
    parameter: Any
    master: torch.Tensor
    offset: int
    count: int
    sub_group: int
    group: int

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """The slice's part [count] of a flat tensor with the layout of `master`: a view."""
        return flat.narrow(0, self.offset, self.count)


@dataclass(frozen=True)
class StateTensor:
    """A tensor that the optimizer keeps per element of a weight, such as exp_avg. initial: its value before
    the first step.
    """

    name: str
    dtype: torch.dtype
    initial: float


def trained_slices(engine: Any) -> Iterator[TrainedSlice]:
    """The slices of the trained parameters, sub-group after sub-group."""
    zero = engine.optimizer
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    for sub_group, parameters in enumerate(zero.fp16_groups):
        master, offset = zero.fp32_partitioned_groups_flat[sub_group], 0
        group = zero.sub_group_to_group_id[sub_group]
        for parameter in parameters:
            count = parameter.partition_numel()
            yield TrainedSlice(
                names[parameter],
                parameter,
                master,
                offset=offset,
                count=count,
                sub_group=sub_group,
                group=group,
            )
            offset += count


def frozen_parameters(engine: Any) -> Iterator[tuple[str, Any]]:
    """(name, parameter) of each frozen parameter."""
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            yield name, parameter


def parameter_shapes(engine: Any) -> dict[str, tuple[tuple[int, ...], bool]]:
    """Name -> (shape of the whole parameter, whether it is frozen)."""
    return {n: (full_shape(p), not p.requires_grad) for n, p in engine.module.named_parameters()}


def write_back(trained: TrainedSlice) -> None:
    """Copies the master weights of a slice to the weights that the model computes with."""
    trained.parameter.ds_tensor.data.copy_(trained.of(trained.master.data))


def refresh_whole_parameters(engine: Any) -> None:
    """Gathers again the small parameters that every rank keeps whole (parallel.persistence_threshold)."""
    whole = engine.optimizer.persistent_parameters
    if whole:
        whole[0].partition(whole)
        whole[0].all_gather(whole)


class OptimizerState:
    """The state of the engine's optimizer. tensors: what it keeps per element of a weight.

    Where DeepSpeed swaps the state to files, call `hold` before reading or filling the tensors of a slice,
    and `release` at the end. Raises RuntimeError for an optimizer with state that a checkpoint cannot hold.
    """

    def __init__(self, engine: Any) -> None:
        self._optimizer: torch.optim.Optimizer = engine.optimizer.optimizer
        self._swapped = SwappedState(engine.optimizer)
        # On the device of the master weights, because that decides where the state is: AdamW keeps its step
        # count on the parameter's device with fused=True, else on the CPU (torch 2.13).
        found = _try_optimizer(self._optimizer, engine.optimizer.fp32_partitioned_groups_flat[0].device)
        self.tensors = tuple(
            StateTensor(name, value.dtype, float(value[0]))
            for name, value in found.items()
            if isinstance(value, torch.Tensor) and value.shape == (2,)
        )
        self._step = found.get(_STEP)
        per_element = {each.name for each in self.tensors}
        others = [name for name, value in found.items() if value is not None]
        if unknown := sorted({*others} - per_element - {_STEP}):
            raise RuntimeError(
                f"{type(self._optimizer).__name__} keeps {', '.join(unknown)}, neither per element nor as "
                "a step count; a checkpoint cannot hold that"
            )

    @property
    def is_swapped(self) -> bool:
        """Whether some of it is in files; then only the training thread may read it."""
        return self._swapped.is_used

    def hold(self, trained: TrainedSlice) -> None:
        """Brings the sub-group of `trained` into memory."""
        self._swapped.hold(trained.sub_group)

    def release(self, *, changed: bool = False) -> None:
        """Releases the sub-group in memory. changed: write it to its files first."""
        self._swapped.release(changed=changed)

    def read(self, trained: TrainedSlice, kind: StateTensor) -> torch.Tensor:
        """The slice's part [count] of a tensor; the initial values before the optimizer's first step."""
        flat = self._optimizer.state[trained.master].get(kind.name)
        if flat is None:
            return torch.full((trained.count,), kind.initial, dtype=kind.dtype)
        return trained.of(flat)

    def place(self, trained: TrainedSlice, kind: StateTensor) -> torch.Tensor:
        """The slice's part [count] of a tensor, to be filled: a view. The tensor is created if needed."""
        state = self._optimizer.state[trained.master]
        if state.get(kind.name) is None:
            state[kind.name] = torch.full_like(trained.master.data, kind.initial, dtype=kind.dtype)
        return trained.of(state[kind.name])

    def set_step(self, trained: TrainedSlice, step: float) -> None:
        """Sets the step count of the slice's sub-group, if the optimizer has one."""
        if self._step is not None:
            self._optimizer.state[trained.master][_STEP] = _step_like(self._step, step)

    def steps(self, slices: list[TrainedSlice]) -> list[float]:
        """The step count of each parameter group; 0 before its first step. slices: all of this rank.

        Raises RuntimeError if the counts differ within a group.
        """
        found: list[set[float]] = [set() for _ in self._optimizer.param_groups]
        for trained in slices:
            state = self._optimizer.state.get(trained.master, {})
            found[trained.group].add(float(state.get(_STEP, 0.0)))
        for group, steps in enumerate(found):
            if len(steps) > 1:
                raise RuntimeError(f"the step counts differ in parameter group {group}: {sorted(steps)}")
        return [max(steps, default=0.0) for steps in found]

    def hyper_parameters(self) -> list[dict[str, Any]]:
        """The settings of each parameter group that JSON can hold: name, lr, weight_decay and so on."""
        return [
            {
                key: value
                for key, value in group.items()
                if key != "params" and isinstance(value, int | float | str | list | tuple | None)
            }
            for group in self._optimizer.param_groups
        ]

    def set_hyper_parameters(self, stored: list[dict[str, Any]]) -> None:
        """Sets what `hyper_parameters` returned. Lists become tuples, because JSON has no tuples."""
        for group, values in zip(self._optimizer.param_groups, stored, strict=True):
            group.update({k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def _step_like(kept: Any, step: float) -> Any:
    """`step` as the optimizer keeps its count: a tensor with the dtype and device of `kept`, or a number."""
    return torch.full_like(kept, step) if isinstance(kept, torch.Tensor) else type(kept)(step)


def _try_optimizer(optimizer: torch.optim.Optimizer, device: torch.device) -> dict[str, Any]:
    """The state that `optimizer` keeps for a float32 parameter of two elements on `device`, after a step with
    a gradient of zero. `optimizer` itself does not change.
    """
    parameter = torch.nn.Parameter(torch.zeros(2, device=device))
    parameter.grad = torch.zeros(2, device=device)
    trial = copy.copy(optimizer)
    # torch.optim copies only state, groups and defaults (2.13); a subclass may have attributes of its own.
    vars(trial).update({name: value for name, value in vars(optimizer).items() if name not in vars(trial)})
    trial.state = defaultdict(dict)
    trial.param_groups = [{**optimizer.param_groups[0], "params": [parameter]}]
    type(optimizer).step(trial)
    return dict(trial.state[parameter])

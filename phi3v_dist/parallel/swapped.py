"""Optimizer state that DeepSpeed keeps in files (ZeRO-Infinity), brought to memory group by group, to be
read or filled by checkpoints.

In: a ZeRO-3 optimizer. Called by `checkpoint` and `state`. It uses DeepSpeed's internals, as these two do,
so DeepSpeed is pinned exactly (0.19.8).
"""

from __future__ import annotations

from typing import Any

from shards.format import BadInputError


class SwappedState:
    """Holds at most one sub-group of the optimizer in memory; the others are where they belong. Where nothing
    is swapped all of it is in memory, and `hold` and `release` do nothing.
    """

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._held: int | None = None

    @property
    def is_used(self) -> bool:
        """Whether any of the state is in files."""
        return any(self._is_swapped(number) for number in range(len(self._optimizer.fp16_groups)))

    def _is_swapped(self, number: int) -> bool:
        return bool(self._optimizer._swappable_optimizer_subgroup(number))

    def hold(self, number: int) -> None:
        """Brings sub-group `number` into memory; the one that was there goes, unchanged."""
        if number == self._held:
            return
        self.release()
        if self._is_swapped(number):
            self._optimizer._optimizer_states_and_gradient_swap_in(number)
            self._held = number

    def release(self, changed: bool = False) -> None:
        """Gives the memory back. changed: what is in it is written to the files first."""
        if self._held is None:
            return
        if changed:
            self._optimizer._writeback_swap_state(self._held, True, False)
        else:
            self._optimizer._release_swap_buffers(self._held)
        self._held = None


def check_swapping() -> None:
    """Raises BadInputError if DeepSpeed cannot read and write files here as parallel.offload_optimizer=nvme
    needs it.
    """
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        raise BadInputError(
            "parallel.offload_optimizer=nvme: DeepSpeed's asynchronous I/O needs libaio's headers and a C++ "
            "compiler on every node (Debian: libaio-dev, g++, ninja-build); install them, or offload to cpu"
        )

"""Optimizer state that DeepSpeed keeps in files (ZeRO-Infinity): their folder, what is needed to swap, and
what was swapped brought to memory group by group, to be read or filled by checkpoints.

In: the run's configuration; a ZeRO-3 optimizer. Called by the train loop, `checkpoint` and `state`. It uses
DeepSpeed's internals, as these two do, so DeepSpeed is pinned exactly (0.19.8).
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import platform
import shutil
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import torch

from phi3v_dist.config import RunConfig
from phi3v_dist.parallel.mesh import Mesh
from shards.common.errors import BadInputError

_log = logging.getLogger(__name__)


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


def swap_dir(config: RunConfig) -> Path:
    """The run's own folder in parallel.offload_path. DeepSpeed names its files by rank and parameter alone,
    so two runs on one node would write into each other's.
    """
    digest = hashlib.sha256(os.fsencode(config.run_dir.resolve())).hexdigest()[:12]
    return Path(config.parallel.offload_path or "") / f"swap-{digest}"


def prepare_swapping(config: RunConfig, mesh: Mesh) -> None:
    """Removes what a killed start has left of the run's files, and compiles DeepSpeed's asynchronous I/O if
    need be, once on each node. All ranks call it.

    Raises BadInputError on every rank if it cannot be compiled as parallel.offload_optimizer=nvme needs it.
    """
    if mesh.local_rank == 0:
        shutil.rmtree(swap_dir(config), ignore_errors=True)
    mesh.everywhere(partial(_compile, Path(config.parallel.offload_path or "")))


def _compile(offload_path: Path) -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    builder = AsyncIOBuilder()
    if not builder.is_compatible(verbose=False):
        raise BadInputError(
            "parallel.offload_optimizer=nvme: DeepSpeed's asynchronous I/O needs libaio's headers and a C++ "
            "compiler on every node (Debian: libaio-dev, g++, ninja-build); install them, or offload to cpu"
        )
    version = f"torch-{torch.__version__}-python-{platform.python_version()}"
    folder = offload_path / "extensions" / version
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
    with (folder / "turn").open("w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)  # unlike torch's own lock files this one goes with its process
        # Torch's are left by a start that was killed; torch 2.13 would wait for them for ever.
        for left in folder.glob("*/lock"):
            _log.warning("%s: left by a start that was killed; removed", left)
            left.unlink()
        try:
            builder.load(verbose=False)
        except (RuntimeError, ImportError, OSError, subprocess.SubprocessError) as error:
            raise BadInputError(
                f"parallel.offload_optimizer=nvme: DeepSpeed's asynchronous I/O cannot be compiled in "
                f"{folder} ({' '.join(str(error).split())[:300]}); mend that, or offload to cpu"
            ) from error


def remove_swapped(config: RunConfig, mesh: Mesh) -> None:
    """Removes this rank's files, and the run's folder once it is empty. The engine must be gone."""
    folder = swap_dir(config)
    shutil.rmtree(folder / "zero_stage_3" / "optimizer" / f"rank{mesh.rank}", ignore_errors=True)
    for empty in (folder / "zero_stage_3" / "optimizer", folder / "zero_stage_3", folder):
        try:
            empty.rmdir()
        except OSError:  # another rank's are still there; it will do it
            return

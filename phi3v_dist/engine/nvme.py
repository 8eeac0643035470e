"""Optimizer state that DeepSpeed keeps in files (ZeRO-Infinity): where the files are, compiling what swapping
needs, and access to the state, one sub-group at a time.

In: the run's configuration, or a ZeRO-3 optimizer. It uses internals of DeepSpeed, which is therefore pinned
to an exact version (0.19.8).
"""

from __future__ import annotations

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
from shards.common.locks import locked
from shards.common.text import one_line

_log = logging.getLogger(__name__)


class SwappedState:
    """Brings swapped sub-groups of the optimizer into memory, one at a time.

    Where nothing is swapped, all state is in memory, and `hold` and `release` do nothing.
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
        """Brings sub-group `number` into memory. The one held before is released without being written."""
        if number == self._held:
            return
        self.release()
        if self._is_swapped(number):
            self._optimizer._optimizer_states_and_gradient_swap_in(number)
            self._held = number

    def release(self, *, changed: bool = False) -> None:
        """Releases the sub-group in memory. changed: write it to its files first."""
        if self._held is None:
            return
        if changed:
            self._optimizer._writeback_swap_state(self._held, True, False)
        else:
            self._optimizer._release_swap_buffers(self._held)
        self._held = None


def swap_dir(config: RunConfig) -> Path:
    """The run's own directory in parallel.offload_path.

    DeepSpeed names its files only by rank and parameter, so two runs on one node would overwrite each
    other's.
    """
    digest = hashlib.sha256(os.fsencode(config.run_dir.resolve())).hexdigest()[:12]
    return Path(config.parallel.offload_path or "") / f"swap-{digest}"


def prepare_swapping(config: RunConfig, mesh: Mesh) -> None:
    """Removes files that a killed start of this run left, and compiles DeepSpeed's asynchronous I/O, which
    parallel.offload_optimizer=nvme needs, once on each node. All ranks call it.

    Raises BadInputError on every rank if it cannot be compiled.
    """
    if mesh.local_rank == 0:
        shutil.rmtree(swap_dir(config), ignore_errors=True)
    mesh.everywhere(partial(_compile, Path(config.parallel.offload_path or "")))


def _compile(offload_path: Path) -> None:
    """Compiles it into `offload_path`, unless another process or an earlier run has. Raises BadInputError."""
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
    with locked(folder / "turn"):  # unlike torch's lock files it is released when its process ends
        # A killed start leaves torch's lock files behind; torch 2.13 would wait for them forever.
        for left in folder.glob("*/lock"):
            _log.warning("%s: left by a start that was killed; removed", left)
            left.unlink()
        try:
            builder.load(verbose=False)
        except (RuntimeError, ImportError, OSError, subprocess.SubprocessError) as error:
            raise BadInputError(
                f"parallel.offload_optimizer=nvme: DeepSpeed's asynchronous I/O cannot be compiled in "
                f"{folder} ({one_line(error)[:300]}); fix that, or offload to cpu"
            ) from error


def remove_swapped(config: RunConfig, mesh: Mesh) -> None:
    """Removes the files of this rank, and the run's directory once it is empty. Call it after the engine has
    been destroyed.
    """
    folder = swap_dir(config)
    shutil.rmtree(folder / "zero_stage_3" / "optimizer" / f"rank{mesh.rank}", ignore_errors=True)
    for empty in (folder / "zero_stage_3" / "optimizer", folder / "zero_stage_3", folder):
        try:
            empty.rmdir()
        except OSError:  # files of another rank are still there; that rank removes the directory
            return

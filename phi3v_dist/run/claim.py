"""Who may write into `runs/NAME`: one job at a time, and only the run that the directory belongs to.

`claim` is the outermost context of a training process: it holds the lock, the heartbeat and the requests to
stop. `open_run_dir` refuses a directory that holds another run.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock

from phi3v_dist.config import RunConfig, changed_keys, config_json, flatten
from phi3v_dist.parallel.heartbeat import Heartbeat
from phi3v_dist.parallel.mesh import Mesh
from phi3v_dist.run.layout import CONFIG, LOGS, RUN_ID
from phi3v_dist.run.logs import not_writable
from phi3v_dist.run.stop import STOP, Stop
from shards.common.errors import BadInputError
from shards.common.files import write_atomically
from shards.common.locks import LockTimeoutError, take_lock

# What may change between one start of a run and the next; anything else would make it another run.
# data.path may: shards are staged to node-local disks, and the fingerprint guards their content.
_MAY_CHANGE = (
    "checkpoint.",
    "eval.",
    "track.",
    "parallel.",
    "runs_dir",
    "data.path",
    "data.workers",
    "data.prefetch",
    "data.cache_",
)
_MAY_CHANGE_WITH_WARNING = ("train.steps", "train.epochs", "model.gradient_checkpointing",
                            "model.vision_chunk", "data.max_bad_fraction", "data.val_split")  # fmt: skip
_LOCK_WAIT_S = 180.0
"""Seconds that a start waits for the ranks of a killed launcher, which still save."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """A claimed run directory. stop: requests to stop. heartbeat: told what this rank is doing."""

    directory: Path
    stop: Stop
    heartbeat: Heartbeat


@contextlib.contextmanager
def claim(config: RunConfig, mesh: Mesh) -> Iterator[Run]:
    """Inside, this job alone trains in the run directory; all ranks enter together.

    Raises BadInputError on every rank if another job holds the directory, LostRankError in place of the
    failure of a collective.
    """
    directory = config.run_dir
    stop = Stop(directory / STOP if mesh.local_rank == 0 else None)
    lock = RunLock(directory)
    with Heartbeat(mesh, directory / LOGS) as heartbeat:
        mesh.on_main(lambda: lock.take(min(_LOCK_WAIT_S, mesh.timeout_s / 2)))
        try:
            yield Run(directory, stop, heartbeat)
        finally:
            lock.release()


class RunLock:
    """RUN/.lock, for the main rank alone. The system releases it when its holder dies."""

    def __init__(self, run_dir: Path) -> None:
        self._file = run_dir / ".lock"
        self._lock: filelock.BaseFileLock | None = None

    def take(self, wait_s: float) -> None:
        """Waits `wait_s` seconds at most: ranks of a killed launcher finish their step and save before they
        end. Raises BadInputError if another process still holds the directory then.
        """
        try:
            self._lock = take_lock(self._file, timeout_s=0)
        except LockTimeoutError:
            _log.warning("%s: waiting for %s, which still trains here", self._file.parent, self._holder())
            self._lock = self._wait(time.monotonic() + wait_s)
        if self._lock is not None:
            with contextlib.suppress(OSError):
                self._file.write_text(f"process {os.getpid()} on {socket.gethostname()}\n")

    def _wait(self, until: float) -> filelock.BaseFileLock | None:
        try:
            return take_lock(self._file, timeout_s=max(0.0, until - time.monotonic()))
        except LockTimeoutError as error:
            raise BadInputError(
                f"{self._file.parent}: {self._holder()} trains here; wait for it or end it, or choose "
                "another name"
            ) from error

    def _holder(self) -> str:
        return self._file.read_text().strip() or "another process"

    def release(self) -> None:
        """Lets the next job in; does nothing if the lock is not held."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None


def open_run_dir(
    config: RunConfig, data_fingerprint: str, before: dict[str, Any] | None, *, wandb_id: str | None
) -> None:
    """Writes config.yaml of the run that starts or resumes here; for the main rank.

    before: what made the checkpoint that it resumes from (`provenance`), None without one. wandb_id: of the
    W&B run in that checkpoint. Raises BadInputError if it is of another configuration or other data, naming
    what differs and what may.
    """
    run_dir = config.run_dir
    try:
        if before is not None:
            _check_same(run_dir, config, data_fingerprint, before=before)
            if wandb_id and not (run_dir / RUN_ID).exists():
                write_atomically(run_dir / RUN_ID, wandb_id.encode())
        write_atomically(run_dir / CONFIG, config_json(config).encode())
    except OSError as error:
        raise not_writable(run_dir, error) from error


def _check_same(run_dir: Path, config: RunConfig, data_fingerprint: str, *, before: dict[str, Any]) -> None:
    old, new = _with_defaults(before["config"]), config.model_dump(mode="json")
    changed = changed_keys(old, new)
    if "data.sources" in changed and _weights(old) == _weights(new):
        changed.remove("data.sources")  # as for data.path
    refused = [key for key in changed if not key.startswith((*_MAY_CHANGE, *_MAY_CHANGE_WITH_WARNING))]
    was, now = dict(flatten(old)), dict(flatten(new))
    if refused:
        differences = "; ".join(f"{key} was {was.get(key)}, now {now.get(key)}" for key in refused[:8])
        allowed = ", ".join(
            f"{key}*" if key.endswith(".") else key for key in (*_MAY_CHANGE_WITH_WARNING, *_MAY_CHANGE)
        )
        raise BadInputError(
            f"{run_dir}: holds a run with another {', '.join(refused)} ({differences}); set it back, or "
            f"choose another name for the new run (what may change: {allowed})"
        )
    if before["data_fingerprint"] != data_fingerprint:
        raise BadInputError(
            f"{run_dir}: was trained on other data than {', '.join(config.data.paths)} holds now; "
            "restore the data, or choose another name for the new run"
        )
    for key in changed:
        level = logging.WARNING if key.startswith(_MAY_CHANGE_WITH_WARNING) else logging.INFO
        change = f"was {was.get(key)}, now {now.get(key)}"
        _log.log(level, "%s: resumes with another %s: %s", run_dir, key, change)


def _weights(config: dict[str, Any]) -> list[float | None] | None:
    sources = config["data"].get("sources")
    return None if sources is None else [source["weight"] for source in sources]


def _with_defaults(tree: dict[str, Any]) -> dict[str, Any]:
    """A dumped tree, with the defaults of keys that its version did not know yet."""
    try:
        return RunConfig.model_validate(tree).model_dump(mode="json")
    except ValueError:
        return tree

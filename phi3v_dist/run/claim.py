"""The run directory: who may write into `runs/NAME`, where it goes on from, and where its logs go.

In: the configuration. Out: a directory that belongs to this run alone. Called by the train loop;
the names are those by which all others know a run's files.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import socket
import time
from pathlib import Path
from typing import Any

from phi3v_dist.config import RunConfig, changed_keys, config_json, flatten
from phi3v_dist.run.layout import CONFIG, RUN_ID
from phi3v_dist.run.logs import not_writable
from shards.common.errors import BadInputError
from shards.common.files import write_atomically

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
_MAY_CHANGE_ALOUD = ("train.steps", "train.epochs", "model.gradient_checkpointing", "model.vision_chunk",
                     "data.max_bad_fraction", "data.val_split")  # fmt: skip
_log = logging.getLogger(__name__)


class RunLock:
    """RUN/.lock: one job at a time trains in a run directory; the system lets go of it when its holder dies.

    For the main rank alone. Ranks of a killed launcher finish their step and save before they end, so a start
    right after waits for them.
    """

    def __init__(self, run_dir: Path) -> None:
        self._file = run_dir / ".lock"
        self._descriptor: int | None = None

    def take(self, wait_s: float) -> None:
        """Raises BadInputError if another process still holds the directory after `wait_s` seconds."""
        descriptor = os.open(self._file, os.O_RDWR | os.O_CREAT, 0o666)
        until, said = time.monotonic() + wait_s, False
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                    _log.warning(
                        "%s: this file system has no locks (%s); do not start a run twice", self._file, error
                    )
                    break
            holder = self._file.read_text().strip() or "another process"
            if time.monotonic() > until:
                os.close(descriptor)
                raise BadInputError(
                    f"{self._file.parent}: {holder} trains here; wait for it or end it, or choose "
                    "another name"
                )
            if not said:
                _log.warning("%s: waiting for %s, which still trains here", self._file.parent, holder)
                said = True
            time.sleep(0.5)
        self._descriptor = descriptor
        with contextlib.suppress(OSError):
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())

    def release(self) -> None:
        """Lets the next job in; nothing if it is not held."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def open_run_dir(
    config: RunConfig, data_fingerprint: str, before: dict[str, Any] | None, *, wandb_id: str | None
) -> None:
    """Makes the run directory of `config` this run's. before, wandb_id: what the checkpoint that it resumes
    from says of the run (configuration, data_fingerprint) and of its W&B run; None without one.

    Raises BadInputError if that is of another configuration or other data, naming what differs and what may.
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
    refused = [key for key in changed if not key.startswith((*_MAY_CHANGE, *_MAY_CHANGE_ALOUD))]
    was, now = dict(flatten(old)), dict(flatten(new))
    if refused:
        differences = "; ".join(f"{key} was {was.get(key)}, now {now.get(key)}" for key in refused[:8])
        allowed = ", ".join(
            f"{key}*" if key.endswith(".") else key for key in (*_MAY_CHANGE_ALOUD, *_MAY_CHANGE)
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
        if key.startswith(_MAY_CHANGE_ALOUD):
            _log.warning(
                "%s: goes on with another %s: was %s, now %s", run_dir, key, was.get(key), now.get(key)
            )
        else:
            _log.info("%s: %s was %s, now %s", run_dir, key, was.get(key), now.get(key))


def _weights(config: dict[str, Any]) -> list[float | None] | None:
    sources = config["data"].get("sources")
    return None if sources is None else [source["weight"] for source in sources]


def _with_defaults(tree: dict[str, Any]) -> dict[str, Any]:
    """A dumped tree, with the defaults of keys that its version did not know yet."""
    try:
        return RunConfig.model_validate(tree).model_dump(mode="json")
    except ValueError:
        return tree

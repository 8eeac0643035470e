"""Locks between processes, on one node or on storage that several nodes share. The system lets go of a lock
when its holder dies.

`take_lock` locks a file of its own; `alone_in` a whole directory, which readers may share.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

import filelock

from shards.common.errors import BadInputError

LockTimeoutError = filelock.Timeout
_PATIENCE = 2.0  # seconds
_log = logging.getLogger(__name__)


def take_lock(file: Path, *, timeout_s: float = -1) -> filelock.BaseFileLock | None:
    """Locks `file`, which is made if need be and stays; release it with `.release()` or use it as a context.

    timeout_s: seconds to wait for its holder, 0 for one attempt, negative for ever. Out: the lock; None, with
    a warning, on a file system that has no locks. Raises LockTimeoutError.
    """
    # No soft lock: it would outlive a holder that is killed.
    lock = filelock.FileLock(
        file,
        timeout=timeout_s,
        mode=0o666,
        thread_local=False,
        fallback_to_soft=False,
        preserve_lock_file=True,
    )
    try:
        lock.acquire()
    except LockTimeoutError:
        raise
    except (NotImplementedError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
            raise
        _log.warning("%s: this file system has no locks (%s); do not start a job twice", file, error)
        return None
    return lock


@contextlib.contextmanager
def locked(file: Path, *, timeout_s: float = -1) -> Iterator[None]:
    """The context holds the lock of `take_lock`. Raises LockTimeoutError."""
    lock = take_lock(file, timeout_s=timeout_s)
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


@contextlib.contextmanager
def alone_in(root: Path, lock: str | None = None, shared: bool = False) -> Iterator[None]:
    """No other process is in this context for the directory `root` while it is open. lock: name of a file in
    it, made and deleted here, where several share the directory and each has its own part.

    shared: any number may be here that are `shared`. Raises BadInputError if another one still is here after
    some seconds: the processes of a killed build need a moment to end. Some network file systems lock no
    directories: there, two at once are the user's to avoid.
    """
    path = root if lock is None else root / lock
    descriptor = os.open(path, os.O_RDONLY if lock is None else os.O_RDWR | os.O_CREAT)
    try:
        _lock(descriptor, fcntl.LOCK_SH if shared else fcntl.LOCK_EX, path)
        yield
        if lock is not None:
            path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, kind: int, path: Path) -> None:
    until = time.monotonic() + _PATIENCE
    while True:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno != errno.EWOULDBLOCK:
                return
            if time.monotonic() >= until:
                raise BadInputError(
                    f"{path}: another process is writing here; wait for it or end it"
                ) from error
        time.sleep(0.05)

"""Locks between processes, on one node or on storage that several nodes share. The operating system releases
a lock when its holder dies.

`take_lock` and `locked` lock a file. `alone_in` locks a directory, which several processes may share.
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
_WAIT_S = 2.0  # of `alone_in` and `alone_with`: the processes of a killed build need a moment to end
_log = logging.getLogger(__name__)


def take_lock(file: Path, *, timeout_s: float = -1) -> filelock.BaseFileLock | None:
    """Locks `file`, which is created if needed and is not deleted. Release the lock with `.release()`, or use
    it as a context manager.

    timeout_s: seconds to wait for another holder; 0: try once; negative: wait without limit. Returns None,
    with a warning, on a file system without locks. Raises LockTimeoutError.
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
    """Holds the lock of `take_lock` while the context is open. Raises LockTimeoutError."""
    lock = take_lock(file, timeout_s=timeout_s)
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


@contextlib.contextmanager
def alone_with(file: Path) -> Iterator[None]:
    """Holds the lock of `file` while the context is open, and deletes the file at its end.

    Raises BadInputError if another process still holds it after some seconds.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(file, timeout_s=_WAIT_S))
        except LockTimeoutError as error:
            raise _busy(file) from error
        yield
        # Before the release. A process that waits for the deleted file notices that (filelock compares the
        # inodes) and creates a new one.
        file.unlink(missing_ok=True)


@contextlib.contextmanager
def alone_in(root: Path, *, shared: bool = False) -> Iterator[None]:
    """Locks the directory `root` while the context is open: alone, or together with all that are `shared`.

    Raises BadInputError if another process is in the way for some seconds.

    This is flock(2) on the directory itself. filelock (4.2) offers two shared locks, and neither fits: one
    keeps an SQLite file in the directory, the other is a file with a heartbeat, which a killed process leaves
    behind. Where a network file system cannot lock directories, this does nothing, and users must not start
    two builds at once.
    """
    descriptor = os.open(root, os.O_RDONLY)
    try:
        _flock(descriptor, fcntl.LOCK_SH if shared else fcntl.LOCK_EX, root)
        yield
    finally:
        os.close(descriptor)


def _flock(descriptor: int, kind: int, path: Path) -> None:
    until = time.monotonic() + _WAIT_S
    while True:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno != errno.EWOULDBLOCK:
                return
            if time.monotonic() >= until:
                raise _busy(path) from error
        time.sleep(0.05)


def _busy(path: Path) -> BadInputError:
    return BadInputError(f"{path}: another process is writing here; wait for it or end it")

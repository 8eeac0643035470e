"""Locks: a directory is one process's at a time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from shards.common.errors import BadInputError

_PATIENCE = 2.0  # seconds


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

"""Atomic writes: a file is written beside its final path as `.NAME.partial` and then renamed, so that readers
see the complete file or none.

In: a path and bytes, or a finished partial file.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def partial_path(path: Path) -> Path:
    """Where `path` is written until it is complete. What a killed process left there is overwritten."""
    return path.with_name(f".{path.name}.partial")


def publish(path: Path) -> None:
    """Renames the partial file of `path` to `path` and syncs the directory, so that it survives a crash.

    The content must have been synced before.
    """
    os.replace(partial_path(path), path)
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def create_once(path: Path, data: bytes) -> None:
    """Creates `path` with `data`, atomically, if it does not exist. Of several processes that do this at the
    same time, also on several nodes, the first one wins and the others change nothing.
    """
    partial = path.with_name(f"{partial_path(path).name}.{os.uname().nodename}.{os.getpid()}")
    partial.write_bytes(data)
    try:
        with contextlib.suppress(FileExistsError):
            os.link(partial, path)
    finally:
        partial.unlink()


def write_atomically(path: Path, data: bytes, durable: bool = True) -> None:
    """Writes `data` to `path`, replacing what is there.

    durable: synced to the disk before this returns; False for files that can be made again.
    """
    partial = partial_path(path)
    with partial.open("wb") as stream:
        stream.write(data)
        if durable:
            stream.flush()
            os.fsync(stream.fileno())
    if durable:
        publish(path)
    else:
        os.replace(partial, path)

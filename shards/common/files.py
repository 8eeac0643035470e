"""Files that are whole or absent: written beside their place under a `.NAME.partial` name, then renamed.

In: a path and bytes, or a finished partial file. Called by every file of this package that writes.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def partial_path(path: Path) -> Path:
    """Where `path` is written until it is whole; a left-over of a killed process is simply written again."""
    return path.with_name(f".{path.name}.partial")


def publish(path: Path) -> None:
    """Renames the partial file of `path` to `path` and brings the directory entry to the disk."""
    os.replace(partial_path(path), path)
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def create_whole(path: Path, data: bytes) -> None:
    """Makes `path` with `data` if it is not there; whoever comes second changes nothing."""
    partial = path.with_name(f"{partial_path(path).name}.{os.uname().nodename}.{os.getpid()}")
    partial.write_bytes(data)
    try:
        with contextlib.suppress(FileExistsError):
            os.link(partial, path)
    finally:
        partial.unlink()


def write_atomically(path: Path, data: bytes, durable: bool = True) -> None:
    """Writes `data` to `path`. durable: on the disk when this returns; False where it can be made again."""
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

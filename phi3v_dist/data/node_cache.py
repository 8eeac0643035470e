"""Shards on a disk of the node, fetched whole in the background while their first samples are read from afar.

In: a directory shared by all processes of the node, and a limit in bytes. Out: paths of whole, verified
copies. A copy is named after its content (sha256 of dataset.json), so one of another version is never taken
for it; it appears by rename; the least recently used ones go when room is needed. Called by `reader`.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shards.format.dataset import ShardInfo

_BLOCK = 1 << 22
_AT_ONCE = 2  # fetches of one process
_TOUCH_S = 60.0  # a copy in use says so no more often than this
_ABANDONED_S = 3600.0  # a partial copy that nobody has written to for so long
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CacheOptions:
    """directory: on a disk of the node. limit: bytes that all copies together may take."""

    directory: str
    limit: int


class NodeCache:
    """Copies of shards. One per process; any number of processes share the directory."""

    def __init__(self, options: CacheOptions) -> None:
        self._directory, self._limit = Path(options.directory), options.limit
        self._directory.mkdir(parents=True, exist_ok=True)
        self._pool: ThreadPoolExecutor | None = None
        self._asked: set[str] = set()
        self._touched: dict[str, float] = {}
        self._lock = threading.Lock()
        self.wrong: dict[str, str] = {}  # copies whose content is not what dataset.json says, and why

    def path(self, fs: Any, source: str, shard: ShardInfo) -> Path | None:
        """The copy of a shard; None while there is none: then one is being fetched, if it can be kept."""
        name = copy_name(shard)
        copy = self._directory / name
        now = time.monotonic()
        if copy.exists():
            if now - self._touched.get(name, -_TOUCH_S) >= _TOUCH_S:
                self._touched[name] = now
                with contextlib.suppress(OSError):
                    os.utime(copy)
            self._asked.discard(name)
            return copy
        with self._lock:
            if name not in self._asked and shard.bytes <= self._limit:
                self._asked.add(name)
                if self._pool is None:
                    self._pool = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="node-cache")
                self._pool.submit(self._fetch, fs, source, shard, copy)
        return None

    def close(self) -> None:
        """Ends fetches that have not begun; waits for those that have."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _fetch(self, fs: Any, source: str, shard: ShardInfo, copy: Path) -> None:
        try:
            with _alone(self._directory / f".{copy.name}.lock", wait=False) as mine:
                if not mine or copy.exists():
                    return  # another process fetches it, or just has
                partial = self._directory / f".{copy.name}.partial"
                if not self._make_room(partial, shard.bytes):
                    return
                try:
                    digest = hashlib.sha256()
                    with fs.open(source, "rb") as stream, partial.open("r+b") as out:
                        while block := stream.read(_BLOCK):
                            digest.update(block)
                            out.write(block)
                        whole = out.tell() == shard.bytes
                    if not whole or digest.hexdigest() != shard.sha256:
                        self.wrong[copy.name] = (
                            f"{shard.name}: its content is not that of {shard.sha256[:12]} in dataset.json; "
                            "it was replaced by another version or is damaged"
                        )
                        return
                    os.replace(partial, copy)
                finally:
                    partial.unlink(missing_ok=True)
        except Exception as error:  # of any store; samples are still read from afar
            _log.warning("%s: no copy on this node (%s)", source, error)

    def _make_room(self, partial: Path, size: int) -> bool:
        """Deletes copies until `size` more bytes fit, and takes that room with an empty file of that size."""
        with _alone(self._directory / ".room.lock", wait=True):
            partial.unlink(missing_ok=True)
            copies = []
            total = 0
            for entry in os.scandir(self._directory):
                with contextlib.suppress(FileNotFoundError):
                    stat = entry.stat()
                    abandoned = time.time() - stat.st_mtime > _ABANDONED_S
                    if entry.name.endswith(".tar") or (entry.name.endswith(".partial") and abandoned):
                        copies.append((stat.st_mtime, stat.st_size, entry.path))
                    total += stat.st_size
            for _, freed, path in sorted(copies):
                if total + size <= self._limit:
                    break
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)  # a process that has it open goes on reading it
                total -= freed
            if total + size > self._limit:
                return False
            with partial.open("wb") as out:
                out.truncate(size)
            return True


def copy_name(shard: ShardInfo) -> str:
    """The name of a copy: equal names, equal content."""
    return f"{shard.sha256[:24]}-{shard.bytes}.tar"


@contextlib.contextmanager
def _alone(lock: Path, wait: bool) -> Iterator[bool]:
    """Whether this process has the lock file to itself until the end of the context."""
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError:
            yield False
            return
        yield True
    finally:
        os.close(descriptor)

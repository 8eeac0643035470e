"""Copies of shards on a disk of the node, fetched in the background while the first samples of a shard are
still read from its store.

In: a directory shared by all processes of the node, and a limit in bytes. Out: paths of complete, verified
copies. The name of a copy holds its sha256 from dataset.json, so a copy of another version is never used. The
least recently used copies are deleted when room is needed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phi3v_dist.data.local_copy import fetch_file
from shards.common.errors import BadInputError
from shards.common.locks import LockTimeoutError, locked
from shards.format.dataset import ShardInfo

_AT_ONCE = 2  # fetches of one process at a time
_TOUCH_S = 60.0  # the time of last use of a copy is updated at most this often
_ABANDONED_S = 3600.0  # a partial copy without a write for this long is deleted
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
        """The copy of a shard; None while there is none: a fetch is started if it can be kept."""
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
                self._pool.submit(self._fetch, fs, source, shard, copy=copy)
        return None

    def close(self) -> None:
        """Cancels fetches that have not begun; waits for those that have."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _fetch(self, fs: Any, source: str, shard: ShardInfo, *, copy: Path) -> None:
        try:
            with locked(self._directory / f".{copy.name}.lock", timeout_s=0):
                if copy.exists():
                    return  # another process has just fetched it
                partial = self._directory / f".{copy.name}.partial"
                if not self._make_room(partial, shard.bytes):
                    return
                try:
                    fetch_file(fs, source, copy, partial=partial, size=shard.bytes, sha256=shard.sha256)
                except BadInputError:
                    self.wrong[copy.name] = (
                        f"{shard.name}: its content is not that of {shard.sha256[:12]} in dataset.json; "
                        "it was replaced by another version or is damaged"
                    )
                finally:
                    partial.unlink(missing_ok=True)
        except LockTimeoutError:
            pass  # another process is fetching it
        except Exception as error:  # stores raise many types; samples are still read from the store
            _log.warning("%s: no copy on this node (%s)", source, error)

    def _make_room(self, partial: Path, size: int) -> bool:
        """Deletes copies until `size` more bytes fit, and reserves them with a sparse file of that size."""
        with locked(self._directory / ".room.lock"):
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
                    os.unlink(path)  # a process that has it open can still read it
                total -= freed
            if total + size > self._limit:
                return False
            with partial.open("wb") as out:
                out.truncate(size)
            return True


def copy_name(shard: ShardInfo) -> str:
    """The name of a copy; equal names mean equal content."""
    return f"{shard.sha256[:24]}-{shard.bytes}.tar"

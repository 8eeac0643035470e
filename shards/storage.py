"""Where a dataset is built: a local directory, or an object store with a local work directory.

Every finished partition is uploaded to the object store (tars, then ledger, then index), and its tars are
then deleted locally. So a worker on any machine can resume after the last partition in the store.
dataset.json is uploaded last.

In: `out` as the user gave it. Out: `Storage`.
"""

from __future__ import annotations

import contextlib
import hashlib
import urllib.parse
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec

from shards.common.errors import BadInputError
from shards.common.text import first_line
from shards.format.dataset import BUILD_JSON, DATASET_JSON, INDEX_DIR, LEDGER_DIR, files_in

LOCK_SUFFIX = ".lock"
TASKS = ".tasks"  # file with the number of tasks that build here; deleted when the dataset is complete


@dataclass(frozen=True)
class StoredFile:
    """size: bytes. version: changes when the content does (ETag or modification time)."""

    size: int
    version: str


@dataclass(frozen=True)
class Storage:
    """root: the local directory. filesystem, base: the object store (fsspec) and the path in it; None and ""
    for a local directory. All methods raise BadInputError if the store fails.
    """

    out: str
    root: Path
    filesystem: Any = None
    base: str = ""

    def pull(self) -> None:
        """Makes the local directory a copy of the store, without its tars, which resuming does not need."""
        if self.filesystem is None:
            return
        with self._store_errors():
            self.filesystem.invalidate_cache()
            names = [name for name in (BUILD_JSON, DATASET_JSON, TASKS) if self._exists(name)]
            names += [*self._names(INDEX_DIR), *self._names(LEDGER_DIR)]
            for folder in (self.root, self.root / INDEX_DIR, self.root / LEDGER_DIR):
                folder.mkdir(parents=True, exist_ok=True)
            for path in [path for path in self.root.rglob("*") if path.is_file()]:
                if path.suffix != LOCK_SUFFIX:
                    path.unlink()
            for name in sorted(names):
                self.filesystem.get_file(f"{self.base}/{name}", str(self.root / name))

    def read(self, name: str) -> str | None:
        """The text of a file in the store; None if there is no such file."""
        if self.filesystem is None:
            path = self.root / name
            return path.read_text() if path.is_file() else None
        with self._store_errors():
            try:
                return str(self.filesystem.cat_file(f"{self.base}/{name}").decode())
            except FileNotFoundError:
                return None

    def upload(self, names: Iterable[str]) -> None:
        """Copies files to the store, in this order. Tars are deleted locally after their upload."""
        if self.filesystem is None:
            return
        with self._store_errors():
            for name in names:
                self.filesystem.put_file(str(self.root / name), f"{self.base}/{name}")
                if name.endswith(".tar"):
                    (self.root / name).unlink()

    def remove(self, name: str) -> None:
        """Deletes a file in the store, then locally."""
        if self.filesystem is not None:
            with self._store_errors(), contextlib.suppress(FileNotFoundError):
                self.filesystem.rm_file(f"{self.base}/{name}")
        (self.root / name).unlink(missing_ok=True)

    def files(self) -> dict[str, StoredFile]:
        """The files in it by name, without those in its folders."""
        if self.filesystem is None:
            paths = [path for path in self.root.iterdir() if path.is_file()]
            facts = [(path.name, path.stat()) for path in paths]
            return {name: StoredFile(stat.st_size, str(stat.st_mtime_ns)) for name, stat in facts}
        with self._store_errors():
            self.filesystem.invalidate_cache()
            try:
                entries = self.filesystem.ls(self.base, detail=True)
            except FileNotFoundError:
                return {}
            return {
                entry["name"].rsplit("/", 1)[1]: StoredFile(entry["size"], _version(entry))
                for entry in entries
                if entry["type"] == "file"
            }

    @contextlib.contextmanager
    def local_copy(self, name: str) -> Iterator[Path]:
        """A local path of the file. A copy from a store is deleted at the end of the context."""
        path = self.root / name
        if self.filesystem is None:
            yield path
            return
        try:
            with self._store_errors():
                self.filesystem.get_file(f"{self.base}/{name}", str(path))
            yield path
        finally:
            path.unlink(missing_ok=True)

    def _exists(self, name: str) -> bool:
        return bool(self.filesystem.exists(f"{self.base}/{name}"))

    def _names(self, folder: str) -> list[str]:
        found = files_in(self.filesystem, f"{self.base}/{folder}", "")
        return [f"{folder}/{path.rsplit('/', 1)[1]}" for path in found]

    @contextlib.contextmanager
    def _store_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # each client of a store has its own exceptions
            raise BadInputError(
                f"{self.out}: the object store failed ({first_line(error)}); check its address and your "
                "permissions, then run again"
            ) from error


def _version(entry: dict[str, Any]) -> str:
    """What this store reports that changes with the content; "" if it reports nothing."""
    known = ("ETag", "etag", "md5Hash", "LastModified", "last_modified", "mtime", "created")
    return next((str(entry[name]) for name in known if entry.get(name)), "")


@contextlib.contextmanager
def disk_errors(out: str) -> Iterator[None]:
    """Turns an OSError into a BadInputError that tells a failed write in `out` (a full disk, no permission)
    from a failed read elsewhere.
    """
    try:
        yield
    except OSError as error:
        if error.filename and not _related(out, Path(error.filename)):
            raise BadInputError(f"{error.filename}: cannot be read ({error.strerror or error})") from error
        where = f" at {error.filename}" if error.filename else ""
        raise BadInputError(
            f"{out}: cannot write ({error.strerror or error}{where}); free some space or choose another --out"
        ) from error


def _related(out: str, file: Path) -> bool:
    """Whether `file` is in `out`, or `out` in it. Always true for a store, where it cannot be known."""
    directory, file = Path(out).absolute(), file.absolute()
    return (
        "://" in out or directory == file or directory in file.parents or file in directory.parents
    )  # fmt: skip


def open_storage(out: str, work_dir: str | None = None, worker: str = "") -> Storage:
    """The storage of `out`, a path or fsspec URL.

    work_dir: local directory for files on their way to a store; None: one in the user's cache. worker: a
    different name for each of several workers on one machine.
    Raises BadInputError if there is no fsspec driver for the URL.
    """
    if out[:7].lower() == "file://":
        return Storage(out, Path(urllib.parse.unquote(urllib.parse.urlsplit(out).path)))
    if "://" not in out:
        return Storage(out, Path(out))
    try:
        filesystem, base = fsspec.core.url_to_fs(out)
    except (ImportError, ValueError) as error:
        raise BadInputError(f"{out}: {error}") from error
    name = hashlib.sha256(f"{out} {worker}".encode()).hexdigest()[:16]
    folder = Path.home() / ".cache/phi3v/shards" if work_dir is None else Path(work_dir)
    return Storage(out, folder / name, filesystem, str(base).rstrip("/"))

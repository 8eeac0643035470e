"""Where a dataset is built: a local directory, or an object store with a local directory to work in.

In an object store every finished window is sent (tars, then ledger, then index) and its tars are deleted
locally; a worker on any machine goes on behind the last window that the store has. dataset.json goes last.

In: `out` as the user gave it. Out: `Place`. Called by `build` and its parts.
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
TASKS = ".tasks"  # how many tasks are building here; gone when the dataset is complete


@dataclass(frozen=True)
class Place:
    """root: the local directory. filesystem, base: the store and the path in it; None and "" without one."""

    out: str
    root: Path
    filesystem: Any = None
    base: str = ""

    def pull(self) -> None:
        """Makes the local directory what the store has, without the tars: they are not needed to go on."""
        if self.filesystem is None:
            return
        with self._store_errors():
            self.filesystem.invalidate_cache()
            there = {BUILD_JSON, DATASET_JSON, TASKS, *self._names(INDEX_DIR), *self._names(LEDGER_DIR)}
            there = {name for name in there if "/" in name or self.filesystem.exists(f"{self.base}/{name}")}
            for folder in (self.root, self.root / INDEX_DIR, self.root / LEDGER_DIR):
                folder.mkdir(parents=True, exist_ok=True)
            for path in [path for path in self.root.rglob("*") if path.is_file()]:
                if path.suffix != LOCK_SUFFIX:
                    path.unlink()
            for name in sorted(there):
                self.filesystem.get_file(f"{self.base}/{name}", str(self.root / name))

    def read(self, name: str) -> str | None:
        """The text of a file as the store has it, None if it is not there."""
        if self.filesystem is None:
            path = self.root / name
            return path.read_text() if path.is_file() else None
        with self._store_errors():
            try:
                return str(self.filesystem.cat_file(f"{self.base}/{name}").decode())
            except FileNotFoundError:
                return None

    def send(self, names: Iterable[str]) -> None:
        """Copies files to the store, in this order; tars are deleted here once they are there."""
        if self.filesystem is None:
            return
        with self._store_errors():
            for name in names:
                self.filesystem.put_file(str(self.root / name), f"{self.base}/{name}")
                if name.endswith(".tar"):
                    (self.root / name).unlink()

    def remove(self, name: str) -> None:
        """Deletes a file, in the store first."""
        if self.filesystem is not None:
            with self._store_errors(), contextlib.suppress(FileNotFoundError):
                self.filesystem.rm_file(f"{self.base}/{name}")
        (self.root / name).unlink(missing_ok=True)

    def files(self) -> dict[str, tuple[int, str]]:
        """The files right in it: name -> (bytes, a stamp that changes when the content does)."""
        if self.filesystem is None:
            found = [path for path in self.root.iterdir() if path.is_file()]
            return {path.name: (path.stat().st_size, str(path.stat().st_mtime_ns)) for path in found}
        with self._store_errors():
            self.filesystem.invalidate_cache()
            try:
                entries = self.filesystem.ls(self.base, detail=True)
            except FileNotFoundError:
                return {}
            entries = [entry for entry in entries if entry["type"] == "file"]
            return {entry["name"].rsplit("/", 1)[1]: (entry["size"], _stamp(entry)) for entry in entries}

    @contextlib.contextmanager
    def copy_of(self, name: str) -> Iterator[Path]:
        """The file here; what is copied from a store for it is deleted again."""
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

    def _names(self, folder: str) -> list[str]:
        found = files_in(self.filesystem, f"{self.base}/{folder}", "")
        return [f"{folder}/{path.rsplit('/', 1)[1]}" for path in found]

    @contextlib.contextmanager
    def _store_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever a store's client raises
            raise BadInputError(
                f"{self.out}: the store does not answer as it should ({first_line(error)}); check its "
                "address and your rights, then run again"
            ) from error


def _stamp(entry: dict[str, Any]) -> str:
    """Whatever a store says that changes with the content; "" where it says nothing."""
    known = ("ETag", "etag", "md5Hash", "LastModified", "last_modified", "mtime", "created")
    return next((str(entry[name]) for name in known if entry.get(name)), "")


@contextlib.contextmanager
def writing(out: str) -> Iterator[None]:
    """Turns what a full or forbidden disk raises into a BadInputError, and what cannot be read elsewhere."""
    try:
        yield
    except OSError as error:
        place = f" at {error.filename}" if error.filename else ""
        if error.filename and not _concerns(out, Path(error.filename)):
            raise BadInputError(f"{error.filename}: cannot be read ({error.strerror or error})") from error
        raise BadInputError(
            f"{out}: cannot write ({error.strerror or error}{place}); make room or choose another --out"
        ) from error


def _concerns(out: str, file: Path) -> bool:
    """Whether `file` lies in `out`, or `out` in it; of a store nobody knows."""
    place, file = Path(out).absolute(), file.absolute()
    return "://" in out or place == file or place in file.parents or file in place.parents


def open_place(out: str, work_dir: str | None = None, worker: str = "") -> Place:
    """The place of `out`. work_dir: local directory for what is under way to a store; None: one in the user's
    cache. worker: a name of its own for each of several workers on one machine.

    Raises BadInputError if there is no driver for the URL.
    """
    if out[:7].lower() == "file://":
        return Place(out, Path(urllib.parse.unquote(urllib.parse.urlsplit(out).path)))
    if "://" not in out:
        return Place(out, Path(out))
    try:
        filesystem, base = fsspec.core.url_to_fs(out)
    except (ImportError, ValueError) as error:
        raise BadInputError(f"{out}: {error}") from error
    name = hashlib.sha256(f"{out} {worker}".encode()).hexdigest()[:16]
    folder = Path.home() / ".cache/phi3v/shards" if work_dir is None else Path(work_dir)
    return Place(out, folder / name, filesystem, str(base).rstrip("/"))

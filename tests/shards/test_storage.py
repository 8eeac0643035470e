"""A dataset built into an object store: the same files as on a disk, also after the worker was killed."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from shards.build import BuildOptions, build, build_task, close_tasks, retry_failed, waits_for_close
from shards.common.errors import BadInputError
from shards.format.index import read_index
from shards.inspect import inspect
from shards.page import make_page
from shards.verify import verify

ASK = BuildOptions(("image",), "?", "{name}", shard_samples=10, min_success=0.5)
URL = "memory://bucket/data"


@pytest.fixture
def store() -> Iterator[Any]:
    """fsspec's store in memory: its files are whole or absent, as objects are."""
    filesystem = fsspec.filesystem("memory")
    filesystem.store.clear()
    yield filesystem
    filesystem.store.clear()


def options(folder: Path, **values: Any) -> BuildOptions:
    return BuildOptions(**{**ASK.__dict__, "work_dir": str(folder), **values})


def in_store(filesystem: Any) -> dict[str, bytes]:
    return {
        path.removeprefix("/bucket/data/"): filesystem.cat_file(path) for path in filesystem.find("/bucket")
    }


def on_disk(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_a_store_gets_the_files_that_a_disk_gets(
    store: Any, tmp_path: Path, table: Callable[..., Path]
) -> None:
    source = str(table(25))
    info = build(source, URL, options(tmp_path / "work"))
    assert build(source, str(tmp_path / "disk"), ASK) == info
    assert in_store(store) == on_disk(tmp_path / "disk")
    assert not list((tmp_path / "work").rglob("*.tar"))
    assert verify(URL, decode=1).faults == () and read_index(URL).num_rows == 25
    assert inspect(URL).width.largest == 60 and "data:image/jpeg" in make_page(URL, inspect(URL), 3)
    assert build(source, URL, options(tmp_path / "work")) == info
    with pytest.raises(BadInputError, match="memory://bucket/data: holds a build with val_fraction"):
        build(source, URL, options(tmp_path / "work", val_fraction=0.5))


def test_another_machine_resumes_after_the_last_partition(
    store: Any, tmp_path: Path, table: Callable[..., Path]
) -> None:
    source = str(table(35))
    build(source, str(tmp_path / "disk"), ASK)

    def stop(done: int, total: int) -> None:
        if done == 25:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(source, URL, options(tmp_path / "here"), progress=stop)
    seen: list[int] = []
    build(source, URL, options(tmp_path / "there"), progress=lambda done, total: seen.append(done))
    assert seen == list(range(21, 36)) and in_store(store) == on_disk(tmp_path / "disk")


def test_tasks_and_records_tried_again(store: Any, tmp_path: Path, table: Callable[..., Path]) -> None:
    source = table(12)
    hidden = source.parent / "7.jpg"
    hidden.rename(hidden.with_suffix(".away"))
    for task in (1, 0):
        build_task(str(source), URL, options(tmp_path / "work"), task=task, tasks=2)
    assert waits_for_close(URL) and close_tasks(URL, str(tmp_path / "work")).num_samples == 11
    hidden.with_suffix(".away").rename(hidden)
    assert retry_failed(str(source), URL, options(tmp_path / "work")).num_samples == 12
    assert verify(URL, decode=1).faults == ()


def test_tables_and_images_in_a_store(store: Any, tmp_path: Path, table: Callable[..., Path]) -> None:
    source = table(6)
    store.put(f"{source.parent}/", "/bucket/source/", recursive=True)
    info = build("memory://bucket/source/table.csv", str(tmp_path / "out"), ASK)
    build(str(source), str(tmp_path / "disk"), ASK)
    assert info.num_samples == 6
    tars = [sorted((tmp_path / name).glob("*.tar")) for name in ("out", "disk")]
    assert [path.read_bytes() for path in tars[0]] == [path.read_bytes() for path in tars[1]]


def test_a_store_that_fails_is_reported_in_one_line(
    store: Any, tmp_path: Path, table: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise PermissionError("Access Denied")

    monkeypatch.setattr(type(store), "put_file", refuse)
    with pytest.raises(BadInputError, match="the object store failed .Access Denied.; check its address"):
        build(str(table(3)), URL, options(tmp_path / "work"))

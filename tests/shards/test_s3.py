"""A dataset over s3://, against a real server: build, kill, resume, verify, inspect, read."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest

from phi3v_dist.data.reader import SampleReader
from shards.build import BuildOptions, build, build_task, close_tasks, retry_failed, waits_for_close
from shards.common.errors import BadInputError
from shards.format.index import read_index, table_records
from shards.index import IndexOptions, build_index
from shards.inspect import inspect
from shards.page import make_page
from shards.verify import verify

ASK = BuildOptions(("image",), "?", "{name}", shard_samples=10, min_success=0.5, val_fraction=0.3)


def options(folder: Path, **values: Any) -> BuildOptions:
    return BuildOptions(**{**ASK.__dict__, "work_dir": str(folder), **values})


def in_store(url: str) -> dict[str, bytes]:
    filesystem, place = fsspec.core.url_to_fs(url)
    filesystem.invalidate_cache()
    return {
        path.removeprefix(place).lstrip("/"): filesystem.cat_file(path) for path in filesystem.find(place)
    }


def on_disk(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_a_build_killed_on_its_way_to_s3_ends_as_on_a_disk(
    s3: str, tmp_path: Path, table: Callable[..., Path]
) -> None:
    source, url = str(table(35)), f"{s3}/set"
    build(source, str(tmp_path / "disk"), ASK)
    code = (
        "import os, signal; from shards.build import BuildOptions, build\n"
        "def stop(done, total):\n"
        "    if done == 25: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"build({source!r}, {url!r}, BuildOptions(**{options(tmp_path / 'a').__dict__!r}), progress=stop)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == -9
    assert "dataset.json" not in in_store(url)
    seen: list[int] = []
    info = build(source, url, options(tmp_path / "b"), progress=lambda done, total: seen.append(done))
    assert seen[0] > 20 and info.num_samples == 35 and in_store(url) == on_disk(tmp_path / "disk")
    assert verify(url, decode=1).faults == ()
    assert inspect(url).width.largest == 60 and "data:image/jpeg" in make_page(url, inspect(url), 3)
    record = table_records(read_index(url))[7]
    reader = SampleReader(url)
    assert reader.images(record) == [(Path(source).parent / f"{int(record.key)}.jpg").read_bytes()]


def test_tars_of_others_are_indexed_where_they_are(
    s3: str, tmp_path: Path, picture: Callable[..., bytes]
) -> None:
    from webdataset.writer import TarWriter

    for name in ("a.tar", "b.tar"):  # both count from 0
        with TarWriter(str(tmp_path / name)) as tar:
            for number in range(4):
                tar.write(
                    {"__key__": f"{number:04d}", "jpg": picture(number + ord(name[0])), "txt": "a thing"}
                )
        fsspec.filesystem("s3").put_file(str(tmp_path / name), f"{s3}/tars/{name}")
    chosen = IndexOptions(prompt="?", answer="{txt}", val_fraction=0.5)
    work = str(tmp_path / "work")

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_index(f"{s3}/tars", chosen, progress=stop, work_dir=work)
    info = build_index(f"{s3}/tars", chosen, work_dir=work)
    assert build_index(f"{s3}/tars", chosen, work_dir=work) == info and info.num_samples == 8
    assert not list((tmp_path / "work").rglob("*.tar")) and verify(f"{s3}/tars", decode=1).faults == ()
    records = table_records(read_index(f"{s3}/tars"))
    assert [record.key for record in records][::4] == ["a/0000", "b/0000"]
    assert SampleReader(f"{s3}/tars").images(records[5]) == [picture(1 + ord("b"))]
    with pytest.raises(BadInputError, match="of an index with other options"):
        build_index(f"{s3}/tars", IndexOptions(prompt="!", answer="{txt}"), work_dir=work)
    with pytest.raises(BadInputError, match="/nothing: no .tar files to index"):
        build_index(f"{s3}/nothing", chosen, work_dir=work)


def test_tasks_and_records_tried_again_on_s3(s3: str, tmp_path: Path, table: Callable[..., Path]) -> None:
    source, url = table(22), f"{s3}/set"
    (source.parent / "7.jpg").rename(source.parent / "away")
    for task in (1, 0):
        build_task(str(source), url, options(tmp_path / "work"), task=task, tasks=2)
    assert waits_for_close(url) and close_tasks(url, str(tmp_path / "work")).num_samples == 21
    (source.parent / "away").rename(source.parent / "7.jpg")
    assert retry_failed(str(source), url, options(tmp_path / "work")).num_samples == 22
    assert verify(url, decode=1).faults == ()

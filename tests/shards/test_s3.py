"""The whole way of a dataset over s3://, against a real server: build, kill, go on, verify, inspect, read."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec

from phi3v_dist.data.reader import SampleReader
from shards.build import BuildOptions, build, build_task, close_tasks, retry_failed, waits_for_close
from shards.format import read_index
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
        f"build({source!r}, {url!r}, BuildOptions(**{options(tmp_path / 'a').__dict__!r}), stop)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == -9
    assert "dataset.json" not in in_store(url)
    seen: list[int] = []
    info = build(source, url, options(tmp_path / "b"), lambda done, total: seen.append(done))
    assert seen[0] > 20 and info.num_samples == 35 and in_store(url) == on_disk(tmp_path / "disk")
    assert verify(url, decode=1).faults == ()
    assert inspect(url).width.largest == 60 and "data:image/jpeg" in make_page(url, inspect(url), 3)
    row = read_index(url).to_pylist()[7]
    reader = SampleReader(url)
    assert reader.images(row) == [(Path(source).parent / f"{int(row['key'])}.jpg").read_bytes()]


def test_tasks_and_rows_tried_again_on_s3(s3: str, tmp_path: Path, table: Callable[..., Path]) -> None:
    source, url = table(22), f"{s3}/set"
    (source.parent / "7.jpg").rename(source.parent / "away")
    for task in (1, 0):
        build_task(str(source), url, task, 2, options(tmp_path / "work"))
    assert waits_for_close(url) and close_tasks(url, str(tmp_path / "work")).num_samples == 21
    (source.parent / "away").rename(source.parent / "7.jpg")
    assert retry_failed(str(source), url, options(tmp_path / "work")).num_samples == 22
    assert verify(url, decode=1).faults == ()

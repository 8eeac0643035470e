"""Several tasks build one dataset without knowing of each other."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shards.build import BuildOptions, build, build_task, close_tasks, retry_failed, waits_for_close
from shards.format import BadInputError, read_index
from shards.rows import Recipe
from shards.sources import open_source
from shards.verify import verify

ASK = BuildOptions(("image",), "?", "{name}", shard_samples=5, val_fraction=0.3)


def test_tasks_at_once_give_the_rows_of_one_build(tmp_path: Path, table: Callable[..., Path]) -> None:
    source, out = str(table(33)), str(tmp_path / "out")
    code = (
        "import sys; from shards.build import BuildOptions, build_task\n"
        f"build_task({source!r}, {out!r}, int(sys.argv[1]), 3, BuildOptions(**{ASK.__dict__!r}))"
    )
    running = [subprocess.Popen([sys.executable, "-c", code, str(task)]) for task in range(3)]
    assert [process.wait(60) for process in running] == [0, 0, 0]
    assert waits_for_close(out)
    info = close_tasks(out)
    assert info.num_samples == 33 and not waits_for_close(out) and close_tasks(out) == info
    assert info.shards[0].name.startswith("shard-0000-") and info.shards[-1].name.startswith("shard-0002-")
    build(source, str(tmp_path / "one"), ASK)
    wanted = ["key", "split", "messages", "meta"]
    one = sorted(read_index(str(tmp_path / "one"), columns=wanted).to_pylist(), key=lambda row: row["key"])
    many = sorted(read_index(out, columns=wanted).to_pylist(), key=lambda row: row["key"])
    assert one == many and verify(out, decode=1).faults == ()
    assert not list(Path(out).glob(".*"))


def test_a_task_run_again_does_nothing_and_missing_ones_are_named(
    tmp_path: Path, table: Callable[..., Path]
) -> None:
    source, out = str(table(10)), str(tmp_path / "out")
    first = build_task(source, out, 1, 4, ASK)
    assert build_task(source, out, 1, 4, ASK) == first
    with pytest.raises(BadInputError, match="not done yet: task 0, 2, 3 of 4; run them again"):
        close_tasks(out)
    with pytest.raises(BadInputError, match="tasks 4, now 2; choose another --out"):
        build_task(source, out, 0, 2, ASK)
    with pytest.raises(BadInputError, match="task 4/4: the task must be from 0 to 3"):
        build_task(source, out, 4, 4, ASK)
    for task in (0, 2, 3):
        build_task(source, out, task, 4, ASK)
    assert close_tasks(out).num_samples == 10
    (Path(source).parent / "3.jpg").unlink()


def test_one_task_of_one_is_the_whole_build(tmp_path: Path, table: Callable[..., Path]) -> None:
    source, out = str(table(7)), str(tmp_path / "out")
    assert sum(window.rows for window in build_task(source, out, 0, 1, ASK)) == 7
    assert not waits_for_close(out) and build(source, out, ASK).num_samples == 7


def test_more_tasks_than_rows(tmp_path: Path, table: Callable[..., Path]) -> None:
    source, out = str(table(2)), str(tmp_path / "out")
    for task in range(5):
        build_task(source, out, task, 5, ASK)
    assert close_tasks(out).num_samples == 2 and verify(out, decode=1).faults == ()


def test_failed_rows_of_all_tasks_are_tried_again(tmp_path: Path, table: Callable[..., Path]) -> None:
    source, out = table(12), str(tmp_path / "out")
    options = BuildOptions(("image",), "?", "{name}", shard_samples=5, min_success=0.5)
    hidden = [source.parent / f"{n}.jpg" for n in (1, 7, 11)]
    for path in hidden:
        path.rename(path.with_suffix(".away"))
    for task in range(3):
        build_task(str(source), out, task, 3, options)
    assert close_tasks(out).num_samples == 9
    for path in hidden:
        path.with_suffix(".away").rename(path)
    assert retry_failed(str(source), out, options).num_samples == 12
    assert verify(out, decode=1).faults == ()


@pytest.mark.parametrize("kind", ["csv", "parquet", "hf"])
def test_the_parts_of_a_source_are_disjoint_and_everything(tmp_path: Path, kind: str) -> None:
    columns = {"image": [f"{n}.jpg" for n in range(23)], "name": [f"n{n}" for n in range(23)]}
    if kind == "csv":
        place = tmp_path / "t.csv"
        place.write_text("image,name\n" + "".join(f"{n}.jpg,n{n}\n" for n in range(23)))
    else:
        place = tmp_path / "t.parquet"
        pq.write_table(pa.table(columns), place, row_group_size=4)
    source = open_source(f"hf:{tmp_path}" if kind == "hf" else str(place), Recipe(("image",), "?", "{name}"))
    for tasks in (1, 2, 3, 30):
        parts = [list(source.part(task, tasks, 0)) for task in range(tasks)]
        numbers = [row.number for part in parts for row in part]
        assert sorted(numbers) == list(range(23)) and len({row.key for part in parts for row in part}) == 23
        assert sorted(row.messages[1]["content"] for part in parts for row in part) == sorted(columns["name"])
        for task, part in enumerate(parts):
            assert source.part_rows(task, tasks) in (len(part), None)
            assert list(source.part(task, tasks, 2)) == part[2:]


def test_plan_of_a_build_says_how_many_tasks(tmp_path: Path, table: Callable[..., Path]) -> None:
    build_task(str(table(4)), str(tmp_path / "out"), 0, 2, ASK)
    assert json.loads((tmp_path / "out/build.json").read_text())["built_with"]["tasks"] == 2

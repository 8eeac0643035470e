"""Several tasks build one dataset without knowing of each other."""

import csv
import json
import multiprocessing
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shards.build import BuildOptions, build, build_task, close_tasks, retry_failed, waits_for_close
from shards.common.errors import BadInputError
from shards.source_records import Recipe
from shards.sources import ALL, open_source
from shards.verify import verify

ASK = BuildOptions(("image",), "?", "{name}", shard_samples=5, val_fraction=0.3)


def test_tasks_at_once_give_the_records_of_one_build(tmp_path: Path, table: Callable[..., Path]) -> None:
    source, out = str(table(33)), str(tmp_path / "out")
    code = (
        "import sys; from shards.build import BuildOptions, build_task\n"
        f"build_task({source!r}, {out!r}, BuildOptions(**{ASK.__dict__!r}), task=int(sys.argv[1]), tasks=3)"
    )
    running = [subprocess.Popen([sys.executable, "-c", code, str(task)]) for task in range(3)]
    assert [process.wait(60) for process in running] == [0, 0, 0]
    assert waits_for_close(out)
    info = close_tasks(out)
    assert info.num_samples == 33 and not waits_for_close(out) and close_tasks(out) == info
    assert build(source, str(tmp_path / "one"), ASK) == info
    assert files(Path(out)) == files(tmp_path / "one") and verify(out, decode=1).faults == ()


def files(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("columns", ["csv", "parquet", "jsonl"])
def test_processes_write_what_one_writes(tmp_path: Path, table: Callable[..., Path], columns: str) -> None:
    source = table(33)
    if columns != "csv":
        rows = list(csv.DictReader(source.open()))
        source = source.with_suffix(f".{columns}")
        if columns == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), source, row_group_size=4)
        else:
            source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    seen: list[int] = []
    two = BuildOptions(**{**ASK.__dict__, "processes": 2})
    build(str(source), str(tmp_path / "two"), two, progress=lambda done, total: seen.append(done))
    build(str(source), str(tmp_path / "one"), ASK)
    assert files(tmp_path / "two") == files(tmp_path / "one") and seen[-1] == 33


def test_a_killed_process_ends_the_build_and_the_same_command_resumes(
    tmp_path: Path, table: Callable[..., Path]
) -> None:
    source, out = str(table(400)), str(tmp_path / "out")
    two = BuildOptions(**{**ASK.__dict__, "processes": 2})

    def kill(done: int, total: int) -> None:
        multiprocessing.active_children()[0].kill()

    with pytest.raises(BadInputError, match="a process of the build was killed .SIGKILL: often too little"):
        build(source, out, two, progress=kill)
    assert not multiprocessing.active_children() and not (tmp_path / "out/dataset.json").exists()
    build(source, out, two)
    build(source, str(tmp_path / "one"), ASK)
    assert files(Path(out)) == files(tmp_path / "one")


def test_ctrl_c_ends_all_processes_at_once(tmp_path: Path, table: Callable[..., Path]) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    two = BuildOptions(**{**ASK.__dict__, "processes": 2})
    with pytest.raises(KeyboardInterrupt):
        build(str(table(400)), str(tmp_path / "out"), two, progress=interrupt)
    assert not multiprocessing.active_children() and not (tmp_path / "out/dataset.json").exists()


def test_an_error_of_a_process_is_reported_once_and_can_be_fixed(
    tmp_path: Path, table: Callable[..., Path]
) -> None:
    source = table(40)
    hidden = [source.parent / f"{n}.jpg" for n in range(20, 40)]
    for path in hidden:
        path.rename(path.with_suffix(".away"))
    two = BuildOptions(**{**ASK.__dict__, "processes": 2})
    with pytest.raises(BadInputError, match="records failed and only 2 of 40 may .* no such file"):
        build(str(source), str(tmp_path / "out"), two)
    for path in hidden:
        path.with_suffix(".away").rename(path)
    build(str(source), str(tmp_path / "out"), two)
    build(str(source), str(tmp_path / "one"), ASK)
    assert files(tmp_path / "out") == files(tmp_path / "one")


def test_without_a_task_the_rest_of_the_tasks_is_built(tmp_path: Path, table: Callable[..., Path]) -> None:
    source, out = str(table(33)), str(tmp_path / "out")
    build_task(source, out, ASK, task=1, tasks=3)
    build(source, out, ASK)
    build(source, str(tmp_path / "one"), ASK)
    assert files(Path(out)) == files(tmp_path / "one") and not waits_for_close(out)


def test_tasks_drop_the_duplicates_among_their_own_records(
    tmp_path: Path, table: Callable[..., Path]
) -> None:
    source, out = table(20), str(tmp_path / "out")
    for number in (3, 15, 19):
        (source.parent / f"{number}.jpg").write_bytes((source.parent / "1.jpg").read_bytes())
    options = BuildOptions(**{**ASK.__dict__, "duplicates": "drop"})
    for task in range(2):
        build_task(str(source), out, options, task=task, tasks=2)
    assert close_tasks(out).num_samples == 18  # of 1 and 3 one, of 15 and 19 one


def test_a_task_run_again_does_nothing_and_missing_ones_are_named(
    tmp_path: Path, table: Callable[..., Path]
) -> None:
    source, out = str(table(20)), str(tmp_path / "out")
    first = build_task(source, out, ASK, task=1, tasks=4)
    assert build_task(source, out, ASK, task=1, tasks=4) == first
    with pytest.raises(BadInputError, match="not done yet: task 0, 2, 3 of 4; run them again"):
        close_tasks(out)
    with pytest.raises(BadInputError, match="is being built by 4 tasks, now 2; use --task I/4"):
        build_task(source, out, ASK, task=0, tasks=2)
    with pytest.raises(BadInputError, match="task 4/4: the task must be from 0 to 3"):
        build_task(source, out, ASK, task=4, tasks=4)
    for task in (0, 2, 3):
        build_task(source, out, ASK, task=task, tasks=4)
    assert close_tasks(out).num_samples == 20
    (Path(source).parent / "3.jpg").unlink()


def test_one_task_of_one_is_the_whole_build(tmp_path: Path, table: Callable[..., Path]) -> None:
    source, out = str(table(7)), str(tmp_path / "out")
    assert sum(partition.records for partition in build_task(source, out, ASK, task=0, tasks=1)) == 7
    assert not waits_for_close(out) and build(source, out, ASK).num_samples == 7


def test_more_tasks_than_records(tmp_path: Path, table: Callable[..., Path]) -> None:
    source, out = str(table(2)), str(tmp_path / "out")
    for task in range(5):
        build_task(source, out, ASK, task=task, tasks=5)
    assert close_tasks(out).num_samples == 2 and verify(out, decode=1).faults == ()


def test_failed_records_of_all_tasks_are_tried_again(tmp_path: Path, table: Callable[..., Path]) -> None:
    source, out = table(12), str(tmp_path / "out")
    options = BuildOptions(("image",), "?", "{name}", shard_samples=5, min_success=0.5)
    hidden = [source.parent / f"{n}.jpg" for n in (1, 7, 11)]
    for path in hidden:
        path.rename(path.with_suffix(".away"))
    for task in range(3):
        build_task(str(source), out, options, task=task, tasks=3)
    assert close_tasks(out).num_samples == 9
    for path in hidden:
        path.with_suffix(".away").rename(path)
    assert retry_failed(str(source), out, options).num_samples == 12
    assert verify(out, decode=1).faults == ()


@pytest.mark.parametrize("kind", ["csv", "parquet", "folder"])
def test_spans_of_a_source_are_its_records(tmp_path: Path, table: Callable[..., Path], kind: str) -> None:
    source = table(23)
    recipe = Recipe(("image",), "?", "{name}")
    if kind == "parquet":
        source = source.with_suffix(".parquet")
        pq.write_table(
            pa.table({"image": ["x"] * 23, "name": [f"n{n}" for n in range(23)]}), source, row_group_size=4
        )
    elif kind == "folder":
        source.unlink()
        source, recipe = source.parent, Recipe((), "?", "{label}")
    opened = open_source(str(source), recipe)
    rows = list(opened.records([ALL]))
    assert [row.number for row in rows] == list(range(23))
    for spans in ([(0, 5), (5, 6)], [(3, 9), (17, 23)], [(22, 23)], [(1, 2), (9, 10), (11, 12)]):
        assert list(opened.records(spans)) == [row for first, end in spans for row in rows[first:end]]


def test_the_parts_of_a_stream_are_disjoint_and_everything(tmp_path: Path) -> None:
    columns = {"image": [f"{n}.jpg" for n in range(23)], "name": [f"n{n}" for n in range(23)]}
    pq.write_table(pa.table(columns), tmp_path / "t.parquet", row_group_size=4)
    source = open_source(f"hf:{tmp_path}", Recipe(("image",), "?", "{name}"))
    assert source.part is not None and source.num_records is None
    for tasks in (1, 2, 3, 30):
        parts = [list(source.part(task, tasks, 0)) for task in range(tasks)]
        numbers = [row.number for part in parts for row in part]
        assert sorted(numbers) == list(range(23)) and len({row.key for part in parts for row in part}) == 23
        assert sorted(row.messages[1]["content"] for part in parts for row in part) == sorted(columns["name"])
        for task, part in enumerate(parts):
            assert list(source.part(task, tasks, 2)) == part[2:]


def test_a_task_of_a_stream_fails_with_too_many_bad_records(
    tmp_path: Path, picture: Callable[..., bytes]
) -> None:
    import datasets

    features = datasets.Features({"photo": datasets.Image(), "name": datasets.Value("string")})
    columns = {"photo": [{"bytes": picture(n), "path": None} for n in range(10)], "name": ["x", None] * 5}
    (tmp_path / "data").mkdir()
    datasets.Dataset.from_dict(columns, features=features).to_parquet(str(tmp_path / "data/train.parquet"))
    source, out = f"hf:{tmp_path / 'data'}", str(tmp_path / "out")
    options = BuildOptions(("photo",), "?", "{name}", shard_samples=3)
    with pytest.raises(BadInputError, match="5 of the 5 records of this task failed .*is empty"):
        build_task(source, out, options, task=1, tasks=2)
    for task in (0, 1):
        build_task(source, out, replace(options, min_success=0), task=task, tasks=2)
    assert close_tasks(out).num_samples == 5


def test_a_data_set_that_changes_on_its_hub_is_not_mixed(
    tmp_path: Path, picture: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the hub says of the branch stands in for the hub; the data lie on the disk."""
    import datasets

    columns = {"image": [f"{n}.jpg" for n in range(4)], "name": ["x"] * 4}
    pq.write_table(pa.table(columns), tmp_path / "train.parquet")
    load = datasets.load_dataset
    asked: list[str | None] = []

    def from_disk(name: str, split: str, revision: str | None, streaming: bool) -> object:
        asked.append(revision)
        return load(str(tmp_path), split=split, streaming=streaming)

    monkeypatch.setattr(datasets, "load_dataset", from_disk)
    monkeypatch.setattr("shards.sources._commit", lambda name, revision: f"commit of {revision}")
    recipe = Recipe(("image",), "?", "{name}")
    first, second = open_source("hf:a/b", recipe), open_source("hf:a/b@next#train", recipe)
    assert asked == ["commit of None", "commit of next"] and first.sha256 != second.sha256
    assert second.name == "hf:a/b@commit of next#train"


def test_tasks_of_a_stream_have_files_of_their_own(tmp_path: Path, picture: Callable[..., bytes]) -> None:
    import datasets

    features = datasets.Features({"photo": datasets.Image(), "name": datasets.Value("string")})
    columns = {"photo": [{"bytes": picture(n), "path": None} for n in range(11)], "name": ["x"] * 11}
    (tmp_path / "data").mkdir()
    datasets.Dataset.from_dict(columns, features=features).to_parquet(str(tmp_path / "data/train.parquet"))
    source, out = f"hf:{tmp_path / 'data'}", str(tmp_path / "out")
    options = BuildOptions(("photo",), "?", "{name}", shard_samples=3)
    for task in (1, 0):
        with pytest.raises(BadInputError, match="not done yet: task"):
            close_tasks(out) if task == 0 else build_task(
                source, out, options, task=task, tasks=2
            ) and close_tasks(out)
        build_task(source, out, options, task=task, tasks=2)
    assert close_tasks(out).num_samples == 11 and verify(out, decode=1).faults == ()
    assert (tmp_path / "out/index/part-0001-000000.parquet").exists()

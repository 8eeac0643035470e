"""Rows into shards: resumable, by one worker or many, and always the same bytes.

The rows are worked through in windows of `shard_samples` (see `window`). The output directory then holds

    build.json                      what is being built here: another source or other options are refused
    shard-000000.tar ...            numbered by window, one split each; a window's further ones: 000000_01
    ledger/part-000000.jsonl ...    per row: outcome, reason; per image: HTTP status, bytes, sha256, size
    index/part-000000.parquet ...   one part per window
    dataset.json                    written last: the dataset is complete

`build` makes all windows that are missing; `build_task` those of one of several tasks, and `close_tasks`
writes dataset.json when all are there: the same directory to the byte. Two things depend on what came
before and so on the number of tasks: rows of a stream whose length nobody knows, and duplicates that are
dropped. `retry_failed` tries the rows again that failed; what arrives goes into further shards.

In: a source (see `sources`), an output directory or object store (see `place`), `BuildOptions`. Out:
`DatasetInfo`. Called by the command line.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from shards.common.errors import BadInputError
from shards.common.files import create_whole, partial_path, write_atomically
from shards.common.locks import alone_in
from shards.format.dataset import (
    BUILD_JSON,
    DATASET_JSON,
    FORMAT_VERSION,
    INDEX_DIR,
    LEDGER_DIR,
    DatasetInfo,
    dataset_info_json,
    read_dataset_info,
)
from shards.ledger import failed_rows, reasons, rounds_before
from shards.options import BuildOptions
from shards.partition import Window, committed_windows, leading_windows
from shards.process_pool import do_work
from shards.rows import PRODUCT_ANSWER, PRODUCT_PROMPT, Row
from shards.sources import Source, Span, open_source
from shards.storage import LOCK_SUFFIX, TASKS, Place, open_place, writing
from shards.worker import Progress, Work, finished_windows

__all__ = ["BuildOptions", "build", "build_task", "close_tasks", "retry_failed", "waits_for_close"]

_WRITER = 4  # raised when the same source and options would give other bytes than before
_log = logging.getLogger(__name__)


def build(
    source: str, out: str, options: BuildOptions | None = None, progress: Progress | None = None
) -> DatasetInfo:
    """Builds the dataset of `source` in `out`, a local directory or fsspec URL, or finishes what was
    interrupted there.

    progress(done, total): called with rows as they are done, those of an earlier call included; total 0 where
    only reading to the end tells.
    Raises BadInputError for everything the user can mend. After too many failed rows its message names the
    ledger, and the same command tries the unfinished window again.
    """
    options = options or BuildOptions()
    opened, plan = _prepare(source, options, tasks=1)
    place = open_place(out, options.work_dir)
    with writing(out), _claim(place, plan):
        if _is_complete(place):
            _log.info("%s: already complete, nothing to do", out)
            return read_dataset_info(str(place.root))
        return _complete(place, opened, options, progress)


def build_task(
    source: str,
    out: str,
    task: int,
    tasks: int,
    options: BuildOptions | None = None,
    progress: Progress | None = None,
) -> list[Window]:
    """Builds the part of task `task` (from 0) of `tasks`; all tasks may run at once, on any machines that
    share `out`. The dataset is complete after `close_tasks`.

    Returns the windows of this task; a single task needs no closing. Raises as `build` does; min_success is
    of the task's own rows.
    """
    options = options or BuildOptions()
    if tasks < 1:
        raise BadInputError(f"task {task}/{tasks}: at least one task is needed")
    if not 0 <= task < tasks:
        raise BadInputError(f"task {task}/{tasks}: the task must be from 0 to {tasks - 1}")
    opened, plan = _prepare(source, options, tasks)
    if tasks == 1:
        build(source, out, options, progress)
        place = open_place(out, options.work_dir)
        return list(finished_windows(place.root, _task_work(opened, options, 0, 1)).values())
    place = open_place(out, options.work_dir, f"task {task}")
    work = _task_work(opened, options, task, tasks)
    with writing(out), _join(place, plan, task, tasks):
        if _is_complete(place):
            return list(finished_windows(place.root, work).values())
        windows = list(do_work(place, work, options, progress).values())
        if opened.num_rows is None:  # else its share has been watched from the first row on
            _check_share(place.root, opened.name, windows, options.min_success)
        return windows


def waits_for_close(out: str) -> bool:
    """`out` is a build by several tasks without its dataset.json."""
    place = open_place(out, worker="close")
    if place.read(BUILD_JSON) is None or place.read(DATASET_JSON) is not None:
        return False
    return place.read(TASKS) is not None and _read_plan(place)["retry_rounds"] == 0


def close_tasks(out: str, work_dir: str | None = None) -> DatasetInfo:
    """Writes dataset.json when every task is done. Raises BadInputError naming those that are not."""
    place = open_place(out, work_dir, "close")
    with writing(out):
        place.root.mkdir(parents=True, exist_ok=True)
        with alone_in(place.root):
            place.pull()
            if _is_complete(place):
                return read_dataset_info(str(place.root))
            return _finish(place, _read_plan(place))


def retry_failed(
    source: str, out: str, options: BuildOptions | None = None, progress: Progress | None = None
) -> DatasetInfo:
    """Tries the rows again that failed, once each; a dataset that is not complete is completed first.

    Until it is done the dataset is incomplete; the same call (or `build`) goes on where it was killed.
    """
    options = options or BuildOptions()
    place = open_place(out, options.work_dir)
    root = place.root
    tasks = 1 if place.read(BUILD_JSON) is None else int(_read_plan(place)["built_with"]["tasks"])
    opened, plan = _prepare(source, options, tasks)
    with writing(out), _claim(place, plan):
        rounds = int(_read_plan(place)["retry_rounds"])
        if not _is_complete(place):
            info = _complete(place, opened, options, progress)
            if rounds:  # this was the round that had been interrupted
                return info
        if not failed_rows(root):
            _log.info("%s: no row has failed, nothing to do", out)
            return read_dataset_info(str(root))
        write_atomically(root / BUILD_JSON, _plan_json({**plan, "retry_rounds": rounds + 1}))
        place.send([BUILD_JSON])
        place.remove(DATASET_JSON)
        return _complete(place, opened, options, progress)


def _prepare(source: str, options: BuildOptions, tasks: int) -> tuple[Source, dict[str, Any]]:
    """Checks everything before anything is written: the opened source, the plan."""
    options.check()
    opened = open_source(source, options.recipe())
    # The number of tasks shapes nothing but these two.
    shaping_tasks = tasks if opened.num_rows is None or options.duplicates == "drop" else 1
    built_with = {"writer": _WRITER, "tasks": shaping_tasks, **options.shaping()}
    texts = [PRODUCT_PROMPT, PRODUCT_ANSWER]
    fingerprint = hashlib.sha256(json.dumps([opened.sha256, built_with, texts]).encode()).hexdigest()
    plan = {
        "fingerprint": fingerprint,
        "source": opened.name,
        "num_rows": opened.num_rows,
        "built_with": built_with,
        "retry_rounds": 0,
    }
    return opened, plan


def _plan_json(plan: dict[str, Any]) -> bytes:
    return (json.dumps(plan, indent=1, sort_keys=True) + "\n").encode()


def _read_plan(place: Place) -> dict[str, Any]:
    text = place.read(BUILD_JSON)
    if text is None:
        raise BadInputError(f"{place.out}: no {BUILD_JSON}, so no build has begun here")
    with contextlib.suppress(ValueError, TypeError):
        found = json.loads(text)
        needed = {"fingerprint", "source", "num_rows", "built_with", "retry_rounds"}
        if needed <= set(found) and "tasks" in found["built_with"]:
            return dict(found)
    raise BadInputError(
        f"{place.out}: its {BUILD_JSON} is not of this version of shards build; choose another --out"
    )


@contextlib.contextmanager
def _claim(place: Place, plan: dict[str, Any]) -> Iterator[None]:
    """Makes `place` that of this build, alone in it while the context is open."""
    root = place.root
    root.mkdir(parents=True, exist_ok=True)
    with alone_in(root):
        place.pull()
        if not (root / BUILD_JSON).exists():
            _check_empty(root)
            write_atomically(root / BUILD_JSON, _plan_json(plan))
            place.send([BUILD_JSON])
        _check_same(place, plan)
        _make_folders(root)
        yield


@contextlib.contextmanager
def _join(place: Place, plan: dict[str, Any], task: int, tasks: int) -> Iterator[None]:
    """Makes `place` that of this build, which other tasks may have begun or be beginning; no other process
    does this task while the context is open.
    """
    root = place.root
    root.mkdir(parents=True, exist_ok=True)
    if place.filesystem is None and not (root / BUILD_JSON).exists():
        _check_empty(root)
    with alone_in(root, shared=True), alone_in(root, f".task-{task:04d}{LOCK_SUFFIX}"):
        place.pull()
        if not (root / BUILD_JSON).exists():
            create_whole(root / BUILD_JSON, _plan_json(plan))
            place.send([BUILD_JSON])
        _check_same(place, plan)
        if not _is_complete(place):
            if not (root / TASKS).exists():
                create_whole(root / TASKS, f"{tasks}\n".encode())
                place.send([TASKS])
            others = (root / TASKS).read_text().strip()
            if others != str(tasks):
                raise BadInputError(
                    f"{place.out}: is being built by {others} tasks, now {tasks}; use --task I/{others}, or "
                    "none to build here what is missing"
                )
        _make_folders(root)
        yield


def _make_folders(root: Path) -> None:
    for folder in (INDEX_DIR, LEDGER_DIR):
        (root / folder).mkdir(exist_ok=True)


def _check_empty(root: Path) -> None:
    record = root / BUILD_JSON
    begun = (partial_path(record).name, ".task")  # by another task, at this moment
    mine = {INDEX_DIR, LEDGER_DIR}  # made for a store, empty
    found = [path for path in root.iterdir() if path != record and not path.name.startswith(begun)]
    strange = [path for path in found if path.name not in mine or any(path.iterdir())]
    if strange and not record.exists():
        raise BadInputError(f"{root}: not empty and not a directory of shards build; choose another --out")


def _check_same(place: Place, plan: dict[str, Any]) -> None:
    found = _read_plan(place)
    if found["fingerprint"] == plan["fingerprint"]:
        return
    before, now = found["built_with"], plan["built_with"]
    changed = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
    if changed:
        what = "; ".join(f"{name} {before.get(name)!r}, now {now.get(name)!r}" for name in changed)
    else:
        what = f"another content of the source ({found['source']}, now {plan['source']})"
    raise BadInputError(
        f"{place.out}: holds a build with {what}; choose another --out, or delete this one to build anew"
    )


def _is_complete(place: Place) -> bool:
    """dataset.json is there, and it is that of the last round of rows tried again."""
    if not (place.root / DATASET_JSON).exists():
        return False
    rounds = read_dataset_info(str(place.root)).built_with["retry_rounds"]
    return bool(rounds == _read_plan(place)["retry_rounds"])


def _task_work(source: Source, options: BuildOptions, task: int, tasks: int) -> Work:
    base = options.image_root or source.base
    if source.num_rows is None:
        if tasks == 1:
            return Work(source.name, base, "", source.rows)

        def rows(spans: Sequence[Span]) -> Iterator[Row]:
            assert source.part is not None
            for first, end in spans:
                yield from islice(source.part(task, tasks, first), end - first)

        return Work(source.name, base, f"{task:04d}-", rows)
    count = _num_windows(source.num_rows, options.shard_samples)
    windows = range(count * task // tasks, count * (task + 1) // tasks)
    work = Work(source.name, base, "", source.rows, source.num_rows, windows)
    return replace(work, may_fail=_may_fail(work, options))


def _num_windows(num_rows: int, size: int) -> int:
    return -(-num_rows // size)


def _may_fail(work: Work, options: BuildOptions) -> int:
    return int((1 - options.min_success) * work.total(options.shard_samples) + 1e-9)


def _retry_work(root: Path, source: Source, options: BuildOptions, tasks: int, number: int) -> Work:
    """The rows that had failed before round `number` (from 1): the same ones when that round is half done."""
    failed = sorted(failed_rows(root, before_round=number))

    def rows(spans: Sequence[Span]) -> Iterator[Row]:
        for first, end in spans:
            wanted = failed[first:end]
            if source.num_rows is not None:
                yield from source.rows([(each, each + 1) for each in wanted])
                continue
            assert source.part is not None
            everything = chain.from_iterable(source.part(task, tasks, 0) for task in range(tasks))
            numbers = set(wanted)
            found = {row.number: row for row in everything if row.number in numbers}
            yield from (found[each] for each in wanted if each in found)

    windows = range(_num_windows(len(failed), options.shard_samples))
    base = options.image_root or source.base
    return Work(source.name, base, f"r{number:02d}-", rows, len(failed), windows, None, rounds_before(number))


def _complete(place: Place, source: Source, options: BuildOptions, progress: Progress | None) -> DatasetInfo:
    """Does what is missing: the rows, the rounds of rows tried again, dataset.json."""
    plan = _read_plan(place)
    tasks = plan["built_with"]["tasks"]
    if tasks == 1:
        do_work(place, _task_work(source, options, 0, 1), options, progress)
    for number in range(1, plan["retry_rounds"] + 1):
        do_work(place, _retry_work(place.root, source, options, tasks, number), options, progress)
    return _finish(place, plan, options.min_success)


def _windows(place: Place, plan: dict[str, Any]) -> list[Window]:
    """All windows of the rows' first round, in order. Raises BadInputError if one is missing."""
    root, tasks = place.root, plan["built_with"]["tasks"]
    if plan["num_rows"] is not None:
        count = _num_windows(plan["num_rows"], plan["built_with"]["shard_samples"])
        found = committed_windows(root, "", range(count))
        if len(found) == count:
            return [found[number] for number in range(count)]
        split = place.read(TASKS)
        undone = _undone_tasks(set(range(count)) - set(found), count, int(split)) if split else []
    else:
        prefixes = [""] if tasks == 1 else [f"{task:04d}-" for task in range(tasks)]
        by_task = [leading_windows(root, prefix) for prefix in prefixes]
        undone = [task for task, some in enumerate(by_task) if not some or not some[len(some) - 1].last]
        if not undone:
            return [window for some in by_task for window in some.values()]
        split = str(tasks)
    if not undone:
        raise BadInputError(f"{place.out}: not done yet; run its `phi3v shards build` command again")
    named = ", ".join(map(str, undone[:20])) + (", ..." if len(undone) > 20 else "")
    raise BadInputError(f"{place.out}: not done yet: task {named} of {str(split).strip()}; run them again")


def _undone_tasks(missing: set[int], count: int, tasks: int) -> list[int]:
    return [
        task
        for task in range(tasks)
        if not missing.isdisjoint(range(count * task // tasks, count * (task + 1) // tasks))
    ]


def _check_share(root: Path, source: str, windows: Sequence[Window], min_success: float) -> None:
    """Raises BadInputError if more of the rows of a task's windows have failed than may."""
    rows, failed = sum(each.rows for each in windows), sum(each.failed for each in windows)
    if failed > (1 - min_success) * rows + 1e-9:
        raise BadInputError(
            f"{source}: {failed} of the {rows} rows of this task failed (min_success {min_success:g}); most "
            f"often: {next(iter(reasons(root)), 'unknown')}; every row's outcome is in {root / LEDGER_DIR}; "
            "mend the rows, or lower min_success and run it again, which keeps what is done"
        )


def _finish(place: Place, plan: dict[str, Any], min_success: float = 0.0) -> DatasetInfo:
    """Writes dataset.json over all windows. Raises BadInputError if one is not done."""
    root, rounds = place.root, plan["retry_rounds"]
    first_round = _windows(place, plan)
    retried = [leading_windows(root, f"r{number:02d}-").values() for number in range(1, rounds + 1)]
    windows = list(chain(first_round, *retried))
    samples: Counter[str] = sum((window.samples for window in windows), Counter())
    rows = sum(window.rows for window in first_round)
    failed = len(failed_rows(root)) if any(window.failed for window in windows) else 0
    if not samples or (not rounds and failed > (1 - min_success) * rows + 1e-9):
        reason = next(iter(reasons(root)), "no row")
        raise BadInputError(
            f"{plan['source']}: {failed} of {rows} rows failed (min_success {min_success:g}), "
            f"{samples.total()} samples; most often: {reason}; every row's outcome is in "
            f"{root / LEDGER_DIR}; mend the rows or lower min_success"
        )
    shards = tuple(shard for window in windows for shard in window.shards)
    splits = {split: samples[split] for split in ("train", "val") if samples[split]}
    content = [plan["fingerprint"], [shard.sha256 for shard in shards]]
    info = DatasetInfo(
        FORMAT_VERSION,
        samples.total(),
        splits,
        shards,
        plan["source"],
        {**plan["built_with"], "retry_rounds": rounds},
        hashlib.sha256(json.dumps(content).encode()).hexdigest(),
    )
    write_atomically(root / DATASET_JSON, dataset_info_json(info))
    place.send([DATASET_JSON])
    place.remove(TASKS)
    dropped = sum(window.dropped for window in windows)
    _log.info("%s: complete: %s, %d failed, %d duplicates dropped", place.out, splits, failed, dropped)
    return info

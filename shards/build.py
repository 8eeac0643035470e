"""Builds a dataset: records of a source become shards, by one worker or many, always with the same bytes.

The records are processed in partitions of `shard_samples` (see `partition`). The output directory then holds

    build.json                      what is being built here: another source or other options are refused
    shard-000000.tar ...            numbered by partition, one split each; further ones: 000000_01
    ledger/part-000000.jsonl ...    per record: outcome, reason; per image: HTTP status, bytes, sha256, size
    index/part-000000.parquet ...   one part per partition
    dataset.json                    written last: the dataset is complete

`build` makes all partitions that are missing, so the same call resumes a build that was interrupted.
`build_task` makes those of one of several tasks, and `close_tasks` writes dataset.json when all are there;
the directory is the same to the byte. Only two things depend on the number of tasks, because they depend on
the records before: streams of unknown length, and duplicates that are dropped. `retry_failed` tries failed
records again; samples that it gains go into further shards.

In: a source (see `sources`), an output directory or object store (see `storage`), `BuildOptions`. Out:
`DatasetInfo`.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path

from shards.claim import BuildPlan, claim, is_complete, join, read_plan, write_plan
from shards.common.errors import BadInputError
from shards.common.locks import alone_in
from shards.finish import check_share, finish
from shards.format.dataset import BUILD_JSON, DATASET_JSON, DatasetInfo, read_dataset_info
from shards.ledger import failed_records, patterns_before_round
from shards.options import BuildOptions, num_may_fail
from shards.partition import Partition, num_partitions, task_partitions
from shards.process_pool import run_work
from shards.source_records import PRODUCT_ANSWER, PRODUCT_PROMPT, SourceRecord
from shards.sources import Source, Span, open_source
from shards.storage import TASKS, Storage, disk_errors, open_storage
from shards.worker import Progress, Work, finished_partitions

__all__ = ["BuildOptions", "build", "build_task", "close_tasks", "retry_failed", "waits_for_close"]

_WRITER = 4  # raised when the same source and options would give other bytes than before
_log = logging.getLogger(__name__)


def build(
    source: str, out: str, options: BuildOptions | None = None, *, progress: Progress | None = None
) -> DatasetInfo:
    """Builds the dataset of `source` in `out`, a local directory or fsspec URL, or resumes the build there.

    progress(done, total): called with records, those of earlier calls included; total 0 if only reading to
    the end tells.
    Raises BadInputError for everything that the user can fix. After too many failed records its message names
    the ledger, and the same call tries the unfinished partition again.
    """
    options = options or BuildOptions()
    opened, plan = _prepare(source, options, tasks=1)
    storage = open_storage(out, options.work_dir)
    with disk_errors(out), claim(storage, plan):
        if is_complete(storage):
            _log.info("%s: already complete, nothing to do", out)
            return read_dataset_info(str(storage.root))
        return _complete(storage, opened, options, progress=progress)


def build_task(
    source: str,
    out: str,
    options: BuildOptions | None = None,
    *,
    task: int,
    tasks: int,
    progress: Progress | None = None,
) -> list[Partition]:
    """Builds the part of task `task` (from 0) of `tasks`. All tasks may run at the same time, on any machines
    that share `out`. `close_tasks` then completes the dataset; a single task needs no closing.

    Returns the partitions of this task. Raises as `build` does; min_success counts the task's own records.
    """
    options = options or BuildOptions()
    if tasks < 1:
        raise BadInputError(f"task {task}/{tasks}: at least one task is needed")
    if not 0 <= task < tasks:
        raise BadInputError(f"task {task}/{tasks}: the task must be from 0 to {tasks - 1}")
    opened, plan = _prepare(source, options, tasks)
    if tasks == 1:
        build(source, out, options, progress=progress)
        storage = open_storage(out, options.work_dir)
        work = _task_work(opened, options, task=0, tasks=1)
        return list(finished_partitions(storage.root, work).values())
    storage = open_storage(out, options.work_dir, f"task {task}")
    work = _task_work(opened, options, task=task, tasks=tasks)
    with disk_errors(out), join(storage, plan, task=task, tasks=tasks):
        if is_complete(storage):
            return list(finished_partitions(storage.root, work).values())
        partitions = list(run_work(storage, work, options, progress=progress).values())
        if (
            opened.num_records is None
        ):  # otherwise Work.may_fail has limited the failures from the first record
            check_share(storage.root, opened.name, partitions, min_success=options.min_success)
        return partitions


def waits_for_close(out: str) -> bool:
    """Whether `out` is a build by several tasks that `close_tasks` has not completed."""
    storage = open_storage(out, worker="close")
    if storage.read(BUILD_JSON) is None or storage.read(DATASET_JSON) is not None:
        return False
    return storage.read(TASKS) is not None and read_plan(storage).retry_rounds == 0


def close_tasks(out: str, work_dir: str | None = None) -> DatasetInfo:
    """Writes dataset.json when every task is done. Raises BadInputError naming the tasks that are not."""
    storage = open_storage(out, work_dir, "close")
    with disk_errors(out):
        storage.root.mkdir(parents=True, exist_ok=True)
        with alone_in(storage.root):
            storage.pull()
            if is_complete(storage):
                return read_dataset_info(str(storage.root))
            return finish(storage, read_plan(storage))


def retry_failed(
    source: str, out: str, options: BuildOptions | None = None, *, progress: Progress | None = None
) -> DatasetInfo:
    """Tries every failed record once more; a dataset that is not complete is completed first.

    Until it is done the dataset counts as incomplete; the same call (or `build`) resumes it after a kill.
    Raises as `build` does.
    """
    options = options or BuildOptions()
    storage = open_storage(out, options.work_dir)
    tasks = 1 if storage.read(BUILD_JSON) is None else read_plan(storage).tasks
    opened, plan = _prepare(source, options, tasks)
    with disk_errors(out), claim(storage, plan):
        rounds = read_plan(storage).retry_rounds
        if not is_complete(storage):
            info = _complete(storage, opened, options, progress=progress)
            if rounds:  # the interrupted build was a retry round: this call has now finished it
                return info
        if not failed_records(storage.root):
            _log.info("%s: no record has failed, nothing to do", out)
            return read_dataset_info(str(storage.root))
        write_plan(storage, replace(plan, retry_rounds=rounds + 1))
        storage.remove(DATASET_JSON)
        return _complete(storage, opened, options, progress=progress)


def _prepare(source: str, options: BuildOptions, tasks: int) -> tuple[Source, BuildPlan]:
    """Checks everything that can be checked before anything is written."""
    options.check()
    opened = open_source(source, options.recipe())
    # Without a known length or with dropped duplicates the bytes depend on the number of tasks.
    shaping_tasks = tasks if opened.num_records is None or options.duplicates == "drop" else 1
    built_with = {"writer": _WRITER, "tasks": shaping_tasks, **options.shaping()}
    texts = [PRODUCT_PROMPT, PRODUCT_ANSWER]
    fingerprint = hashlib.sha256(json.dumps([opened.sha256, built_with, texts]).encode()).hexdigest()
    return opened, BuildPlan(fingerprint, opened.name, opened.num_records, built_with)


def _task_work(source: Source, options: BuildOptions, *, task: int, tasks: int) -> Work:
    base = options.image_root or source.base
    if source.num_records is None:
        if tasks == 1:
            return Work(source.name, base, prefix="", records=source.records)

        def records(spans: Sequence[Span]) -> Iterator[SourceRecord]:
            assert source.part is not None
            for first, end in spans:
                yield from islice(source.part(task, tasks, first), end - first)

        return Work(source.name, base, prefix=f"{task:04d}-", records=records)
    count = num_partitions(source.num_records, options.shard_samples)
    work = Work(
        source.name,
        base,
        prefix="",
        records=source.records,
        num_records=source.num_records,
        partitions=task_partitions(count, task, tasks),
    )
    return replace(work, may_fail=num_may_fail(work.total(options.shard_samples), options.min_success))


def _retry_work(root: Path, source: Source, options: BuildOptions, *, tasks: int, number: int) -> Work:
    """The records that had failed before retry round `number` (from 1). They are the same when half of the
    round is done.
    """
    failed = sorted(failed_records(root, before_round=number))

    def records(spans: Sequence[Span]) -> Iterator[SourceRecord]:
        for first, end in spans:
            wanted = failed[first:end]
            if source.num_records is not None:
                yield from source.records([(each, each + 1) for each in wanted])
                continue
            assert source.part is not None
            everything = chain.from_iterable(source.part(task, tasks, 0) for task in range(tasks))
            numbers = set(wanted)
            found = {record.number: record for record in everything if record.number in numbers}
            yield from (found[each] for each in wanted if each in found)

    return Work(
        source.name,
        options.image_root or source.base,
        prefix=f"r{number:02d}-",
        records=records,
        num_records=len(failed),
        partitions=range(num_partitions(len(failed), options.shard_samples)),
        before=patterns_before_round(number),
    )


def _complete(
    storage: Storage, source: Source, options: BuildOptions, *, progress: Progress | None
) -> DatasetInfo:
    """Makes everything that is missing: partitions, retry rounds, dataset.json."""
    plan = read_plan(storage)
    if plan.tasks == 1:
        run_work(storage, _task_work(source, options, task=0, tasks=1), options, progress=progress)
    for number in range(1, plan.retry_rounds + 1):
        work = _retry_work(storage.root, source, options, tasks=plan.tasks, number=number)
        run_work(storage, work, options, progress=progress)
    return finish(storage, plan, min_success=options.min_success)

"""One worker of a build: prepares the records of its partitions and writes them.

A worker that was killed is started again and makes the partitions that are missing; what is finished is not
fetched again. It touches only the files of its own partitions, so several workers can write into one
directory at the same time: tasks on many machines (see `build`), processes on this one (see `process_pool`).

In: records, options. Out: the finished partitions.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import sys
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from shards.common.errors import BadInputError
from shards.fetch import Fetcher, FetchOptions, in_order
from shards.format.dataset import LEDGER_DIR
from shards.ledger import image_digest, seen_images
from shards.options import BuildOptions
from shards.partition import (
    Partition,
    PartitionWriter,
    committed_partitions,
    delete_unfinished,
    leading_partitions,
    partition_files,
)
from shards.prepare import Prepared, on_disk, prepare, prepare_all
from shards.source_records import SourceRecord
from shards.sources import Span
from shards.storage import Storage

_MAX_WAITING = 128 * 2**20  # bytes of images that wait for their turn to be written
_BATCH = 8  # records with local images that a thread takes at a time
_log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""progress(done, total): records (or bytes) done so far, and of how many; total 0 if that is unknown."""


@dataclass(frozen=True)
class Work:
    """What a worker has to do.

    name: of the source, for messages. base: folder or URL that image paths start from. prefix: of the files.
    records(spans): the records at ascending spans [first, end) of places in this work. num_records: of the
    whole work, all tasks together; None if only reading to the end tells. partitions: the numbers of this
    worker's partitions; None: one after the other until the records end. may_fail: records that may fail
    before it stops; None: any number. before: patterns of the ledger parts of earlier rounds.
    """

    name: str
    base: str
    prefix: str
    records: Callable[[Sequence[Span]], Iterator[SourceRecord]]
    num_records: int | None = None
    partitions: range | None = None
    may_fail: int | None = None
    before: tuple[str, ...] = ()

    def span(self, number: int, size: int) -> Span:
        """The places of the records of partition `number`, for partitions of `size` records."""
        limit = sys.maxsize if self.num_records is None else self.num_records
        return number * size, min((number + 1) * size, limit)

    def total(self, size: int) -> int:
        """Records in the worker's partitions, 0 if unknown."""
        if self.partitions is None or not self.partitions:
            return 0
        return self.span(self.partitions[-1], size)[1] - self.span(self.partitions[0], size)[0]


class Tally:
    """Records done and records failed so far, those of earlier calls included. `process_pool` has one that
    several processes share.
    """

    def __init__(self, records: int, failed: int) -> None:
        self.records, self.failed = records, failed

    def add(self, failed: bool) -> None:
        self.records += 1
        self.failed += failed


def finished_partitions(root: Path, work: Work) -> dict[int, Partition]:
    """The partitions of `work` that are finished, by number."""
    if work.partitions is None:
        return leading_partitions(root, work.prefix)
    return committed_partitions(root, work.prefix, work.partitions)


def partitions_to_do(work: Work, finished: Mapping[int, Partition]) -> Iterable[int]:
    """The numbers of the missing partitions: a list, or without an end where the number of records is not
    known.
    """
    if work.partitions is not None:
        return [number for number in work.partitions if number not in finished]
    if finished and finished[len(finished) - 1].last:
        return []
    return itertools.count(len(finished))


def clean_up(root: Path, work: Work) -> dict[int, Partition]:
    """Deletes what killed workers have left of the partitions of `work`; returns the finished ones."""
    finished = finished_partitions(root, work)
    delete_unfinished(root, work.prefix, finished, numbers=work.partitions)
    if finished:
        _log.info("%s: resuming after %d finished partitions", root, len(finished))
    return finished


def run_worker(
    storage: Storage,
    work: Work,
    options: BuildOptions,
    *,
    numbers: Iterable[int],
    tally: Tally,
    progress: Callable[[], None] = lambda: None,
) -> None:
    """Writes the partitions `numbers` (ascending) of `work`. progress(): called after every record.

    Raises BadInputError if more records fail than may, or if the source changes meanwhile.
    """
    asyncio.run(_write_partitions(storage, work, options, numbers=numbers, tally=tally, progress=progress))


class _Reader:
    """The records of a worker, with one read ahead, so that the last partition is known to be the last."""

    def __init__(self, records: Iterator[SourceRecord]) -> None:
        self._records = records
        self._next = next(records, None)

    @property
    def at_end(self) -> bool:
        return self._next is None

    def take(self, count: int) -> Iterator[SourceRecord]:
        """Yields the next `count` records, or fewer at the end."""
        for _ in range(count):
            if self._next is None:
                return
            record, self._next = self._next, next(self._records, None)
            yield record


async def _write_partitions(
    storage: Storage,
    work: Work,
    options: BuildOptions,
    *,
    numbers: Iterable[int],
    tally: Tally,
    progress: Callable[[], None],
) -> None:
    root, size = storage.root, options.shard_samples
    if work.partitions is None:
        start = next(iter(numbers))
        numbers = itertools.count(start)
        spans = [(start * size, sys.maxsize)]
        earlier: Iterable[int] = range(start)
    else:
        numbers = list(numbers)
        spans = [work.span(number, size) for number in numbers]
        earlier = range(work.partitions.start, numbers[0])
    reader = _Reader(work.records(spans))
    drops = options.duplicates == "drop"
    seen = seen_images(root, work.prefix, earlier, before=work.before) if drops else None

    async with Fetcher(_fetch_options(options)) as fetcher:
        for number in numbers:
            first, end = work.span(number, size)
            writer = PartitionWriter(
                root,
                work.prefix,
                number,
                val_fraction=options.val_fraction,
                shard_bytes=options.shard_bytes,
            )
            try:
                prepared = _prepared(reader.take(end - first), work.base, fetcher, options=options)
                async with contextlib.aclosing(prepared):
                    async for items in prepared:
                        for item in items:
                            added = item if seen is None else _without_duplicates(item, seen)
                            failed = added.outcome == "failed"
                            writer.add(added)
                            tally.add(failed)
                            if failed:
                                _check_failures(root, work, options, writer=writer, tally=tally)
                            progress()
                if work.num_records is not None and writer.partition.records != end - first:
                    raise BadInputError(
                        f"{work.name}: changed while it was read; leave it unchanged and run again"
                    )
                last = reader.at_end if work.num_records is None else end == work.num_records
                partition = writer.commit(last)
                storage.upload(partition_files(partition, work.prefix, number))
            except BaseException:
                writer.abandon()
                raise
            _log.info("%s: partition %d: %s", root, number, _summary(partition))
            if partition.last:
                break


async def _prepared(
    records: Iterator[SourceRecord], base: str, fetcher: Fetcher, *, options: BuildOptions
) -> AsyncGenerator[list[Prepared], None]:
    """Yields the records in order, with their images fetched and checked, in batches."""

    async def prepare_batch(batch: list[SourceRecord]) -> list[Prepared]:
        if len(batch) == 1 and not on_disk(batch[0], base):
            return [await prepare(batch[0], base, fetcher, options=options)]
        return await prepare_all(batch, base, options)

    prepared = in_order(
        _batches(records, base),
        prepare_batch,
        8 * options.concurrency,
        weigh=_weight,
        most=_MAX_WAITING // (options.processes or 1),
        at_once=2 * options.concurrency,
    )
    async with contextlib.aclosing(prepared):
        async for items in prepared:
            yield items


def _fetch_options(options: BuildOptions) -> FetchOptions:
    return FetchOptions(
        concurrency=options.concurrency,
        per_host=options.per_host,
        retries=options.retries,
        max_bytes=options.max_bytes,
        allow_private_hosts=options.allow_private_hosts,
    )


def _batches(records: Iterable[SourceRecord], base: str) -> Iterator[list[SourceRecord]]:
    """The records in order: those with local images in batches, any other one alone."""
    batch: list[SourceRecord] = []
    for record in records:
        if not on_disk(record, base):
            if batch:
                yield batch
            yield [record]
            batch = []
            continue
        batch.append(record)
        if len(batch) == _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _weight(items: Sequence[Prepared]) -> int:
    """Bytes of image data that the items hold in memory."""
    return sum(len(image.fetched.data or b"") for item in items for image in item.images)


def _without_duplicates(item: Prepared, seen: dict[bytes, int]) -> Prepared:
    """The item, marked as dropped if a record before it had the same images. Updates `seen`."""
    if item.fault is not None or not item.images:
        return item
    first = seen.setdefault(image_digest([str(each.sha256) for each in item.images]), item.record.number)
    if first == item.record.number:
        return item
    return replace(item, fault=f"duplicate: its images are those of record {first}", dropped=True)


def _check_failures(
    root: Path, work: Work, options: BuildOptions, *, writer: PartitionWriter, tally: Tally
) -> None:
    """Raises BadInputError as soon as too many records have failed, so that nobody waits for the end."""
    if work.may_fail is None or tally.failed <= work.may_fail:
        return
    writer.write_ledger()
    reason = writer.failures.most_common(1)[0][0]
    raise BadInputError(
        f"{work.name}: {tally.failed} of the first {tally.records} records failed and only {work.may_fail} "
        f"of {work.total(options.shard_samples)} may (min_success {options.min_success:g}); most frequent "
        f"reason: {reason}; the outcome of every record is in {root / LEDGER_DIR}; fix the records or the "
        "network and run again, or lower min_success"
    )


def _summary(partition: Partition) -> str:
    splits = ", ".join(f"{count} {split}" for split, count in sorted(partition.samples.items()))
    megabytes = sum(shard.bytes for shard in partition.shards) / 1e6
    return f"{splits or 'no samples'}, {partition.failed} failed, {megabytes:.1f} MB"

"""One worker of a build: windows of rows of the source, each finished or to be made again.

A worker that was killed makes the windows that are missing; what is finished is not fetched again. It touches
no file but those of its windows, so any number of workers are busy in one directory at once: tasks on many
machines (see `build`), processes on this one (see `crew`).

In: rows, options. Out: the finished windows. Called by `build` and `crew`.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from shards.common.errors import BadInputError
from shards.fetch import Fetcher, FetchOptions, in_order
from shards.format.dataset import LEDGER_DIR
from shards.ledger import image_digest, seen_images
from shards.options import BuildOptions
from shards.partition import (
    Window,
    WindowWriter,
    committed_windows,
    delete_unfinished,
    leading_windows,
    window_files,
)
from shards.prepare import Prepared, on_disk, prepare, prepare_all
from shards.rows import Row
from shards.sources import Span
from shards.storage import Place

_MOST_WAITING = 128 * 2**20  # bytes of images that wait for their turn to be written
_BATCH = 8  # rows of local images that a thread takes at a time
_log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Work:
    """What a worker has to do. name: of the source, for messages; base: what image paths start from. prefix:
    of its files. rows(spans): rows of ascending spans of their places in this work. num_rows: of all rows
    that `windows` count; None if only reading to the end tells. windows: the numbers of the worker's windows
    among them, None for one after the other until the rows end. may_fail: rows that may fail before it gives
    up; None: any number. before: patterns of the ledgers of earlier rounds.
    """

    name: str
    base: str
    prefix: str
    rows: Callable[[Sequence[Span]], Iterator[Row]]
    num_rows: int | None = None
    windows: range | None = None
    may_fail: int | None = None
    before: tuple[str, ...] = ()

    def span(self, number: int, size: int) -> Span:
        """The places of the rows of window `number`, for windows of `size` rows."""
        return number * size, min(
            (number + 1) * size, sys.maxsize if self.num_rows is None else self.num_rows
        )

    def total(self, size: int) -> int:
        """Rows of the worker's windows, 0 if not known."""
        if self.windows is None or not self.windows:
            return 0
        return self.span(self.windows[-1], size)[1] - self.span(self.windows[0], size)[0]


class Tally:
    """Rows and failures so far, those of earlier calls included. `add` raises nothing; see `Crew` for the one
    that several processes share."""

    def __init__(self, rows: int, failed: int) -> None:
        self.rows, self.failed = rows, failed

    def add(self, failed: bool) -> None:
        self.rows += 1
        self.failed += failed


def finished_windows(root: Path, work: Work) -> dict[int, Window]:
    """The windows of `work` that are finished, by number."""
    if work.windows is None:
        return leading_windows(root, work.prefix)
    return committed_windows(root, work.prefix, work.windows)


def windows_to_do(work: Work, windows: Mapping[int, Window]) -> Iterable[int]:
    """The numbers of the windows that are missing; without an end where only reading tells."""
    if work.windows is not None:
        return [number for number in work.windows if number not in windows]
    if windows and windows[len(windows) - 1].last:
        return []
    return itertools.count(len(windows))


def tidy(root: Path, work: Work) -> dict[int, Window]:
    """Deletes what killed workers have left of the windows of `work`; returns those that are finished."""
    windows = finished_windows(root, work)
    delete_unfinished(root, work.prefix, windows, work.windows)
    if windows:
        _log.info("%s: going on after %d finished windows", root, len(windows))
    return windows


def run_worker(
    place: Place,
    work: Work,
    options: BuildOptions,
    todo: Iterable[int],
    tally: Tally,
    progress: Callable[[], None] = lambda: None,
) -> None:
    """Writes the windows `todo` of `work`, ascending. progress(): called after every row.

    Raises BadInputError if more rows fail than may, or if the source changes meanwhile.
    """
    asyncio.run(_write_windows(place, work, options, todo, tally, progress))


async def _write_windows(
    place: Place,
    work: Work,
    options: BuildOptions,
    todo: Iterable[int],
    tally: Tally,
    progress: Callable[[], None],
) -> None:
    root, size = place.root, options.shard_samples
    if work.windows is None:
        start = next(iter(todo))
        todo = itertools.count(start)
        rows = work.rows([(start * size, sys.maxsize)])
        earlier: Iterable[int] = range(start)
    else:
        todo = list(todo)
        rows = work.rows([work.span(number, size) for number in todo])
        earlier = range(work.windows.start, todo[0])
    upcoming = next(rows, None)
    drops = options.duplicates == "drop"
    seen = seen_images(root, work.prefix, earlier, work.before) if drops else None

    def window_rows(count: int) -> Iterator[Row]:
        nonlocal upcoming
        for _ in range(count):
            if upcoming is None:
                return
            row, upcoming = upcoming, next(rows, None)
            yield row

    async with Fetcher(_fetch_options(options)) as fetcher:

        async def prepare_batch(batch: list[Row]) -> list[Prepared]:
            if len(batch) == 1 and not on_disk(batch[0], work.base):
                return [await prepare(batch[0], work.base, fetcher, options)]
            return await prepare_all(batch, work.base, options)

        for number in todo:
            first, end = work.span(number, size)
            writer = WindowWriter(root, work.prefix, number, options.val_fraction, options.shard_bytes)
            batches = _batches(window_rows(end - first), work.base)
            most = _MOST_WAITING // (options.processes or 1)
            prepared = in_order(
                batches, prepare_batch, 8 * options.concurrency, _weight, most, 2 * options.concurrency
            )
            try:
                async with contextlib.aclosing(prepared):
                    async for items in prepared:
                        for item in items:
                            added = item if seen is None else _without_duplicates(item, seen)
                            writer.add(added)
                            tally.add(added.outcome == "failed")
                            if added.outcome == "failed":
                                _check_failures(root, work, options, writer, tally)
                            progress()
                if work.num_rows is not None and writer.window.rows != end - first:
                    raise BadInputError(
                        f"{work.name}: changed while it was read; leave it alone and run again"
                    )
                last = upcoming is None if work.num_rows is None else end == work.num_rows
                window = writer.commit(last)
                place.send(window_files(window, work.prefix, number))
            except BaseException:
                writer.abandon()
                raise
            _log.info("%s: window %d: %s", root, number, _summary(window))
            if window.last:
                break


def _fetch_options(options: BuildOptions) -> FetchOptions:
    return FetchOptions(
        concurrency=options.concurrency,
        per_host=options.per_host,
        retries=options.retries,
        max_bytes=options.max_bytes,
        allow_private_hosts=options.allow_private_hosts,
    )


def _batches(rows: Iterable[Row], base: str) -> Iterator[list[Row]]:
    """The rows in order: local ones together, one to be fetched by itself."""
    batch: list[Row] = []
    for row in rows:
        if not on_disk(row, base):
            if batch:
                yield batch
            yield [row]
            batch = []
            continue
        batch.append(row)
        if len(batch) == _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _weight(items: Sequence[Prepared]) -> int:
    return sum(len(picture.fetched.data or b"") for item in items for picture in item.pictures)


def _without_duplicates(item: Prepared, seen: dict[bytes, int]) -> Prepared:
    if item.fault is not None or not item.pictures:
        return item
    first = seen.setdefault(image_digest([str(each.sha256) for each in item.pictures]), item.row.number)
    if first == item.row.number:
        return item
    return replace(item, fault=f"duplicate: its images are those of row {first}", dropped=True)


def _check_failures(
    root: Path, work: Work, options: BuildOptions, writer: WindowWriter, tally: Tally
) -> None:
    """Raises BadInputError as soon as more rows have failed than may, so that nobody waits for the end."""
    if work.may_fail is None or tally.failed <= work.may_fail:
        return
    writer.write_ledger()
    reason = writer.reasons.most_common(1)[0][0]
    raise BadInputError(
        f"{work.name}: {tally.failed} of the first {tally.rows} rows failed and only {work.may_fail} of "
        f"{work.total(options.shard_samples)} may (min_success {options.min_success:g}); most often: "
        f"{reason}; every row's outcome is in {root / LEDGER_DIR}; mend the rows or the network and run "
        "again, or lower min_success"
    )


def _summary(window: Window) -> str:
    splits = ", ".join(f"{count} {split}" for split, count in sorted(window.samples.items())) or "no samples"
    return f"{splits}, {window.failed} failed, {sum(shard.bytes for shard in window.shards) / 1e6:.1f} MB"

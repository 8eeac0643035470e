"""One worker of a build: its rows of the source, window by window, until they are done.

A worker that was killed goes on behind its last finished window; what is finished is not fetched again. It
touches no file but those with its prefix, so any number of them work in one directory at once.

In: rows, options. Out: the finished windows. Called by `build`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from shards.fetch import Fetcher, FetchOptions, in_order
from shards.format import LEDGER_DIR, BadInputError
from shards.ledger import image_digest, seen_images
from shards.options import BuildOptions
from shards.place import Place
from shards.prepare import Prepared, prepare
from shards.rows import Row
from shards.window import Window, WindowWriter, committed_windows, delete_unfinished, window_files

_MOST_WAITING = 128 * 2**20  # bytes of images that wait for their turn to be written
_log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Work:
    """What a worker has to do. name: of the source, for messages; base: what image paths start from. prefix:
    of its files. num_rows: None if only reading to the end tells. rows(start): its rows from the start-th on.
    may_fail: rows that may fail before it gives up; None: any number.
    """

    name: str
    base: str
    prefix: str
    num_rows: int | None
    rows: Callable[[int], Iterator[Row]]
    may_fail: int | None


def run_worker(place: Place, work: Work, options: BuildOptions, progress: Progress | None) -> list[Window]:
    """Does the rest of `work` and returns all its windows.

    progress(done, total): called with rows as they are done, those of an earlier call included; total 0 if it
    is not known. Raises BadInputError if more rows fail than may, or if the source changes meanwhile.
    """
    root = place.root
    windows = committed_windows(root, work.prefix)
    delete_unfinished(root, work.prefix, windows)
    if windows and not windows[-1].last:
        _log.info("%s: going on after %d finished windows", root, len(windows))
    if not windows or not windows[-1].last:
        asyncio.run(_write_windows(place, work, options, windows, progress))
    return windows


async def _write_windows(
    place: Place, work: Work, options: BuildOptions, windows: list[Window], progress: Progress | None
) -> None:
    """Writes the windows that are missing, appending each to `windows` when it is committed."""
    root = place.root
    rows = work.rows(sum(window.rows for window in windows))
    upcoming = next(rows, None)
    seen = seen_images(root, work.prefix) if options.duplicates == "drop" else None
    fetch_options = FetchOptions(
        concurrency=options.concurrency,
        per_host=options.per_host,
        retries=options.retries,
        max_bytes=options.max_bytes,
        allow_private_hosts=options.allow_private_hosts,
    )

    def window_rows() -> Iterator[Row]:
        nonlocal upcoming
        for _ in range(options.shard_samples):
            if upcoming is None:
                return
            row, upcoming = upcoming, next(rows, None)
            yield row

    async with Fetcher(fetch_options) as fetcher:

        async def prepare_row(row: Row) -> Prepared:
            return await prepare(row, work.base, fetcher, options)

        while not (windows and windows[-1].last):
            done = sum(window.rows for window in windows)
            failed = sum(window.failed for window in windows)
            first_shard = sum(len(window.shards) for window in windows)
            writer = WindowWriter(
                root, work.prefix, len(windows), first_shard, options.val_fraction, options.shard_bytes
            )
            prepared = in_order(window_rows(), prepare_row, 8 * options.concurrency, _weight, _MOST_WAITING)
            try:
                async with contextlib.aclosing(prepared):
                    async for item in prepared:
                        writer.add(item if seen is None else _without_duplicates(item, seen))
                        _check_failures(root, work, options, writer, done, failed)
                        if progress is not None:
                            progress(done + writer.window.rows, work.num_rows or 0)
                if upcoming is None and work.num_rows not in (None, done + writer.window.rows):
                    raise BadInputError(
                        f"{work.name}: changed while it was read; leave it alone and run again"
                    )
                window = writer.commit(last=upcoming is None)
                place.send(window_files(window, work.prefix, len(windows)))
                windows.append(window)
            except BaseException:
                writer.abandon()
                raise
            _log.info("%s: window %d: %s", root, len(windows) - 1, _summary(windows[-1]))


def _weight(item: Prepared) -> int:
    return sum(len(picture.fetched.data or b"") for picture in item.pictures)


def _without_duplicates(item: Prepared, seen: dict[bytes, int]) -> Prepared:
    if item.fault is not None or not item.pictures:
        return item
    first = seen.setdefault(image_digest([str(each.sha256) for each in item.pictures]), item.row.number)
    if first == item.row.number:
        return item
    return replace(item, fault=f"duplicate: its images are those of row {first}", dropped=True)


def _check_failures(
    root: Path, work: Work, options: BuildOptions, writer: WindowWriter, done: int, failed: int
) -> None:
    """Raises BadInputError as soon as more rows have failed than may, so that nobody waits for the end."""
    failed += writer.window.failed
    if work.may_fail is None or failed <= work.may_fail:
        return
    writer.write_ledger()
    reason = writer.reasons.most_common(1)[0][0]
    raise BadInputError(
        f"{work.name}: {failed} of the first {done + writer.window.rows} rows failed and only "
        f"{work.may_fail} of {work.num_rows} may (min_success {options.min_success:g}); most often: "
        f"{reason}; every row's outcome is in {root / LEDGER_DIR}; mend the rows or the network and run "
        "again, or lower min_success"
    )


def _summary(window: Window) -> str:
    splits = ", ".join(f"{count} {split}" for split, count in sorted(window.samples.items())) or "no samples"
    return f"{splits}, {window.failed} failed, {sum(shard.bytes for shard in window.shards) / 1e6:.1f} MB"

"""Rows into shards: resumable, and the same bytes however often it was interrupted.

The source is worked through in windows of `shard_samples` rows (see `window`). A killed build goes on at the
first window without an index part; what is finished is not fetched again. The output directory then holds

    build.json                      what is being built here: another source or other options are refused
    shard-000000.tar ...            numbered over the whole dataset, one split each
    ledger/part-000000.jsonl ...    per row: outcome, reason; per image: HTTP status, bytes, sha256, size
    index/part-000000.parquet ...   one part per window
    dataset.json                    written last: the dataset is complete

In: a source (see `sources`), an output directory, `BuildOptions`. Out: `DatasetInfo`. Called by the command
line.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any

from shards.atomic import alone_in, partial_path, write_atomically
from shards.fetch import Fetcher, FetchOptions, in_order
from shards.format import (
    BUILD_JSON,
    DATASET_JSON,
    FORMAT_VERSION,
    LEDGER_DIR,
    BadInputError,
    DatasetInfo,
    dataset_info_json,
    read_dataset_info,
)
from shards.prepare import Prepared, prepare
from shards.sources import PRODUCT_ANSWER, PRODUCT_PROMPT, Recipe, Row, Source, open_source
from shards.window import Window, WindowWriter, committed_windows

_WRITER = 1  # raised when the same source and options would give other bytes than before
_log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class BuildOptions:
    """How to build. The first block shapes the bytes (and is recorded); the second only how they are got.

    images, prompt, answer, key, group_by: see `sources.Recipe`; without group_by rows with equal images stay
    together. val_fraction: part of the groups that becomes the val split, by hash, so it is stable when rows
    are added. shard_samples: rows per window, so the most samples of a tar. shard_bytes: a tar is closed
    before it grows past it. max_bytes, max_pixels: of one image. min_success: part of the rows that must
    succeed. concurrency: fetches at a time, per_host of them at one host. retries: after a failure that may
    pass.
    """

    images: tuple[str, ...] = ()
    prompt: str | None = None
    answer: str | None = None
    key: str | None = None
    group_by: str | None = None
    val_fraction: float = 0.1
    shard_samples: int = 1000
    shard_bytes: int = 256 * 2**20
    max_bytes: int = 64 * 2**20
    max_pixels: int = 100_000_000

    min_success: float = 0.95
    allow_private_hosts: bool = False
    concurrency: int = 32
    per_host: int = 16
    retries: int = 3


_HOW_ONLY = ("min_success", "allow_private_hosts", "concurrency", "per_host", "retries")


def build(
    source: str, out: str, options: BuildOptions | None = None, progress: Progress | None = None
) -> DatasetInfo:
    """Builds the dataset of `source` in the local directory `out`, or finishes a build that was interrupted
    there.

    progress(done, total): called with rows as they are done, those of an earlier call included.
    Raises BadInputError for everything the user can mend. After too many failed rows its message names the
    ledger, and the same command tries the unfinished window again.
    """
    options = options or BuildOptions()
    _check_options(options, out)
    recipe = Recipe(options.images, options.prompt, options.answer, options.key, options.group_by)
    opened = open_source(source, recipe)
    shaping = {f.name: getattr(options, f.name) for f in fields(options) if f.name not in _HOW_ONLY}
    built_with = json.loads(json.dumps({"writer": _WRITER, **shaping}))
    texts = [PRODUCT_PROMPT, PRODUCT_ANSWER]
    fingerprint = hashlib.sha256(json.dumps([opened.sha256, built_with, texts]).encode()).hexdigest()
    root = Path(out)
    try:
        with _claim(root, source, built_with, fingerprint):
            if (root / DATASET_JSON).exists():
                _log.info("%s: already complete, nothing to do", out)
                return read_dataset_info(out)
            windows = committed_windows(root)
            if windows:
                _log.info("%s: going on after %d finished windows", out, len(windows))
            asyncio.run(_write_windows(root, opened, options, windows, progress))
            return _finish(root, source, built_with, fingerprint, windows)
    except OSError as error:
        place = f" at {error.filename}" if error.filename else ""
        raise BadInputError(
            f"{out}: cannot write ({error.strerror or error}{place}); make room or choose another --out"
        ) from error


def _check_options(options: BuildOptions, out: str) -> None:
    if "://" in out:
        raise BadInputError(
            f"{out}: shards are written to a local directory; copy them to their store afterwards"
        )
    for name in ("val_fraction", "min_success"):
        if not 0 <= getattr(options, name) <= 1:
            raise BadInputError(f"{name} is {getattr(options, name)}; it must be from 0 to 1")
    for name in ("shard_samples", "shard_bytes", "max_bytes", "max_pixels", "concurrency", "per_host"):
        if getattr(options, name) < 1:
            raise BadInputError(f"{name} is {getattr(options, name)}; it must be at least 1")
    if options.retries < 0:
        raise BadInputError(f"retries is {options.retries}; it must be at least 0")


@contextlib.contextmanager
def _claim(root: Path, source: str, built_with: dict[str, Any], fingerprint: str) -> Iterator[None]:
    """Makes `root` the directory of this build, alone in it while the context is open."""
    root.mkdir(parents=True, exist_ok=True)
    with alone_in(root):
        plan = {"fingerprint": fingerprint, "source": source, "built_with": built_with}
        record = root / BUILD_JSON
        if record.exists():
            try:
                found = json.loads(record.read_text())
                same = found["fingerprint"] == fingerprint
            except (ValueError, TypeError, KeyError) as error:
                raise BadInputError(f"{record}: not written by shards build; choose another --out") from error
            if not same:
                raise BadInputError(_difference(root, found, plan))
        elif any(path != partial_path(record) for path in root.iterdir()):
            raise BadInputError(
                f"{root}: not empty and not a directory of shards build; choose another --out"
            )
        else:
            write_atomically(record, (json.dumps(plan, indent=1, sort_keys=True) + "\n").encode())
        yield


def _difference(root: Path, found: dict[str, Any], plan: dict[str, Any]) -> str:
    before, now = found.get("built_with", {}), plan["built_with"]
    changed = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
    if changed:
        what = "; ".join(f"{name} {before.get(name)!r}, now {now.get(name)!r}" for name in changed)
    else:
        what = f"another content of the source ({found.get('source')}, now {plan['source']})"
    return f"{root}: holds a build with {what}; choose another --out, or delete this one to build anew"


async def _write_windows(
    root: Path, source: Source, options: BuildOptions, windows: list[Window], progress: Progress | None
) -> None:
    """Writes the windows that are missing, appending each to `windows` when it is committed."""
    rows = source.rows(sum(window.rows for window in windows))
    fetch_options = FetchOptions(
        concurrency=options.concurrency,
        per_host=options.per_host,
        retries=options.retries,
        max_bytes=options.max_bytes,
        allow_private_hosts=options.allow_private_hosts,
    )
    async with Fetcher(fetch_options) as fetcher:

        async def prepare_row(row: Row) -> Prepared:
            return await prepare(row, source.base, fetcher, options.max_pixels)

        while (done := sum(window.rows for window in windows)) < source.num_rows:
            failed = sum(window.failed for window in windows)
            first_shard = sum(len(window.shards) for window in windows)
            writer = WindowWriter(root, len(windows), first_shard, options.val_fraction, options.shard_bytes)
            prepared = in_order(islice(rows, options.shard_samples), prepare_row, 2 * options.concurrency)
            try:
                async with contextlib.aclosing(prepared):
                    async for item in prepared:
                        writer.add(item)
                        _check_failures(root, source, options, writer, done, failed)
                        if progress is not None:
                            progress(done + writer.window.rows, source.num_rows)
                if writer.window.rows != min(options.shard_samples, source.num_rows - done):
                    raise BadInputError(
                        f"{source.name}: changed while it was read; leave it alone and run again"
                    )
                windows.append(writer.commit())
            except BaseException:
                writer.abandon()
                raise
            _log.info("%s: window %d: %s", root, len(windows) - 1, _summary(windows[-1]))


def _check_failures(
    root: Path, source: Source, options: BuildOptions, writer: WindowWriter, done: int, failed: int
) -> None:
    """Raises BadInputError as soon as min_success cannot be reached any more, so that nobody waits for the
    end.
    """
    allowed = int((1 - options.min_success) * source.num_rows + 1e-9)
    failed += writer.window.failed
    if failed <= allowed:
        return
    writer.write_ledger()
    reason = writer.reasons.most_common(1)[0][0]
    raise BadInputError(
        f"{source.name}: {failed} of the first {done + writer.window.rows} rows failed and only {allowed} of "
        f"{source.num_rows} may (min_success {options.min_success:g}); most often: {reason}; every row's "
        f"outcome is in {root / LEDGER_DIR}; mend the rows or the network and run again, or lower min_success"
    )


def _finish(
    root: Path, source: str, built_with: dict[str, Any], fingerprint: str, windows: list[Window]
) -> DatasetInfo:
    samples: Counter[str] = sum((window.samples for window in windows), Counter())
    if not samples:
        raise BadInputError(f"{source}: no row could be used; every row's outcome is in {root / LEDGER_DIR}")
    shards = tuple(shard for window in windows for shard in window.shards)
    splits = {split: samples[split] for split in ("train", "val") if samples[split]}
    info = DatasetInfo(FORMAT_VERSION, samples.total(), splits, shards, source, built_with, fingerprint)
    write_atomically(root / DATASET_JSON, dataset_info_json(info))
    failed = sum(window.failed for window in windows)
    _log.info("%s: complete: %d samples %s, %d rows failed", root, info.num_samples, splits, failed)
    return info


def _summary(window: Window) -> str:
    splits = ", ".join(f"{count} {split}" for split, count in sorted(window.samples.items())) or "no samples"
    return f"{splits}, {window.failed} failed, {sum(shard.bytes for shard in window.shards) / 1e6:.1f} MB"

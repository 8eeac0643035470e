"""One window of rows into tars, a ledger part and an index part; what `build` repeats until the source is
done.

A window writes its tars (each holds one split), then its ledger part (the outcome of every row), then its
index part, whose appearance commits the window: its schema metadata says which rows and shards it covers.

In: `Row`s. Out: files in the dataset directory, and a `Window` that says what they are. Called by `build`.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from shards.atomic import partial_path, publish, write_atomically
from shards.fetch import Fetched, Fetcher
from shards.format import INDEX_DIR, INDEX_SCHEMA, BadInputError, ShardInfo, sample_json
from shards.images import ImageFacts, check_image
from shards.sources import Row
from shards.tars import TarSample, TarShard

LEDGER_DIR = "ledger"
_WINDOW_KEY = b"phi3v_window"


@dataclass
class Window:
    """What a window has written. rows: taken from the source; samples: those of them written, by split."""

    rows: int = 0
    samples: Counter[str] = field(default_factory=Counter)
    shards: list[ShardInfo] = field(default_factory=list)

    @property
    def failed(self) -> int:
        return self.rows - self.samples.total()


@dataclass(frozen=True)
class Picture:
    """One image of a row. facts: None if it is no good image; sha256: in hex, None without bytes."""

    name: str
    fetched: Fetched
    facts: ImageFacts | None
    sha256: str | None
    reason: str | None


@dataclass(frozen=True)
class Prepared:
    """A row with its images fetched and checked. fault: why it cannot be used, None if it can."""

    row: Row
    pictures: tuple[Picture, ...]
    fault: str | None


async def prepare(row: Row, base: Path, fetcher: Fetcher, max_pixels: int) -> Prepared:
    """Fetches and checks the images of `row`; image paths start from `base`."""
    if row.fault is not None:
        return Prepared(row, (), row.fault)

    async def picture(name: str) -> Picture:
        fetched = await fetcher.fetch(name if "://" in name else str(base / name))
        if fetched.data is None:
            return Picture(name, fetched, None, None, fetched.reason)
        facts, sha256, reason = await asyncio.to_thread(_check, fetched.data, max_pixels)
        return Picture(name, fetched, facts, sha256, reason)

    pictures = tuple(await asyncio.gather(*(picture(name) for name in row.images)))
    faults = [each.reason for each in pictures if each.reason is not None]
    return Prepared(row, pictures, faults[0] if faults else None)


def _check(data: bytes, max_pixels: int) -> tuple[ImageFacts | None, str, str | None]:
    sha256 = hashlib.sha256(data).hexdigest()
    try:
        return check_image(data, max_pixels), sha256, None
    except BadInputError as error:
        return None, sha256, str(error)


class WindowWriter:
    """Writes window `number` of the dataset in `root`: `add` every row, then `commit` (or `abandon`).

    first_shard: the number of the next tar. A tar is closed before it grows past `shard_bytes`, and at the
    end; there is one open per split. Until `commit`, `window` says what has been added, without its shards.
    """

    def __init__(
        self, root: Path, number: int, first_shard: int, val_fraction: float, shard_bytes: int
    ) -> None:
        self.window = Window()
        self.reasons: Counter[str] = Counter()  # of the rows that failed
        self._root, self._number, self._next_shard = root, number, first_shard
        self._val_fraction, self._shard_bytes = val_fraction, shard_bytes
        self._open: dict[str, tuple[str, TarShard]] = {}
        self._index: list[dict[str, Any]] = []
        self._ledger = io.StringIO()

    def add(self, item: Prepared) -> None:
        self.window.rows += 1
        split = shard = None
        if item.fault is None:
            split = _split_of(item, self._val_fraction)
            shard, sample = self._write(split, item)
            self._index.append(_index_row(item, split, shard, sample))
            self.window.samples[split] += 1
        else:
            self.reasons[item.fault] += 1
        self._ledger.write(json.dumps(_ledger_entry(item, split, shard), ensure_ascii=False) + "\n")

    def commit(self) -> Window:
        for split in list(self._open):
            self._close(split)
        self.window.shards.sort(key=lambda shard: shard.name)
        self.write_ledger()
        stored = {
            "rows": self.window.rows,
            "samples": dict(sorted(self.window.samples.items())),
            "shards": [asdict(shard) for shard in self.window.shards],
        }
        self._index.sort(key=lambda row: (row["shard"], row["offset"]))
        schema = INDEX_SCHEMA.with_metadata({_WINDOW_KEY: json.dumps(stored).encode()})
        part = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(self._index, schema), part, compression="zstd")
        write_atomically(_index_part(self._root, self._number), part.getvalue())
        return self.window

    def write_ledger(self) -> None:
        """Also for a window that will not be committed, so that the user sees why."""
        write_atomically(_ledger_part(self._root, self._number), self._ledger.getvalue().encode())

    def abandon(self) -> None:
        """Leaves partial files and tars that no index names; `committed_windows` deletes them."""
        for _, tar in self._open.values():
            tar.abandon()

    def _write(self, split: str, item: Prepared) -> tuple[str, TarSample]:
        members = [("json", sample_json(item.row.messages, item.row.meta))]
        for place, picture in enumerate(item.pictures):
            assert picture.fetched.data is not None and picture.facts is not None
            extension = picture.facts.extension
            suffix = extension if len(item.pictures) == 1 else f"{place}.{extension}"
            members.append((suffix, picture.fetched.data))
        size = sum(512 + len(data) + -len(data) % 512 for _, data in members)
        if split in self._open and self._open[split][1].size + size > self._shard_bytes:
            self._close(split)
        if split not in self._open:
            name = f"shard-{self._next_shard:06d}.tar"
            self._next_shard += 1
            self._open[split] = (name, TarShard(partial_path(self._root / name)))
        name, tar = self._open[split]
        return name, tar.add(item.row.key, members)

    def _close(self, split: str) -> None:
        name, tar = self._open.pop(split)
        sha256 = tar.close()
        publish(self._root / name)
        self.window.shards.append(ShardInfo(name, tar.samples, tar.size, sha256))


def committed_windows(root: Path) -> list[Window]:
    """The windows that are finished, in order. Whatever an unfinished one has left is deleted."""
    for folder in (INDEX_DIR, LEDGER_DIR):
        (root / folder).mkdir(exist_ok=True)
    windows: list[Window] = []
    while (part := _index_part(root, len(windows))).exists():
        stored = json.loads(pq.read_schema(part).metadata[_WINDOW_KEY])
        shards = [ShardInfo(**shard) for shard in stored["shards"]]
        windows.append(Window(stored["rows"], Counter(stored["samples"]), shards))
    kept = {root / shard.name for window in windows for shard in window.shards}
    kept |= {_ledger_part(root, number) for number in range(len(windows))}
    for pattern in ("shard-*.tar", f"{LEDGER_DIR}/*.jsonl", "**/.*.partial"):
        for path in root.glob(pattern):
            if path not in kept:
                path.unlink()
    return windows


def _index_row(item: Prepared, split: str, shard: str, sample: TarSample) -> dict[str, Any]:
    images = [
        {
            "member": member.name,
            "offset": member.offset,
            "length": member.length,
            "width": picture.facts.width,
            "height": picture.facts.height,
        }
        for member, picture in zip(sample.members[1:], item.pictures, strict=True)
        if picture.facts is not None
    ]
    return {
        "key": sample.key,
        "split": split,
        "shard": shard,
        "offset": sample.offset,
        "length": sample.length,
        "images": images,
        "messages": item.row.messages,
        "meta": json.dumps(item.row.meta, ensure_ascii=False),
    }


def _ledger_entry(item: Prepared, split: str | None, shard: str | None) -> dict[str, Any]:
    images = [
        {
            "image": picture.name,
            "http_status": picture.fetched.http_status,
            "bytes": None if picture.fetched.data is None else len(picture.fetched.data),
            "sha256": picture.sha256,
            "width": picture.facts.width if picture.facts else None,
            "height": picture.facts.height if picture.facts else None,
            "reason": picture.reason,
        }
        for picture in item.pictures
    ]
    outcome = "ok" if item.fault is None else "failed"
    return {
        "row": item.row.number,
        "key": item.row.key,
        "outcome": outcome,
        "reason": item.fault,
        "split": split,
        "shard": shard,
        "images": images,
    }


def _split_of(item: Prepared, val_fraction: float) -> str:
    """By hash of the group: that of the row, else its images, else (a sample of text alone) its messages."""
    group = item.row.group
    if group is None:
        group = " ".join(each.sha256 or "" for each in item.pictures) or json.dumps(item.row.messages)
    number = int.from_bytes(hashlib.sha256(f"split {group}".encode()).digest()[:8], "big")
    return "val" if number < val_fraction * 2**64 else "train"


def _index_part(root: Path, number: int) -> Path:
    return root / INDEX_DIR / f"part-{number:06d}.parquet"


def _ledger_part(root: Path, number: int) -> Path:
    return root / LEDGER_DIR / f"part-{number:06d}.jsonl"

"""One window of rows into tars, a ledger part and an index part; a worker repeats it until its rows are done.

A window writes its tars (each holds one split), then its ledger part (the outcome of every row), then its
index part, whose appearance commits the window: its schema metadata says which rows and shards it covers.
All files carry the number of their window: `shard-000012.tar` is its first tar, `shard-000012_01.tar` the
next one. So a window's bytes are a function of its rows alone, whoever writes it and when. Numbers start
with a prefix for rows tried again ("r01-" in the first round) and where tasks read a stream of unknown length
("0003-" for task 3).

In: `Prepared` rows. Out: files in the dataset directory, and a `Window` that says what they are. Called by
`worker` and `build`.
"""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from collections.abc import Container, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from shards.common.files import partial_path, publish, write_atomically
from shards.format.dataset import INDEX_DIR, LEDGER_DIR, ShardInfo
from shards.format.index import INDEX_SCHEMA
from shards.format.records import sample_json
from shards.ledger import ledger_line, ledger_part
from shards.prepare import Prepared, index_row, split_of
from shards.tars import TarSample, TarShard

_WINDOW_KEY = b"phi3v_window"


@dataclass
class Window:
    """What a window has written. rows: taken from the source; samples: those of them written, by split;
    dropped: good but not wanted; last: the worker's rows end with it.
    """

    rows: int = 0
    samples: Counter[str] = field(default_factory=Counter)
    dropped: int = 0
    shards: list[ShardInfo] = field(default_factory=list)
    last: bool = False

    @property
    def failed(self) -> int:
        return self.rows - self.samples.total() - self.dropped


class WindowWriter:
    """Writes window `number` of a worker into the dataset in `root`: `add` every row, then `commit` (or
    `abandon`).

    A tar is closed before it grows past `shard_bytes`, and at the end; there is one open per split. Until
    `commit`, `window` says what has been added, without its shards.
    """

    def __init__(self, root: Path, prefix: str, number: int, val_fraction: float, shard_bytes: int) -> None:
        self.window = Window()
        self.reasons: Counter[str] = Counter()  # of the rows that failed
        self._root, self._prefix, self._number, self._tars = root, prefix, number, 0
        self._val_fraction, self._shard_bytes = val_fraction, shard_bytes
        self._open: dict[str, tuple[str, TarShard]] = {}
        self._index: list[dict[str, Any]] = []
        self._ledger = io.StringIO()

    def add(self, item: Prepared) -> None:
        self.window.rows += 1
        split = shard = None
        if item.outcome == "ok":
            split = split_of(item, self._val_fraction)
            shard, sample = self._write(split, item)
            self._index.append(index_row(item, split, shard, sample, sample.members[1:]))
            self.window.samples[split] += 1
        elif item.outcome == "dropped":
            self.window.dropped += 1
        else:
            self.reasons[str(item.fault)] += 1
        self._ledger.write(ledger_line(item, split, shard))

    def commit(self, last: bool) -> Window:
        """last: no row of this worker is left."""
        for split in list(self._open):
            self._close(split)
        self.window.shards.sort(key=lambda shard: shard.name)
        self.window.last = last
        self.write_ledger()
        stored = {
            "rows": self.window.rows,
            "samples": dict(sorted(self.window.samples.items())),
            "dropped": self.window.dropped,
            "shards": [asdict(shard) for shard in self.window.shards],
            "last": last,
        }
        self._index.sort(key=lambda row: (row["shard"], row["offset"]))
        schema = INDEX_SCHEMA.with_metadata({_WINDOW_KEY: json.dumps(stored).encode()})
        part = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(self._index, schema), part, compression="zstd")
        write_atomically(index_part(self._root, self._prefix, self._number), part.getvalue())
        return self.window

    def write_ledger(self) -> None:
        """Also for a window that will not be committed, so that the user sees why."""
        place = ledger_part(self._root, self._prefix, self._number)
        write_atomically(place, self._ledger.getvalue().encode())

    def abandon(self) -> None:
        """Leaves partial files and tars that no index names; `delete_unfinished` deletes them."""
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
            further = f"_{self._tars:02d}" if self._tars else ""
            name = f"shard-{self._prefix}{self._number:06d}{further}.tar"
            self._tars += 1
            self._open[split] = (name, TarShard(partial_path(self._root / name)))
        name, tar = self._open[split]
        return name, tar.add(item.row.key, members)

    def _close(self, split: str) -> None:
        name, tar = self._open.pop(split)
        sha256 = tar.close()
        publish(self._root / name)
        self.window.shards.append(ShardInfo(name, tar.samples, tar.size, sha256))


def committed_windows(root: Path, prefix: str, numbers: Iterable[int]) -> dict[int, Window]:
    """Those of the windows `numbers` of a worker that are finished."""
    return {number: window for number in numbers if (window := _committed(root, prefix, number)) is not None}


def leading_windows(root: Path, prefix: str) -> dict[int, Window]:
    """The finished windows of a worker that writes them one after the other."""
    windows: dict[int, Window] = {}
    while (window := _committed(root, prefix, len(windows))) is not None:
        windows[len(windows)] = window
    return windows


def _committed(root: Path, prefix: str, number: int) -> Window | None:
    part = index_part(root, prefix, number)
    if not part.exists():
        return None
    stored = json.loads(pq.read_schema(part).metadata[_WINDOW_KEY])
    shards = [ShardInfo(**shard) for shard in stored["shards"]]
    return Window(stored["rows"], Counter(stored["samples"]), stored["dropped"], shards, stored["last"])


def delete_unfinished(
    root: Path, prefix: str, windows: Mapping[int, Window], numbers: Container[int] | None
) -> None:
    """Deletes what a killed worker has left besides its finished `windows`. numbers: of the windows that are
    its own; None: all with its prefix.
    """
    kept = {root / shard.name for window in windows.values() for shard in window.shards}
    kept |= {ledger_part(root, prefix, number) for number in windows}
    kept |= {index_part(root, prefix, number) for number in windows}
    mine = re.compile(rf"\.?(?:shard|part)-{prefix}(\d{{6,}})(?:_\d+)?\.(?:tar|jsonl|parquet)(?:\.partial)?")
    for folder in (root, root / INDEX_DIR, root / LEDGER_DIR):
        for path in folder.iterdir():
            match = mine.fullmatch(path.name)
            if match and path not in kept and (numbers is None or int(match.group(1)) in numbers):
                path.unlink(missing_ok=True)


def window_files(window: Window, prefix: str, number: int) -> list[str]:
    """The files of a finished window, the one that commits it last."""
    parts = (ledger_part(Path(), prefix, number), index_part(Path(), prefix, number))
    return [*(shard.name for shard in window.shards), *(part.as_posix() for part in parts)]


def index_part(root: Path, prefix: str, number: int) -> Path:
    """Where the index of window `number` of a worker lies."""
    return root / INDEX_DIR / f"part-{prefix}{number:06d}.parquet"

"""One partition of a build: a fixed number of consecutive records, written as tars, one ledger part and one
index part.

A partition writes its tars (each holds one split), then its ledger part (the outcome of every record), then
its index part. The index part commits the partition: its schema metadata says which records and shards the
partition has. All files carry the number of the partition: `shard-000012.tar` is its first tar,
`shard-000012_01.tar` the next one. So the bytes of a partition depend on its records alone, not on who writes
it and when. Numbers have a prefix for records tried again ("r01-" in the first round) and where tasks read a
stream of unknown length ("0003-" for task 3).

In: `Prepared` records. Out: files in the dataset directory, and a `Partition` that describes them.
"""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from collections.abc import Container, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pyarrow.parquet as pq

from shards.common.files import partial_path, publish, write_atomically
from shards.format.dataset import INDEX_DIR, LEDGER_DIR, ShardInfo
from shards.format.index import records_table
from shards.format.records import SampleRecord, sample_json
from shards.ledger import ledger_entry, ledger_part
from shards.prepare import Prepared, sample_record, split_of
from shards.tars import TarSample, TarShard

_PARTITION_KEY = b"phi3v_window"  # in the schema metadata of an index part; the name is part of the format


@dataclass
class Partition:
    """What a partition holds. records: read from the source. samples: records written, by split. dropped:
    good but not wanted (duplicates). last: no record comes after it.
    """

    records: int = 0
    samples: Counter[str] = field(default_factory=Counter)
    dropped: int = 0
    shards: list[ShardInfo] = field(default_factory=list)
    last: bool = False

    @property
    def failed(self) -> int:
        return self.records - self.samples.total() - self.dropped

    def to_json(self) -> bytes:
        """As it is stored in the metadata of its index part."""
        stored = {
            "rows": self.records,
            "samples": dict(sorted(self.samples.items())),
            "dropped": self.dropped,
            "shards": [asdict(shard) for shard in self.shards],
            "last": self.last,
        }
        return json.dumps(stored).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Partition:
        """The inverse of `to_json`."""
        stored = json.loads(data)
        return cls(
            records=stored["rows"],
            samples=Counter(stored["samples"]),
            dropped=stored["dropped"],
            shards=[ShardInfo(**shard) for shard in stored["shards"]],
            last=stored["last"],
        )


class PartitionWriter:
    """Writes partition `number` into the dataset in `root`: `add` every record, then `commit` or `abandon`.

    A tar is closed before it grows past `shard_bytes`; one tar per split is open at a time. `partition` says
    what has been added so far; its shards are complete after `commit`. failures: reason -> failed records.
    """

    def __init__(
        self, root: Path, prefix: str, number: int, *, val_fraction: float, shard_bytes: int
    ) -> None:
        self.partition = Partition()
        self.failures: Counter[str] = Counter()
        self._root, self._prefix, self._number, self._tars = root, prefix, number, 0
        self._val_fraction, self._shard_bytes = val_fraction, shard_bytes
        self._open: dict[str, tuple[str, TarShard]] = {}
        self._index: list[SampleRecord] = []
        self._ledger = io.StringIO()

    def add(self, item: Prepared) -> None:
        """Writes a record: into a tar if it is good, into the ledger in any case."""
        self.partition.records += 1
        split = shard = None
        if item.outcome == "ok":
            split = split_of(item, self._val_fraction)
            shard, sample = self._write(split, item)
            record = sample_record(item, split, shard, sample=sample, members=sample.members[1:])
            self._index.append(record)
            self.partition.samples[split] += 1
        elif item.outcome == "dropped":
            self.partition.dropped += 1
        else:
            self.failures[str(item.fault)] += 1
        self._ledger.write(ledger_entry(item, split, shard).to_json())

    def commit(self, last: bool) -> Partition:
        """Completes the files. last: no record of this worker is left."""
        for split in list(self._open):
            self._close(split)
        self.partition.shards.sort(key=lambda shard: shard.name)
        self.partition.last = last
        self.write_ledger()
        self._index.sort(key=lambda record: (record.shard, record.offset))
        table = records_table(self._index).replace_schema_metadata({_PARTITION_KEY: self.partition.to_json()})
        data = io.BytesIO()
        pq.write_table(table, data, compression="zstd")
        write_atomically(index_part(self._root, self._prefix, self._number), data.getvalue())
        return self.partition

    def write_ledger(self) -> None:
        """Writes the ledger part; also called before an error, so that the user sees the reasons."""
        write_atomically(
            ledger_part(self._root, self._prefix, self._number), self._ledger.getvalue().encode()
        )

    def abandon(self) -> None:
        """Stops. The partial files and tars that stay behind are in no index; `delete_unfinished` deletes
        them.
        """
        for _, tar in self._open.values():
            tar.abandon()

    def _write(self, split: str, item: Prepared) -> tuple[str, TarSample]:
        """Adds the sample to the open tar of `split`: the tar's name, and where the sample lies in it."""
        members = [("json", sample_json(item.record.messages, item.record.meta))]
        for place, image in enumerate(item.images):
            assert image.fetched.data is not None and image.facts is not None
            extension = image.facts.extension
            suffix = extension if len(item.images) == 1 else f"{place}.{extension}"
            members.append((suffix, image.fetched.data))
        size = sum(512 + len(data) + -len(data) % 512 for _, data in members)
        if split in self._open and self._open[split][1].size + size > self._shard_bytes:
            self._close(split)
        if split not in self._open:
            further = f"_{self._tars:02d}" if self._tars else ""
            name = f"shard-{self._prefix}{self._number:06d}{further}.tar"
            self._tars += 1
            self._open[split] = (name, TarShard(partial_path(self._root / name)))
        name, tar = self._open[split]
        return name, tar.add(item.record.key, members)

    def _close(self, split: str) -> None:
        name, tar = self._open.pop(split)
        sha256 = tar.close()
        publish(self._root / name)
        self.partition.shards.append(ShardInfo(name, tar.samples, tar.size, sha256))


def committed_partitions(root: Path, prefix: str, numbers: Iterable[int]) -> dict[int, Partition]:
    """Those of the partitions `numbers` that are finished, by number."""
    found = ((number, _committed(root, prefix, number)) for number in numbers)
    return {number: partition for number, partition in found if partition is not None}


def leading_partitions(root: Path, prefix: str) -> dict[int, Partition]:
    """The finished partitions of a worker that writes them one after the other, by number."""
    found: dict[int, Partition] = {}
    while (partition := _committed(root, prefix, len(found))) is not None:
        found[len(found)] = partition
    return found


def _committed(root: Path, prefix: str, number: int) -> Partition | None:
    part = index_part(root, prefix, number)
    return Partition.from_json(pq.read_schema(part).metadata[_PARTITION_KEY]) if part.exists() else None


def delete_unfinished(
    root: Path, prefix: str, finished: Mapping[int, Partition], *, numbers: Container[int] | None
) -> None:
    """Deletes what killed workers have left besides the `finished` partitions.

    numbers: only of these partitions; None: of all with this prefix.
    """
    kept = {root / shard.name for partition in finished.values() for shard in partition.shards}
    kept |= {ledger_part(root, prefix, number) for number in finished}
    kept |= {index_part(root, prefix, number) for number in finished}
    mine = re.compile(rf"\.?(?:shard|part)-{prefix}(\d{{6,}})(?:_\d+)?\.(?:tar|jsonl|parquet)(?:\.partial)?")
    for folder in (root, root / INDEX_DIR, root / LEDGER_DIR):
        for path in folder.iterdir():
            match = mine.fullmatch(path.name)
            if match and path not in kept and (numbers is None or int(match.group(1)) in numbers):
                path.unlink(missing_ok=True)


def partition_files(partition: Partition, prefix: str, number: int) -> list[str]:
    """The files of a finished partition, relative to the dataset; the one that commits it is the last."""
    parts = (ledger_part(Path(), prefix, number), index_part(Path(), prefix, number))
    return [*(shard.name for shard in partition.shards), *(part.as_posix() for part in parts)]


def num_partitions(num_records: int, size: int) -> int:
    """Partitions of `size` records that hold `num_records`."""
    return -(-num_records // size)


def task_partitions(count: int, task: int, tasks: int) -> range:
    """The numbers of the partitions, of `count`, that task `task` (from 0) of `tasks` makes."""
    return range(count * task // tasks, count * (task + 1) // tasks)


def index_part(root: Path, prefix: str, number: int) -> Path:
    """The path of the index of partition `number` with this prefix."""
    return root / INDEX_DIR / f"part-{prefix}{number:06d}.parquet"

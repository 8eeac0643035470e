"""The index parts of foreign tars: a parquet file per tar, whose schema metadata says what it was made from.

In: records of a tar. Out: `TarPart`, also read back from a part of an earlier call, so that an interrupted
call resumes at the first tar without a part.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from shards.common.files import write_atomically
from shards.format.dataset import ShardInfo
from shards.format.index import INDEX_SCHEMA, records_table
from shards.format.records import SampleRecord
from shards.ledger import ledger_part
from shards.partition import index_part

_TAR_KEY = b"phi3v_tar"  # in the schema metadata


@dataclass(frozen=True)
class TarTag:
    """What a part depends on; a part with another tag is made again.

    fingerprint: hex digest of the options. name: of the tar. stamp: `StoredFile.version` of the tar. row:
    number of its first sample among those of all tars.
    """

    fingerprint: str
    name: str
    stamp: str
    row: int


@dataclass(frozen=True)
class TarPart:
    """One tar that is indexed.

    records: samples in the tar. samples: those of them indexed, by split. keys: of the indexed samples, as
    the tar has them. prefixed: the keys in the index begin with the name of the tar.
    """

    tag: TarTag
    shard: ShardInfo
    records: int
    samples: Counter[str]
    keys: tuple[str, ...]
    prefixed: bool = False

    def metadata(self) -> dict[bytes, bytes]:
        """The schema metadata of its file: all but the keys, which are a column."""
        stored = {
            **asdict(self.tag),
            "rows": self.records,
            "samples": dict(sorted(self.samples.items())),
            "shard": asdict(self.shard),
            "prefixed": self.prefixed,
        }
        return {_TAR_KEY: json.dumps(stored).encode()}


def write_part(root: Path, number: int, part: TarPart, *, records: Sequence[SampleRecord]) -> None:
    """Writes the index part of tar `number` (in the order of the names)."""
    _write_table(index_part(root, "", number), records_table(records), part)


def is_part(path: Path) -> bool:
    """Whether `write_part` wrote this file."""
    return _stored(path) is not None


def finished_part(root: Path, number: int, tag: TarTag) -> TarPart | None:
    """The part of an earlier call; None if there is none with this tag."""
    path = index_part(root, "", number)
    stored = _stored(path) if path.exists() else None
    if stored is None or any(stored.get(name) != value for name, value in asdict(tag).items()):
        return None
    with pq.ParquetFile(path) as file:
        keys = file.read(columns=["key"])["key"].to_pylist()
    if stored["prefixed"]:  # by an earlier call that was stopped shortly before its end
        keys = [key.removeprefix(_prefix(tag.name)) for key in keys]
    return TarPart(
        tag=tag,
        shard=ShardInfo(**stored["shard"]),
        records=stored["rows"],
        samples=Counter(stored["samples"]),
        keys=tuple(keys),
        prefixed=stored["prefixed"],
    )


def _stored(path: Path) -> dict[str, Any] | None:
    """What `TarPart.metadata` put into this file; None if it is another file."""
    try:
        stored = json.loads((pq.read_schema(path).metadata or {})[_TAR_KEY])
    except (pa.ArrowException, KeyError, ValueError):
        return None
    return stored if isinstance(stored, dict) else None


def prefix_keys(root: Path, number: int, part: TarPart) -> None:
    """Puts the name of the tar before the keys in its index part, unless that was done before."""
    if part.prefixed:
        return
    path = index_part(root, "", number)
    with pq.ParquetFile(path) as file:
        table = file.read()
    keys = [_prefix(part.shard.name) + key for key in part.keys]
    table = table.set_column(0, INDEX_SCHEMA.field("key"), pa.array(keys, pa.string()))
    _write_table(path, table, replace(part, prefixed=True))


def part_files(number: int) -> list[str]:
    """The files of the part of a tar, relative to the dataset; the one that commits it is the last."""
    return [ledger_part(Path(), "", number).as_posix(), index_part(Path(), "", number).as_posix()]


def _write_table(path: Path, table: pa.Table, part: TarPart) -> None:
    data = io.BytesIO()
    pq.write_table(table.replace_schema_metadata(part.metadata()), data, compression="zstd")
    write_atomically(path, data.getvalue())


def _prefix(tar: str) -> str:
    return tar.removesuffix(".tar") + "/"

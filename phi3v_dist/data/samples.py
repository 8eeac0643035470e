"""The samples of a split, over one or several data sets: everything but the pixels.

In: dataset directories. Out: `Samples`: records by number (data set after data set, each in canonical order),
what each shard should be, and which samples lie in which shard. Kept as an Arrow file that all ranks and
workers of a node map into memory, so that ten million samples are there once, not once a process. Called by
`prepare`, `tokens`, the loader and evaluation.
"""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa

from shards.common.errors import BadInputError
from shards.common.files import partial_path, publish
from shards.format.dataset import INDEX_DIR, ShardInfo, files_in, read_dataset_info
from shards.format.index import read_index

_COLUMNS = ["key", "shard", "images", "messages"]
_BATCH = 4096  # samples of a record batch


class Samples:
    """roots: the dataset directories. shards: of each, its shards by name. The records have the columns key,
    shard, images, messages, source (number of the data set), and meta if the table has it. Pickled by file
    name where there is a file.
    """

    def __init__(
        self,
        roots: Sequence[str],
        shards: Sequence[dict[str, ShardInfo]],
        table: pa.Table | None = None,
        file: Path | None = None,
    ) -> None:
        self.roots, self.shards, self.file = tuple(roots), tuple(shards), file
        self._table = table if file is None else None
        self._batches: list[pa.RecordBatch] | None = None
        self._starts: list[int] = []
        self._columns: dict[int, _Columns] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_batches": None, "_starts": [], "_columns": {}}

    def __len__(self) -> int:
        return self._starts[-1] if self.batches() else 0

    def batches(self) -> list[pa.RecordBatch]:
        """All records in order; views into the file."""
        if self._batches is None:
            if self.file is not None:
                reader = pa.ipc.open_file(pa.memory_map(str(self.file)))
                batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
            else:
                assert self._table is not None
                batches = self._table.to_batches()
            self._batches = [batch for batch in batches if batch.num_rows]
            self._starts = np.cumsum([0] + [batch.num_rows for batch in self._batches]).tolist()
        return self._batches

    def records(self, numbers: Sequence[int] | np.ndarray, texts: bool = True) -> Iterator[dict[str, Any]]:
        """The records with these numbers. texts: with key, messages and meta; where the pictures lie needs
        none of them.
        """
        batches = self.batches()
        for number in numbers:
            place = bisect.bisect_right(self._starts, number) - 1
            if place not in self._columns:
                self._columns[place] = _Columns(batches[place])
            yield self._columns[place].record(int(number) - self._starts[place], texts)

    def take(self, numbers: Sequence[int] | np.ndarray) -> Samples:
        """These samples alone."""
        schema = self.batches()[0].schema if self.batches() else None
        table = pa.Table.from_pylist(list(self.records(numbers)), schema) if schema else self._table
        return Samples(self.roots, self.shards, table)

    def shard_numbers(self) -> np.ndarray:
        """int32 [samples]: a number for every shard, ascending."""
        if not self.batches():
            return np.empty(0, np.int32)
        names = pa.chunked_array([batch.column("shard") for batch in self.batches()])
        codes = np.asarray(names.dictionary_encode().combine_chunks().indices)
        changes = (np.diff(codes) != 0) | (np.diff(self._sources()) != 0)
        return np.concatenate([[0], np.cumsum(changes)]).astype(np.int32)

    def bounds(self) -> tuple[int, ...]:
        """The number of the first sample of each data set, and the number of samples."""
        return tuple(np.searchsorted(self._sources(), np.arange(len(self.roots) + 1)).tolist())

    def _sources(self) -> np.ndarray:
        columns = [np.asarray(batch.column("source")) for batch in self.batches()]
        return np.concatenate([np.empty(0, np.int16), *columns])


class _Columns:
    """The columns of a batch, taken apart once: a record costs a fifth of what `to_pylist` takes."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        names = [name for name in ("key", "shard", "meta") if name in batch.schema.names]
        self._plain = {name: batch.column(name) for name in names}
        self._sources = np.asarray(batch.column("source"))
        self._lists = {}
        for name in ("images", "messages"):
            column = batch.column(name)
            fields = [column.type.value_type.field(i) for i in range(column.type.value_type.num_fields)]
            values = {field.name: column.values.field(i) for i, field in enumerate(fields)}
            ready = {
                field.name: values[field.name]
                if pa.types.is_string(field.type)
                else np.asarray(values[field.name])
                for field in fields
            }
            self._lists[name] = (np.asarray(column.offsets), ready)

    def record(self, row: int, texts: bool) -> dict[str, Any]:
        record: dict[str, Any] = {"source": int(self._sources[row])}
        for name, column in self._plain.items():
            if texts or name == "shard":
                record[name] = column[row].as_py()
        for name, (offsets, fields) in self._lists.items():
            if not texts and name == "messages":
                continue
            record[name] = [
                {
                    field: int(values[i]) if isinstance(values, np.ndarray) else values[i].as_py()
                    for field, values in fields.items()
                }
                for i in range(offsets[row], offsets[row + 1])
            ]
        return record


def read_samples(paths: Sequence[str], split: str, may_lack: bool = False) -> Samples:
    """The samples of `split` of all data sets. may_lack: a data set without that split gives none.

    Raises BadInputError as `read_index` does, and for a split that is empty, unless it may be.
    """
    tables, shards = split_tables(paths, split, _COLUMNS, may_lack)
    for number, table in tables.items():
        if not table.num_rows and not may_lack:
            raise BadInputError(f"{paths[number]}: the split {split!r} is empty")
    return Samples(paths, shards, pa.concat_tables(list(tables.values())) if tables else pa.table({}))


def split_tables(
    paths: Sequence[str], split: str, columns: Sequence[str], may_lack: bool
) -> tuple[dict[int, pa.Table], list[dict[str, ShardInfo]]]:
    """The index of a split by number of the data set, with that number as the column `source`, and the shards
    of every data set by name. may_lack: a data set without that split is left out. Raises BadInputError as
    `read_index`.
    """
    tables: dict[int, pa.Table] = {}
    shards = []
    for number, path in enumerate(paths):
        info = read_dataset_info(path)
        shards.append({shard.name: shard for shard in info.shards})
        if may_lack and not info.splits.get(split):
            continue
        table = read_index(path, split, columns)
        source = pa.array(np.full(table.num_rows, number, dtype=np.int16))
        tables[number] = table.append_column("source", source)
    return tables, shards


def samples_fingerprint(paths: Sequence[str], split: str) -> str:
    """Hex digest of the index files of all data sets and of the split's name: cheaper than reading them."""
    digest = hashlib.sha256(repr(("samples 1", split, len(paths))).encode())
    for path in paths:
        fs, root = fsspec.core.url_to_fs(str(path))
        for name in files_in(fs, f"{root.rstrip('/')}/{INDEX_DIR}", ".parquet"):
            digest.update(name.rpartition("/")[2].encode())
            with fs.open(name, "rb") as stream:
                while block := stream.read(1 << 22):
                    digest.update(block)
    return digest.hexdigest()


def keep_samples(samples: Samples, file: Path) -> None:
    """Writes the records to an Arrow file, whole or not at all."""
    assert samples._table is not None
    table = samples._table
    with pa.OSFile(str(partial_path(file)), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        for start in range(0, table.num_rows, _BATCH):
            piece = table.slice(start, _BATCH).combine_chunks()
            for batch in piece.to_batches():
                writer.write_batch(batch)
    publish(file)


def open_samples(paths: Sequence[str], file: Path) -> Samples:
    """The samples in a file of `keep_samples`. Raises BadInputError if it is damaged."""
    shards = [{shard.name: shard for shard in read_dataset_info(path).shards} for path in paths]
    samples = Samples(paths, shards, file=file)
    try:
        samples.batches()
    except (pa.ArrowException, OSError) as error:
        raise BadInputError(f"{file}: damaged ({error}); delete it, it is made again") from error
    return samples

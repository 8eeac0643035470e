"""The samples of a split, of one or several datasets: everything but the pixels.

In: dataset directories. Out: `Samples`: `SampleRecord`s by number (dataset after dataset, each in canonical
order), what dataset.json says of each shard, and the shard of each sample. They are kept in an Arrow file
that all ranks and workers of a node map into memory, so that ten million samples are in memory once per node,
not once per process.
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
from shards.format.records import ImageRef, SampleRecord

_COLUMNS = ["key", "shard", "images", "messages"]
_BATCH = 4096  # samples of a record batch


class Samples:
    """The records of a split, in a table or in a file of `keep_samples`.

    roots: the dataset directories. shards: the shards of each, by name. table: the columns key, shard,
    images, messages, source (number of the dataset), and perhaps meta. With a file, pickling sends its name
    alone.
    """

    def __init__(
        self,
        roots: Sequence[str],
        shards: Sequence[dict[str, ShardInfo]],
        table: pa.Table | None = None,
        *,
        file: Path | None = None,
    ) -> None:
        self.roots, self.shards, self.file = tuple(roots), tuple(shards), file
        self._table = table if file is None else None
        self._batches: list[pa.RecordBatch] | None = None
        self._starts: list[int] = []
        self._decoders: dict[int, BatchRecords] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_batches": None, "_starts": [], "_decoders": {}}

    def __len__(self) -> int:
        return self._starts[-1] if self.batches() else 0

    def batches(self) -> list[pa.RecordBatch]:
        """All records in order, as Arrow batches: views into the file."""
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

    def records(self, numbers: Sequence[int] | np.ndarray, texts: bool = True) -> Iterator[SampleRecord]:
        """The records with these numbers. texts: with key, messages and meta, which reading images does not
        need.
        """
        batches = self.batches()
        for number in numbers:
            place = bisect.bisect_right(self._starts, number) - 1
            if place not in self._decoders:
                self._decoders[place] = BatchRecords(batches[place])
            yield self._decoders[place].record(int(number) - self._starts[place], texts)

    def take(self, numbers: Sequence[int] | np.ndarray) -> Samples:
        """These samples alone, in this order, in memory."""
        if not self.batches():
            return Samples(self.roots, self.shards, self._table)
        table = pa.Table.from_batches(self.batches()).take(pa.array(numbers, pa.int64()))
        return Samples(self.roots, self.shards, table)

    def shard_numbers(self) -> np.ndarray:
        """int32 [samples]: the number of the shard of each sample, ascending."""
        if not self.batches():
            return np.empty(0, np.int32)
        names = pa.chunked_array([batch.column("shard") for batch in self.batches()])
        codes = np.asarray(names.dictionary_encode().combine_chunks().indices)
        changes = (np.diff(codes) != 0) | (np.diff(self._sources()) != 0)
        return np.concatenate([[0], np.cumsum(changes)]).astype(np.int32)

    def bounds(self) -> tuple[int, ...]:
        """The number of the first sample of each dataset, then the number of all samples."""
        return tuple(np.searchsorted(self._sources(), np.arange(len(self.roots) + 1)).tolist())

    def _sources(self) -> np.ndarray:
        columns = [np.asarray(batch.column("source")) for batch in self.batches()]
        return np.concatenate([np.empty(0, np.int16), *columns])


class BatchRecords:
    """The records of an Arrow batch, one at a time and in any order.

    The columns are split once, as views into the memory of the batch. A record of two images and two messages
    then takes less than half of the time of `batch.slice(number, 1).to_pylist()` (pyarrow 26.0). Integers
    come from a memoryview: it gives a Python int, in less time than a numpy array gives a numpy scalar.
    """

    def __init__(self, batch: pa.RecordBatch) -> None:
        self._keys, self._shards = _Strings(batch.column("key")), _Strings(batch.column("shard"))
        self._metas = _Strings(batch.column("meta")) if "meta" in batch.schema.names else None
        self._sources = _integers(batch.column("source"))
        images, messages = batch.column("images"), batch.column("messages")
        self._image_starts = _integers(images.offsets)
        self._message_starts = _integers(messages.offsets)
        self._members = _Strings(_field(images, "member"))
        self._offsets, self._lengths, self._widths, self._heights = (
            _integers(_field(images, name)) for name in ("offset", "length", "width", "height")
        )
        self._roles, self._contents = (_Strings(_field(messages, name)) for name in ("role", "content"))

    def record(self, number: int, texts: bool = True) -> SampleRecord:
        """The record with this number in the batch. texts: with key, messages and meta."""
        shard, source = self._shards[number], self._sources[number]
        images = tuple(
            [
                ImageRef(
                    self._members[i], self._offsets[i], self._lengths[i], self._widths[i], self._heights[i]
                )
                for i in range(self._image_starts[number], self._image_starts[number + 1])
            ]
        )
        if not texts:
            return SampleRecord("", shard, images, source=source)
        return SampleRecord(
            key=self._keys[number],
            shard=shard,
            images=images,
            messages=tuple(
                [
                    {"role": self._roles[i], "content": self._contents[i]}
                    for i in range(self._message_starts[number], self._message_starts[number + 1])
                ]
            ),
            meta="{}" if self._metas is None else self._metas[number] or "{}",
            source=source,
        )


def _field(column: pa.ListArray, name: str) -> pa.Array:
    """A field of the structs in a list column, for all lists one after the other."""
    return column.values.field(column.type.value_type.get_field_index(name))


def _integers(column: pa.Array) -> memoryview:
    """A column of integers without nulls, as a view of its memory."""
    array: Any = np.asarray(column)  # a buffer, although numpy's stubs do not say so
    return memoryview(array)


class _Strings:
    """A column of texts without nulls, by number; faster than `column[number].as_py()` (pyarrow 26.0)."""

    def __init__(self, column: pa.StringArray) -> None:
        _, starts, data = column.buffers()
        if not len(column):
            starts, data = pa.py_buffer(bytes(4)), None
        self._starts = memoryview(starts).cast("B").cast("i")[column.offset : column.offset + len(column) + 1]
        self._data = memoryview(data) if data is not None else memoryview(b"")

    def __getitem__(self, number: int) -> str:
        return str(self._data[self._starts[number] : self._starts[number + 1]], "utf-8")


def read_samples(paths: Sequence[str], split: str, may_lack: bool = False) -> Samples:
    """The samples of `split` of all datasets. may_lack: a dataset without that split contributes no samples.

    Raises BadInputError as `read_index`, and for an empty split unless `may_lack`.
    """
    tables, shards = split_tables(paths, split, _COLUMNS, may_lack=may_lack)
    for number, table in tables.items():
        if not table.num_rows and not may_lack:
            raise BadInputError(f"{paths[number]}: the split {split!r} is empty")
    return Samples(paths, shards, pa.concat_tables(list(tables.values())) if tables else pa.table({}))


def split_tables(
    paths: Sequence[str], split: str, columns: Sequence[str], *, may_lack: bool
) -> tuple[dict[int, pa.Table], list[dict[str, ShardInfo]]]:
    """The index of a split, by number of the dataset, with that number as the column `source`; and for every
    dataset its shards by name. may_lack: a dataset without that split is left out.

    Raises BadInputError as `read_index`.
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
    """Hex digest of the index files of all datasets and of the split's name: cheaper than parsing them."""
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
    """Writes the records to an Arrow file, atomically. They must be in memory, as `read_samples` returns
    them.
    """
    assert samples._table is not None
    table = samples._table
    with pa.OSFile(str(partial_path(file)), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        for start in range(0, table.num_rows, _BATCH):
            piece = table.slice(start, _BATCH).combine_chunks()
            for batch in piece.to_batches():
                writer.write_batch(batch)
    publish(file)


def open_samples(paths: Sequence[str], file: Path) -> Samples:
    """The samples in a file of `keep_samples`, not read but mapped. Raises BadInputError if it is damaged."""
    shards = [{shard.name: shard for shard in read_dataset_info(path).shards} for path in paths]
    samples = Samples(paths, shards, file=file)
    try:
        samples.batches()
    except (pa.ArrowException, OSError) as error:
        raise BadInputError(f"{file}: damaged ({error}); delete it, and it is made again") from error
    return samples

"""The index of a dataset: its schema, reading it, and records to table and back.

In: a dataset directory. Out: a pyarrow Table in canonical order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import fsspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from shards.common.errors import BadInputError
from shards.common.text import first_line
from shards.format.dataset import DATASET_JSON, INDEX_DIR, files_in, read_dataset_info
from shards.format.records import ImageRef, Message, SampleRecord

# offset and length of a sample: bytes of its members in the tar, from the first header to the end of the last
# member's padding. offset and length of an image: bytes of its data alone, from the start of the tar. width
# and height: pixels as shown, EXIF orientation applied. meta: JSON text.
INDEX_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("split", pa.string()),
        ("shard", pa.string()),
        ("offset", pa.int64()),
        ("length", pa.int64()),
        (
            "images",
            pa.list_(
                pa.struct(
                    [
                        ("member", pa.string()),
                        ("offset", pa.int64()),
                        ("length", pa.int64()),
                        ("width", pa.int32()),
                        ("height", pa.int32()),
                    ]
                )
            ),
        ),
        ("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        ("meta", pa.string()),
    ]
)


def read_index(root: str, split: str | None = None, columns: Sequence[str] | None = None) -> pa.Table:
    """The index of a complete dataset in canonical order (shard name, then offset), schema INDEX_SCHEMA.

    split: only the samples of this split. columns: only these columns, in this order.
    Raises BadInputError if the dataset is incomplete or has no such split, if a part of the index cannot be
    read, or if the index does not agree with dataset.json.
    """
    info = read_dataset_info(root)
    if split is not None and split not in info.splits:
        known = ", ".join(sorted(info.splits)) or "none"
        raise BadInputError(f"{root}: no split {split!r}; it has: {known}")
    fs, path = fsspec.core.url_to_fs(str(root))
    names = files_in(fs, f"{path.rstrip('/')}/{INDEX_DIR}", ".parquet")
    wanted = list(columns) if columns is not None else INDEX_SCHEMA.names
    needed = list(dict.fromkeys([*wanted, "shard", "offset", "split"]))
    schema = _subschema(needed)
    parts = []
    for name in names:
        try:
            with fs.open(name, "rb") as stream:
                parts.append(pq.read_table(stream, columns=needed).cast(schema))
        except (pa.ArrowException, OSError) as error:
            reason = first_line(error)
            raise BadInputError(f"{name}: unreadable index part ({reason}); rebuild it") from error
    table = pa.concat_tables(parts) if parts else schema.empty_table()
    if split is not None:
        table = table.filter(pc.equal(table["split"], split))
    expected = info.num_samples if split is None else info.splits[split]
    if table.num_rows != expected:
        raise BadInputError(
            f"{root}: {INDEX_DIR}/ holds {table.num_rows} samples but {DATASET_JSON} says {expected}"
            f"{'' if split is None else f' for split {split}'}; rebuild the dataset"
        )
    return table.sort_by([("shard", "ascending"), ("offset", "ascending")]).select(wanted)


def _subschema(names: Sequence[str]) -> pa.Schema:
    unknown = [name for name in names if name not in INDEX_SCHEMA.names]
    if unknown:
        raise BadInputError(
            f"the index has no column {unknown[0]!r}; it has: {', '.join(INDEX_SCHEMA.names)}"
        )
    return pa.schema([INDEX_SCHEMA.field(name) for name in names])


def records_table(records: Sequence[SampleRecord]) -> pa.Table:
    """The records as a table of INDEX_SCHEMA, in their order."""
    names = INDEX_SCHEMA.names
    entries = [
        {
            **{name: getattr(record, name) for name in names},
            "images": [
                {
                    "member": image.member,
                    "offset": image.offset,
                    "length": image.length,
                    "width": image.width,
                    "height": image.height,
                }
                for image in record.images
            ],
        }
        for record in records
    ]
    return pa.Table.from_pylist(entries, INDEX_SCHEMA)


def table_records(table: pa.Table) -> list[SampleRecord]:
    """The inverse of `records_table`. Columns that `table` does not have get the defaults of SampleRecord;
    key, shard and images are needed.
    """
    return [
        SampleRecord(
            **{
                **entry,
                "images": tuple(ImageRef(**image) for image in entry["images"]),
                "messages": tuple(cast(Message, message) for message in entry.get("messages", ())),
            }
        )
        for entry in table.to_pylist()
    ]

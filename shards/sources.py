"""Sources of records: tables (CSV, TSV, JSONL, JSON, Parquet), image folders, Hugging Face datasets.

In: the name of a source and a `Recipe`. Out: a `Source`, which yields one `SourceRecord` for each record, in
order; a record that cannot be used carries the reason. Files may be at any fsspec URL. Only the source itself
is read here; its images are fetched later.

    hf:NAME[@REVISION][#SPLIT]   streamed through `datasets`; also a local directory of Parquet or JSONL
    DIRECTORY                    of images, with the columns image, label (name of its folder) and caption
                                 (text of NAME.txt beside it); or with a metadata.csv, .jsonl or .parquet that
                                 names the images in the column file_name
    FILE                         .csv .tsv .jsonl .ndjson .json (one list, as in LLaVA) .parquet
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count, islice
from pathlib import Path
from typing import IO, Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from shards.common.errors import BadInputError
from shards.common.text import first_line
from shards.source_records import (
    Content,
    Converter,
    Fields,
    Recipe,
    RecordFault,
    SourceRecord,
    find_converter,
    has_templates,
    make_key,
    make_record,
)
from shards.tars import sha256_of

HF_PREFIX = "hf:"

_SUFFIXES = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
}
_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # the names that `datasets` looks for
_IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}

Span = tuple[int, int]
"""A range [first, end) of record numbers."""
ALL: Span = (0, sys.maxsize)


@dataclass(frozen=True)
class Unreadable:
    """Stands for a record that could not be parsed."""

    reason: str


RawRecord = Fields | Unreadable


@dataclass(frozen=True)
class Source:
    """An opened source.

    base: the folder or URL that image paths are relative to. num_records: None if it is not known before all
    have been read. sha256: in hex, of the content; of a remote dataset, of its name and revision.
    records(spans): yields the records of these spans in one pass; the spans must be ascending. part(task,
    tasks, start): only where num_records is None; yields the records of one of several tasks, without its
    first `start`. Each record belongs to exactly one task.
    """

    name: str
    base: str
    num_records: int | None
    sha256: str
    records: Callable[[Sequence[Span]], Iterator[SourceRecord]]
    part: Callable[[int, int, int], Iterator[SourceRecord]] | None = None


def open_source(source: str, recipe: Recipe) -> Source:
    """Opens a source and checks the recipe against its columns. A file is read once, to count its records and
    to hash it.

    Raises BadInputError: no such source, an unknown kind of file, no records, a column or template field that
    does not exist.
    """
    if source.startswith(HF_PREFIX):
        return _open_hf(source, recipe)
    filesystem, path = _filesystem(source)
    if filesystem.isdir(path):
        return _open_folder(source, recipe)
    kind = _SUFFIXES.get(Path(path).suffix.lower())
    if kind is None:
        what = f"a {Path(path).suffix or 'suffixless'} file"
        raise BadInputError(
            f"{source}: {what}; sources are {', '.join(_SUFFIXES)} files, image folders and hf:NAME"
        )
    if not filesystem.exists(path):
        raise BadInputError(f"{source}: no such file")
    return _open_table(source, kind, recipe)


def _filesystem(source: str) -> tuple[Any, str]:
    try:
        filesystem, path = fsspec.core.url_to_fs(source)
    except (ImportError, ValueError) as error:
        raise BadInputError(f"{source}: {error}") from error
    return filesystem, str(path)


def _open_table(source: str, kind: str, recipe: Recipe, *, images: str | None = None) -> Source:
    """Opens a table. images: the column that names the images if the recipe names none."""
    try:
        with fsspec.open(source, "rb") as stream:
            sha256 = sha256_of(stream)
        columns, num_records = _survey(source, kind)
    except OSError as error:
        raise BadInputError(f"{source}: cannot be read ({error.strerror or error})") from error
    except (csv.Error, UnicodeDecodeError, json.JSONDecodeError, pa.ArrowException) as error:
        raise BadInputError(f"{source}: not a readable {kind} file ({first_line(error)})") from error
    if num_records == 0:
        raise BadInputError(f"{source}: no records; nothing to build")
    is_chat = not {"messages", "conversations"}.isdisjoint(columns) and not has_templates(recipe)
    if images is not None and not is_chat:
        recipe = replace(recipe, images=recipe.images or (images,))
    convert = find_converter(source, columns, recipe)
    if images is not None and is_chat:
        convert = _with_images(convert, images)

    def records(spans: Sequence[Span]) -> Iterator[SourceRecord]:
        position = 0
        raw: Iterator[RawRecord] | None = None
        for first, end in spans:
            if raw is None or (kind == "parquet" and first > position):  # Parquet skips without reading
                position, raw = first, _raw_records(source, kind, first)
            chosen = islice(raw, first - position, end - position)
            yield from _converted(chosen, convert, recipe, first=first)
            position = end

    base = source.rpartition("/")[0] if "://" in source else str(Path(source).resolve().parent)
    return Source(source, base, num_records, sha256=sha256, records=records)


def _with_images(convert: Converter, column: str) -> Converter:
    """The converter for records whose messages are about the images of `column`."""

    def convert_all(fields: Fields) -> Content:
        others = {name: value for name, value in fields.items() if name != column}
        return convert({**others, "images": fields.get("images") or fields.get(column)})

    return convert_all


def _converted(
    raw: Iterable[RawRecord], convert: Converter, recipe: Recipe, *, first: int, step: int = 1
) -> Iterator[SourceRecord]:
    """Yields the converted records. Their numbers are first, first + step, ..."""
    for number, fields in zip(count(first, step), raw, strict=False):
        if isinstance(fields, Unreadable):
            yield SourceRecord(number, make_key(number, {}, None), fault=fields.reason)
            continue
        try:
            key = make_key(number, fields, recipe.key)
        except RecordFault as fault:
            yield SourceRecord(number, make_key(number, {}, None), fault=str(fault))
        else:
            yield make_record(number, key, fields, convert=convert, group_by=recipe.group_by)


def _survey(source: str, kind: str) -> tuple[list[str], int]:
    """The columns (of a JSON file, the fields of all its records) and the number of records."""
    if kind == "parquet":
        with fsspec.open(source, "rb") as stream, pq.ParquetFile(stream) as table:
            return table.schema_arrow.names, table.metadata.num_rows
    columns: dict[str, None] = {}
    num_records = 0
    first_fault = None
    for record in _raw_records(source, kind, 0):
        if isinstance(record, Unreadable):
            first_fault = first_fault or f"record {num_records}: {record.reason}"
        else:
            columns.update(dict.fromkeys(record))
        num_records += 1
    if num_records and not columns:
        raise BadInputError(f"{source}: no record can be read; {first_fault}")
    return list(columns), num_records


def _raw_records(source: str, kind: str, start: int) -> Iterator[RawRecord]:
    """Yields the records from number `start` on."""
    with fsspec.open(source, "rb") as stream:
        if kind == "parquet":
            yield from _parquet_records(stream, start)
            return
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
        records: Iterator[RawRecord]
        if kind == "jsonl":
            records = (_json_record(line) for line in text if line.strip())
        elif kind == "json":
            records = _json_array(text)
        else:
            records = _csv_records(source, text, "\t" if kind == "tsv" else ",")
        yield from islice(records, start, None)


def _parquet_records(stream: IO[bytes], start: int) -> Iterator[RawRecord]:
    """Yields the records from number `start` on. Row groups before it are not read."""
    with pq.ParquetFile(stream) as table:
        groups = list(range(table.num_row_groups))
        while groups and table.metadata.row_group(groups[0]).num_rows <= start:
            start -= table.metadata.row_group(groups.pop(0)).num_rows
        if groups:
            batches = table.iter_batches(batch_size=256, row_groups=groups)
            yield from islice((record for batch in batches for record in batch.to_pylist()), start, None)


def _csv_records(source: str, text: io.TextIOWrapper, delimiter: str) -> Iterator[RawRecord]:
    """Yields the records of a CSV. Raises BadInputError if two columns have the same name."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    reader = csv.reader(text, delimiter=delimiter)
    header = next(reader, [])
    if len(set(header)) != len(header):
        repeated = next(name for name in header if header.count(name) > 1)
        raise BadInputError(f"{source}: two columns are named {repeated!r}; rename one")
    for fields in reader:
        if len(fields) == len(header):
            yield dict(zip(header, fields, strict=True))
        elif fields:
            yield Unreadable(f"{len(fields)} fields, the header has {len(header)}")


def _integer(digits: str) -> int | str:
    """The number; the digits as text if there are more than 4000: Python 3.11's int() refuses more than 4300
    (CVE-2020-10735).
    """
    return int(digits) if len(digits) <= 4000 else digits


_DECODER = json.JSONDecoder(parse_int=_integer)


def _json_record(line: str) -> RawRecord:
    """The record on one line of a JSONL file."""
    try:
        value = _DECODER.decode(line)
    except json.JSONDecodeError as error:
        return Unreadable(f"not JSON ({error})")
    except RecursionError:
        return Unreadable("JSON that is nested too deeply")
    return _json_fields(value)


def _json_fields(value: object) -> RawRecord:
    if isinstance(value, dict):
        return value
    return Unreadable(f"JSON of type {type(value).__name__}, not an object")


def _json_array(text: io.TextIOWrapper) -> Iterator[RawRecord]:
    """Yields the elements of one JSON list without keeping them: such files can have gigabytes.

    ijson 3.6 (its yajl2_c backend) is no faster (1.3 s for a list of 200 MB, 1.4 s here) and needs no less
    memory, but it refuses NaN, which `json.dump` writes, and integers of more than 64 bits, and it silently
    replaces lone surrogates by "?".
    """
    buffer = text.read(2**20).lstrip()
    if not buffer.startswith("["):
        wanted = "not a list of records; one record a line goes into a .jsonl file"
        raise json.JSONDecodeError(wanted, buffer[:20], 0)
    position = 1
    while True:
        while position < len(buffer) and buffer[position] in " \t\r\n,":
            position += 1
        if buffer.startswith("]", position):
            return
        try:
            value, position = _DECODER.raw_decode(buffer, position)
        except RecursionError as error:
            raise json.JSONDecodeError("nested too deeply", buffer[position : position + 20], 0) from error
        except json.JSONDecodeError:  # either the buffer ends within the element, or it is not JSON
            more = text.read(max(2**20, len(buffer) - position))
            if not more:
                raise
            buffer, position = buffer[position:] + more, 0
            continue
        yield _json_fields(value)


def _open_folder(source: str, recipe: Recipe) -> Source:
    """Images in folders, each one a record; or the table in the folder that names its images."""
    filesystem, root = _filesystem(source)
    for name in _METADATA:
        if filesystem.exists(f"{root}/{name}"):
            table = f"{source.rstrip('/')}/{name}"
            return _open_table(table, _SUFFIXES[Path(name).suffix], recipe, images="file_name")
    found = sorted(path.removeprefix(root).lstrip("/") for path in filesystem.find(root))
    names = [name for name in found if Path(name).suffix.lower() in _IMAGE_SUFFIXES]
    if not names:
        raise BadInputError(
            f"{source}: no images ({', '.join(sorted(_IMAGE_SUFFIXES))}) and no {_METADATA[0]} in it"
        )
    texts = {str(Path(name).with_suffix(".txt")) for name in names} & set(found)
    digest = hashlib.sha256("\n".join(names).encode())
    for name in sorted(texts):  # an edited caption makes another dataset; unrelated files do not
        digest.update(f"\n{name}\n".encode() + filesystem.cat_file(f"{root}/{name}"))
    named = replace(recipe, images=recipe.images or ("image",))
    convert = find_converter(source, ["image", "label", "caption"], named)

    def raw_records(chosen: list[str]) -> Iterator[RawRecord]:
        for name in chosen:
            caption = str(Path(name).with_suffix(".txt"))
            text = (
                filesystem.cat_file(f"{root}/{caption}").decode(errors="replace")
                if caption in texts
                else None
            )
            yield {"image": name, "label": Path(name).parent.name or None, "caption": text}

    def records(spans: Sequence[Span]) -> Iterator[SourceRecord]:
        for first, end in spans:
            yield from _converted(raw_records(names[first:end]), convert, named, first=first)

    base = source.rstrip("/") if "://" in source else str(Path(source).resolve())
    return Source(source, base, len(names), sha256=digest.hexdigest(), records=records)


def _open_hf(source: str, recipe: Recipe) -> Source:
    """A dataset streamed through `datasets`, so that nothing but the shards is stored.

    All of a build reads one revision: the hub's commit for the requested revision is recorded in the name of
    the source, and an interrupted build resumes with it.
    """
    name, _, split = source.removeprefix(HF_PREFIX).partition("#")
    name, _, revision = name.partition("@")
    try:
        import datasets

        commit = None if Path(name).exists() else _commit(name, revision or None)
        stream = datasets.load_dataset(name, split=split or "train", revision=commit, streaming=True)
        first = next(iter(stream.take(1)), None)
        features = stream.features or {}
        for column, feature in features.items():
            if isinstance(feature, datasets.Image):
                stream = stream.cast_column(column, datasets.Image(decode=False))
            elif isinstance(getattr(feature, "feature", None), datasets.Image):
                stream = stream.cast_column(column, datasets.List(datasets.Image(decode=False)))
    except Exception as error:  # a hub, a network or a loader may raise anything
        raise BadInputError(f"{source}: cannot be loaded by `datasets` ({first_line(error)})") from error
    if first is None:
        raise BadInputError(f"{source}: no records; nothing to build")
    convert = find_converter(source, list(features) or list(first), recipe)

    def part(task: int, tasks: int, start: int) -> Iterator[SourceRecord]:
        """Each task reads whole files if there are enough; otherwise it skips the records of other tasks."""
        if tasks == 1:
            return _converted(_guarded(source, stream.skip(start)), convert, recipe, first=start)
        if stream.num_shards >= tasks:
            mine = stream.shard(num_shards=tasks, index=task, contiguous=False).skip(start)
        else:
            mine = islice(iter(stream), task + start * tasks, None, tasks)
        number = task + start * tasks
        return _converted(_guarded(source, mine), convert, recipe, first=number, step=tasks)

    def records(spans: Sequence[Span]) -> Iterator[SourceRecord]:
        for first, end in spans:
            yield from islice(part(0, 1, first), end - first)

    content = _files_digest(Path(name)) if commit is None else commit
    identity = f"{name}@{content}#{split or 'train'}"
    pinned = f"{HF_PREFIX}{name}{f'@{commit}' if commit else ''}#{split or 'train'}"
    sha256 = hashlib.sha256(identity.encode()).hexdigest()
    return Source(pinned, name, None, sha256=sha256, records=records, part=part)


def _commit(name: str, revision: str | None) -> str | None:
    """The hub's commit for `revision` of a dataset: a branch, tag or commit; None: the default branch."""
    from huggingface_hub import HfApi

    return HfApi().dataset_info(name, revision=revision).sha


def _files_digest(path: Path) -> str:
    """The sha256, in hex, of the names and sizes of the files of a local dataset, a directory or one file."""
    found = [path] if path.is_file() else path.rglob("*")
    files = sorted(file for file in found if file.is_file() and not file.name.startswith("."))
    listed = [(str(file.relative_to(path)), file.stat().st_size) for file in files]
    return hashlib.sha256(repr(listed).encode()).hexdigest()


def _guarded(source: str, records: Iterable[RawRecord]) -> Iterator[RawRecord]:
    """Yields the records. Anything that a hub or a network raises meanwhile becomes a BadInputError."""
    try:
        yield from records
    except Exception as error:
        raise BadInputError(
            f"{source}: reading stopped ({first_line(error)}); run again to resume"
        ) from error

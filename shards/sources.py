"""What people have, as rows: tables (CSV, TSV, JSONL, JSON, Parquet), image folders, Hugging Face datasets.

In: the name of a source and a `Recipe`. Out: `Source`, and from it one `Row` per record, in order, with the
messages made; a record that cannot be used gives a row that carries the reason. Files may lie on any fsspec
URL. Nothing but the source itself is read here: images are fetched later. Called by `build`.

    hf:NAME[@REVISION][#SPLIT]   through `datasets`, streamed; a local directory of Parquet or JSONL too
    DIRECTORY                    of images, with the columns image, label (its folder), caption (NAME.txt
                                 beside it); or with a metadata.csv or .jsonl that names the files
    FILE                         .csv .tsv .jsonl .ndjson .json (a list, as LLaVA has it) .parquet
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import IO, Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from shards.common.errors import BadInputError
from shards.common.text import first_line
from shards.rows import Made, Recipe, Row, RowFault, RowMaker, make_key, make_row, row_maker
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
_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # the names that `datasets` knows
_PICTURES = {".jpg", ".jpeg", ".png", ".webp"}

Record = Mapping[str, Any] | str  # a str says why there is no record
Span = tuple[int, int]  # first, end
ALL: Span = (0, sys.maxsize)


@dataclass(frozen=True)
class Source:
    """An opened source.

    base: the folder or URL that image paths start from. num_rows: None if only reading to the end tells.
    sha256: of the content (of a remote dataset: of its name and revision), in hex. rows(spans): the rows
    of ascending spans [first, end) of their numbers, in one pass. part(task, tasks, start): only where
    num_rows is None: the rows of a task, from its start-th on; the parts of all tasks are disjoint and
    together all.
    """

    name: str
    base: str
    num_rows: int | None
    sha256: str
    rows: Callable[[Sequence[Span]], Iterator[Row]]
    part: Callable[[int, int, int], Iterator[Row]] | None = None


def open_source(source: str, recipe: Recipe) -> Source:
    """Reads a file once (to count and to hash it) and checks the recipe against its columns.

    Raises BadInputError: no such source, a kind not known, no rows, a column or template field that does not
    exist.
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


def _open_table(source: str, kind: str, recipe: Recipe, images: str | None = None) -> Source:
    """images: column that holds the pictures where the recipe names none."""
    try:
        with fsspec.open(source, "rb") as stream:
            sha256 = sha256_of(stream)
        columns, num_rows = _survey(source, kind)
    except OSError as error:
        raise BadInputError(f"{source}: cannot be read ({error.strerror or error})") from error
    except (csv.Error, UnicodeDecodeError, json.JSONDecodeError, pa.ArrowException) as error:
        raise BadInputError(f"{source}: not a readable {kind} file ({first_line(error)})") from error
    if num_rows == 0:
        raise BadInputError(f"{source}: no rows; nothing to build")
    talks = not {"messages", "conversations"}.isdisjoint(columns)
    talks = talks and not recipe.images and recipe.prompt is None and recipe.answer is None
    if images is not None and not talks:
        recipe = replace(recipe, images=recipe.images or (images,))
    make = row_maker(source, columns, recipe)
    if images is not None and talks:
        make = _with_images(make, images)

    def rows(spans: Sequence[Span]) -> Iterator[Row]:
        at = 0
        records: Iterator[Record] | None = None
        for first, end in spans:
            if records is None or (kind == "parquet" and first > at):  # which skips without reading
                at, records = first, _records(source, kind, first)
            yield from _rows(islice(records, first - at, end - at), first, 1, make, recipe)
            at = end

    base = source.rpartition("/")[0] if "://" in source else str(Path(source).resolve().parent)
    return Source(source, base, num_rows, sha256, rows)


def _with_images(make: RowMaker, column: str) -> RowMaker:
    """For records whose messages are about the pictures of `column`."""

    def made(record: Mapping[str, Any]) -> Made:
        others = {name: value for name, value in record.items() if name != column}
        return make({**others, "images": record.get("images") or record.get(column)})

    return made


def _rows(records: Iterable[Record], number: int, step: int, make: RowMaker, recipe: Recipe) -> Iterator[Row]:
    """The rows of records whose numbers are number, number + step, ..."""
    for record in records:
        if isinstance(record, str):
            yield Row(number, make_key(number, {}, None), fault=record)
        else:
            try:
                key = make_key(number, record, recipe.key)
            except RowFault as fault:
                yield Row(number, make_key(number, {}, None), fault=str(fault))
            else:
                yield make_row(number, key, record, make, recipe.group_by)
        number += step


def _survey(source: str, kind: str) -> tuple[list[str], int]:
    """Columns (of a JSON file: of all its records) and number of rows."""
    if kind == "parquet":
        with fsspec.open(source, "rb") as stream, pq.ParquetFile(stream) as table:
            return table.schema_arrow.names, table.metadata.num_rows
    columns: dict[str, None] = {}
    count = 0
    first_fault = None
    for record in _records(source, kind, 0):
        if isinstance(record, str):
            first_fault = first_fault or f"row {count}: {record}"
        else:
            columns.update(dict.fromkeys(record))
        count += 1
    if count and not columns:
        raise BadInputError(f"{source}: no row can be read; {first_fault}")
    return list(columns), count


def _records(source: str, kind: str, start: int) -> Iterator[Record]:
    """Yields each record from number `start` on."""
    with fsspec.open(source, "rb") as stream:
        if kind == "parquet":
            yield from _parquet_records(stream, start)
            return
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
        records: Iterator[Record]
        if kind == "jsonl":
            records = (_json_record(line) for line in text if line.strip())
        elif kind == "json":
            records = _json_array(text)
        else:
            records = _csv_records(source, text, "\t" if kind == "tsv" else ",")
        yield from islice(records, start, None)


def _parquet_records(stream: IO[bytes], start: int) -> Iterator[Record]:
    """Row groups before `start` are not read."""
    with pq.ParquetFile(stream) as table:
        groups = list(range(table.num_row_groups))
        while groups and table.metadata.row_group(groups[0]).num_rows <= start:
            start -= table.metadata.row_group(groups.pop(0)).num_rows
        if groups:
            batches = table.iter_batches(batch_size=256, row_groups=groups)
            yield from islice((record for batch in batches for record in batch.to_pylist()), start, None)


def _csv_records(source: str, text: io.TextIOWrapper, delimiter: str) -> Iterator[Record]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    reader = csv.reader(text, delimiter=delimiter)
    header = next(reader, [])
    if len(set(header)) != len(header):
        twice = next(name for name in header if header.count(name) > 1)
        raise BadInputError(f"{source}: two columns are named {twice!r}; rename one")
    for fields in reader:
        if len(fields) == len(header):
            yield dict(zip(header, fields, strict=True))
        elif fields:
            yield f"{len(fields)} fields, the header has {len(header)}"


def _integer(digits: str) -> int | str:
    """Python reads no number of more than 4,300 digits (CVE-2020-10735); one of so many stays text."""
    return int(digits) if len(digits) <= 4000 else digits


_DECODER = json.JSONDecoder(parse_int=_integer)


def _json_record(line: str) -> Record:
    try:
        record = _DECODER.decode(line)
    except json.JSONDecodeError as error:
        return f"not JSON ({error})"
    except RecursionError:
        return "JSON that is nested too deeply"
    return record if isinstance(record, dict) else f"JSON of type {type(record).__name__}, not an object"


def _json_array(text: io.TextIOWrapper) -> Iterator[Record]:
    """Yields the elements of one JSON list without holding the list: such files have gigabytes."""
    buffer = text.read(2**20).lstrip()
    if not buffer.startswith("["):
        wanted = "not a list of records; one record a line goes into a .jsonl file"
        raise json.JSONDecodeError(wanted, buffer[:20], 0)
    place = 1
    while True:
        while place < len(buffer) and buffer[place] in " \t\r\n,":
            place += 1
        if buffer.startswith("]", place):
            return
        try:
            record, place = _DECODER.raw_decode(buffer, place)
        except RecursionError as error:
            raise json.JSONDecodeError("nested too deeply", buffer[place : place + 20], 0) from error
        except json.JSONDecodeError:  # cut by the end of the buffer, or really none
            more = text.read(max(2**20, len(buffer) - place))
            if not more:
                raise
            buffer, place = buffer[place:] + more, 0
            continue
        yield record if isinstance(record, dict) else f"JSON of type {type(record).__name__}, not an object"


def _open_folder(source: str, recipe: Recipe) -> Source:
    """Pictures in folders, each a record; or the table in the folder that names them."""
    filesystem, root = _filesystem(source)
    for name in _METADATA:
        if filesystem.exists(f"{root}/{name}"):
            table = f"{source.rstrip('/')}/{name}"
            return _open_table(table, _SUFFIXES[Path(name).suffix], recipe, images="file_name")
    found = sorted(path.removeprefix(root).lstrip("/") for path in filesystem.find(root))
    names = [name for name in found if Path(name).suffix.lower() in _PICTURES]
    if not names:
        raise BadInputError(
            f"{source}: no pictures ({', '.join(sorted(_PICTURES))}) and no {_METADATA[0]} in it"
        )
    texts = {str(Path(name).with_suffix(".txt")) for name in names} & set(found)
    digest = hashlib.sha256("\n".join(names).encode())
    for name in sorted(texts):  # a caption that was edited makes another data set; strange files make none
        digest.update(f"\n{name}\n".encode() + filesystem.cat_file(f"{root}/{name}"))
    named = Recipe(**{**recipe.__dict__, "images": recipe.images or ("image",)})
    make = row_maker(source, ["image", "label", "caption"], named)

    def records(chosen: list[str]) -> Iterator[Record]:
        for name in chosen:
            caption = str(Path(name).with_suffix(".txt"))
            text = (
                filesystem.cat_file(f"{root}/{caption}").decode(errors="replace")
                if caption in texts
                else None
            )
            yield {"image": name, "label": Path(name).parent.name or None, "caption": text}

    def rows(spans: Sequence[Span]) -> Iterator[Row]:
        for first, end in spans:
            yield from _rows(records(names[first:end]), first, 1, make, named)

    base = source.rstrip("/") if "://" in source else str(Path(source).resolve())
    return Source(source, base, len(names), digest.hexdigest(), rows)


def _open_hf(source: str, recipe: Recipe) -> Source:
    """A dataset through `datasets`, streamed: nothing is stored beside the shards. All of a build is of one
    revision: the commit that the hub has for the asked one is what is read, recorded, and gone on with.
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
    except Exception as error:  # whatever a hub, a network or a loader raises
        raise BadInputError(f"{source}: cannot be loaded by `datasets` ({first_line(error)})") from error
    if first is None:
        raise BadInputError(f"{source}: no rows; nothing to build")
    make = row_maker(source, list(features) or list(first), recipe)

    def part(task: int, tasks: int, start: int) -> Iterator[Row]:
        """Whole files go to the tasks where there are enough; else every task skips the others' rows."""
        if tasks == 1:
            return _rows(_guarded(source, stream.skip(start)), start, 1, make, recipe)
        if stream.num_shards >= tasks:
            mine = stream.shard(num_shards=tasks, index=task, contiguous=False).skip(start)
        else:
            mine = islice(iter(stream), task + start * tasks, None, tasks)
        return _rows(_guarded(source, mine), task + start * tasks, tasks, make, recipe)

    def rows(spans: Sequence[Span]) -> Iterator[Row]:
        for first, end in spans:
            yield from islice(part(0, 1, first), end - first)

    content = _files_digest(Path(name)) if commit is None else commit
    identity = f"{name}@{content}#{split or 'train'}"
    pinned = f"{HF_PREFIX}{name}{f'@{commit}' if commit else ''}#{split or 'train'}"
    return Source(pinned, name, None, hashlib.sha256(identity.encode()).hexdigest(), rows, part)


def _commit(name: str, revision: str | None) -> str | None:
    """The commit that `revision` of a data set is on the hub: a branch, tag or commit; None: the main one."""
    from huggingface_hub import HfApi

    return HfApi().dataset_info(name, revision=revision).sha


def _files_digest(place: Path) -> str:
    """Of the names and sizes of what lies in a local data set, a directory or a file."""
    found = [place] if place.is_file() else place.rglob("*")
    files = sorted(file for file in found if file.is_file() and not file.name.startswith("."))
    listed = [(str(file.relative_to(place)), file.stat().st_size) for file in files]
    return hashlib.sha256(repr(listed).encode()).hexdigest()


def _guarded(source: str, records: Iterable[Record]) -> Iterator[Record]:
    """The records; what a hub or a network raises on the way becomes a BadInputError."""
    try:
        yield from records
    except Exception as error:
        raise BadInputError(f"{source}: reading stopped ({first_line(error)}); run again to go on") from error

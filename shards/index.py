"""An index for WebDataset tars that someone else wrote, so that they are trained on as they are.

The tars stay untouched; `index/`, `ledger/` and `dataset.json` are written beside them. The members of a
sample may come in any order. Its images are the members with an image's suffix, in the order of the numbers
in their names; its text comes from `KEY.json` ("messages", as this program writes it, or fields for the
templates) and from text members (`KEY.txt` is the field {txt}, `KEY.cls` is {cls}).

In: a directory of .tar files or the URL of one in an object store, `IndexOptions`. Out: `DatasetInfo`. One
index part and one ledger part per tar, so an interrupted call goes on at the first tar without them. Of a
store one tar at a time is copied here. Called by the command line.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from shards.common.errors import BadInputError
from shards.common.files import write_atomically
from shards.common.locks import alone_in
from shards.common.text import first_line
from shards.fetch import Fetched
from shards.format.dataset import (
    BUILD_JSON,
    DATASET_JSON,
    FORMAT_VERSION,
    INDEX_DIR,
    LEDGER_DIR,
    DatasetInfo,
    ShardInfo,
    dataset_info_json,
    read_dataset_info,
)
from shards.format.index import INDEX_SCHEMA
from shards.ledger import ledger_line, ledger_part, reasons
from shards.options import BuildOptions, check_fractions
from shards.partition import index_part
from shards.prepare import Prepared, check_picture, index_row, split_of, with_pictures
from shards.rows import Recipe, Row, RowMaker, make_row, row_maker
from shards.storage import Place, open_place
from shards.tars import Member, TarSample, scan

INDEXER = "indexer"  # in DatasetInfo.built_with of a dataset that was indexed, not built

_INDEXER = 2  # raised when equal tars and options would give another index than before
_TAR_KEY = b"phi3v_tar"
_IMAGE_SUFFIXES = {"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff"}
_SPLIT_WORDS = {
    "train": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
}
_TEXT_LIMIT = 2**20
_log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class IndexOptions:
    """How tars become samples.

    images: suffixes of the members that are the images, in the order of the tags; none given: all with an
    image's suffix. prompt, answer: templates over the JSON's fields and the text members; not needed where
    the JSON holds messages. group_by: field whose equal values stay in one split. val_fraction: part of the
    groups that becomes the val split, unless every tar's name says its split (train, val, test). max_bytes,
    max_pixels: of one image. min_success: part of the samples that must be usable.
    """

    images: tuple[str, ...] = ()
    prompt: str | None = None
    answer: str | None = None
    group_by: str | None = None
    val_fraction: float = 0.1
    max_bytes: int = 64 * 2**20
    max_pixels: int = 100_000_000
    min_success: float = 0.95


@dataclass(frozen=True)
class _Part:
    """One tar done. rows: samples in the tar; samples: those of them indexed, by split; keys: of these."""

    shard: ShardInfo
    rows: int
    samples: Counter[str]
    keys: tuple[str, ...]


def build_index(
    root: str,
    options: IndexOptions | None = None,
    progress: Progress | None = None,
    work_dir: str | None = None,
) -> DatasetInfo:
    """Indexes the tars of `root`, a local directory or fsspec URL, or finishes a call that was interrupted.

    progress(done, total): called with bytes of tars read. work_dir: where tars of a store are looked at;
    None: in the user's cache.
    Raises BadInputError: no tars, a compressed or damaged one, a template that does not fit, too many samples
    that cannot be used, a directory that another command has written.
    """
    options = options or IndexOptions()
    check_fractions(options, "val_fraction", "min_success")
    place = open_place(root, work_dir, "index")
    tars = _find_tars(place)
    chosen = {name: value for name, value in asdict(options).items() if name != "min_success"}
    built_with = json.loads(json.dumps({INDEXER: _INDEXER, **chosen}))
    place.root.mkdir(parents=True, exist_ok=True)
    with alone_in(place.root):
        try:
            place.pull()
            if (place.root / DATASET_JSON).exists():
                return _already_indexed(place, tars, built_with)
            parts = _index_tars(place, tars, options, built_with, progress)
            return _finish(place, parts, options, built_with)
        except OSError as error:
            name = f" at {error.filename}" if error.filename else ""
            raise BadInputError(f"{root}: cannot be indexed ({error.strerror or error}{name})") from error


def _find_tars(place: Place) -> dict[str, tuple[int, str]]:
    """name -> (bytes, stamp), by name."""
    if place.filesystem is None and not place.root.is_dir():
        raise BadInputError(f"{place.out}: no such directory; give the directory that holds the .tar files")
    files = place.files()
    if BUILD_JSON in files:
        raise BadInputError(
            f"{place.out}: was written by shards build, which makes the index itself; run that again"
        )
    tars = {name: files[name] for name in sorted(files) if name.endswith(".tar") and name[0] != "."}
    if not tars:
        packed = sorted(name for name in files if name.endswith((".tar.gz", ".tgz", ".tar.zst")))
        hint = f"; {packed[0]} is compressed: unpack it to a plain .tar first" if packed else ""
        raise BadInputError(f"{place.out}: no .tar files to index{hint}")
    return tars


def _already_indexed(
    place: Place, tars: dict[str, tuple[int, str]], built_with: dict[str, Any]
) -> DatasetInfo:
    info = read_dataset_info(str(place.root))
    there = {name: size for name, (size, _) in tars.items()}
    if info.built_with == built_with and there == {shard.name: shard.bytes for shard in info.shards}:
        _log.info("%s: already indexed, nothing to do", place.out)
        return info
    what = "other options" if info.built_with != built_with else "other tars than those that are here now"
    raise BadInputError(
        f"{place.out}: {DATASET_JSON} is of an index with {what}; to index anew, delete {DATASET_JSON}, "
        f"{INDEX_DIR}/ and {LEDGER_DIR}/"
    )


def _index_tars(
    place: Place,
    tars: dict[str, tuple[int, str]],
    options: IndexOptions,
    built_with: dict[str, Any],
    progress: Progress | None,
) -> list[_Part]:
    root = place.root
    for folder in (INDEX_DIR, LEDGER_DIR):
        (root / folder).mkdir(exist_ok=True)
    fingerprint = hashlib.sha256(json.dumps(built_with).encode()).hexdigest()
    expected = {index_part(root, "", number) for number in range(len(tars))}
    strange = [
        path for path in (root / INDEX_DIR).glob("*.parquet") if path not in expected or _tag(path) is None
    ]
    if strange:
        raise BadInputError(f"{strange[0]}: not a part of this index; move {INDEX_DIR}/ away and index anew")
    splits = [_split_in_name(name) for name in tars]
    total, done, rows = sum(size for size, _ in tars.values()), 0, 0
    maker = _Maker(place.out, options)
    parts = []
    for number, (name, (_, stamp)) in enumerate(tars.items()):
        tag = {"fingerprint": fingerprint, "name": name, "stamp": stamp, "row": rows}
        part = _finished_part(index_part(root, "", number), tag)
        if part is None:
            split = splits[number] if all(splits) else None
            with place.copy_of(name) as path:
                part = _index_tar(root, number, path, tag, split, maker, options)
            place.send(_part_files(number))
            _log.info(
                "%s/%s: %d samples, %d failed", place.out, name, len(part.keys), part.rows - len(part.keys)
            )
        parts.append(part)
        rows += part.rows
        done += part.shard.bytes
        if progress is not None:
            progress(done, total)
    return parts


def _part_files(number: int) -> list[str]:
    return [ledger_part(Path(), "", number).as_posix(), index_part(Path(), "", number).as_posix()]


class _Maker:
    """From a sample's fields to its row; the templates are checked against the fields of the first sample."""

    def __init__(self, source: str, options: IndexOptions) -> None:
        self._source, self._options = source, options
        self._make: RowMaker | None = None

    def row(self, number: int, key: str, fields: dict[str, Any]) -> Row:
        if self._make is None:
            images = () if self._options.prompt is None and self._options.answer is None else ("images",)
            recipe = Recipe(images, self._options.prompt, self._options.answer, None, self._options.group_by)
            self._make = row_maker(f"{self._source}: sample {key}", list(fields), recipe)
        row = make_row(number, key, fields, self._make, self._options.group_by)
        row.meta.pop("images", None)
        return row


def _index_tar(
    root: Path,
    number: int,
    path: Path,
    tag: dict[str, Any],
    named_split: str | None,
    maker: _Maker,
    options: IndexOptions,
) -> _Part:
    index: list[dict[str, Any]] = []
    ledger = io.StringIO()
    samples: Counter[str] = Counter()
    seen: set[str] = set()
    rows = 0
    with path.open("rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        stream.seek(0)
        for sample in scan(stream, str(path)):
            item, members = _prepare(stream.fileno(), sample, tag["row"] + rows, maker, options)
            if sample.key in seen:
                item = Prepared(item.row, (), "its key came before in this tar: its members are not adjacent")
            seen.add(sample.key)
            split = None
            if item.fault is None:
                split = named_split or split_of(item, options.val_fraction)
                index.append(index_row(item, split, path.name, sample, members))
                samples[split] += 1
            ledger.write(ledger_line(item, split, path.name))
            rows += 1
        shard = ShardInfo(path.name, len(index), os.fstat(stream.fileno()).st_size, sha256)
    write_atomically(ledger_part(root, "", number), ledger.getvalue().encode())
    stored = {**tag, "rows": rows, "samples": dict(sorted(samples.items())), "shard": asdict(shard)}
    stored["prefixed"] = False
    _write_part(index_part(root, "", number), pa.Table.from_pylist(index, INDEX_SCHEMA), stored)
    return _Part(shard, rows, samples, tuple(row["key"] for row in index))


def _prepare(
    descriptor: int, sample: TarSample, number: int, maker: _Maker, options: IndexOptions
) -> tuple[Prepared, list[Member]]:
    """The sample as a row with its pictures, and the members that hold them."""
    members = _image_members(sample, options.images)
    fields: dict[str, Any] = {}
    for member in sample.members:
        if member in members or member.length > _TEXT_LIMIT:
            continue
        data = os.pread(descriptor, member.length, member.offset)
        try:
            if member.suffix == "json":
                content = json.loads(data)
                fields |= content if isinstance(content, dict) else {"json": content}
            else:
                fields[member.suffix] = data.decode()
        except UnicodeDecodeError:
            continue  # an array, a sound: nothing a template could name
        except (ValueError, RecursionError) as error:  # not JSON, numbers of thousands of digits, too deep
            reason = f"member {member.name} is not readable JSON ({first_line(error)})"
            return Prepared(Row(number, sample.key), (), reason), []
    members = _in_named_order(members, fields.get("images"), options)
    if isinstance(named := fields.get("images"), list) and len(named) != len(members):
        reason = f"its JSON names {len(named)} image(s), the tar has {len(members)}"
        return Prepared(Row(number, sample.key), (), reason), []
    fields["images"] = [member.name for member in members]
    row = maker.row(number, sample.key, fields)
    if row.fault is None and list(row.images) != fields["images"]:
        row = Row(number, sample.key, fault=f"{len(row.images)} image(s) named, the tar has {len(members)}")
    if row.fault is not None:
        return Prepared(row, (), row.fault), []
    limits = BuildOptions(max_bytes=options.max_bytes, max_pixels=options.max_pixels)
    pictures = []
    for member in members:
        fetched = Fetched(
            member.name, None, f"{member.length} bytes, more than the limit of {options.max_bytes}"
        )
        if member.length <= options.max_bytes:
            fetched = Fetched(member.name, os.pread(descriptor, member.length, member.offset))
        pictures.append(check_picture(member.name, fetched, limits))
    return with_pictures(row, pictures), members


def _image_members(sample: TarSample, suffixes: tuple[str, ...]) -> list[Member]:
    """The members that are the images of a sample, in the order of their tags: 2.jpg before 10.jpg."""
    if suffixes:
        by_suffix = {member.suffix: member for member in sample.members}
        return [by_suffix[suffix] for suffix in suffixes if suffix in by_suffix]
    images = [each for each in sample.members if each.suffix.rpartition(".")[2] in _IMAGE_SUFFIXES]
    return sorted(images, key=lambda member: _natural(member.suffix.rpartition(".")[0]))


def _in_named_order(members: list[Member], named: Any, options: IndexOptions) -> list[Member]:
    """The members in the order in which a sample's own JSON names them, if it names them all."""
    if options.images or not isinstance(named, list) or not all(isinstance(each, str) for each in named):
        return members
    by_name = {name: each for each in members for name in (each.name.rpartition("/")[2], each.suffix)}
    found = [by_name.get(each.rpartition("/")[2]) for each in named]
    chosen = [each for each in found if each is not None]
    complete = len(chosen) == len(members) == len({each.name for each in chosen})
    return chosen if complete and None not in found else members


def _natural(text: str) -> list[tuple[int, str]]:
    return [(int(piece), "") if piece.isdigit() else (-1, piece) for piece in re.split(r"(\d+)", text)]


def _split_in_name(name: str) -> str | None:
    words = {_SPLIT_WORDS[word] for word in re.split(r"[^a-z]+", name.lower()) if word in _SPLIT_WORDS}
    return words.pop() if len(words) == 1 else None


def _finish(
    place: Place, parts: list[_Part], options: IndexOptions, built_with: dict[str, Any]
) -> DatasetInfo:
    root = place.root
    rows = sum(part.rows for part in parts)
    splits: Counter[str] = sum((part.samples for part in parts), Counter())
    if not splits or splits.total() < options.min_success * rows - 1e-9:
        reason = next(iter(reasons(root)), "the tars hold no samples")
        raise BadInputError(
            f"{place.out}: only {splits.total()} of {rows} samples can be used (min_success "
            f"{options.min_success:g}); most often: {reason}; every sample's outcome is in "
            f"{place.out}/{LEDGER_DIR}; mend them or lower min_success"
        )
    keys = Counter(key for part in parts for key in part.keys)
    if len(keys) < splits.total():  # tars that each count from 0: told apart by the name of their tar
        for number, part in enumerate(parts):
            _prefix_keys(index_part(root, "", number), _prefix(part.shard.name))
            place.send(_part_files(number))
    shards = tuple(part.shard for part in parts)
    content = [[shard.name, shard.sha256] for shard in shards]
    fingerprint = hashlib.sha256(json.dumps([content, built_with]).encode()).hexdigest()
    info = DatasetInfo(
        FORMAT_VERSION, splits.total(), dict(sorted(splits.items())), shards, "tars", built_with, fingerprint
    )
    write_atomically(root / DATASET_JSON, dataset_info_json(info))
    place.send([DATASET_JSON])
    _log.info(
        "%s: complete: %d samples %s, %d failed",
        place.out,
        info.num_samples,
        info.splits,
        rows - splits.total(),
    )
    return info


def _prefix_keys(path: Path, prefix: str) -> None:
    with pq.ParquetFile(path) as part:
        table = part.read()
    stored = json.loads(table.schema.metadata[_TAR_KEY])
    if not stored["prefixed"]:
        keys = [prefix + key for key in table["key"].to_pylist()]
        table = table.set_column(0, INDEX_SCHEMA.field("key"), pa.array(keys, pa.string()))
        _write_part(path, table, {**stored, "prefixed": True})


def _prefix(tar: str) -> str:
    return tar.removesuffix(".tar") + "/"


def _write_part(path: Path, table: pa.Table, stored: dict[str, Any]) -> None:
    data = io.BytesIO()
    table = table.replace_schema_metadata({_TAR_KEY: json.dumps(stored).encode()})
    pq.write_table(table, data, compression="zstd")
    write_atomically(path, data.getvalue())


def _tag(path: Path) -> dict[str, Any] | None:
    """What `_write_part` stored in an index part, None if it did not write this file."""
    try:
        metadata = pq.read_schema(path).metadata or {}
        stored = json.loads(metadata[_TAR_KEY])
    except (pa.ArrowException, KeyError, ValueError):
        return None
    return stored if isinstance(stored, dict) else None


def _finished_part(path: Path, tag: dict[str, Any]) -> _Part | None:
    """The part of an earlier call, None if there is none of this tar with these options."""
    stored = _tag(path) if path.exists() else None
    if stored is None or any(stored.get(name) != value for name, value in tag.items()):
        return None
    with pq.ParquetFile(path) as part:
        keys = part.read(columns=["key"])["key"].to_pylist()
    if stored["prefixed"]:  # by an earlier call that was stopped just before its end
        keys = [key.removeprefix(_prefix(stored["name"])) for key in keys]
    return _Part(ShardInfo(**stored["shard"]), stored["rows"], Counter(stored["samples"]), tuple(keys))

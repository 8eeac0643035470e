"""An index for WebDataset tars that another program wrote, so that training can read them as they are.

The tars are not changed; `index/`, `ledger/` and `dataset.json` are written beside them. How members become
samples is in `index_samples`.

In: a directory of .tar files or the URL of one in an object store, `IndexOptions`. Out: `DatasetInfo`. There
is one index part and one ledger part per tar, so an interrupted call resumes at the first tar without them.
Tars of an object store are copied to a work directory, one at a time.
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
from dataclasses import asdict
from pathlib import Path
from typing import Any

from shards.common.errors import BadInputError
from shards.common.files import write_atomically
from shards.common.locks import alone_in
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
from shards.format.records import SampleRecord
from shards.index_parts import TarPart, TarTag, finished_part, is_part, part_files, prefix_keys, write_part
from shards.index_samples import IndexOptions, SampleReader
from shards.ledger import failure_reasons, ledger_entry, ledger_part
from shards.options import check_fractions, num_may_fail
from shards.partition import index_part
from shards.prepare import Prepared, sample_record, split_of
from shards.storage import Storage, StoredFile, open_storage
from shards.tars import scan

__all__ = ["INDEXER", "IndexOptions", "build_index"]

INDEXER = "indexer"  # key in DatasetInfo.built_with that marks a dataset as indexed, not built

_INDEXER = 2  # raised when equal tars and options would give another index than before
_SPLIT_WORDS = {
    "train": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
}
_log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]


def build_index(
    root: str,
    options: IndexOptions | None = None,
    *,
    progress: Progress | None = None,
    work_dir: str | None = None,
) -> DatasetInfo:
    """Indexes the tars of `root`, a local directory or fsspec URL, or resumes a call that was interrupted.

    progress(done, total): called with bytes of tars read. work_dir: where tars of an object store are copied
    to; None: in the user's cache.
    Raises BadInputError: no tars, a compressed or damaged tar, a template that does not fit, too many samples
    that cannot be used, a directory that another command has written.
    """
    options = options or IndexOptions()
    check_fractions(options, "val_fraction", "min_success")
    storage = open_storage(root, work_dir, "index")
    tars = _find_tars(storage)
    chosen = {name: value for name, value in asdict(options).items() if name != "min_success"}
    built_with = json.loads(json.dumps({INDEXER: _INDEXER, **chosen}))
    storage.root.mkdir(parents=True, exist_ok=True)
    with alone_in(storage.root):
        try:
            storage.pull()
            if (storage.root / DATASET_JSON).exists():
                return _already_indexed(storage, tars, built_with)
            fingerprint = hashlib.sha256(json.dumps(built_with).encode()).hexdigest()
            parts = _index_tars(storage, tars, options, fingerprint=fingerprint, progress=progress)
            return _finish(storage, parts, built_with, min_success=options.min_success)
        except OSError as error:
            name = f" at {error.filename}" if error.filename else ""
            raise BadInputError(f"{root}: cannot be indexed ({error.strerror or error}{name})") from error


def _find_tars(storage: Storage) -> dict[str, StoredFile]:
    """The tars by name, in the order of the names."""
    if storage.filesystem is None and not storage.root.is_dir():
        raise BadInputError(f"{storage.out}: no such directory; give the directory that holds the .tar files")
    files = storage.files()
    if BUILD_JSON in files:
        raise BadInputError(
            f"{storage.out}: was written by shards build, which makes the index itself; run that again"
        )
    tars = {name: files[name] for name in sorted(files) if name.endswith(".tar") and name[0] != "."}
    if not tars:
        packed = sorted(name for name in files if name.endswith((".tar.gz", ".tgz", ".tar.zst")))
        hint = f"; {packed[0]} is compressed: unpack it to a plain .tar first" if packed else ""
        raise BadInputError(f"{storage.out}: no .tar files to index{hint}")
    return tars


def _already_indexed(
    storage: Storage, tars: dict[str, StoredFile], built_with: dict[str, Any]
) -> DatasetInfo:
    """The dataset.json that is there. Raises BadInputError if it is of other tars or options."""
    info = read_dataset_info(str(storage.root))
    sizes = {name: file.size for name, file in tars.items()}
    if info.built_with == built_with and sizes == {shard.name: shard.bytes for shard in info.shards}:
        _log.info("%s: already indexed, nothing to do", storage.out)
        return info
    what = "other options" if info.built_with != built_with else "other tars than those that are here now"
    raise BadInputError(
        f"{storage.out}: {DATASET_JSON} is of an index with {what}; to index again, delete {DATASET_JSON}, "
        f"{INDEX_DIR}/ and {LEDGER_DIR}/"
    )


def _index_tars(
    storage: Storage,
    tars: dict[str, StoredFile],
    options: IndexOptions,
    *,
    fingerprint: str,
    progress: Progress | None,
) -> list[TarPart]:
    root = storage.root
    for folder in (INDEX_DIR, LEDGER_DIR):
        (root / folder).mkdir(exist_ok=True)
    _check_parts(root, len(tars))
    splits = [_split_in_name(name) for name in tars]
    total, done, records = sum(file.size for file in tars.values()), 0, 0
    reader = SampleReader(storage.out, options)
    parts = []
    for number, (name, file) in enumerate(tars.items()):
        tag = TarTag(fingerprint, name, file.version, row=records)
        part = finished_part(root, number, tag)
        if part is None:
            split = splits[number] if all(splits) else None
            with storage.local_copy(name) as path:
                part = _index_tar(
                    path,
                    tag,
                    reader,
                    root=root,
                    number=number,
                    named_split=split,
                    val_fraction=options.val_fraction,
                )
            storage.upload(part_files(number))
            failed = part.records - len(part.keys)
            _log.info("%s/%s: %d samples, %d failed", storage.out, name, len(part.keys), failed)
        parts.append(part)
        records += part.records
        done += part.shard.bytes
        if progress is not None:
            progress(done, total)
    return parts


def _check_parts(root: Path, count: int) -> None:
    """Raises BadInputError if index/ holds a file that is not a part of an index of `count` tars."""
    expected = {index_part(root, "", number) for number in range(count)}
    for path in (root / INDEX_DIR).glob("*.parquet"):
        if path not in expected or not is_part(path):
            raise BadInputError(f"{path}: not a part of this index; move {INDEX_DIR}/ away and index again")


def _index_tar(
    path: Path,
    tag: TarTag,
    reader: SampleReader,
    *,
    root: Path,
    number: int,
    named_split: str | None,
    val_fraction: float,
) -> TarPart:
    """Reads one tar and writes its ledger part and index part, `number`, into the dataset `root`.

    named_split: the split that the names of the tars say; None: by hash of the groups.
    """
    records: list[SampleRecord] = []
    ledger = io.StringIO()
    seen: set[str] = set()
    scanned = 0
    with path.open("rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        stream.seek(0)
        for sample in scan(stream, str(path)):
            item, members = reader.read(stream.fileno(), sample, tag.row + scanned)
            if sample.key in seen:
                item = Prepared(
                    item.record, (), "its key came before in this tar: its members are not adjacent"
                )
            seen.add(sample.key)
            split = None
            if item.fault is None:
                split = named_split or split_of(item, val_fraction)
                records.append(sample_record(item, split, path.name, sample=sample, members=members))
            ledger.write(ledger_entry(item, split, path.name).to_json())
            scanned += 1
        size = os.fstat(stream.fileno()).st_size
    write_atomically(ledger_part(root, "", number), ledger.getvalue().encode())
    part = TarPart(
        tag=tag,
        shard=ShardInfo(path.name, len(records), size, sha256),
        records=scanned,
        samples=Counter(record.split for record in records),
        keys=tuple(record.key for record in records),
    )
    write_part(root, number, part, records=records)
    return part


def _split_in_name(name: str) -> str | None:
    """The split that the name of a tar says; None if it says none, or several."""
    words = {_SPLIT_WORDS[word] for word in re.split(r"[^a-z]+", name.lower()) if word in _SPLIT_WORDS}
    return words.pop() if len(words) == 1 else None


def _finish(
    storage: Storage, parts: list[TarPart], built_with: dict[str, Any], *, min_success: float
) -> DatasetInfo:
    """Writes dataset.json over all parts."""
    root = storage.root
    records = sum(part.records for part in parts)
    splits: Counter[str] = sum((part.samples for part in parts), Counter())
    failed = records - splits.total()
    if not splits or failed > num_may_fail(records, min_success):
        reason = next(iter(failure_reasons(root)), "the tars hold no samples")
        raise BadInputError(
            f"{storage.out}: only {splits.total()} of {records} samples can be used (min_success "
            f"{min_success:g}); most frequent reason: {reason}; the outcome of every sample is in "
            f"{storage.out}/{LEDGER_DIR}; fix them or lower min_success"
        )
    keys = Counter(key for part in parts for key in part.keys)
    if len(keys) < splits.total():  # each tar counts from 0: the name of the tar tells the samples apart
        for number, part in enumerate(parts):
            prefix_keys(root, number, part)
            storage.upload(part_files(number))
    shards = tuple(part.shard for part in parts)
    content = [[shard.name, shard.sha256] for shard in shards]
    info = DatasetInfo(
        format_version=FORMAT_VERSION,
        num_samples=splits.total(),
        splits=dict(sorted(splits.items())),
        shards=shards,
        source="tars",
        built_with=built_with,
        fingerprint=hashlib.sha256(json.dumps([content, built_with]).encode()).hexdigest(),
    )
    write_atomically(root / DATASET_JSON, dataset_info_json(info))
    storage.upload([DATASET_JSON])
    _log.info("%s: complete: %d samples %s, %d failed", storage.out, info.num_samples, info.splits, failed)
    return info

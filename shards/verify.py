"""Checks that a dataset directory is what its dataset.json says. Every byte is read once; nothing is written.

In: a directory, and the fraction of the images to decode. Out: a `Report` with every fault found; each names
the file and the sample. Checked: the size and sha256 of every shard, the tar structure, the index against the
members of the tars, the JSON against the index, the messages (tags against images), the content of images.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO

import fsspec
import pyarrow.compute as pc

from shards.common.errors import BadInputError
from shards.format.dataset import DATASET_JSON, DatasetInfo, ShardInfo, files_in, read_dataset_info
from shards.format.index import read_index, table_records
from shards.format.messages import check_messages
from shards.format.records import ImageRef, SampleRecord
from shards.images import check_image, check_size
from shards.index import INDEXER
from shards.tars import Member, TarSample, read_member, scan, sha256_of

_MAX_FAULTS = 1000
_MAX_PIXELS = 2**40  # no limit: the build has applied its own

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Report:
    """What `verify` has found. images_decoded: of `images`. faults: one line each, at most 1000 of
    `num_faults`.
    """

    shards: int
    samples: int
    images: int
    images_decoded: int
    faults: tuple[str, ...]
    num_faults: int


def verify(root: str, decode: float = 0.01, progress: Progress | None = None) -> Report:
    """Checks the dataset directory `root`, a local path or fsspec URL.

    decode: fraction of the images that is decoded, 0 to 1, chosen by hash of the sample's key (the same ones
    each time). progress(done, total): called with bytes of shards checked.
    Raises BadInputError if there is no complete dataset in `root` or its index cannot be read.
    """
    if not 0 <= decode <= 1:
        raise BadInputError(f"decode is {decode}; it must be from 0 (none) to 1 (every image)")
    info = read_dataset_info(root)
    checker = _Checker(root, info, decode)
    faults = checker.dataset_faults()
    num_faults = len(faults)
    done, total = 0, sum(shard.bytes for shard in info.shards)
    for shard in info.shards:
        for fault in checker.shard_faults(shard):
            num_faults += 1
            if len(faults) < _MAX_FAULTS:
                faults.append(fault)
        done += shard.bytes
        if progress is not None:
            progress(done, total)
    return Report(
        shards=len(info.shards),
        samples=info.num_samples,
        images=checker.images,
        images_decoded=checker.decoded,
        faults=tuple(faults),
        num_faults=num_faults,
    )


class _Checker:
    """The index of a dataset, the checks, and the counts for the report."""

    def __init__(self, root: str, info: DatasetInfo, decode: float) -> None:
        self._filesystem, self._root = fsspec.core.url_to_fs(root)
        self._info, self._decode = info, decode
        self._index = read_index(root)
        self._foreign = INDEXER in info.built_with  # tars that another program wrote
        self.images = self.decoded = 0

    def dataset_faults(self) -> list[str]:
        """Faults of the dataset as a whole."""
        faults = []
        listed = [shard.name for shard in self._info.shards]
        tars = {path.rsplit("/", 1)[1] for path in files_in(self._filesystem, self._root, ".tar")}
        extra = sorted(tars - set(listed))
        faults += [f"{name}: not in {DATASET_JSON}; delete it or build again" for name in extra]
        keys = Counter(self._index["key"].to_pylist())
        faults += [f"index: key {key!r} occurs {count} times" for key, count in keys.items() if count > 1]
        splits = Counter(self._index["split"].to_pylist())
        if dict(splits) != {split: count for split, count in self._info.splits.items() if count}:
            faults.append(f"index: splits {dict(splits)}, {DATASET_JSON} says {self._info.splits}")
        counts = Counter(self._index["shard"].to_pylist())
        faults += [
            f"index: names {name}, which {DATASET_JSON} does not" for name in counts if name not in listed
        ]
        return faults

    def shard_faults(self, shard: ShardInfo) -> Iterator[str]:
        """Yields the faults of one shard, of its samples and of its records in the index."""
        path = f"{self._root}/{shard.name}"
        if not self._filesystem.isfile(path):
            yield f"{shard.name}: missing; copy it again or build again"
            return
        with self._filesystem.open(path, "rb") as stream:
            size = self._filesystem.size(path)
            if size != shard.bytes:
                yield f"{shard.name}: {size} bytes, {DATASET_JSON} says {shard.bytes}"
            if sha256_of(stream) != shard.sha256:
                yield f"{shard.name}: its sha256 is not that of {DATASET_JSON}: the content has changed"
            records = self._records(shard.name)
            if len(records) != shard.samples:
                yield (
                    f"{shard.name}: {len(records)} samples in the index, {DATASET_JSON} says {shard.samples}"
                )
            stream.seek(0)
            try:
                for sample in scan(stream, shard.name):
                    record = records.pop(sample.offset, None)
                    if record is not None:
                        for fault in self._sample_faults(stream, sample, record):
                            yield f"{shard.name}: sample {record.key!r}: {fault}"
                    elif not self._foreign:  # a foreign tar may hold samples that cannot be used
                        yield f"{shard.name}: sample {sample.key!r} is not in the index"
            except BadInputError as error:
                yield str(error)
        for record in records.values():
            yield f"{shard.name}: no sample at byte {record.offset}, where the index has {record.key!r}"

    def _records(self, shard: str) -> dict[int, SampleRecord]:
        """The records of one shard by their offset."""
        table = self._index.filter(pc.equal(self._index["shard"], shard))
        return {record.offset: record for record in table_records(table)}

    def _sample_faults(self, stream: IO[bytes], sample: TarSample, record: SampleRecord) -> Iterator[str]:
        if record.key != sample.key and not (self._foreign and record.key.endswith("/" + sample.key)):
            yield f"the tar has {sample.key!r} at this place"
            return
        if record.length != sample.length:
            yield f"{sample.length} bytes in the tar, {record.length} in the index"
        try:
            check_messages(list(record.messages), len(record.images))
        except BadInputError as error:
            yield str(error)
        yield from self._json_faults(stream, sample, record)
        members = {member.name: member for member in sample.members}
        chosen = self._is_chosen(record.key)
        for image in record.images:
            yield from self._image_faults(stream, image, members.get(image.member), decode=chosen)

    def _json_faults(self, stream: IO[bytes], sample: TarSample, record: SampleRecord) -> Iterator[str]:
        """The messages and meta in the tar against those of the index."""
        member = next((each for each in sample.members if each.suffix == "json"), None)
        if not self._foreign and (member is None or sample.members[0] is not member):
            yield f"{sample.key}.json is not its first member"
            return
        if member is None:
            return
        try:
            content = json.loads(read_member(stream, member))
        except (ValueError, RecursionError) as error:
            yield f"{member.name} is not JSON ({error})"
            return
        if self._foreign:
            return  # its index may be made from other fields, with templates
        if not isinstance(content, dict) or content.get("messages") != list(record.messages):
            yield f"the messages of {member.name} are not those of the index"
        elif content.get("meta") != json.loads(record.meta):
            yield f"the meta of {member.name} is not that of the index"

    def _image_faults(
        self, stream: IO[bytes], image: ImageRef, member: Member | None, *, decode: bool
    ) -> Iterator[str]:
        self.images += 1
        try:
            check_size(image.width, image.height, max_pixels=_MAX_PIXELS)
        except BadInputError as error:
            yield f"image {image.member}: {error}"
        if member is None or (member.offset, member.length) != (image.offset, image.length):
            yield f"image {image.member} is not where the index says"
        elif decode:
            self.decoded += 1
            try:
                facts = check_image(read_member(stream, member), max_pixels=_MAX_PIXELS)
            except BadInputError as error:
                yield f"image {member.name}: {error}"
                return
            if (facts.width, facts.height) != (image.width, image.height):
                yield (
                    f"image {member.name} is {facts.width}x{facts.height}, "
                    f"the index says {image.width}x{image.height}"
                )

    def _is_chosen(self, key: str) -> bool:
        number = int.from_bytes(hashlib.sha256(f"decode {key}".encode()).digest()[:8], "big")
        return number < self._decode * 2**64

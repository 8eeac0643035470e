"""Is a dataset directory what its dataset.json says? Every byte is read once; nothing is written.

In: a directory, and which part of the images to decode. Out: a `Report` with every fault found, each naming
the file and the sample. Checked: the size and sha256 of every shard, the tar structure, the index against the
members of the tars, the JSON against the index, the messages (tags against images), the images' content.
Called by the command line and by whoever is about to pay for GPUs.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Any

import fsspec
import pyarrow.compute as pc

from shards.common.errors import BadInputError
from shards.format.dataset import DATASET_JSON, DatasetInfo, ShardInfo, files_in, read_dataset_info
from shards.format.index import read_index
from shards.format.messages import check_messages
from shards.images import check_image, check_size
from shards.tars import TarSample, read_member, scan, sha256_of

_MAX_FAULTS = 1000

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Report:
    """What `verify` has found. images_decoded: of `images`. faults: one line each, at most 1000 of
    num_faults.
    """

    shards: int
    samples: int
    images: int
    images_decoded: int
    faults: tuple[str, ...]
    num_faults: int


def verify(root: str, decode: float = 0.01, progress: Progress | None = None) -> Report:
    """Checks the dataset directory `root`, a local path or fsspec URL.

    decode: part of the images that is decoded, 0 to 1, chosen by hash of the sample's key (the same ones each
    time); 1: all. progress(done, total): called with bytes of shards checked.
    Raises BadInputError if there is no complete dataset in `root` or its index cannot be read.
    """
    if not 0 <= decode <= 1:
        raise BadInputError(f"decode is {decode}; it must be from 0 (none) to 1 (every image)")
    info = read_dataset_info(root)
    faults: list[str] = []
    checker = _Checker(root, info, decode)
    faults += checker.dataset_faults()
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
        len(info.shards), info.num_samples, checker.images, checker.decoded, tuple(faults), num_faults
    )


class _Checker:
    """The index by shard, and the counts that the report wants."""

    def __init__(self, root: str, info: DatasetInfo, decode: float) -> None:
        self._filesystem, self._root = fsspec.core.url_to_fs(root)
        self._info, self._decode = info, decode
        self._index = read_index(root)
        self._foreign = "indexer" in info.built_with
        self.images = self.decoded = 0

    def dataset_faults(self) -> list[str]:
        """What is wrong with the dataset as a whole."""
        faults = []
        listed = [shard.name for shard in self._info.shards]
        tars = {path.rsplit("/", 1)[1] for path in files_in(self._filesystem, self._root, ".tar")}
        stray = sorted(tars - set(listed))
        faults += [f"{name}: not in {DATASET_JSON}; delete it or build anew" for name in stray]
        keys = Counter(self._index["key"].to_pylist())
        faults += [f"index: key {key!r} stands {count} times" for key, count in keys.items() if count > 1]
        splits = Counter(self._index["split"].to_pylist())
        if dict(splits) != {split: count for split, count in self._info.splits.items() if count}:
            faults.append(f"index: splits {dict(splits)}, {DATASET_JSON} says {self._info.splits}")
        counts = Counter(self._index["shard"].to_pylist())
        faults += [
            f"index: names {name}, which {DATASET_JSON} does not" for name in counts if name not in listed
        ]
        return faults

    def shard_faults(self, shard: ShardInfo) -> Iterator[str]:
        """Yields what is wrong with one shard, its samples and its rows of the index."""
        path = f"{self._root}/{shard.name}"
        if not self._filesystem.isfile(path):
            yield f"{shard.name}: missing; copy it again or build anew"
            return
        with self._filesystem.open(path, "rb") as stream:
            size = self._filesystem.size(path)
            if size != shard.bytes:
                yield f"{shard.name}: {size} bytes, {DATASET_JSON} says {shard.bytes}"
            if sha256_of(stream) != shard.sha256:
                yield f"{shard.name}: its sha256 is not that of {DATASET_JSON}: the content has changed"
            rows = {row["offset"]: row for row in self._rows(shard.name)}
            if len(rows) != shard.samples:
                yield f"{shard.name}: {len(rows)} samples in the index, {DATASET_JSON} says {shard.samples}"
            stream.seek(0)
            try:
                for sample in scan(stream, shard.name):
                    row = rows.pop(sample.offset, None)
                    if row is not None:
                        for fault in self._sample_faults(stream, sample, row):
                            yield f"{shard.name}: sample {row['key']!r}: {fault}"
                    elif not self._foreign:  # in tars from elsewhere it may be one that could not be used
                        yield f"{shard.name}: sample {sample.key!r} is not in the index"
            except BadInputError as error:
                yield str(error)
        for row in rows.values():
            yield f"{shard.name}: no sample at byte {row['offset']}, where the index has {row['key']!r}"

    def _rows(self, shard: str) -> list[dict[str, Any]]:
        return self._index.filter(pc.equal(self._index["shard"], shard)).to_pylist()

    def _sample_faults(self, stream: IO[bytes], sample: TarSample, row: dict[str, Any]) -> Iterator[str]:
        if row["key"] != sample.key and not (self._foreign and row["key"].endswith("/" + sample.key)):
            yield f"the tar has {sample.key!r} at this place"
            return
        if row["length"] != sample.length:
            yield f"{sample.length} bytes in the tar, {row['length']} in the index"
        members = {member.name: member for member in sample.members}
        try:
            check_messages(row["messages"], len(row["images"]))
        except BadInputError as error:
            yield str(error)
        yield from self._json_faults(stream, sample, row)
        wanted = self._is_chosen(row["key"])
        for image in row["images"]:
            self.images += 1
            try:
                check_size(image["width"], image["height"], max_pixels=2**40)
            except BadInputError as error:
                yield f"image {image['member']}: {error}"
            member = members.get(image["member"])
            if member is None or (member.offset, member.length) != (image["offset"], image["length"]):
                yield f"image {image['member']} is not where the index says"
            elif wanted:
                self.decoded += 1
                data = read_member(stream, member)
                try:
                    facts = check_image(data, max_pixels=2**40)
                except BadInputError as error:
                    yield f"image {member.name}: {error}"
                    continue
                if (facts.width, facts.height) != (image["width"], image["height"]):
                    yield (
                        f"image {member.name} is {facts.width}x{facts.height}, "
                        f"the index says {image['width']}x{image['height']}"
                    )

    def _json_faults(self, stream: IO[bytes], sample: TarSample, row: dict[str, Any]) -> Iterator[str]:
        """The messages and meta of the tar against those of the index."""
        member = next((each for each in sample.members if each.suffix == "json"), None)
        if member is None or (sample.members[0] is not member and not self._foreign):
            if not self._foreign:
                yield f"{sample.key}.json is not its first member"
            return
        try:
            content = json.loads(read_member(stream, member))
        except (ValueError, RecursionError) as error:
            yield f"{member.name} is not JSON ({error})"
            return
        if self._foreign:  # its index may be made of other fields and templates
            return
        if not isinstance(content, dict) or content.get("messages") != row["messages"]:
            yield f"the messages of {member.name} are not those of the index"
        elif content.get("meta") != json.loads(row["meta"]):
            yield f"the meta of {member.name} is not that of the index"

    def _is_chosen(self, key: str) -> bool:
        number = int.from_bytes(hashlib.sha256(f"decode {key}".encode()).digest()[:8], "big")
        return number < self._decode * 2**64

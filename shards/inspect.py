"""What is in a dataset, without a model: counts, image sizes, text lengths, duplicates, failed records.

In: a complete dataset directory. Out: an `Inspection` of plain numbers. Only the index is read, except to
find duplicate images: images of equal size and length are read and hashed.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import fsspec

from shards.format.dataset import DatasetInfo, read_dataset_info
from shards.format.index import read_index, table_records
from shards.format.records import ImageRef, SampleRecord
from shards.ledger import failure_reasons


@dataclass(frozen=True)
class Spread:
    """Of a set of numbers; all 0 if it is empty."""

    smallest: float
    median: float
    percentile_95: float
    largest: float
    total: float


@dataclass(frozen=True)
class FoundImage:
    """An image and the sample that it is in."""

    sample: SampleRecord
    image: ImageRef


@dataclass(frozen=True)
class Inspection:
    """The findings. Sizes of images in pixels as shown, lengths of texts in characters.

    shard_bytes: of all tars. images_per_sample: number of images -> samples. formats: suffix -> images.
    width, height, image_bytes: over images. prompt_chars, reply_chars: over samples, of all their turns.
    duplicate_images: groups of images with equal bytes. cross_split: the number of these groups that are in
    more than one split, which makes the validation loss too good. repeated_texts: samples whose messages all
    occurred before. frequent_replies: (reply, samples), the five most frequent. failed: reason -> records of
    the source that are not in the dataset, by the ledger.
    """

    info: DatasetInfo
    shard_bytes: int
    images_per_sample: dict[int, int]
    formats: dict[str, int]
    width: Spread
    height: Spread
    image_bytes: Spread
    prompt_chars: Spread
    reply_chars: Spread
    turns: Spread
    duplicate_images: tuple[tuple[FoundImage, ...], ...]
    cross_split: int
    repeated_texts: int
    frequent_replies: tuple[tuple[str, int], ...]
    failed: dict[str, int]

    @property
    def copies(self) -> int:
        """Images that are a duplicate of another one."""
        return sum(len(group) - 1 for group in self.duplicate_images)


def inspect(root: str) -> Inspection:
    """Reads the index (and, of a local directory, the ledger) of `root`, a path or fsspec URL.

    Raises BadInputError if there is no complete dataset in `root`.
    """
    info = read_dataset_info(root)
    records = table_records(read_index(root))
    images = [image for record in records for image in record.images]
    replies = [_text(record, "assistant") for record in records]
    texts = {json.dumps(record.messages) for record in records}
    duplicates = _duplicates(root, records)
    return Inspection(
        info=info,
        shard_bytes=sum(shard.bytes for shard in info.shards),
        images_per_sample=dict(sorted(Counter(len(record.images) for record in records).items())),
        formats=dict(Counter(image.member.rpartition(".")[2].lower() for image in images).most_common()),
        width=spread(image.width for image in images),
        height=spread(image.height for image in images),
        image_bytes=spread(image.length for image in images),
        prompt_chars=spread(len(_text(record, "user")) for record in records),
        reply_chars=spread(len(reply) for reply in replies),
        turns=spread(len(record.messages) for record in records),
        duplicate_images=duplicates,
        cross_split=sum(len({found.sample.split for found in group}) > 1 for group in duplicates),
        repeated_texts=len(records) - len(texts),
        frequent_replies=tuple(Counter(replies).most_common(5)),
        failed=failure_reasons(Path(root)) if "://" not in root else {},
    )


def spread(numbers: Iterable[float]) -> Spread:
    """The spread of `numbers`; percentiles are members of the set (nearest rank)."""
    ordered = sorted(numbers)
    if not ordered:
        return Spread(0, 0, 0, 0, 0)
    last = len(ordered) - 1
    return Spread(ordered[0], ordered[last // 2], ordered[round(0.95 * last)], ordered[-1], sum(ordered))


def _text(record: SampleRecord, role: str) -> str:
    return "\n".join(message["content"] for message in record.messages if message["role"] == role)


def _duplicates(root: str, records: Sequence[SampleRecord]) -> tuple[tuple[FoundImage, ...], ...]:
    """Groups of images with equal bytes."""
    filesystem, path = fsspec.core.url_to_fs(root)
    alike = defaultdict(list)
    for record in records:
        for image in record.images:
            alike[image.length, image.width, image.height].append(FoundImage(record, image))
    equal = defaultdict(list)
    for candidates in alike.values():
        if len(candidates) > 1:
            for found in candidates:
                start, end = found.image.offset, found.image.offset + found.image.length
                data = filesystem.cat_file(f"{path}/{found.sample.shard}", start=start, end=end)
                equal[hashlib.sha256(data).digest()].append(found)
    return tuple(tuple(group) for group in equal.values() if len(group) > 1)

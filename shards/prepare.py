"""A record with its images fetched and checked, and what the index, the ledger and the split need from it.

In: a `SourceRecord` and a way to fetch. Out: `Prepared`; `sample_record` makes the record of the index from
it, and `split_of` its split.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

from shards.common.errors import BadInputError
from shards.common.text import first_line
from shards.fetch import Fetched, Fetcher, is_local, read_local
from shards.format.records import ImageRef, SampleRecord
from shards.images import ImageFacts, check_image, reencode
from shards.options import BuildOptions
from shards.source_records import ImageSource, SourceRecord
from shards.tars import Member, TarSample

_ENCODER = json.JSONEncoder(ensure_ascii=False)


@dataclass(frozen=True)
class PreparedImage:
    """One image of a record.

    name: the path or URL as the source has it, or "inline". fetched: its bytes; if `reencoded`, those that
    are to be stored, not those that were fetched. facts: None if it is not a usable image. sha256: of the
    bytes, in hex; None without bytes. reason: why it cannot be used, None if it can.
    """

    name: str
    fetched: Fetched
    facts: ImageFacts | None = None
    sha256: str | None = None
    reason: str | None = None
    reencoded: bool = False


@dataclass(frozen=True)
class Prepared:
    """A record with its images fetched and checked. fault: why it is not in the dataset, None if it can be.

    dropped: the record is good, but not wanted (a duplicate).
    """

    record: SourceRecord
    images: tuple[PreparedImage, ...]
    fault: str | None
    dropped: bool = False

    @property
    def outcome(self) -> str:
        """ "ok", "failed" or "dropped", as the ledger has it."""
        return "ok" if self.fault is None else "dropped" if self.dropped else "failed"


async def prepare_all(records: Sequence[SourceRecord], base: str, options: BuildOptions) -> list[Prepared]:
    """`prepare` for records whose images are all on local disks (see `on_disk`), in one thread."""
    return await asyncio.to_thread(
        lambda: [_prepare_local(record, _locations(record, base), options) for record in records]
    )


def on_disk(record: SourceRecord, base: str) -> bool:
    """Whether no image of the record has to be fetched from a network or an object store."""
    return all(isinstance(location, bytes) or is_local(location) for location in _locations(record, base))


async def prepare(record: SourceRecord, base: str, fetcher: Fetcher, *, options: BuildOptions) -> Prepared:
    """Fetches and checks the images of `record`. base: the folder or URL that image paths are relative to."""
    if record.fault is not None:
        return Prepared(record, (), record.fault)

    async def image(source: ImageSource, location: ImageSource) -> PreparedImage:
        if isinstance(location, bytes):
            return await asyncio.to_thread(prepare_image, "inline", Fetched("inline", location), options)
        fetched = await fetcher.fetch(location)
        decode = options.decode == "all" or (options.decode == "fetched" and not is_local(location))
        return await asyncio.to_thread(prepare_image, str(source), fetched, options, decode=decode)

    images = await asyncio.gather(*map(image, record.images, _locations(record, base)))
    return with_images(record, images)


def _locations(record: SourceRecord, base: str) -> list[ImageSource]:
    return [image if isinstance(image, bytes) else _location(image, base) for image in record.images]


def _location(image: str, base: str) -> str:
    if "://" in image:
        return image
    return f"{base}/{image}" if "://" in base else os.path.join(base, image)


def _prepare_local(record: SourceRecord, locations: Sequence[ImageSource], options: BuildOptions) -> Prepared:
    if record.fault is not None:
        return Prepared(record, (), record.fault)
    images = []
    for source, location in zip(record.images, locations, strict=True):
        if isinstance(location, bytes):
            images.append(prepare_image("inline", Fetched("inline", location), options))
        else:
            images.append(prepare_image(str(source), read_local(location, options.max_bytes), options))
    return with_images(record, images)


def prepare_image(
    name: str, fetched: Fetched, options: BuildOptions, *, decode: bool | None = None
) -> PreparedImage:
    """Checks the bytes of `fetched`, encodes them again if the options say so, and hashes them.

    decode: whether the image is decoded; None: as the options say for local images. Does not raise: the
    `reason` of the result says why an image cannot be used.
    """
    data = fetched.data
    if data is None:
        return PreparedImage(name, fetched, reason=fetched.reason)
    if len(data) > options.max_bytes:
        reason = f"{len(data)} bytes, more than the limit of {options.max_bytes}"
        return PreparedImage(name, fetched, reason=reason)
    try:
        facts = check_image(data, options.max_pixels, options.decode == "all" if decode is None else decode)
        too_large = options.max_side is not None and max(facts.width, facts.height) > options.max_side
        reencoded = too_large or options.reencode is not None
        if reencoded:
            data, facts = _reencode(data, facts, options)
            fetched = replace(fetched, data=data, reason=None)
        sha256 = hashlib.sha256(data).hexdigest()
        return PreparedImage(name, fetched, facts, sha256=sha256, reencoded=reencoded)
    except BadInputError as error:
        return PreparedImage(name, fetched, sha256=hashlib.sha256(data).hexdigest(), reason=str(error))


def _reencode(data: bytes, facts: ImageFacts, options: BuildOptions) -> tuple[bytes, ImageFacts]:
    try:
        return reencode(data, facts, options.max_side, coding=options.reencode)
    except BadInputError:
        raise
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, ValueError, ...
        raise BadInputError(f"damaged {facts.extension} image ({first_line(error)})") from error


def with_images(record: SourceRecord, images: Sequence[PreparedImage]) -> Prepared:
    """The record with its images; the first fault among the images is that of the record."""
    reasons = [image.reason for image in images if image.reason is not None]
    return Prepared(record, tuple(images), reasons[0] if reasons else None)


def sample_record(
    item: Prepared, split: str, shard: str, *, sample: TarSample, members: Sequence[Member]
) -> SampleRecord:
    """The record of a sample that is in a tar. members: those of `sample` that hold its images, in order."""
    images = tuple(
        ImageRef(member.name, member.offset, member.length, image.facts.width, image.facts.height)
        for member, image in zip(members, item.images, strict=True)
        if image.facts is not None
    )
    return SampleRecord(
        key=item.record.key,
        split=split,
        shard=shard,
        offset=sample.offset,
        length=sample.length,
        images=images,
        messages=item.record.messages,
        meta=_ENCODER.encode(item.record.meta),
    )


def split_of(item: Prepared, val_fraction: float) -> str:
    """ "train" or "val", by the hash of the record's group; without a group, of its images; without images,
    of its messages.
    """
    group = item.record.group
    if group is None:
        group = " ".join(each.sha256 or "" for each in item.images) or json.dumps(item.record.messages)
    number = int.from_bytes(hashlib.sha256(f"split {group}".encode()).digest()[:8], "big")
    return "val" if number < val_fraction * 2**64 else "train"

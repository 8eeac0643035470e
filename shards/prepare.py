"""A row with its images fetched and checked, and what the index, the ledger and the split say of it.

In: a `Row` and a way to fetch. Out: `Prepared`, from which come the index row, the ledger line and the split.
Called by `build` and `window`, and by `index` for samples that are in tars already.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from shards.common.errors import BadInputError
from shards.common.text import first_line
from shards.fetch import Fetched, Fetcher, is_local, read_local
from shards.format.records import ImageRef, Message, SampleRecord
from shards.images import ImageFacts, check_image, reencode
from shards.options import BuildOptions
from shards.rows import Image, Row
from shards.tars import Member, TarSample

_ENCODER = json.JSONEncoder(ensure_ascii=False)


@dataclass(frozen=True)
class Picture:
    """One image of a row. facts: None if it is no good image; sha256: in hex, None without bytes. reencoded:
    the bytes are not those that were fetched.
    """

    name: str
    fetched: Fetched
    facts: ImageFacts | None
    sha256: str | None
    reason: str | None
    reencoded: bool = False


@dataclass(frozen=True)
class Prepared:
    """A row with its images fetched and checked. fault: why it is not in the dataset, None if it can be.

    dropped: it is good, but not wanted (a duplicate).
    """

    row: Row
    pictures: tuple[Picture, ...]
    fault: str | None
    dropped: bool = False

    @property
    def outcome(self) -> str:
        return "ok" if self.fault is None else "dropped" if self.dropped else "failed"


async def prepare_all(rows: Sequence[Row], base: str, options: BuildOptions) -> list[Prepared]:
    """`prepare` of rows whose images are all on disks here (see `on_disk`), as one job of a thread."""
    return await asyncio.to_thread(lambda: [_prepare_local(row, _places(row, base), options) for row in rows])


def on_disk(row: Row, base: str) -> bool:
    """No image of the row is to be fetched from a network or store."""
    return all(isinstance(place, bytes) or is_local(place) for place in _places(row, base))


async def prepare(row: Row, base: str, fetcher: Fetcher, options: BuildOptions) -> Prepared:
    """Fetches and checks the images of `row`; image paths start from `base`, a folder or a URL."""
    if row.fault is not None:
        return Prepared(row, (), row.fault)
    places = _places(row, base)

    async def picture(image: Image, place: Image) -> Picture:
        if isinstance(place, bytes):
            return await asyncio.to_thread(check_picture, "inline", Fetched("inline", place), options)
        fetched = await fetcher.fetch(place)
        decode = options.decode == "all" or (options.decode == "fetched" and not is_local(place))
        return await asyncio.to_thread(check_picture, str(image), fetched, options, decode)

    return with_pictures(row, await asyncio.gather(*map(picture, row.images, places)))


def _places(row: Row, base: str) -> list[Image]:
    return [image if isinstance(image, bytes) else _place(image, base) for image in row.images]


def _place(image: str, base: str) -> str:
    if "://" in image:
        return image
    return f"{base}/{image}" if "://" in base else os.path.join(base, image)


def _prepare_local(row: Row, places: Sequence[Image], options: BuildOptions) -> Prepared:
    if row.fault is not None:
        return Prepared(row, (), row.fault)
    pictures = []
    for image, place in zip(row.images, places, strict=True):
        if isinstance(place, bytes):
            pictures.append(check_picture("inline", Fetched("inline", place), options))
        else:
            pictures.append(check_picture(str(image), read_local(place, options.max_bytes), options))
    return with_pictures(row, pictures)


def check_picture(name: str, fetched: Fetched, options: BuildOptions, decode: bool | None = None) -> Picture:
    """Checks the bytes of `fetched`, makes them anew if asked, hashes them; faults are in the `reason`.

    decode: whether the image is decoded; None: as the options say of local ones.
    """
    data = fetched.data
    if data is None:
        return Picture(name, fetched, None, None, fetched.reason)
    if len(data) > options.max_bytes:
        reason = f"{len(data)} bytes, more than the limit of {options.max_bytes}"
        return Picture(name, fetched, None, None, reason)
    try:
        facts = check_image(data, options.max_pixels, options.decode == "all" if decode is None else decode)
        too_large = options.max_side is not None and max(facts.width, facts.height) > options.max_side
        made = None
        if too_large or options.reencode is not None:
            made = _made_anew(data, facts, options)
            data, facts = made
            fetched = Fetched(fetched.url, data, None, fetched.http_status, fetched.attempts)
        return Picture(name, fetched, facts, hashlib.sha256(data).hexdigest(), None, made is not None)
    except BadInputError as error:
        return Picture(name, fetched, None, hashlib.sha256(data).hexdigest(), str(error))


def _made_anew(data: bytes, facts: ImageFacts, options: BuildOptions) -> tuple[bytes, ImageFacts]:
    try:
        return reencode(data, facts, options.max_side, options.reencode)
    except BadInputError:
        raise
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, ValueError, ...
        raise BadInputError(f"damaged {facts.extension} image ({first_line(error)})") from error


def with_pictures(row: Row, pictures: Sequence[Picture]) -> Prepared:
    """The row with its pictures; the first fault among them is the row's."""
    faults = [picture.reason for picture in pictures if picture.reason is not None]
    return Prepared(row, tuple(pictures), faults[0] if faults else None)


def sample_record(
    item: Prepared, split: str, shard: str, *, sample: TarSample, members: Sequence[Member]
) -> SampleRecord:
    """The record of a sample that is in a tar. members: those of `sample` that hold its images, in order."""
    images = tuple(
        ImageRef(member.name, member.offset, member.length, picture.facts.width, picture.facts.height)
        for member, picture in zip(members, item.pictures, strict=True)
        if picture.facts is not None
    )
    return SampleRecord(
        key=item.row.key,
        split=split,
        shard=shard,
        offset=sample.offset,
        length=sample.length,
        images=images,
        messages=cast("tuple[Message, ...]", tuple(item.row.messages)),
        meta=_ENCODER.encode(item.row.meta),
    )


def split_of(item: Prepared, val_fraction: float) -> str:
    """By hash of the group: that of the row, else its images, else (a sample of text alone) its messages."""
    group = item.row.group
    if group is None:
        group = " ".join(each.sha256 or "" for each in item.pictures) or json.dumps(item.row.messages)
    number = int.from_bytes(hashlib.sha256(f"split {group}".encode()).digest()[:8], "big")
    return "val" if number < val_fraction * 2**64 else "train"

"""A row with its images fetched and checked, and what the index, the ledger and the split say of it.

In: a `Row` and a way to fetch. Out: `Prepared`, from which come the index row, the ledger line and the split.
Called by `build` and `window`, and by `index` for samples that are in tars already.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shards.fetch import Fetched, Fetcher
from shards.format import BadInputError
from shards.images import ImageFacts, check_image
from shards.sources import Row
from shards.tars import Member, TarSample


@dataclass(frozen=True)
class Picture:
    """One image of a row. facts: None if it is no good image; sha256: in hex, None without bytes."""

    name: str
    fetched: Fetched
    facts: ImageFacts | None
    sha256: str | None
    reason: str | None


@dataclass(frozen=True)
class Prepared:
    """A row with its images fetched and checked. fault: why it cannot be used, None if it can."""

    row: Row
    pictures: tuple[Picture, ...]
    fault: str | None


async def prepare(row: Row, base: Path, fetcher: Fetcher, max_pixels: int) -> Prepared:
    """Fetches and checks the images of `row`; image paths start from `base`."""
    if row.fault is not None:
        return Prepared(row, (), row.fault)

    async def picture(name: str) -> Picture:
        fetched = await fetcher.fetch(name if "://" in name else str(base / name))
        return await asyncio.to_thread(check_picture, name, fetched, max_pixels)

    return with_pictures(row, await asyncio.gather(*(picture(name) for name in row.images)))


def check_picture(name: str, fetched: Fetched, max_pixels: int) -> Picture:
    """Hashes and decodes the bytes of `fetched`; what is wrong with them is in `Picture.reason`."""
    if fetched.data is None:
        return Picture(name, fetched, None, None, fetched.reason)
    sha256 = hashlib.sha256(fetched.data).hexdigest()
    try:
        return Picture(name, fetched, check_image(fetched.data, max_pixels), sha256, None)
    except BadInputError as error:
        return Picture(name, fetched, None, sha256, str(error))


def with_pictures(row: Row, pictures: Sequence[Picture]) -> Prepared:
    """The row with its pictures; the first fault among them is the row's."""
    faults = [picture.reason for picture in pictures if picture.reason is not None]
    return Prepared(row, tuple(pictures), faults[0] if faults else None)


def index_row(
    item: Prepared, split: str, shard: str, sample: TarSample, members: Sequence[Member]
) -> dict[str, Any]:
    """A row of INDEX_SCHEMA. members: those of `sample` that hold the pictures, in their order."""
    images = [
        {
            "member": member.name,
            "offset": member.offset,
            "length": member.length,
            "width": picture.facts.width,
            "height": picture.facts.height,
        }
        for member, picture in zip(members, item.pictures, strict=True)
        if picture.facts is not None
    ]
    return {
        "key": item.row.key,
        "split": split,
        "shard": shard,
        "offset": sample.offset,
        "length": sample.length,
        "images": images,
        "messages": item.row.messages,
        "meta": json.dumps(item.row.meta, ensure_ascii=False),
    }


def ledger_entry(item: Prepared, split: str | None, shard: str | None) -> dict[str, Any]:
    """One line of the ledger: what became of the row, and of each of its images."""
    images = [
        {
            "image": picture.name,
            "http_status": picture.fetched.http_status,
            "bytes": None if picture.fetched.data is None else len(picture.fetched.data),
            "sha256": picture.sha256,
            "width": picture.facts.width if picture.facts else None,
            "height": picture.facts.height if picture.facts else None,
            "reason": picture.reason,
        }
        for picture in item.pictures
    ]
    outcome = "ok" if item.fault is None else "failed"
    return {
        "row": item.row.number,
        "key": item.row.key,
        "outcome": outcome,
        "reason": item.fault,
        "split": split,
        "shard": shard,
        "images": images,
    }


def split_of(item: Prepared, val_fraction: float) -> str:
    """By hash of the group: that of the row, else its images, else (a sample of text alone) its messages."""
    group = item.row.group
    if group is None:
        group = " ".join(each.sha256 or "" for each in item.pictures) or json.dumps(item.row.messages)
    number = int.from_bytes(hashlib.sha256(f"split {group}".encode()).digest()[:8], "big")
    return "val" if number < val_fraction * 2**64 else "train"

"""The samples of tars that another program wrote: which members are the images, what the text is.

In: a `TarSample` (the members of one key), `IndexOptions`. Out: the sample as a `Prepared` record, and the
members that hold its images. Members may come in any order; images are taken in the order of the numbers in
their names. The text comes from `KEY.json` ("messages", as this program writes it, or fields for the
templates) and from text members (`KEY.txt` is the field {txt}, `KEY.cls` is {cls}).
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, replace
from typing import Any

from shards.common.text import first_line
from shards.fetch import Fetched
from shards.options import BuildOptions
from shards.prepare import Prepared, prepare_image, with_images
from shards.source_records import Converter, Recipe, SourceRecord, find_converter, make_record
from shards.tars import Member, TarSample

_IMAGE_SUFFIXES = {"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff"}
_MAX_TEXT = 2**20  # bytes of a text member; larger ones are ignored


@dataclass(frozen=True)
class IndexOptions:
    """How tars become samples.

    images: suffixes of the members that are the images, in the order of the tags; empty: all members with the
    suffix of an image format. prompt, answer: templates over the fields of the JSON and the text members; not
    needed if the JSON holds messages. group_by: field whose equal values stay in one split. val_fraction:
    part of the groups that becomes the val split, unless the name of every tar says its split (train, val,
    test). max_bytes, max_pixels: of one image. min_success: part of the samples that must be usable.
    """

    images: tuple[str, ...] = ()
    prompt: str | None = None
    answer: str | None = None
    group_by: str | None = None
    val_fraction: float = 0.1
    max_bytes: int = 64 * 2**20
    max_pixels: int = 100_000_000
    min_success: float = 0.95


class SampleReader:
    """Reads samples of the tars of `source`. The templates are checked against the fields of the first
    sample: `read` raises BadInputError if they do not fit.
    """

    def __init__(self, source: str, options: IndexOptions) -> None:
        self._source, self._options = source, options
        self._limits = BuildOptions(max_bytes=options.max_bytes, max_pixels=options.max_pixels)
        self._convert: Converter | None = None

    def read(self, descriptor: int, sample: TarSample, number: int) -> tuple[Prepared, list[Member]]:
        """The sample as record `number`, and the members that hold its images; no members if it failed.

        descriptor: of the open tar.
        """
        members = _image_members(sample, self._options.images)
        fields, reason = _read_fields(descriptor, sample, members)
        if reason is not None:
            return Prepared(SourceRecord(number, sample.key), (), reason), []
        named = fields.get("images")
        members = self._in_named_order(members, named)
        if isinstance(named, list) and len(named) != len(members):
            reason = f"its JSON names {len(named)} image(s), the tar has {len(members)}"
            return Prepared(SourceRecord(number, sample.key), (), reason), []
        fields["images"] = [member.name for member in members]
        record = self._record(number, sample.key, fields)
        if record.fault is None and list(record.images) != fields["images"]:
            reason = f"{len(record.images)} image(s) named, the tar has {len(members)}"
            record = SourceRecord(number, sample.key, fault=reason)
        if record.fault is not None:
            return Prepared(record, (), record.fault), []
        images = [prepare_image(each.name, self._fetch(descriptor, each), self._limits) for each in members]
        return with_images(record, images), members

    def _record(self, number: int, key: str, fields: dict[str, Any]) -> SourceRecord:
        options = self._options
        if self._convert is None:
            images = () if options.prompt is None and options.answer is None else ("images",)
            recipe = Recipe(images, options.prompt, options.answer, group_by=options.group_by)
            self._convert = find_converter(f"{self._source}: sample {key}", list(fields), recipe)
        record = make_record(number, key, fields, convert=self._convert, group_by=options.group_by)
        meta = {name: value for name, value in record.meta.items() if name != "images"}
        return replace(record, meta=meta)

    def _fetch(self, descriptor: int, member: Member) -> Fetched:
        limit = self._options.max_bytes
        if member.length > limit:
            return Fetched(member.name, None, f"{member.length} bytes, more than the limit of {limit}")
        return Fetched(member.name, os.pread(descriptor, member.length, member.offset))

    def _in_named_order(self, members: list[Member], named: Any) -> list[Member]:
        """The members in the order in which the JSON of the sample names them, if it names them all."""
        is_list_of_names = isinstance(named, list) and all(isinstance(each, str) for each in named)
        if self._options.images or not is_list_of_names:
            return members
        by_name = {name: each for each in members for name in (each.name.rpartition("/")[2], each.suffix)}
        found = [by_name.get(each.rpartition("/")[2]) for each in named]
        chosen = [each for each in found if each is not None]
        complete = len(chosen) == len(members) == len({each.name for each in chosen})
        return chosen if complete and None not in found else members


def _read_fields(
    descriptor: int, sample: TarSample, images: list[Member]
) -> tuple[dict[str, Any], str | None]:
    """The fields of the JSON and of the text members, and why the sample cannot be used."""
    fields: dict[str, Any] = {}
    for member in sample.members:
        if member in images or member.length > _MAX_TEXT:
            continue
        data = os.pread(descriptor, member.length, member.offset)
        try:
            if member.suffix == "json":
                content = json.loads(data)
                fields |= content if isinstance(content, dict) else {"json": content}
            else:
                fields[member.suffix] = data.decode()
        except UnicodeDecodeError:
            continue  # an array or a sound: nothing that a template could name
        except (ValueError, RecursionError) as error:  # not JSON, numbers of thousands of digits, too deep
            return {}, f"member {member.name} is not readable JSON ({first_line(error)})"
    return fields, None


def _image_members(sample: TarSample, suffixes: tuple[str, ...]) -> list[Member]:
    """The members that are the images of a sample, in the order of their tags: 2.jpg before 10.jpg."""
    if suffixes:
        by_suffix = {member.suffix: member for member in sample.members}
        return [by_suffix[suffix] for suffix in suffixes if suffix in by_suffix]
    images = [each for each in sample.members if each.suffix.rpartition(".")[2] in _IMAGE_SUFFIXES]
    return sorted(images, key=lambda member: _natural(member.suffix.rpartition(".")[0]))


def _natural(text: str) -> list[tuple[int, str]]:
    """A sort key by which numbers in a name are ordered by value."""
    return [(int(piece), "") if piece.isdigit() else (-1, piece) for piece in re.split(r"(\d+)", text)]

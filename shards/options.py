"""How to build shards: the options, their limits, and on which of them the bytes depend.

In: values from the command line or a recipe. Out: `BuildOptions`, checked.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from typing import Any

from shards.common.errors import BadInputError
from shards.images import parse_coding
from shards.source_records import Recipe


@dataclass(frozen=True)
class BuildOptions:
    """The options of a build. The bytes of the dataset depend on the first block, which is recorded; the
    second block only says how to get there.

    images, prompt, answer, key, group_by, meta: see `source_records.Recipe`; without group_by, records with
    equal images stay in one split. image_root: folder or URL that image paths are relative to; None: that of
    the source. val_fraction: fraction of the groups that becomes the val split, by hash, so that it is stable
    when records are added. shard_samples: records of a partition, so at most so many samples in a tar.
    shard_bytes: a tar is closed before it grows beyond this. max_bytes, max_pixels: of one image. max_side:
    larger images are scaled down until their longer side has so many pixels; None: any size. reencode:
    "jpeg:90", "webp:80" or "png": every image is encoded again in this format, upright; None: images that are
    not too large keep their bytes. duplicates: "keep", or "drop" samples whose images were all seen before.

    min_success: fraction of the records that must succeed. decode: which images are decoded completely and
    not only checked for their structure: those "fetched" from a network, "all", or "none". processes: number
    of processes that write partitions at the same time; None: one per core if many local files are to be
    read. work_dir: where shards are kept before they are copied to an object store; None: in the user's
    cache. concurrency: fetches at the same time, at most per_host of them from one host. retries: of a fetch,
    after a failure that may be temporary.
    """

    images: tuple[str, ...] = ()
    prompt: str | None = None
    answer: str | None = None
    key: str | None = None
    group_by: str | None = None
    meta: tuple[tuple[str, str], ...] = ()
    image_root: str | None = None
    val_fraction: float = 0.1
    shard_samples: int = 1000
    shard_bytes: int = 256 * 2**20
    max_bytes: int = 64 * 2**20
    max_pixels: int = 100_000_000
    max_side: int | None = None
    reencode: str | None = None
    duplicates: str = "keep"

    min_success: float = 0.95
    allow_private_hosts: bool = False
    decode: str = "fetched"
    processes: int | None = None
    work_dir: str | None = None
    concurrency: int = 32
    per_host: int = 16
    retries: int = 3

    def recipe(self) -> Recipe:
        """The part that says how a record becomes a sample."""
        return Recipe(**{each.name: getattr(self, each.name) for each in fields(Recipe)})

    def shaping(self) -> dict[str, Any]:
        """The options on which the bytes depend, as JSON has them."""
        chosen = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _HOW_ONLY}
        return dict(json.loads(json.dumps(chosen)))

    def check(self) -> None:
        """Raises BadInputError if a value is outside its limits."""
        check_fractions(self, "val_fraction", "min_success")
        for name in _AT_LEAST_1:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise BadInputError(f"{name} is {value}; it must be at least 1")
        if self.retries < 0:
            raise BadInputError(f"retries is {self.retries}; it must be at least 0")
        if self.duplicates not in ("keep", "drop"):
            raise BadInputError(f"duplicates is {self.duplicates!r}; it must be keep or drop")
        if self.decode not in ("fetched", "all", "none"):
            raise BadInputError(f"decode is {self.decode!r}; it must be fetched, all or none")
        if self.reencode is not None:
            parse_coding(self.reencode)


def num_may_fail(num_records: int, min_success: float) -> int:
    """How many of the records may fail where the fraction `min_success` must succeed."""
    return int((1 - min_success) * num_records + 1e-9)


def check_fractions(options: object, *names: str) -> None:
    """Raises BadInputError if one of these fields is not from 0 to 1."""
    for name in names:
        if not 0 <= getattr(options, name) <= 1:
            raise BadInputError(f"{name} is {getattr(options, name)}; it must be from 0 to 1")


_HOW_ONLY = (
    "min_success",
    "allow_private_hosts",
    "decode",
    "processes",
    "work_dir",
    "concurrency",
    "per_host",
    "retries",
)
_AT_LEAST_1 = (
    "shard_samples",
    "shard_bytes",
    "max_bytes",
    "max_pixels",
    "max_side",
    "processes",
    "concurrency",
    "per_host",
)

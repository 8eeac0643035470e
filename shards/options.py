"""How to build shards: the options, their limits, and which of them shape the bytes.

In: values from the command line or a recipe. Out: `BuildOptions`, checked. Called by `build` and its parts.
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
    """The first block shapes the bytes (and is recorded); the second only how they are got.

    images, prompt, answer, key, group_by, meta: see `rows.Recipe`; without group_by rows with equal images
    stay together. image_root: folder or URL that image paths start from; None: that of the source.
    val_fraction: part of the groups that becomes the val split, by hash, so it is stable when rows are added.
    shard_samples: rows per window, so the most samples of a tar. shard_bytes: a tar is closed before it grows
    past it. max_bytes, max_pixels: of one image. max_side: larger images are made smaller, in pixels of the
    longer side; None: any size. reencode: "jpeg:90", "webp:80", "png": every image is made anew in this
    format, upright; None: those that are not too large keep their bytes. duplicates: "keep", or "drop"
    samples whose images all came before.

    min_success: part of the rows that must succeed. decode: which images are decoded, not only walked through
    to their end: "fetched" from a network, "all", "none". processes: that write windows at the same time;
    None: as many as cores, where many local files are to be read. work_dir: where shards lie on their way to
    an object store; None: in the user's cache. concurrency: fetches at a time, per_host of them at one host.
    retries: after a failure that may pass.
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
        return Recipe(self.images, self.prompt, self.answer, self.key, self.group_by, self.meta)

    def shaping(self) -> dict[str, Any]:
        """The options that shape the bytes, as JSON has them."""
        chosen = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _HOW_ONLY}
        return dict(json.loads(json.dumps(chosen)))

    def check(self) -> None:
        """Raises BadInputError at a value that makes no sense."""
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

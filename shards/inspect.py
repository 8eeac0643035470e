"""What is in a dataset, without a model: counts, image sizes, text lengths, duplicates, rows that failed.

In: a complete dataset directory. Out: an `Inspection` of plain numbers. Only the index is read, except to
tell duplicate images apart: those of equal size and length are read and hashed. Called by the command line.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec

from shards.format.dataset import DatasetInfo, read_dataset_info
from shards.format.index import read_index
from shards.ledger import reasons


@dataclass(frozen=True)
class Spread:
    """Of a set of numbers; all 0 for none."""

    smallest: float
    median: float
    percentile_95: float
    largest: float
    total: float


@dataclass(frozen=True)
class Inspection:
    """The findings. Sizes of images in pixels as shown, lengths of texts in characters.

    shard_bytes: of all tars. images_per_sample: number of images -> samples. formats: suffix -> images.
    width, height, image_bytes: over images. prompt_chars, reply_chars: over samples, of all their turns.
    duplicate_images: groups of (shard, member) with equal bytes; cross_split: those groups that are in more
    than one split, which makes the validation loss too good. repeated_texts: samples whose prompts and
    replies all came before. commonest_replies: (reply, samples). failed: reason -> rows of the source that
    are not in the dataset, by the ledger.
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
    duplicate_images: tuple[tuple[tuple[str, str], ...], ...]
    cross_split: int
    repeated_texts: int
    commonest_replies: tuple[tuple[str, int], ...]
    failed: dict[str, int]


def inspect(root: str) -> Inspection:
    """Reads the index (and, of a local directory, the ledger) of `root`, a path or fsspec URL.

    Raises BadInputError if there is no complete dataset in `root`.
    """
    info = read_dataset_info(root)
    rows = read_index(root).to_pylist()
    images = [image for row in rows for image in row["images"]]
    prompts = [_text(row, "user") for row in rows]
    replies = [_text(row, "assistant") for row in rows]
    texts = Counter(json.dumps(row["messages"]) for row in rows)
    duplicates, cross_split = _duplicates(root, rows)
    return Inspection(
        info,
        sum(shard.bytes for shard in info.shards),
        dict(sorted(Counter(len(row["images"]) for row in rows).items())),
        dict(Counter(image["member"].rpartition(".")[2].lower() for image in images).most_common()),
        spread([image["width"] for image in images]),
        spread([image["height"] for image in images]),
        spread([image["length"] for image in images]),
        spread([len(prompt) for prompt in prompts]),
        spread([len(reply) for reply in replies]),
        spread([len(row["messages"]) for row in rows]),
        duplicates,
        cross_split,
        len(rows) - len(texts),
        tuple(Counter(replies).most_common(5)),
        reasons(Path(root)) if "://" not in root else {},
    )


def spread(numbers: Iterable[float]) -> Spread:
    """The spread of `numbers`; percentiles are members of the set (the nearest rank)."""
    ordered = sorted(numbers)
    if not ordered:
        return Spread(0, 0, 0, 0, 0)
    last = len(ordered) - 1
    return Spread(ordered[0], ordered[last // 2], ordered[round(0.95 * last)], ordered[-1], sum(ordered))


def _text(row: dict[str, Any], role: str) -> str:
    return "\n".join(message["content"] for message in row["messages"] if message["role"] == role)


def _duplicates(
    root: str, rows: Sequence[dict[str, Any]]
) -> tuple[tuple[tuple[tuple[str, str], ...], ...], int]:
    """Groups of images with equal bytes, and how many of the groups are in more than one split."""
    filesystem, place = fsspec.core.url_to_fs(root)
    alike = defaultdict(list)
    for row in rows:
        for image in row["images"]:
            alike[image["length"], image["width"], image["height"]].append((row, image))
    equal = defaultdict(list)
    for candidates in alike.values():
        if len(candidates) > 1:
            for row, image in candidates:
                end = image["offset"] + image["length"]
                data = filesystem.cat_file(f"{place}/{row['shard']}", start=image["offset"], end=end)
                digest = hashlib.sha256(data).digest()
                equal[digest].append((row, image))
    groups = [group for group in equal.values() if len(group) > 1]
    crossing = sum(len({row["split"] for row, _ in group}) > 1 for group in groups)
    named = tuple(tuple((row["shard"], image["member"]) for row, image in group) for group in groups)
    return named, crossing

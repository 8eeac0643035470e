"""The ledger: one JSON line per row of the source, with its outcome, beside the shards.

In: `Prepared` rows while they are written; a directory afterwards. Out: lines, and what they add up to. A row
that was tried again has a later line, which counts. Called by `window`, `build`, `index` and `inspect`.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from shards.format.dataset import LEDGER_DIR
from shards.prepare import Prepared

_ENCODER = json.JSONEncoder(ensure_ascii=False)


def ledger_part(root: Path, prefix: str, number: int) -> Path:
    """Where the ledger of window `number` of a worker lies. prefix: that of the worker, see `window`."""
    return root / LEDGER_DIR / f"part-{prefix}{number:06d}.jsonl"


def ledger_line(item: Prepared, split: str | None, shard: str | None) -> str:
    """What became of the row, and of each of its images."""
    images = [
        {
            "image": picture.name,
            "http_status": picture.fetched.http_status,
            "bytes": None if picture.fetched.data is None else len(picture.fetched.data),
            "sha256": picture.sha256,
            "width": picture.facts.width if picture.facts else None,
            "height": picture.facts.height if picture.facts else None,
            "reencoded": picture.reencoded,
            "reason": picture.reason,
        }
        for picture in item.pictures
    ]
    entry = {
        "row": item.row.number,
        "key": item.row.key,
        "outcome": item.outcome,
        "reason": item.fault,
        "split": split,
        "shard": shard,
        "images": images,
    }
    return _ENCODER.encode(entry) + "\n"


def read_ledger(root: Path, pattern: str = "*.jsonl") -> Iterator[dict[str, Any]]:
    """Yields the entries in the order in which the rows were tried."""
    for part in sorted((root / LEDGER_DIR).glob(pattern)):
        with part.open(encoding="utf-8") as stream:
            yield from map(json.loads, stream)


def failed_rows(root: Path, before_round: int | None = None) -> set[int]:
    """The numbers of the rows whose last outcome (before this round of trying again, from 1) is a failure."""
    patterns = ("*.jsonl",) if before_round is None else rounds_before(before_round)
    failed = set()
    for entry in chain.from_iterable(read_ledger(root, pattern) for pattern in patterns):
        if entry["outcome"] == "failed":
            failed.add(entry["row"])
        else:
            failed.discard(entry["row"])
    return failed


def rounds_before(number: int) -> tuple[str, ...]:
    """The patterns of the ledgers of all that was tried before round `number` (from 1), in order."""
    return ("part-[0-9]*.jsonl", *(f"part-r{each:02d}-*.jsonl" for each in range(1, number)))


def reasons(root: Path) -> dict[str, int]:
    """How many rows have a failure as their last outcome, by reason, the commonest first."""
    last = {}
    for entry in read_ledger(root):
        last[entry["row"]] = entry["reason"] if entry["outcome"] == "failed" else None
    return dict(Counter(reason for reason in last.values() if reason is not None).most_common())


def image_digest(hashes: list[str]) -> bytes:
    """One digest for the images of a sample, in order. hashes: their sha256 in hex."""
    return hashlib.sha256(" ".join(hashes).encode()).digest()


def seen_images(
    root: Path, prefix: str, numbers: Iterable[int], before: Sequence[str] = ()
) -> dict[bytes, int]:
    """The digests of the images of all samples in these windows of a worker, with their rows' numbers.
    before: patterns of the ledgers of earlier rounds, whose samples count as well.
    """
    seen = {}
    for pattern in (*before, *(ledger_part(root, prefix, number).name for number in numbers)):
        for entry in read_ledger(root, pattern):
            if entry["outcome"] == "ok" and entry["images"]:
                seen[image_digest([image["sha256"] for image in entry["images"]])] = entry["row"]
    return seen

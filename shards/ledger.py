"""The ledger: one JSON line for every record of the source, with its outcome.

In: `Prepared` records while they are written; later a dataset directory. Out: lines, and sums over them. A
record that was tried again has a further line; the last one counts.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from shards.format.dataset import LEDGER_DIR
from shards.prepare import Prepared

_ENCODER = json.JSONEncoder(ensure_ascii=False)


@dataclass(frozen=True)
class LedgerImage:
    """One image of an entry; the fields are those of the file.

    image: path or URL as the source has it. bytes: size of the data; None if nothing was fetched. sha256: hex
    digest of these bytes. width, height: pixels as shown; None if it cannot be used. reencoded: the stored
    bytes are not the fetched ones. reason: why it cannot be used.
    """

    image: str
    http_status: int | None
    bytes: int | None
    sha256: str | None
    width: int | None
    height: int | None
    reencoded: bool
    reason: str | None


@dataclass(frozen=True)
class LedgerEntry:
    """One line of the ledger; the fields are those of the file.

    row: number of the record in the source, from 0. outcome: "ok", "failed" or "dropped". reason: None if it
    is ok. split, shard: where the sample is; None if there is none.
    """

    row: int
    key: str
    outcome: str
    reason: str | None
    split: str | None
    shard: str | None
    images: tuple[LedgerImage, ...]

    @classmethod
    def from_json(cls, line: str) -> LedgerEntry:
        """The entry of one line of a ledger file."""
        fields: dict[str, Any] = json.loads(line)
        fields["images"] = tuple(LedgerImage(**image) for image in fields["images"])
        return cls(**fields)

    def to_json(self) -> str:
        """One line, with its newline."""
        return _ENCODER.encode({**vars(self), "images": [vars(image) for image in self.images]}) + "\n"


def ledger_part(root: Path, prefix: str, number: int) -> Path:
    """The path of the ledger of partition `number` with this prefix (see `partition`)."""
    return root / LEDGER_DIR / f"part-{prefix}{number:06d}.jsonl"


def ledger_entry(item: Prepared, split: str | None, shard: str | None) -> LedgerEntry:
    """The outcome of a record and of each of its images."""
    images = tuple(
        LedgerImage(
            image=image.name,
            http_status=image.fetched.http_status,
            bytes=None if image.fetched.data is None else len(image.fetched.data),
            sha256=image.sha256,
            width=image.facts.width if image.facts else None,
            height=image.facts.height if image.facts else None,
            reencoded=image.reencoded,
            reason=image.reason,
        )
        for image in item.images
    )
    return LedgerEntry(
        row=item.record.number,
        key=item.record.key,
        outcome=item.outcome,
        reason=item.fault,
        split=split,
        shard=shard,
        images=images,
    )


def read_ledger(root: Path, pattern: str = "*.jsonl") -> Iterator[LedgerEntry]:
    """Yields the entries of the parts that fit `pattern`, in the order in which the records were tried."""
    for part in sorted((root / LEDGER_DIR).glob(pattern)):
        with part.open(encoding="utf-8") as stream:
            yield from map(LedgerEntry.from_json, stream)


def failed_records(root: Path, before_round: int | None = None) -> set[int]:
    """The numbers of the records whose last outcome is a failure.

    before_round: count only what was tried before this retry round (from 1).
    """
    patterns = ("*.jsonl",) if before_round is None else patterns_before_round(before_round)
    failed = set()
    for entry in chain.from_iterable(read_ledger(root, pattern) for pattern in patterns):
        if entry.outcome == "failed":
            failed.add(entry.row)
        else:
            failed.discard(entry.row)
    return failed


def patterns_before_round(number: int) -> tuple[str, ...]:
    """Patterns of the ledger parts of everything before retry round `number` (from 1), in order."""
    return ("part-[0-9]*.jsonl", *(f"part-r{each:02d}-*.jsonl" for each in range(1, number)))


def failure_reasons(root: Path) -> dict[str, int]:
    """Reason -> number of records whose last outcome is this failure; the most frequent reason first."""
    last = {}
    for entry in read_ledger(root):
        last[entry.row] = entry.reason if entry.outcome == "failed" else None
    return dict(Counter(reason for reason in last.values() if reason is not None).most_common())


def image_digest(hashes: Sequence[str]) -> bytes:
    """One digest for the images of a sample, in their order. hashes: the sha256 of each, in hex."""
    return hashlib.sha256(" ".join(hashes).encode()).digest()


def seen_images(
    root: Path, prefix: str, numbers: Iterable[int], *, before: Sequence[str] = ()
) -> dict[bytes, int]:
    """Image digest -> record number, of all samples in the partitions `numbers` with this prefix.

    before: patterns of the ledger parts of earlier rounds, whose samples count as well.
    """
    seen = {}
    for pattern in (*before, *(ledger_part(root, prefix, number).name for number in numbers)):
        for entry in read_ledger(root, pattern):
            if entry.outcome == "ok" and entry.images:
                seen[image_digest([str(image.sha256) for image in entry.images])] = entry.row
    return seen

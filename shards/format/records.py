"""The record of a sample: everything that the index holds about it, but no pixels.

In: the index, or a prepared record of a source. Out: `SampleRecord`, and the bytes of `KEY.json`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

_ENCODER = json.JSONEncoder(ensure_ascii=False)


class Message(TypedDict):
    """One message of a conversation, as chat templates take it. role: one of `messages.ROLES`."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class ImageRef:
    """Where an image is, and its size. member: its name in the tar. offset, length: bytes of its data, from
    the start of the tar. width, height: pixels as shown (EXIF orientation applied).
    """

    member: str
    offset: int
    length: int
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class SampleRecord:
    """One sample of the index.

    images: in the order of their tags. messages: empty if that column was not read. meta: JSON text of the
    fields that belong to the task. offset, length: bytes of the sample's members in the tar, from the first
    header to the end of the last member's padding. source: number of the dataset among those of a run.
    """

    key: str
    shard: str
    images: tuple[ImageRef, ...]
    messages: tuple[Message, ...] = ()
    meta: str = "{}"
    split: str = ""
    offset: int = 0
    length: int = 0
    source: int = 0


def sample_json(messages: Sequence[Message], meta: dict[str, Any]) -> bytes:
    """The bytes of `KEY.json`: UTF-8, {"messages": [...], "meta": {...}}."""
    return _ENCODER.encode({"messages": list(messages), "meta": meta}).encode()

"""A dataset on one HTML page: images with their prompts and replies, histograms, duplicates, failed records.

In: a complete dataset directory and its `Inspection`. Out: the HTML of a page that is complete in itself: no
script, images as data URLs. The layout is in templates/dataset.html.j2.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
from PIL import Image, ImageOps

from shards.common.html import render_page
from shards.format.index import read_index, table_records
from shards.format.records import SampleRecord
from shards.images import PILLOW_FORMATS, check_image
from shards.inspect import FoundImage, Inspection

_TEMPLATES = Path(__file__).with_name("templates")
_THUMBNAIL = 224  # pixels of the longer side
_BARS = 24
_BAR_HEIGHT = 80  # pixels of the highest bar
_MAX_TEXT = 1200  # characters of one message
_MAX_IMAGES = 4  # of one sample, or of one group of duplicates
_MAX_GROUPS = 12
_MAX_LINES = 20  # of a table


@dataclass(frozen=True)
class Thumbnail:
    """An image as a data URL; where it cannot be read, url is empty and `error` says why."""

    member: str
    size: str
    url: str
    error: str


@dataclass(frozen=True)
class ShownSample:
    """A sample on the page. images: the first ones. more: how many are not shown."""

    record: SampleRecord
    images: tuple[Thumbnail, ...]
    more: int


@dataclass(frozen=True)
class Bar:
    """One bar of a histogram. y, height: pixels from the top."""

    y: float
    height: float
    hint: str


@dataclass(frozen=True)
class Histogram:
    """Bars of equal width from `low` to `high`."""

    title: str
    low: float
    high: float
    bars: tuple[Bar, ...]


def make_page(root: str, found: Inspection, samples: int = 48) -> str:
    """The page of the dataset directory `root`, a local path or fsspec URL. samples: how many are shown,
    spread evenly over the dataset.

    Raises BadInputError if the index cannot be read.
    """
    index = read_index(root)
    chosen = sorted({round(n * (index.num_rows - 1) / max(1, samples - 1)) for n in range(samples)})
    reader = _ImageReader(root)
    return render_page(
        _TEMPLATES,
        "dataset.html.j2",
        root=root,
        title=Path(root).name,
        found=found,
        spreads={
            "image width, px": found.width,
            "image height, px": found.height,
            "image size, bytes": found.image_bytes,
            "prompt, characters": found.prompt_chars,
            "reply, characters": found.reply_chars,
            "turns": found.turns,
        },
        histograms=_histograms(index),
        tables=[
            ("Failed records", "reason", _first_lines(found.failed)),
            ("Most frequent replies", "reply", _first_lines(dict(found.frequent_replies))),
        ],
        duplicates=[
            [(each.sample, reader.thumbnail(each)) for each in group[:_MAX_IMAGES]]
            for group in found.duplicate_images[:_MAX_GROUPS]
        ],
        samples=[reader.shown(record) for record in table_records(index.take(pa.array(chosen)))],
        max_text=_MAX_TEXT,
    )


def _first_lines(counts: dict[str, int]) -> list[tuple[str, int]]:
    return list(counts.items())[:_MAX_LINES]


def _histograms(index: pa.Table) -> list[Histogram]:
    """Of image sizes and text lengths over the whole index; none of an empty set."""
    images = [image for images in index["images"].to_pylist() for image in images]
    messages = index["messages"].to_pylist()

    def lengths(role: str) -> list[int]:
        return [sum(len(m["content"]) for m in turns if m["role"] == role) for turns in messages]

    numbers: dict[str, Sequence[float]] = {
        "image width, px": [image["width"] for image in images],
        "image height, px": [image["height"] for image in images],
        "image size, kB": [image["length"] / 1000 for image in images],
        "prompt, characters": lengths("user"),
        "reply, characters": lengths("assistant"),
    }
    return [_histogram(title, values) for title, values in numbers.items() if values]


def _histogram(title: str, numbers: Sequence[float]) -> Histogram:
    low, high = min(numbers), max(numbers)
    step = (high - low) / _BARS or 1
    counts = [0] * _BARS
    for number in numbers:
        counts[min(_BARS - 1, int((number - low) / step))] += 1
    bars = []
    for place, count in enumerate(counts):
        height = _BAR_HEIGHT * count / max(counts)
        hint = f"{low + place * step:,.0f} to {low + (place + 1) * step:,.0f}: {count:,}"
        bars.append(Bar(_BAR_HEIGHT - height, height, hint))
    return Histogram(title, low, high, tuple(bars))


class _ImageReader:
    """Reads images out of the tars of a dataset and makes them small."""

    def __init__(self, root: str) -> None:
        self._filesystem: Any
        self._filesystem, self._root = fsspec.core.url_to_fs(root)

    def shown(self, record: SampleRecord) -> ShownSample:
        """The sample with its first images."""
        images = tuple(self.thumbnail(FoundImage(record, image)) for image in record.images[:_MAX_IMAGES])
        return ShownSample(record, images, more=len(record.images) - len(images))

    def thumbnail(self, found: FoundImage) -> Thumbnail:
        """The image made small, or the error: the page must also show a damaged dataset."""
        image = found.image
        url = error_text = ""
        try:
            end = image.offset + image.length
            data = self._filesystem.cat_file(
                f"{self._root}/{found.sample.shard}", start=image.offset, end=end
            )
            url = _data_url(data)
        except Exception as error:  # Pillow's decoders raise many kinds
            error_text = str(error)
        return Thumbnail(image.member, f"{image.width}x{image.height}", url, error_text)


def _data_url(data: bytes) -> str:
    """A small JPEG of an encoded image, as a data URL. Raises whatever Pillow does for a damaged image."""
    check_image(data, decode=False)  # before Pillow: only known formats, and no decompression bomb
    with Image.open(io.BytesIO(data), formats=PILLOW_FORMATS) as opened:
        opened.draft("RGB", (2 * _THUMBNAIL, 2 * _THUMBNAIL))
        small = ImageOps.exif_transpose(opened).convert("RGB")
    small.thumbnail((_THUMBNAIL, _THUMBNAIL))
    encoded = io.BytesIO()
    small.save(encoded, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(encoded.getvalue()).decode()

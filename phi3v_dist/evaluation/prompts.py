"""Samples as prompts, and which of them are answered together. Only the index is read, except by `read`.

In: samples of a split. Out: `Prompts` (texts, reference replies, shapes, and images on request) and batches.
What else is in a batch may change the last bits of an answer. Therefore the batches depend on the prompts and
the settings alone, never on the number of ranks; this makes answers the same at any world size.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from PIL import Image

from phi3v_dist.data.reader import SampleReader
from phi3v_dist.data.samples import Samples, split_tables
from phi3v_dist.evaluation.metrics import parse_product
from phi3v_dist.processor.geometry import SampleShape
from phi3v_dist.processor.image import decode_image
from phi3v_dist.processor.prompt import encode, render
from shards.common.errors import BadInputError
from shards.format.records import SampleRecord

_COLUMNS = ["key", "shard", "images", "messages", "meta"]
_MAX_VIEWS = 256  # tiles and global views of a batch, which go through the vision tower together


@dataclass(frozen=True)
class PromptShape:
    """tokens: of the prompt, image tokens included. views: tiles and global views. images: their number."""

    tokens: int
    views: int
    images: int


@dataclass(frozen=True)
class Prompt:
    """One sample to answer. text: rendered, up to the start of the reply. truth: the reference reply."""

    key: str
    text: str
    truth: str
    images: tuple[Image.Image, ...]


def read_split(paths: Sequence[str], split: str, samples: int | None, *, may_lack: bool = False) -> Samples:
    """`samples` of the samples of a split (None: all), evenly spread; their records include `meta`.

    paths: dataset directories. may_lack: a dataset without that split contributes no samples. Raises
    BadInputError for a dataset that cannot be read, as `read_index` does.
    """
    tables, shards = split_tables(paths, split, _COLUMNS, may_lack=may_lack)
    table = pa.concat_tables(list(tables.values())) if tables else pa.table({})
    chosen = table.take(pa.array(spread(table.num_rows, samples), pa.int64())) if tables else table
    return Samples(paths, shards, chosen)


class Prompts:
    """Samples (of `read_split`) as prompts. `read` decodes the images of some of them.

    images_of: for each prompt, the number of the sample whose images it gets; None: its own. before_read:
    called at the start of every `read`; it may raise BadInputError to end the answering.
    """

    def __init__(
        self,
        samples: Samples,
        images_of: Sequence[int] | None = None,
        before_read: Callable[[], None] | None = None,
    ) -> None:
        self._samples, self._before_read = samples, before_read
        self._records: list[SampleRecord] = list(samples.records(range(len(samples))))
        self._images_of = list(range(len(samples))) if images_of is None else list(images_of)

    def __len__(self) -> int:
        return len(self._records)

    @property
    def keys(self) -> list[str]:
        """The keys of the samples."""
        return [record.key for record in self._records]

    @property
    def truths(self) -> list[str]:
        """The reference replies."""
        return [_reply(record) for record in self._records]

    @property
    def texts(self) -> list[str]:
        """The rendered prompts, up to the start of the reply."""
        return [_text(record) for record in self._records]

    def parts(self, field: str) -> list[str | None]:
        """The value of `field` in each sample's meta. For "category", a sample without that field gets the
        category that its reference reply names. None where there is no value.
        """
        found: list[str | None] = []
        for record in self._records:
            value = json.loads(record.meta).get(field)
            if value is None and field == "category":
                value = parse_product(_reply(record)).category
            found.append(None if value is None else str(value))
        return found

    def shapes(self, tokenizer: Any, num_crops: int, tile: int) -> list[PromptShape]:
        """The shape of each prompt, computed without reading an image.

        num_crops: most tiles of an image. tile: side of a tile in px. Raises BadInputError naming the sample
        whose text or image sizes cannot be used.
        """
        shapes = []
        for record, source in zip(self._records, self._images_of, strict=True):
            try:
                sizes = [(image.width, image.height) for image in self._records[source].images]
                images = SampleShape.of(sizes, num_crops, tile)
                text = encode(
                    tokenizer, record.messages[:-1], [0] * len(images.grids), add_generation_prompt=True
                )
            except BadInputError as error:
                raise BadInputError(f"sample {record.key!r}: {error}") from error
            tokens = len(text.input_ids) + sum(images.image_tokens)
            shapes.append(PromptShape(tokens, images.views, len(images.grids)))
        return shapes

    def read(self, places: Sequence[int]) -> list[Prompt]:
        """The prompts at `places` with their images.

        Raises BadInputError naming a sample whose image cannot be read: to leave the sample out would make
        the scores too good.
        """
        if self._before_read is not None:
            self._before_read()
        reader = SampleReader(self._samples.roots, self._samples.shards)
        prompts = []
        try:
            for place in places:
                record, source = self._records[place], self._records[self._images_of[place]]
                try:
                    images = tuple(decode_image(data) for data in reader.images(source))
                except BadInputError as error:
                    raise BadInputError(f"{source.shard}: sample {source.key!r}: {error}") from error
                prompts.append(Prompt(record.key, _text(record), truth=_reply(record), images=images))
        finally:
            reader.close()
        return prompts

    def swapped(self, seed: int) -> Prompts:
        """The same prompts, each with the images of another sample that has the same number of images. A
        sample that is the only one with its number of images keeps its own.
        """
        images_of = list(range(len(self._records)))
        by_count: dict[int, list[int]] = {}
        for place, record in enumerate(self._records):
            by_count.setdefault(len(record.images), []).append(place)
        for places in by_count.values():
            random.Random(f"swap {seed}").shuffle(places)
            for here, there in zip(places, places[1:] + places[:1], strict=True):
                images_of[here] = there
        return Prompts(self._samples, images_of, self._before_read)


def _text(record: SampleRecord) -> str:
    return render(record.messages[:-1], add_generation_prompt=True)


def _reply(record: SampleRecord) -> str:
    reply: str = record.messages[-1]["content"]
    return reply


@dataclass(frozen=True)
class Batch:
    """Prompts answered together. places: their numbers. has_images: whether its prompts have images.
    crosses_rope_switch: it holds one prompt, whose sequence grows past the switch of the RoPE factors.
    """

    places: tuple[int, ...]
    has_images: bool
    crosses_rope_switch: bool


def make_batches(
    shapes: Sequence[PromptShape], batch_size: int, max_new_tokens: int, *, rope_switch: int
) -> list[Batch]:
    """Batches of prompts of similar length, the most expensive kind first.

    rope_switch: positions from which the long RoPE factors are used. By the published rule they are used for
    a whole batch as soon as one of its sequences is longer. Therefore sequences that stay below the switch,
    that start above it, and that cross it never share a batch.
    """
    kinds: dict[tuple[bool, int], list[int]] = {}
    for place, shape in enumerate(shapes):
        starts_long = shape.tokens > rope_switch
        crosses = not starts_long and shape.tokens + max_new_tokens > rope_switch
        kinds.setdefault((shape.images > 0, 2 if starts_long else int(crosses)), []).append(place)
    batches = []
    for (has_images, side), places in sorted(kinds.items(), reverse=True):
        crosses = side == 1
        together: list[int] = []
        views = 0
        for place in sorted(places, key=lambda i: (-shapes[i].tokens, i)):
            full = len(together) == (1 if crosses else batch_size)
            if together and (full or views + shapes[place].views > _MAX_VIEWS):
                batches.append(Batch(tuple(together), has_images, crosses))
                together, views = [], 0
            together.append(place)
            views += shapes[place].views
        batches.append(Batch(tuple(together), has_images, crosses))
    return batches


def spread(total: int, wanted: int | None) -> list[int]:
    """`wanted` of the numbers 0 .. total - 1, evenly spread and always the same; None: all of them."""
    if wanted is None or wanted >= total:
        return list(range(total))
    return [i * total // wanted for i in range(wanted)]

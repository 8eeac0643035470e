"""Samples as questions, and which of them are answered together: from the index alone, no torch.

In: rows of the index. Out: `Questions` (prompts, truths, shapes, and pictures when asked for) and batches.
The batches are a function of the questions and the settings, never of the number of ranks: an answer may
differ in its last bits with what shares its batch, so the same batches are what makes answers the same at any
world size. Called by evaluation, and by export to compare answers.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from PIL import Image

from phi3v_dist.data.reader import SampleReader
from phi3v_dist.data.samples import Samples, split_tables
from phi3v_dist.evaluation.metrics import parse_product
from phi3v_dist.processor.geometry import hd_grid, image_token_count, tile_side_tokens
from phi3v_dist.processor.image import decode_image
from phi3v_dist.processor.prompt import encode, render
from shards.common.errors import BadInputError

_COLUMNS = ["key", "shard", "images", "messages", "meta"]
_VIEWS = 256  # tiles and global views of a batch at most: what passes the vision tower together


@dataclass(frozen=True)
class Shape:
    """tokens: of the prompt, image tokens included. views: tiles and global views. pictures: their number."""

    tokens: int
    views: int
    pictures: int


@dataclass(frozen=True)
class Question:
    """One sample as a question. prompt: rendered, up to the open reply. truth: the reference reply."""

    key: str
    prompt: str
    truth: str
    pictures: tuple[Image.Image, ...]


def read_split(paths: Sequence[str], split: str, samples: int | None, may_lack: bool = False) -> Samples:
    """`samples` of the samples of a split (None: all), evenly spread; their records have `meta` as well.

    may_lack: a data set without that split gives none. Raises BadInputError as `read_index`.
    """
    tables, shards = split_tables(paths, split, _COLUMNS, may_lack)
    table = pa.concat_tables(list(tables.values())) if tables else pa.table({})
    chosen = table.take(pa.array(spread(table.num_rows, samples), pa.int64())) if tables else table
    return Samples(paths, shards, chosen)


class Questions:
    """`samples` of `read_split`, as questions; `read` decodes the pictures of some.

    pictures_of: from which sample each question takes its pictures; None: its own.
    """

    def __init__(self, samples: Samples, pictures_of: Sequence[int] | None = None) -> None:
        self._samples = samples
        self._records: list[dict[str, Any]] = list(samples.records(range(len(samples))))
        self._pictures_of = list(range(len(samples))) if pictures_of is None else list(pictures_of)

    def __len__(self) -> int:
        return len(self._records)

    @property
    def keys(self) -> list[str]:
        return [record["key"] for record in self._records]

    @property
    def truths(self) -> list[str]:
        return [record["messages"][-1]["content"] for record in self._records]

    @property
    def prompts(self) -> list[str]:
        return [render(record["messages"][:-1], add_generation_prompt=True) for record in self._records]

    def parts(self, field: str) -> list[str | None]:
        """`field` of each sample's meta; for "category" else the one that the truth names."""
        found: list[str | None] = []
        for record in self._records:
            value = json.loads(record.get("meta") or "{}").get(field)
            if value is None and field == "category":
                value = parse_product(record["messages"][-1]["content"]).category
            found.append(None if value is None else str(value))
        return found

    def shapes(self, tokenizer: Any, num_crops: int, tile: int) -> list[Shape]:
        """Of each question, counted without touching a picture. Raises BadInputError naming the sample."""
        side, shapes = tile_side_tokens(tile), []
        for record, source in zip(self._records, self._pictures_of, strict=True):
            try:
                images = self._records[source]["images"]
                grids = [hd_grid(image["width"], image["height"], num_crops, tile=tile) for image in images]
                text = encode(tokenizer, record["messages"][:-1], [0] * len(grids), True)
            except BadInputError as error:
                raise BadInputError(f"sample {record['key']!r}: {error}") from error
            image_tokens = sum(image_token_count(grid.rows, grid.cols, side) for grid in grids)
            views = sum(grid.rows * grid.cols + 1 for grid in grids)
            shapes.append(Shape(len(text.input_ids) + image_tokens, views, len(grids)))
        return shapes

    def read(self, places: Sequence[int]) -> list[Question]:
        """The questions at `places` with their pictures.

        Raises BadInputError naming a sample whose picture cannot be read: leaving it out would flatter the
        scores.
        """
        reader = SampleReader(self._samples.roots, self._samples.shards)
        questions = []
        try:
            for place in places:
                record, source = self._records[place], self._records[self._pictures_of[place]]
                try:
                    pictures = tuple(decode_image(data) for data in reader.images(source))
                except BadInputError as error:
                    raise BadInputError(f"{source['shard']}: sample {source['key']!r}: {error}") from error
                *before, reply = record["messages"]
                prompt = render(before, add_generation_prompt=True)
                questions.append(Question(record["key"], prompt, reply["content"], pictures))
        finally:
            reader.close()
        return questions

    def swapped(self, seed: int) -> Questions:
        """The same questions, each with the pictures of another one that has as many; one without a partner
        keeps its own.
        """
        pictures_of = list(range(len(self._records)))
        by_count: dict[int, list[int]] = {}
        for place, record in enumerate(self._records):
            by_count.setdefault(len(record["images"]), []).append(place)
        for places in by_count.values():
            random.Random(f"swap {seed}").shuffle(places)
            for here, there in zip(places, places[1:] + places[:1], strict=True):
                pictures_of[here] = there
        return Questions(self._samples, pictures_of)


@dataclass(frozen=True)
class Batch:
    """Questions answered together. places: their numbers. pictures: whether they have any. switches: one that
    grows past the switch of the RoPE factors, alone in its batch.
    """

    places: tuple[int, ...]
    pictures: bool
    switches: bool


def make_batches(
    shapes: Sequence[Shape], batch_size: int, max_new_tokens: int, rope_switch: int
) -> list[Batch]:
    """Batches of questions of similar length, the costliest kind first.

    A batch takes the long RoPE factors as soon as one of its rows is past `rope_switch` positions (the
    published rule), so rows that stay below, rows that start above and rows that cross never share one.
    """
    kinds: dict[tuple[bool, int], list[int]] = {}
    for place, shape in enumerate(shapes):
        starts_long = shape.tokens > rope_switch
        crosses = not starts_long and shape.tokens + max_new_tokens > rope_switch
        kinds.setdefault((shape.pictures > 0, 2 if starts_long else int(crosses)), []).append(place)
    batches = []
    for (pictures, side), places in sorted(kinds.items(), reverse=True):
        together: list[int] = []
        views = 0
        for place in sorted(places, key=lambda i: (-shapes[i].tokens, i)):
            full = len(together) == (1 if side == 1 else batch_size)
            if together and (full or views + shapes[place].views > _VIEWS):
                batches.append(Batch(tuple(together), pictures, side == 1))
                together, views = [], 0
            together.append(place)
            views += shapes[place].views
        batches.append(Batch(tuple(together), pictures, side == 1))
    return batches


def spread(total: int, wanted: int | None) -> list[int]:
    """`wanted` of the numbers 0 .. total - 1, evenly spread; the same ones every time."""
    if wanted is None or wanted >= total:
        return list(range(total))
    return [i * total // wanted for i in range(wanted)]

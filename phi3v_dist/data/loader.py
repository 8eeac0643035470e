"""Packed rows ahead of time: the plan's rows of one rank, read, decoded, cut into tiles and collated by
workers.

In: the index, the plan, a range of steps. Out: per step, the `LoadedRow`s of this rank. A sample that cannot
be read or decoded keeps its place and its tokens, but has blank tiles and no labels, so that plan, shapes and
other ranks do not notice; its reason travels with the row. Called by the train loop and evaluation.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import DataLoader, Dataset

from phi3v_dist.data.collate import Document, collate
from phi3v_dist.data.plan import MicroRow
from phi3v_dist.data.reader import SampleReader
from phi3v_dist.model.row import PackedRow
from phi3v_dist.processor.geometry import HDGrid, hd_grid, image_token_count, tile_side_tokens
from phi3v_dist.processor.image import blank_tiles, decode_image, hd_tiles
from phi3v_dist.processor.prompt import IGNORE, encode
from shards.format import BadInputError


@dataclass(frozen=True)
class LoadedRow:
    """A row and what is in it. tokens: without padding. bad: "shard key: reason" of every unreadable
    sample.
    """

    row: PackedRow
    tokens: int
    pictures: int
    bad: tuple[str, ...]


@dataclass(frozen=True)
class RowMaker:
    """Makes rows from sample numbers; travels to the workers.

    root: the dataset directory. index: columns key, shard, images, messages. pad_id: token of the padding.
    """

    root: str
    index: pa.Table
    tokenizer: Any
    num_crops: int
    tile: int
    pad_id: int

    def load(self, micro: MicroRow, reader: SampleReader) -> LoadedRow:
        records = self.index.take(pa.array(micro.samples)).to_pylist()
        documents, bad = [], []
        for record in records:
            document, fault = self.document(record, reader)
            documents.append(document)
            if fault is not None:
                bad.append(f"{record['shard']} {record['key']}: {fault}")
        row = collate(documents, self.pad_id, self.tile, micro.vision_calls)
        tokens = sum(len(document.input_ids) for document in documents)
        return LoadedRow(row, tokens, len(row.grids), tuple(bad))

    def document(self, record: dict[str, Any], reader: SampleReader) -> tuple[Document, str | None]:
        """One sample, and the reason if it cannot be used (then blank and without labels)."""
        grids = [hd_grid(i["width"], i["height"], self.num_crops, self.tile) for i in record["images"]]
        side = tile_side_tokens(self.tile)
        image_tokens = [image_token_count(grid.rows, grid.cols, side) for grid in grids]
        text = encode(self.tokenizer, record["messages"], image_tokens)
        labels, fault = text.labels, None
        try:
            tiles = [
                self._tiles(data, image, grid)
                for data, image, grid in zip(reader.images(record), record["images"], grids, strict=True)
            ]
        except BadInputError as error:
            fault = str(error)
            tiles = [blank_tiles(grid, self.tile) for grid in grids]
            labels = [IGNORE] * len(labels)
        joined = np.concatenate(tiles) if tiles else np.empty((0, 3, self.tile, self.tile), np.uint8)
        return Document(text.input_ids, labels, joined, [(g.rows, g.cols) for g in grids]), fault

    def _tiles(self, data: bytes, image: dict[str, Any], grid: HDGrid) -> np.ndarray:
        picture = decode_image(data)
        if picture.size != (image["width"], image["height"]):
            raise BadInputError(
                f"{image['member']} is {picture.width}x{picture.height} px, the index says "
                f"{image['width']}x{image['height']}"
            )
        return hd_tiles(picture, self.num_crops, self.tile)


class _Rows(Dataset[LoadedRow]):
    def __init__(self, maker: RowMaker, micros: Sequence[MicroRow]) -> None:
        self._maker, self._micros = maker, micros
        self._reader: SampleReader | None = None

    def __len__(self) -> int:
        return len(self._micros)

    def __getitem__(self, place: int) -> LoadedRow:
        if self._reader is None:
            self._reader = SampleReader(self._maker.root)
        return self._maker.load(self._micros[place], self._reader)


def load_rows(
    maker: RowMaker, micros: Sequence[MicroRow], workers: int, prefetch: int, timeout: float
) -> Iterator[LoadedRow]:
    """Yields the rows of `micros` in order.

    workers: processes, 0 for none; prefetch: rows ahead per worker; timeout: seconds without a row before a
    worker counts as lost. An exception in a worker is raised here with its traceback.
    """
    options: dict[str, Any] = {}
    if workers:
        # Forked children of a process with threads (gloo, NCCL, W&B) can deadlock; these are started afresh.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["phi3v_dist.data.loader"])
        options = {"multiprocessing_context": context, "prefetch_factor": prefetch, "timeout": timeout}
    loader: DataLoader[LoadedRow] = DataLoader(
        _Rows(maker, micros),
        batch_size=None,
        num_workers=workers,
        collate_fn=_unchanged,  # type: ignore[arg-type]  # without batching it gets a sample, not a list
        worker_init_fn=_start_worker,
        pin_memory=False,
        **options,
    )
    yield from loader


def _unchanged(row: LoadedRow) -> LoadedRow:
    return row


def _start_worker(worker: int) -> None:
    torch.set_num_threads(1)
    # Slurm signals every process of a step; the train loop decides when to stop, and needs rows until then.
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)

"""Packed rows ahead of time: the plan's rows of one rank, read, decoded, cut into tiles and collated by
workers.

In: the samples, the rows of this rank in order. Out: `LoadedRow`s in that order. A sample that cannot be read
or decoded keeps its place and its tokens, but has blank tiles and no labels, so that plan, shapes and other
ranks do not notice; its reason travels with the row. Called by the train loop and evaluation.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import queue
import signal
import threading
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, fields, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from phi3v_dist.data.collate import Document, collate
from phi3v_dist.data.node_cache import CacheOptions
from phi3v_dist.data.plan import MicroRow
from phi3v_dist.data.reader import SampleReader
from phi3v_dist.data.samples import Samples
from phi3v_dist.data.tokens import pictures_that_fit
from phi3v_dist.model.row import PackedRow
from phi3v_dist.processor.geometry import HDGrid, hd_grid, image_token_count, tile_side_tokens
from phi3v_dist.processor.image import blank_tiles, decode_image, hd_tiles
from phi3v_dist.processor.prompt import IGNORE, encode
from shards.common.errors import BadInputError

_CLOSING_S = 10.0  # for rows under way, once nobody wants them any more


@dataclass(frozen=True)
class LoadedRow:
    """A row and what is in it. tokens: without padding. masked: targets that the plan counts and bad
    samples have lost. bad: "shard key: reason" of every unreadable sample.
    """

    row: PackedRow
    tokens: int
    images: int
    samples: int
    masked: int
    bad: tuple[str, ...]


@dataclass(frozen=True)
class RowCounts:
    """What rows hold, summed. positions: with padding. The rest as in LoadedRow; bad: samples."""

    tokens: int = 0
    positions: int = 0
    images: int = 0
    samples: int = 0
    masked: int = 0
    bad: int = 0

    @classmethod
    def of(cls, loaded: LoadedRow) -> RowCounts:
        """Those of one row."""
        positions = len(loaded.row.input_ids)
        return cls(loaded.tokens, positions, loaded.images, loaded.samples, loaded.masked, len(loaded.bad))

    def __add__(self, other: RowCounts) -> RowCounts:
        return RowCounts(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def metrics(self, rows: int, seq_len: int) -> dict[str, float | int | None]:
        """data/*: fill is tokens per row as a part of seq_len, padding a part of the positions computed."""
        rows = max(1, rows)
        return {
            "data/fill": self.tokens / (rows * seq_len),
            "data/padding": 1 - self.tokens / max(1, self.positions),
            "data/tokens_per_row": self.tokens / rows,
            "data/images_per_row": self.images / rows,
            "data/samples_per_row": self.samples / rows,
        }


class PictureReader(Protocol):
    """What rows are made with: a SampleReader, or a stand-in for one."""

    def images(self, record: Mapping[str, Any]) -> Sequence[bytes | memoryview]: ...


@dataclass(frozen=True)
class RowMaker:
    """Makes rows from sample numbers; travels to the workers.

    pad_id: token of the padding. max_tokens: longer samples lose images from the end; None: they stay as
    they are. cache: copies of shards on a disk of the node.
    """

    samples: Samples
    tokenizer: Any
    num_crops: int
    tile: int
    pad_id: int
    max_tokens: int | None = None
    cache: CacheOptions | None = None

    def reader(self) -> SampleReader:
        """Reads the images; one per process."""
        return SampleReader(self.samples.roots, self.samples.shards, self.cache)

    def load(self, micro: MicroRow, reader: PictureReader) -> LoadedRow:
        """Reads, decodes and packs a row. A sample that cannot be read keeps its place, without targets."""
        documents, bad = [], []
        masked = 0
        for record in self.samples.records(micro.samples):
            document, fault, lost = self.document(record, reader)
            documents.append(document)
            masked += lost
            if fault is not None:
                bad.append(f"{record['shard']} {record['key']}: {fault}")
        row = collate(documents, self.pad_id, self.tile, micro.vision_calls)
        tokens = sum(len(document.input_ids) for document in documents)
        return LoadedRow(row, tokens, len(row.grids), len(documents), masked, tuple(bad))

    def keys(self, micro: MicroRow) -> list[str]:
        """The keys of a row's samples."""
        return [record["key"] for record in self.samples.records(micro.samples)]

    def document(self, record: dict[str, Any], reader: PictureReader) -> tuple[Document, str | None, int]:
        """One sample, and if it cannot be used (then it is blank and without labels) the reason and the
        number of its targets.
        """
        grids = [hd_grid(i["width"], i["height"], self.num_crops, self.tile) for i in record["images"]]
        side = tile_side_tokens(self.tile)
        image_tokens = [image_token_count(grid.rows, grid.cols, side) for grid in grids]
        text = encode(self.tokenizer, record["messages"], image_tokens)
        if self.max_tokens is not None and len(text.input_ids) > self.max_tokens:
            kept = pictures_that_fit(len(text.input_ids), image_tokens, self.max_tokens)
            record, grids = {**record, "images": record["images"][:kept]}, grids[:kept]
            left = [*image_tokens[:kept], *[0] * (len(image_tokens) - kept)]
            text = encode(self.tokenizer, record["messages"], left)
        labels, fault, masked = text.labels, None, 0
        try:
            tiles = [
                self._tiles(data, image, grid)
                for data, image, grid in zip(reader.images(record), record["images"], grids, strict=True)
            ]
        except BadInputError as error:
            fault = str(error)
            tiles = [blank_tiles(grid, self.tile) for grid in grids]
            masked = sum(label != IGNORE for label in labels)
            labels = [IGNORE] * len(labels)
        joined = np.concatenate(tiles) if tiles else np.empty((0, 3, self.tile, self.tile), np.uint8)
        return Document(text.input_ids, labels, joined, [(g.rows, g.cols) for g in grids]), fault, masked

    def _tiles(self, data: bytes | memoryview, image: dict[str, Any], grid: HDGrid) -> np.ndarray:
        picture = decode_image(data)
        if picture.size != (image["width"], image["height"]):
            raise BadInputError(
                f"{image['member']} is {picture.width}x{picture.height} px, the index says "
                f"{image['width']}x{image['height']}"
            )
        return hd_tiles(picture, self.num_crops, self.tile)


class _Rows(Dataset[LoadedRow]):
    """What a worker does with a row that it is sent."""

    def __init__(self, maker: RowMaker) -> None:
        self._maker = maker
        self._reader: SampleReader | None = None

    def __getitem__(self, micro: Any) -> LoadedRow:
        if self._reader is None:
            self._reader = self._maker.reader()
        return self._maker.load(micro, self._reader)


def load_rows(
    maker: RowMaker,
    micros: Iterable[MicroRow],
    workers: int,
    prefetch: int,
    timeout: float,
    pin: bool = False,
    seed: int = 0,
) -> Generator[LoadedRow, None, None]:
    """Yields the rows of `micros` in order; close the generator to end the workers.

    workers: processes, 0 for none; prefetch: rows ahead per worker; timeout: seconds without a row before the
    workers count as stuck; pin: rows in page-locked memory, for copies to a GPU that do not wait; seed: of
    the workers' random numbers.
    An exception in a worker is raised here with its traceback; RuntimeError if a worker died or is stuck.
    """
    if not workers:
        reader = maker.reader()
        try:
            for micro in micros:
                row = maker.load(micro, reader)
                yield _pinned(row) if pin else row
        finally:
            reader.close()
        return
    # Forked children of a process with threads (gloo, NCCL, W&B) can deadlock; these are started afresh.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["phi3v_dist.data.loader"])
    # timeout 0: only then does the DataLoader look every few seconds whether its workers live.
    loader: DataLoader[LoadedRow] = DataLoader(
        _Rows(maker),
        batch_size=None,
        sampler=micros,
        num_workers=workers,
        prefetch_factor=prefetch,
        timeout=0,
        multiprocessing_context=context,
        collate_fn=_unchanged,  # type: ignore[arg-type]  # without batching it gets a sample, not a list
        worker_init_fn=_start_worker,
        generator=torch.Generator().manual_seed(seed),
        pin_memory=False,
    )
    iterator = iter(loader)
    ready: queue.Queue[LoadedRow | BaseException | None] = queue.Queue(1)
    stop = threading.Event()
    feeder = threading.Thread(target=_feed, args=(iterator, ready, stop, pin), name="rows", daemon=True)
    feeder.start()
    try:
        while True:
            try:
                found = ready.get(timeout=timeout)
            except queue.Empty:
                raise RuntimeError(
                    f"no row from {workers} data workers for {timeout:g} s; they are stuck, reading most "
                    "likely: look at the storage of the shards"
                ) from None
            if found is None:
                return
            if isinstance(found, BaseException):
                raise found
            yield found
    finally:
        stop.set()
        feeder.join(_CLOSING_S)
        started: Any = iterator._workers  # type: ignore[attr-defined]
        # They ignore SIGTERM: one in a read that never ends, or waiting for a lock that died with another
        # worker, must be killed.
        if feeder.is_alive() or any(worker.exitcode for worker in started):
            for worker in started:
                worker.kill()
            feeder.join()
        del iterator


def _feed(
    iterator: Iterator[LoadedRow],
    ready: queue.Queue[LoadedRow | BaseException | None],
    stop: threading.Event,
    pin: bool,
) -> None:
    """Takes rows from the workers, pins them, and hands them on; a thread, so that the train loop waits for
    neither.
    """
    found: LoadedRow | BaseException | None
    while not stop.is_set():
        try:
            row = next(iterator, None)
            found = _pinned(row) if row is not None and pin else row
        except RuntimeError as error:
            found = error
            if "exited unexpectedly" in str(error):
                codes = {worker.exitcode for worker in iterator._workers} - {None}  # type: ignore[attr-defined]
                found = RuntimeError(
                    f"a data worker died (exit code {', '.join(map(str, sorted(codes)))}; -9 is mostly the "
                    "system's lack of memory): lower data.workers, data.prefetch or data.seq_len"
                )
                found.__cause__ = error
        except BaseException as error:
            found = error
        while not stop.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(found, timeout=0.2)
                break
        if not isinstance(found, LoadedRow):
            return


def _pinned(loaded: LoadedRow) -> LoadedRow:
    row = loaded.row
    pinned: dict[str, Any] = {
        f.name: value.pin_memory()
        for f in fields(row)
        if isinstance(value := getattr(row, f.name), torch.Tensor)
    }
    return replace(loaded, row=replace(row, **pinned))


def _unchanged(row: LoadedRow) -> LoadedRow:
    return row


def _start_worker(worker: int) -> None:
    torch.set_num_threads(1)
    # Slurm signals every process of a step; the train loop decides when to stop, and needs rows until then.
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()


def _end_with_parent() -> None:
    """A rank that is killed takes its workers along. The DataLoader looks at the process that forked them,
    which is the fork server and lives on while they do.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

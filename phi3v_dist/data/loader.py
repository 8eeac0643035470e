"""Packed rows, loaded ahead of time: workers read, decode, tile and collate the planned rows of one rank.

In: the samples, and the rows of this rank in order. Out: `LoadedRow`s in that order. A sample that cannot be
read or decoded keeps its place and its tokens, but gets blank tiles and no labels, so that the plan, the
shapes and the other ranks are not affected; the row carries the reason.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import queue
import signal
import threading
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import KW_ONLY, astuple, dataclass, fields, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from phi3v_dist.data.collate import Document, collate
from phi3v_dist.data.node_cache import CacheOptions
from phi3v_dist.data.plan import MicroRow
from phi3v_dist.data.reader import SampleReader
from phi3v_dist.data.samples import Samples
from phi3v_dist.data.tokens import images_that_fit
from phi3v_dist.model.row import PackedRow
from phi3v_dist.processor.geometry import SampleShape
from phi3v_dist.processor.image import blank_tiles, decode_image, hd_tiles
from phi3v_dist.processor.prompt import IGNORE, encode
from shards.common.errors import BadInputError
from shards.format.records import ImageRef, SampleRecord

_CLOSING_S = 10.0  # for rows that are being made when the generator is closed


@dataclass(frozen=True)
class LoadedRow:
    """A row and what it holds.

    tokens: without padding. images, samples: their numbers. masked: targets that the plan counts but that
    unreadable samples have lost. bad: "shard key: reason" of every unreadable sample.
    """

    row: PackedRow
    tokens: int
    images: int
    samples: int
    masked: int
    bad: tuple[str, ...]


@dataclass(frozen=True)
class RowCounts:
    """What rows hold, summed. positions: tokens and padding. bad: number of unreadable samples. The others:
    as in LoadedRow.
    """

    tokens: int = 0
    positions: int = 0
    images: int = 0
    samples: int = 0
    masked: int = 0
    bad: int = 0

    @classmethod
    def of(cls, loaded: LoadedRow) -> RowCounts:
        """The counts of one row."""
        positions = len(loaded.row.input_ids)
        return cls(
            tokens=loaded.tokens,
            positions=positions,
            images=loaded.images,
            samples=loaded.samples,
            masked=loaded.masked,
            bad=len(loaded.bad),
        )

    def __add__(self, other: RowCounts) -> RowCounts:
        return RowCounts(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def metrics(self, rows: int, seq_len: int) -> dict[str, float | int | None]:
        """The metrics data/*. fill: tokens as a fraction of rows * seq_len; padding: as a fraction of all
        positions computed.
        """
        rows = max(1, rows)
        return {
            "data/fill": self.tokens / (rows * seq_len),
            "data/padding": 1 - self.tokens / max(1, self.positions),
            "data/tokens_per_row": self.tokens / rows,
            "data/images_per_row": self.images / rows,
            "data/samples_per_row": self.samples / rows,
        }


@dataclass(frozen=True)
class LoadedDocument:
    """One sample, ready to be packed. bad: None; for an unreadable sample, which is blank and has no labels,
    "shard key: reason". masked: number of targets that it has lost.
    """

    document: Document
    bad: str | None
    masked: int


class ImageReader(Protocol):
    """Where rows get their image files: a SampleReader, or a stand-in for one."""

    def images(self, record: SampleRecord) -> Sequence[bytes | memoryview]: ...


@dataclass(frozen=True)
class RowMaker:
    """Makes rows from sample numbers; it is pickled for the workers.

    num_crops: the largest number of tiles of an image. tile: px. max_tokens: longer samples lose images from
    the end; None: they stay unchanged. cache: keep copies of shards on a disk of the node.
    """

    samples: Samples
    tokenizer: Any
    num_crops: int
    _: KW_ONLY
    tile: int
    max_tokens: int | None = None
    cache: CacheOptions | None = None

    def reader(self) -> SampleReader:
        """A reader of the image files; make one per process."""
        return SampleReader(self.samples.roots, self.samples.shards, self.cache)

    def load(self, micro: MicroRow, reader: ImageReader) -> LoadedRow:
        """Reads, decodes and packs a row. A sample that cannot be read keeps its place, without targets."""
        loaded = [self.document(record, reader) for record in self.samples.records(micro.samples)]
        documents = [each.document for each in loaded]
        pad_id = self.tokenizer.pad_token_id
        row = collate(documents, pad_id, self.tile, vision_calls=micro.vision_calls)
        return LoadedRow(
            row=row,
            tokens=sum(len(document.input_ids) for document in documents),
            images=len(row.grids),
            samples=len(documents),
            masked=sum(each.masked for each in loaded),
            bad=tuple(each.bad for each in loaded if each.bad is not None),
        )

    def keys(self, micro: MicroRow) -> list[str]:
        """The keys of a row's samples."""
        return [record.key for record in self.samples.records(micro.samples)]

    def document(self, record: SampleRecord, reader: ImageReader) -> LoadedDocument:
        """Reads, decodes and tokenises one sample."""
        sizes = [(image.width, image.height) for image in record.images]
        shape = SampleShape.of(sizes, self.num_crops, self.tile)
        text = encode(self.tokenizer, record.messages, shape.image_tokens)
        if self.max_tokens is not None and len(text.input_ids) > self.max_tokens:
            kept = images_that_fit(len(text.input_ids), shape.image_tokens, self.max_tokens)
            image_tokens = [*shape.image_tokens[:kept], *[0] * (len(record.images) - kept)]
            record, shape = replace(record, images=record.images[:kept]), shape.first(kept)
            text = encode(self.tokenizer, record.messages, image_tokens)
        labels, bad, masked = text.labels, None, 0
        try:
            files = reader.images(record)
            tiles = [self._tiles(data, image) for data, image in zip(files, record.images, strict=True)]
        except BadInputError as error:
            bad = f"{record.shard} {record.key}: {error}"
            tiles = [blank_tiles(grid, self.tile) for grid in shape.grids]
            masked = sum(label != IGNORE for label in labels)
            labels = [IGNORE] * len(labels)
        joined = np.concatenate(tiles) if tiles else np.empty((0, 3, self.tile, self.tile), np.uint8)
        grids = [(grid.rows, grid.cols) for grid in shape.grids]
        return LoadedDocument(Document(text.input_ids, labels, tiles=joined, grids=grids), bad, masked)

    def _tiles(self, data: bytes | memoryview, ref: ImageRef) -> np.ndarray:
        image = decode_image(data)
        if image.size != (ref.width, ref.height):
            raise BadInputError(
                f"{ref.member} is {image.width}x{image.height} px, the index says {ref.width}x{ref.height}"
            )
        return hd_tiles(image, self.num_crops, self.tile)


class _Rows(Dataset[LoadedRow]):
    """Makes, in a worker, the row that the sampler asks for."""

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
    *,
    prefetch: int,
    timeout_s: float,
    pin: bool = False,
    seed: int = 0,
) -> Generator[LoadedRow, None, None]:
    """Yields the rows of `micros` in order; close the generator to end the workers.

    workers: processes; 0: load in this one. prefetch: rows ahead per worker. timeout_s: seconds without a row
    after which the workers count as stuck. pin: rows in page-locked memory, for asynchronous copies to a GPU.
    seed: of the workers' random numbers.
    An exception in a worker is raised here with its traceback. Raises RuntimeError if a worker died or is
    stuck.
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
    # Not forked from here: a forked child of a process with threads (gloo, NCCL, W&B) can deadlock.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["phi3v_dist.data.loader"])
    # timeout=0: only then does the DataLoader of torch 2.13 check every few seconds that its workers live.
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
    feeder = threading.Thread(
        target=_feed, args=(iterator, ready, stop), kwargs={"pin": pin}, name="rows", daemon=True
    )
    feeder.start()
    try:
        while True:
            try:
                found = ready.get(timeout=timeout_s)
            except queue.Empty:
                raise RuntimeError(
                    f"no row from {workers} data workers for {timeout_s:g} s; they are stuck, most likely "
                    "while reading: check the storage of the shards"
                ) from None
            if found is None:
                return
            if isinstance(found, BaseException):
                raise found
            yield found
    finally:
        stop.set()
        feeder.join(_CLOSING_S)
        _end_workers(iterator, feeder)


def _end_workers(iterator: Any, feeder: threading.Thread) -> None:
    """Ends the workers of a DataLoader's iterator (torch 2.13), however busy they are.

    Not left to the iterator's own end: the traceback of an exception may keep it alive until the process
    ends, which would then wait for ever for workers that ignore SIGTERM.
    """
    workers = iterator._workers
    # A worker must be killed if its read never ends, or if it waits for a lock whose holder, another worker,
    # has died.
    if feeder.is_alive() or any(worker.exitcode for worker in workers):
        for worker in workers:
            worker.kill()
        feeder.join()
    iterator._shutdown_workers()  # waits 5 s for each
    for worker in workers:
        if worker.is_alive():
            worker.kill()
            worker.join()


def _feed(
    iterator: Iterator[LoadedRow],
    ready: queue.Queue[LoadedRow | BaseException | None],
    stop: threading.Event,
    *,
    pin: bool,
) -> None:
    """Takes rows from the workers, pins them and puts them into `ready`. It runs in a thread, so that the
    train loop waits for neither.
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
                    f"a data worker died (exit code {', '.join(map(str, sorted(codes)))}; -9 mostly means "
                    "that the system ran out of memory): lower data.workers, data.prefetch or data.seq_len"
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
    # Slurm signals every process of a step; the train loop decides when to stop and needs rows until then.
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()


def _end_with_parent() -> None:
    """Ends this worker when its rank is killed. The DataLoader's own check watches the process that forked
    the workers: that is the fork server, which lives as long as they do.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

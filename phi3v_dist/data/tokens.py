"""What every sample costs, from the index alone: tokens, targets, tiles. No tar is read, no image decoded.

In: the samples of a split, the tokenizer, num_crops and the tile side. Out: `SampleCosts`, counted by several
processes and kept in a file that all ranks of a node map into memory.
"""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from phi3v_dist.data.samples import BatchRecords, Samples
from phi3v_dist.processor.geometry import SampleShape
from phi3v_dist.processor.prompt import check_encodable, render, reply_spans, text_pieces
from shards.common.errors import BadInputError
from shards.common.files import write_atomically
from shards.format.records import SampleRecord

_ALONE = 16_384  # samples that one process counts alone; to start others takes about two seconds
_MOST_PROCESSES = 32


@dataclass(frozen=True)
class SampleCosts:
    """What each sample of a split costs, in index order; integers [samples] each.

    tokens: text and image tokens. targets: those with a label. tiles: without the global views. images: their
    number.
    """

    tokens: np.ndarray
    targets: np.ndarray
    tiles: np.ndarray
    images: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class Counter:
    """Counts batches of records; it is pickled for the counting processes.

    tokenizer: as `load_tokenizer` returns it. num_crops: the largest number of tiles of an image. tile: px.
    """

    tokenizer: Any
    num_crops: int
    tile: int

    def key(self) -> str:
        """Hex digest of everything that shapes the counts: the tokenizer and the fields here."""
        digest = hashlib.sha256(self.tokenizer.backend_tokenizer.to_str().encode())
        digest.update(json.dumps(["costs 2", self.num_crops, self.tile, "chat"]).encode())
        return digest.hexdigest()

    def shape(self, record: SampleRecord) -> SampleShape:
        """What the images of a sample take. Raises BadInputError for a size that cannot be cut into tiles."""
        return SampleShape.of(
            [(image.width, image.height) for image in record.images], self.num_crops, self.tile
        )

    def count(self, batch: pa.RecordBatch) -> np.ndarray:
        """int32 [4, records]: the fields of SampleCosts, in their order.

        The text is tokenised in pieces, as `encode` does it, but all pieces of the batch at once. Raises
        BadInputError, naming the sample, for one whose text or images cannot be used.
        """
        reader = BatchRecords(batch)
        total = batch.num_rows
        counts = np.zeros((4, total), dtype=np.int64)
        pieces: list[str] = []
        owners: list[int] = []
        for number in range(total):
            record = reader.record(number)
            try:
                shape = self.shape(record)
                check_encodable(record.messages, len(shape.grids))
            except BadInputError as error:
                raise BadInputError(f"sample {record.key!r}: {error}") from error
            own = text_pieces(render(record.messages))
            pieces += own
            owners += [number] * len(own)
            counts[0, number] = sum(shape.image_tokens)
            counts[2, number] = shape.tiles
            counts[3, number] = len(shape.grids)
        if pieces:
            ids = self.tokenizer(pieces, return_attention_mask=False)["input_ids"]
            lengths = np.array([len(piece) for piece in ids])
            of_piece = np.array(owners)
            counts[0] += np.bincount(of_piece, lengths, total).astype(np.int64)
            flat = np.fromiter((t for piece in ids for t in piece), dtype=np.int64, count=int(lengths.sum()))
            of_token = np.repeat(of_piece, lengths)
            starts, stops = reply_spans(self.tokenizer, flat, of_token)
            counts[1] = np.bincount(of_token[starts], stops - starts, total).astype(np.int64)
        return counts.astype(np.int32)


def sample_costs(samples: Samples, counter: Counter, processes: int | None = None) -> SampleCosts:
    """Counts every sample. processes: None for one per core where there are many samples, in a file.

    Raises BadInputError, naming the sample, for one whose text or images cannot be used.
    """
    batches = samples.batches()
    if processes is None:
        cores = min(_MOST_PROCESSES, len(os.sched_getaffinity(0)))
        processes = cores if len(samples) > _ALONE and samples.file is not None else 1
    if processes == 1:
        parts = [counter.count(batch) for batch in batches]
    else:
        # Not forked: a forked child of a process with threads (gloo, NCCL, W&B) can deadlock.
        context = multiprocessing.get_context("forkserver")
        with ProcessPoolExecutor(processes, context, _start, (samples, counter)) as pool:
            parts = list(pool.map(_count, range(len(batches)), chunksize=4))
    return SampleCosts(*np.concatenate([np.zeros((4, 0), np.int32), *parts], axis=1))


_job: tuple[Samples, Counter] | None = None  # of a counting process


def _start(samples: Samples, counter: Counter) -> None:
    global _job
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _job = samples, counter


def _count(number: int) -> np.ndarray:
    assert _job is not None
    samples, counter = _job
    return counter.count(samples.batches()[number])


def keep_costs(costs: SampleCosts, shards: np.ndarray, file: Path) -> None:
    """Writes the counts and the shard number of each sample (int32 [samples]) to a file."""
    data = io.BytesIO()
    np.save(data, np.stack([*astuple(costs), shards]).astype(np.int32))
    write_atomically(file, data.getvalue(), durable=False)


def load_costs(file: Path) -> tuple[SampleCosts, np.ndarray]:
    """(costs, shard numbers) as `keep_costs` wrote them, mapped into memory. Raises BadInputError if the file
    is damaged.
    """
    try:
        stored = np.load(file, mmap_mode="r", allow_pickle=False)
        if stored.dtype != np.int32 or stored.ndim != 2 or len(stored) != 5:
            raise ValueError("not int32 [5, samples]")
    except (OSError, ValueError, EOFError) as error:
        raise BadInputError(f"{file}: damaged ({error}); delete it, and it is made again") from error
    return SampleCosts(*stored[:4]), stored[4]


def images_that_fit(tokens: int, image_tokens: Sequence[int], limit: int) -> int:
    """How many images, counted from the first, a sample of `tokens` tokens keeps to have at most `limit`.

    The text, the reply and the text around a removed image stay. 0 if the text alone is too long.
    """
    kept = len(image_tokens)
    while kept and tokens > limit:
        kept -= 1
        tokens -= image_tokens[kept]
    return kept


def truncated_costs(
    costs: SampleCosts, samples: Samples, counter: Counter, *, limit: int
) -> tuple[SampleCosts, int]:
    """The costs after samples of more than `limit` tokens have lost images from the end, and the number of
    such samples. A sample whose text alone is too long stays unchanged.
    """
    tokens, tiles, images = (np.array(values) for values in (costs.tokens, costs.tiles, costs.images))
    count = 0
    over = np.flatnonzero(costs.tokens > limit)
    for number, record in zip(over.tolist(), samples.records(over), strict=True):
        shape = counter.shape(record)
        kept = images_that_fit(int(tokens[number]), shape.image_tokens, limit)
        shorter = int(tokens[number]) - sum(shape.image_tokens[kept:])
        if shorter <= limit:
            count += 1
            tokens[number] = shorter
            tiles[number] = shape.first(kept).tiles
            images[number] = kept
    return replace(costs, tokens=tokens, tiles=tiles, images=images), count

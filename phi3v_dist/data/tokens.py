"""What every sample costs, from the index alone: tokens, targets, tiles. No tar is touched, no picture
decoded.

In: the samples of a split, the tokenizer, num_crops, the tile side. Out: `SampleCosts`, counted by several
processes and kept in a file that all ranks of a node map into memory. Called by `prepare` and evaluation.
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

from phi3v_dist.data.samples import Samples
from phi3v_dist.processor.geometry import hd_grid, image_token_count, tile_side_tokens
from phi3v_dist.processor.prompt import check_text, render, text_pieces
from shards.common.errors import BadInputError
from shards.common.files import write_atomically

_ALONE = 16_384  # samples up to which one process counts; starting others takes about two seconds
_MOST_PROCESSES = 32


@dataclass(frozen=True)
class SampleCosts:
    """Of each sample of a split, in index order; all integers [samples].

    tokens: text and image tokens. targets: of them with a label. tiles: without the global views. pictures.
    """

    tokens: np.ndarray
    targets: np.ndarray
    tiles: np.ndarray
    pictures: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class Counter:
    """Counts batches of records; travels to other processes."""

    tokenizer: Any
    num_crops: int
    tile: int
    template: str = "chat"

    def key(self) -> str:
        """Hex digest of everything here that shapes the counts."""
        digest = hashlib.sha256(self.tokenizer.backend_tokenizer.to_str().encode())
        digest.update(json.dumps(["costs 2", self.num_crops, self.tile, self.template]).encode())
        return digest.hexdigest()

    def count(self, batch: pa.RecordBatch) -> np.ndarray:
        """int32 [4, records]: the fields of SampleCosts.

        The text is tokenised piece by piece as `encode` does it, all pieces of the batch at once.
        Raises BadInputError for a sample whose text or pictures cannot be used.
        """
        side = tile_side_tokens(self.tile)
        records = batch.select(["key", "images", "messages"]).to_pylist()
        counts = np.zeros((4, len(records)), dtype=np.int64)
        pieces: list[str] = []
        owners: list[int] = []
        for place, record in enumerate(records):
            try:
                grids = [
                    hd_grid(i["width"], i["height"], self.num_crops, tile=self.tile) for i in record["images"]
                ]
                check_text(record["messages"], len(grids))
            except BadInputError as error:
                raise BadInputError(f"sample {record['key']!r}: {error}") from error
            own = text_pieces(render(record["messages"], template=self.template))
            pieces += own
            owners += [place] * len(own)
            counts[0, place] = sum(image_token_count(grid.rows, grid.cols, side) for grid in grids)
            counts[2, place] = sum(grid.rows * grid.cols for grid in grids)
            counts[3, place] = len(grids)
        if pieces:
            ids = self.tokenizer(pieces, return_attention_mask=False)["input_ids"]
            lengths = np.array([len(piece) for piece in ids])
            of_piece = np.array(owners)
            counts[0] += np.bincount(of_piece, lengths, len(records)).astype(np.int64)
            flat = np.fromiter((t for piece in ids for t in piece), dtype=np.int64, count=int(lengths.sum()))
            counts[1] = self._targets(flat, np.repeat(of_piece, lengths), len(records))
        return counts.astype(np.int32)

    def _targets(self, ids: np.ndarray, owner: np.ndarray, records: int) -> np.ndarray:
        """Tokens after the last <|assistant|> before an <|end|>, up to and with that <|end|>."""
        assistant = self.tokenizer.convert_tokens_to_ids("<|assistant|>")
        end = self.tokenizer.convert_tokens_to_ids("<|end|>")
        marks = np.flatnonzero((ids == assistant) | (ids == end))
        before, after = marks[:-1], marks[1:]
        reply = (ids[before] == assistant) & (ids[after] == end) & (owner[before] == owner[after])
        before, after = before[reply], after[reply]
        return np.bincount(owner[after], after - before, records).astype(np.int64)


def sample_costs(samples: Samples, counter: Counter, processes: int | None = None) -> SampleCosts:
    """Counts every sample. processes: None for as many as there are cores, if there are many samples.

    Raises BadInputError for a sample whose text or pictures cannot be used.
    """
    batches = samples.batches()
    if processes is None:
        cores = min(_MOST_PROCESSES, len(os.sched_getaffinity(0)))
        processes = cores if len(samples) > _ALONE and samples.file is not None else 1
    if processes == 1:
        parts = [counter.count(batch) for batch in batches]
    else:
        # Started afresh: a forked child of a process with threads (gloo, NCCL, W&B) can deadlock.
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
    """Writes the counts, and the shard number of each sample, to a file."""
    data = io.BytesIO()
    np.save(data, np.stack([*astuple(costs), shards]).astype(np.int32))
    write_atomically(file, data.getvalue(), durable=False)


def load_costs(file: Path) -> tuple[SampleCosts, np.ndarray]:
    """What `keep_costs` wrote, mapped into memory. Raises BadInputError if it is damaged."""
    try:
        stored = np.load(file, mmap_mode="r", allow_pickle=False)
        if stored.dtype != np.int32 or stored.ndim != 2 or len(stored) != 5:
            raise ValueError("of another form")
    except (OSError, ValueError, EOFError) as error:
        raise BadInputError(f"{file}: damaged ({error}); delete it, it is made again") from error
    return SampleCosts(*stored[:4]), stored[4]


def pictures_that_fit(tokens: int, image_tokens: Sequence[int], limit: int) -> int:
    """How many pictures, from the first on, a sample of `tokens` tokens keeps to have at most `limit`.

    Text and answers stay, so does the place of a picture that goes; 0 if even none is too many.
    """
    kept = len(image_tokens)
    while kept and tokens > limit:
        kept -= 1
        tokens -= image_tokens[kept]
    return kept


def truncated_costs(
    costs: SampleCosts, samples: Samples, num_crops: int, tile: int, limit: int
) -> tuple[SampleCosts, int]:
    """The costs once samples of more than `limit` tokens have lost pictures from the end, and how many have.

    A sample whose text alone is too long is left as it is.
    """
    changed = [np.array(values) for values in astuple(costs)]
    side = tile_side_tokens(tile)
    count = 0
    over = np.flatnonzero(costs.tokens > limit)
    for number, record in zip(over.tolist(), samples.records(over), strict=True):
        grids = [hd_grid(image["width"], image["height"], num_crops, tile=tile) for image in record["images"]]
        image_tokens = [image_token_count(grid.rows, grid.cols, side) for grid in grids]
        kept = pictures_that_fit(int(costs.tokens[number]), image_tokens, limit)
        tokens = int(costs.tokens[number]) - sum(image_tokens[kept:])
        if tokens <= limit:
            count += 1
            changed[0][number] = tokens
            changed[2][number] = sum(grid.rows * grid.cols for grid in grids[:kept])
            changed[3][number] = kept
    return replace(
        costs, **dict(zip(("tokens", "targets", "tiles", "pictures"), changed, strict=True))
    ), count

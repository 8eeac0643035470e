"""What every sample costs, from the index alone: tokens, targets, tiles. No tar is touched, no picture
decoded.

In: the index of a split, the tokenizer, num_crops, the tile side. Out: `SampleCosts`, cached in a file that
is keyed by everything that shapes it. Called by the train loop and `phi3v plan`.
"""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from phi3v_dist.processor.geometry import hd_grid, image_token_count, tile_side_tokens
from phi3v_dist.processor.prompt import IGNORE, encode
from shards.atomic import write_atomically
from shards.format import BadInputError


@dataclass(frozen=True)
class SampleCosts:
    """Of each sample of a split, in index order; all int64 [samples].

    tokens: text and image tokens. targets: of them with a label. tiles: without the global views. pictures.
    """

    tokens: np.ndarray
    targets: np.ndarray
    tiles: np.ndarray
    pictures: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)


def sample_costs(
    index: pa.Table, tokenizer: Any, num_crops: int, tile: int, cache_dir: Path | None = None
) -> SampleCosts:
    """Counts every sample of `index` (columns key, images, messages).

    cache_dir: where the result is kept, under a name made of the tokenizer, the index and the arguments.
    Raises BadInputError for a sample whose text or pictures cannot be used.
    """
    cache = (
        None
        if cache_dir is None
        else cache_dir / f"costs-{_fingerprint(index, tokenizer, num_crops, tile)}.npz"
    )
    if cache is not None and cache.exists():
        with np.load(cache) as stored:
            return SampleCosts(**{name: stored[name] for name in ("tokens", "targets", "tiles", "pictures")})
    side = tile_side_tokens(tile)
    counts = np.zeros((4, index.num_rows), dtype=np.int64)
    place = 0
    for batch in index.select(["key", "images", "messages"]).to_batches():
        for record in batch.to_pylist():
            try:
                counts[:, place] = _count(record, tokenizer, num_crops, tile, side)
            except BadInputError as error:
                raise BadInputError(f"sample {record['key']!r}: {error}") from error
            place += 1
    costs = SampleCosts(*counts)
    if cache is not None:
        packed = io.BytesIO()
        np.savez(packed, **vars(costs))
        write_atomically(cache, packed.getvalue())
    return costs


def _count(
    record: dict[str, Any], tokenizer: Any, num_crops: int, tile: int, side: int
) -> tuple[int, int, int, int]:
    grids = [hd_grid(image["width"], image["height"], num_crops, tile) for image in record["images"]]
    text = encode(tokenizer, record["messages"], [0] * len(grids))
    image_tokens = sum(image_token_count(grid.rows, grid.cols, side) for grid in grids)
    targets = sum(label != IGNORE for label in text.labels)
    return len(text.input_ids) + image_tokens, targets, sum(g.rows * g.cols for g in grids), len(grids)


def _fingerprint(index: pa.Table, tokenizer: Any, num_crops: int, tile: int) -> str:
    digest = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode())
    digest.update(json.dumps(["costs 1", num_crops, tile, index.num_rows]).encode())
    for batch in index.select(["key", "images", "messages"]).combine_chunks().to_batches():
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, batch.schema) as writer:
            writer.write_batch(batch)
        digest.update(sink.getvalue())
    return digest.hexdigest()[:20]

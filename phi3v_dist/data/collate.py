"""Documents -> one packed row; torch tensors are first made here.

In: `Document`s (ids, labels, uint8 tiles). Out: `PackedRow`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from phi3v_dist.model.row import PackedRow
from phi3v_dist.processor.prompt import IGNORE


@dataclass(frozen=True)
class Document:
    """One sample, tokenised and tiled.

    input_ids, labels: [L]; ids are negative at image positions. tiles: uint8 [tiles, 3, S, S], those of all
    images. grids: (rows, cols) of each image.
    """

    input_ids: Sequence[int]
    labels: Sequence[int]
    tiles: np.ndarray
    grids: Sequence[tuple[int, int]]


def collate(
    documents: Sequence[Document], pad_id: int, tile: int, *, vision_calls: int, pad_multiple: int = 64
) -> PackedRow:
    """Packs `documents` one after the other and pads to a multiple of `pad_multiple` positions.

    pad_id: token of the padding, which is a separate document without labels. tile: px. vision_calls: as in
    PackedRow. Without documents, the row is padding alone.
    """
    lengths = [len(document.input_ids) for document in documents]
    total = sum(lengths)
    padding = -total % pad_multiple if total else pad_multiple
    bounds = [0, *np.cumsum(lengths).tolist()]
    if padding:
        bounds.append(total + padding)
    ids = np.full(total + padding, pad_id, dtype=np.int64)
    labels = np.full(total + padding, IGNORE, dtype=np.int64)
    positions = np.zeros(total + padding, dtype=np.int64)
    for document, start in zip(documents, bounds, strict=False):
        end = start + len(document.input_ids)
        ids[start:end] = document.input_ids
        labels[start:end] = document.labels
        labels[start] = IGNORE  # nothing precedes the first token of a document
    for start, end in zip(bounds, bounds[1:], strict=False):
        positions[start:end] = np.arange(end - start)
    tiles = [document.tiles for document in documents if len(document.tiles)]
    grids = [grid for document in documents for grid in document.grids]
    return PackedRow(
        input_ids=torch.from_numpy(ids),
        labels=torch.from_numpy(labels),
        position_ids=torch.from_numpy(positions),
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
        tiles=torch.from_numpy(np.concatenate(tiles) if tiles else np.empty((0, 3, tile, tile), np.uint8)),
        grids=torch.tensor(grids, dtype=torch.int64).reshape(-1, 2),
        image_positions=torch.from_numpy(np.flatnonzero(ids < 0)),
        vision_calls=vision_calls,
    )

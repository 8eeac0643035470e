"""The loss of a split: the same at any number of ranks.

In: samples with their sizes, and a forward pass over packed rows. Out: the mean negative log likelihood of
the target tokens. The rows do not depend on the number of ranks, and their sums are added exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch

from phi3v_dist.data.loader import RowMaker
from phi3v_dist.data.plan import MicroRow
from phi3v_dist.data.tokens import SampleCosts
from phi3v_dist.model.row import PackedRow
from phi3v_dist.parallel.mesh import Mesh
from phi3v_dist.processor.geometry import vision_calls_needed


def split_loss(
    forward: Callable[[PackedRow], torch.Tensor],
    maker: RowMaker,
    costs: SampleCosts,
    *,
    row_tokens: int,
    views_per_call: int,
    mesh: Mesh,
) -> tuple[float, list[str]]:
    """The mean negative log likelihood (nats per target token) of the samples of `maker` that have at most
    `row_tokens` tokens, and one line for each sample that could not be read.

    forward: the summed loss (a scalar) of a packed row on the mesh's device; all ranks call it equally often,
    because under ZeRO-3 a forward pass is a collective. costs: sizes of the samples, in their order.
    views_per_call: views of a row that go through the vision tower at once. Collective: all ranks call it,
    and all get the same result.
    """
    rows = _pack_in_order(costs.tokens, row_tokens)
    views = [int(costs.tiles[row].sum() + costs.images[row].sum()) for row in rows]
    calls = vision_calls_needed(max(views, default=0), 0, views_per_call)
    reader = maker.reader()
    row_losses: list[tuple[int, int, float]] = []  # (row, rank, summed loss)
    targets: dict[int, int] = {}
    unreadable: list[str] = []
    try:
        with torch.no_grad():
            for first in range(0, len(rows), mesh.dp_size):
                number = first + mesh.dp_rank
                here = rows[number] if number < len(rows) else np.empty(0, np.int64)
                loaded = maker.load(MicroRow(here, calls), reader)
                nll = float(forward(loaded.row.to(mesh.device)))
                unreadable += loaded.bad
                if len(here):
                    row_losses.append((number, mesh.rank, nll))
                    targets[number] = loaded.row.num_targets
    finally:
        reader.close()
    shares = mesh.gather((row_losses, targets, unreadable))
    total = math.fsum(nll for _, _, nll in sorted(entry for share, _, _ in shares for entry in share))
    counted = {number: count for _, share, _ in shares for number, count in share.items()}
    return total / max(1, sum(counted.values())), sorted({line for _, _, share in shares for line in share})


def _pack_in_order(tokens: np.ndarray, row_tokens: int) -> list[np.ndarray]:
    """Numbers of the samples of each packed row: samples in order, a new row where one does not fit; samples
    of more than `row_tokens` tokens are left out.
    """
    rows: list[list[int]] = []
    room = 0
    for sample in np.flatnonzero(tokens <= row_tokens).tolist():
        if not rows or tokens[sample] > room:
            rows.append([])
            room = row_tokens
        rows[-1].append(sample)
        room -= int(tokens[sample])
    return [np.array(row, dtype=np.int64) for row in rows]

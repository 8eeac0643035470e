"""Which samples form which packed row, and which rank takes which row: a pure function, no I/O, no torch.

The rows of a run are one endless sequence: the rows of epoch 0, then those of epoch 1, and so on; an epoch
packs every sample exactly once. An optimizer step takes the next `global_batch` rows, also across an epoch's
edge, so nothing is dropped or doubled; only the last step of a run that ends with an epoch is filled up with
empty rows. The sequence does not depend on the number of ranks, hence resuming needs one number: rows
consumed.

Called by the loader and `phi3v plan`.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from phi3v_dist.data.tokens import SampleCosts
from phi3v_dist.processor.geometry import vision_calls_needed
from shards.format import BadInputError

_PACK_WINDOW = 16_384  # samples packed together; larger fills no better


@dataclass(frozen=True)
class EpochRows:
    """The rows of one epoch in order. Row r is samples[offsets[r] : offsets[r + 1]], numbers into the
    index.
    """

    samples: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def row(self, number: int) -> np.ndarray:
        return self.samples[self.offsets[number] : self.offsets[number + 1]]


def epoch_rows(
    lengths: np.ndarray, usable: np.ndarray, seq_len: int, seed: int, epoch: int, shuffle: bool, packing: bool
) -> EpochRows:
    """Packs the samples numbered `usable` (each with lengths[i] <= seq_len tokens) into rows of at most
    seq_len.

    Best-fit decreasing within windows of the shuffled order, then the rows are shuffled. Deterministic in
    (seed, epoch).
    """
    rng = np.random.default_rng([seed, epoch])
    order = usable[rng.permutation(len(usable))] if shuffle else usable
    if packing:
        rows = []
        for start in range(0, len(order), _PACK_WINDOW):
            rows += _pack(order[start : start + _PACK_WINDOW], lengths, seq_len)
    else:
        rows = [[int(sample)] for sample in order]
    if shuffle:
        rows = [rows[i] for i in rng.permutation(len(rows))]
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
    samples = np.fromiter((sample for row in rows for sample in row), dtype=np.int64, count=int(offsets[-1]))
    return EpochRows(samples, offsets)


def _pack(order: np.ndarray, lengths: np.ndarray, seq_len: int) -> list[list[int]]:
    """Best fit decreasing. Ties keep the given order, so the result is a function of the arguments alone."""
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, row), sorted; rows that are full leave the list
    for sample in order[np.argsort(-lengths[order], kind="stable")]:
        need = int(lengths[sample])
        place = bisect.bisect_left(room, (need, -1))
        if place == len(room):
            rows.append([int(sample)])
            left, row = seq_len - need, len(rows) - 1
        else:
            free, row = room.pop(place)
            rows[row].append(int(sample))
            left = free - need
        if left > 0:
            bisect.insort(room, (left, row))
    return rows


@dataclass(frozen=True)
class StepRows:
    """The rows of one optimizer step.

    rows: sample numbers of each of the global_batch rows; empty ones at the end of the run. epoch: of the
    first row. targets: target tokens of all rows, the denominator of the loss.
    """

    rows: tuple[np.ndarray, ...]
    epoch: int
    targets: int


@dataclass
class Plan:
    """The rows of a run.

    costs: of the samples of the train split. seq_len: tokens of a row. Over-long samples are left out
    (over_long "drop") or refused ("fail").
    Raises BadInputError if a sample is too long and over_long is "fail", or nothing is left.
    """

    costs: SampleCosts
    seq_len: int
    seed: int
    global_batch: int
    shuffle: bool = True
    packing: bool = True
    over_long: str = "fail"
    dropped: int = field(init=False)
    _usable: np.ndarray = field(init=False, repr=False)
    _epochs: dict[int, EpochRows] = field(init=False, default_factory=dict, repr=False)
    _first_row: list[int] = field(init=False, default_factory=lambda: [0], repr=False)

    def __post_init__(self) -> None:
        fits = self.costs.tokens <= self.seq_len
        self.dropped = int((~fits).sum())
        if self.dropped and self.over_long == "fail":
            worst = int(self.costs.tokens.max())
            raise BadInputError(
                f"{self.dropped} of {len(fits)} samples are longer than data.seq_len={self.seq_len} "
                f"(longest: {worst}); raise data.seq_len, lower data.num_crops, or set data.over_long=drop"
            )
        self._usable = np.flatnonzero(fits)
        if not len(self._usable):
            raise BadInputError(
                f"no sample fits into data.seq_len={self.seq_len}; raise it or lower data.num_crops"
            )

    def epoch(self, number: int) -> EpochRows:
        """The rows of an epoch; the last two asked for are kept."""
        if number not in self._epochs:
            self._epochs = {n: rows for n, rows in self._epochs.items() if abs(n - number) <= 1}
            self._epochs[number] = epoch_rows(
                self.costs.tokens, self._usable, self.seq_len, self.seed, number, self.shuffle, self.packing
            )
        return self._epochs[number]

    def steps_of(self, epochs: float) -> int:
        """Optimizer steps that take the rows of so many epochs."""
        return -(-self.end_row(epochs) // self.global_batch)

    def step(self, number: int, end_row: int | None = None) -> StepRows:
        """The rows of optimizer step `number`, from 0. Rows at or after `end_row` are left empty."""
        first = number * self.global_batch
        epoch = self._epoch_of(first)
        rows = []
        here = epoch
        for row in range(first, first + self.global_batch):
            if end_row is not None and row >= end_row:
                rows.append(np.empty(0, dtype=np.int64))
                continue
            while row >= self._start(here + 1):
                here += 1
            rows.append(self.epoch(here).row(row - self._start(here)))
        targets = sum(int(self.costs.targets[row].sum()) for row in rows)
        return StepRows(tuple(rows), epoch, targets)

    def fill(self, epoch: int) -> float:
        """Tokens of an epoch's rows as a part of the positions they take."""
        rows = self.epoch(epoch)
        return float(self.costs.tokens[rows.samples].sum() / (len(rows) * self.seq_len))

    def end_row(self, epochs: float) -> int:
        """The number of rows in so many epochs; a part of one is a part of its rows, rounded up."""
        whole = int(epochs)
        part = int(np.ceil((epochs - whole) * len(self.epoch(whole)))) if epochs > whole else 0
        return self._start(whole) + part

    def _start(self, epoch: int) -> int:
        while len(self._first_row) <= epoch:
            done = len(self._first_row) - 1
            self._first_row.append(self._first_row[done] + len(self.epoch(done)))
        return self._first_row[epoch]

    def _epoch_of(self, row: int) -> int:
        epoch = 0
        while row >= self._start(epoch + 1):
            epoch += 1
        return epoch


@dataclass(frozen=True)
class MicroRow:
    """One row of one rank. samples: numbers into the index. vision_calls: of every rank in this
    micro-step.
    """

    samples: np.ndarray
    vision_calls: int


def rank_rows(
    step: StepRows, costs: SampleCosts, dp_rank: int, dp_size: int, vision_chunk: int
) -> list[MicroRow]:
    """The rows that a data-parallel rank accumulates in a step; global_batch / dp_size of them.

    Rows of similar cost share a micro-step, because ZeRO-3 makes every rank wait for the slowest in each.
    """
    by_cost = sorted(range(len(step.rows)), key=lambda i: (-row_cost(costs, step.rows[i]), i))
    mine = []
    for first in range(0, len(by_cost), dp_size):
        together = [step.rows[i] for i in by_cost[first : first + dp_size]]
        calls = max(
            vision_calls_needed(int(costs.tiles[row].sum()), int(costs.pictures[row].sum()), vision_chunk)
            for row in together
        )
        mine.append(MicroRow(together[dp_rank], calls))
    return mine


@dataclass
class RankRows(Sequence[MicroRow]):
    """The rows of one rank from `first_step` to before `end_step`, in order, worked out when they are asked
    for.

    end_row: rows of the run; those after it are empty.
    """

    plan: Plan
    dp_rank: int
    dp_size: int
    vision_chunk: int
    first_step: int
    end_step: int
    end_row: int | None = None
    _step: int = field(init=False, default=-1, repr=False)
    _rows: list[MicroRow] = field(init=False, default_factory=list, repr=False)

    def __len__(self) -> int:
        return (self.end_step - self.first_step) * self.plan.global_batch // self.dp_size

    def __getitem__(self, place: Any) -> Any:
        if not 0 <= place < len(self):
            raise IndexError(place)
        step, micro = divmod(place, self.plan.global_batch // self.dp_size)
        if step != self._step:
            rows = self.plan.step(self.first_step + step, self.end_row)
            self._rows = rank_rows(rows, self.plan.costs, self.dp_rank, self.dp_size, self.vision_chunk)
            self._step = step
        return self._rows[micro]


def row_cost(costs: SampleCosts, samples: np.ndarray) -> float:
    """Work of a row in the work of one token's linear layers, by the FLOPs of the published sizes.

    A token costs 7.25 GFLOP, attention 0.197 MFLOP x L x L in a document of L tokens (half masked), a view
    0.37 TFLOP in the tower.
    """
    tokens = costs.tokens[samples].astype(np.float64)
    views = costs.tiles[samples].sum() + costs.pictures[samples].sum()
    return float(tokens.sum() + (tokens * tokens).sum() / 37_000 + 51 * views)

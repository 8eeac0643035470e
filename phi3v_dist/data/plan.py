"""Which samples form which packed row, and which rank takes which row. No torch.

The rows of a run are one endless sequence: the rows of epoch 0, then those of epoch 1, and so on; an epoch
packs every sample exactly once (a mixture: see `epoch.Layout`). An optimizer step takes the next
`global_batch` rows, also across an epoch's edge, so nothing is dropped or doubled. Where a run ends with an
epoch, the documents of its last step, fewer rows than `global_batch`, are dealt out anew to that many rows.
The sequence does not depend on the number of ranks, hence resuming needs one number: rows consumed.

Called by `prepare`, the train loop, evaluation and `phi3v plan`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from phi3v_dist.data.epoch import EpochRows, Layout, epoch_rows
from phi3v_dist.data.pack import spread
from phi3v_dist.data.plan_files import PlanFiles
from phi3v_dist.data.tokens import SampleCosts
from phi3v_dist.processor.geometry import vision_calls_needed
from shards.common.errors import BadInputError

_KEPT_EPOCHS = 2  # in memory


@dataclass(frozen=True)
class StepRows:
    """The rows of one optimizer step.

    rows: sample numbers of each of the global_batch rows. epoch: of the first row. targets: target tokens of
    all rows, the denominator of the loss. taken: rows of the sequence that the step consumes, fewer than
    global_batch at the end of a run.
    """

    rows: tuple[np.ndarray, ...]
    epoch: int
    targets: int
    taken: int


@dataclass
class Plan:
    """The rows of a run.

    costs: of the samples of the train split. seq_len: tokens of a row. Samples that are too long are left
    out, or refused (over_long "fail"). layout: shards and data sets of the samples. files: where epochs are
    kept between processes.
    Raises BadInputError if a sample is too long and over_long is "fail", or nothing is left.
    """

    costs: SampleCosts
    seq_len: int
    seed: int
    global_batch: int
    shuffle: bool = True
    packing: bool = True
    over_long: str = "fail"
    layout: Layout | None = None
    files: PlanFiles | None = None
    dropped: int = field(init=False)
    _usable: np.ndarray = field(init=False, repr=False)
    _epochs: dict[int, EpochRows] = field(init=False, default_factory=dict, repr=False)
    _first_row: list[int] = field(init=False, default_factory=lambda: [0], repr=False)
    _ahead: bool = field(init=False, default=False, repr=False)
    # the train loop and the thread that feeds the workers both ask
    _lock: threading.RLock = field(init=False, default_factory=threading.RLock, repr=False)

    def __post_init__(self) -> None:
        fits = self.costs.tokens <= self.seq_len
        self.dropped = len(fits) - int(np.count_nonzero(fits))
        if self.dropped and self.over_long == "fail":
            worst = int(self.costs.tokens.max())
            raise BadInputError(
                f"{self.dropped} of {len(fits)} samples are longer than data.seq_len={self.seq_len} "
                f"(longest: {worst}); raise data.seq_len, lower data.num_crops, or set data.over_long to "
                "drop or truncate"
            )
        self._usable = np.flatnonzero(fits)
        if not len(self._usable):
            raise BadInputError(
                f"no sample fits into data.seq_len={self.seq_len}; raise it or lower data.num_crops"
            )
        if self.files is not None:
            self._first_row = self.files.first_rows() or [0]

    @property
    def epoch_samples(self) -> int:
        """Samples of an epoch."""
        return len(self._usable)

    def epoch(self, number: int) -> EpochRows:
        """The rows of an epoch; those asked for last are kept."""
        with self._lock:
            if number not in self._epochs:
                phase = self._start(number) % self.global_batch
                rows = self.files.epoch(number) if self.files is not None else None
                if rows is None:
                    rows = self._make(number, phase)
                    if self.files is not None:
                        self.files.keep_epoch(number, rows, self._ahead)
                while len(self._epochs) >= _KEPT_EPOCHS:
                    self._epochs.pop(next(iter(self._epochs)))
                self._epochs[number] = rows
            return self._epochs[number]

    def _make(self, number: int, phase: int) -> EpochRows:
        return epoch_rows(
            self.costs.tokens,
            sample_work(self.costs),
            self.layout or Layout.single(len(self.costs)),
            self._usable,
            seq_len=self.seq_len,
            global_batch=self.global_batch,
            seed=self.seed,
            epoch=number,
            phase=phase,
            shuffle=self.shuffle,
            packing=self.packing,
        )

    def steps_between(self, first_row: int, end_row: int) -> int:
        """Optimizer steps that take the rows from first_row to before end_row."""
        return max(0, -(-(end_row - first_row) // self.global_batch))

    def steps_of(self, epochs: float) -> int:
        """Optimizer steps that take the rows of so many epochs."""
        return self.steps_between(0, self.end_row(epochs))

    def step(self, first_row: int, end_row: int | None = None) -> StepRows:
        """The rows of the optimizer step that begins with row `first_row`; none at or after `end_row`."""
        stop = first_row + self.global_batch
        if end_row is not None:
            stop = min(stop, end_row)
        here = epoch = self._epoch_of(first_row)
        rows = []
        for row in range(first_row, stop):
            while row >= self._start(here + 1):
                here += 1
            rows.append(self.epoch(here).row(row - self._start(here)))
        missing = self.global_batch - len(rows)
        targets = sum(int(self.costs.targets[row].sum()) for row in rows)
        taken = len(rows)
        if missing:
            rows = self._respread(rows) or [*rows, *[np.empty(0, np.int64)] * missing]
        return StepRows(tuple(rows), epoch, targets, taken)

    def _respread(self, rows: list[np.ndarray]) -> list[np.ndarray] | None:
        samples = np.concatenate(rows) if rows else np.empty(0, np.int64)
        parts = spread(
            self.costs.tokens[samples], sample_work(self.costs, samples), self.global_batch, self.seq_len
        )
        return None if parts is None else [samples[part] for part in parts]

    def fill(self, epoch: int) -> float:
        """Tokens of an epoch's rows as a part of the positions they take."""
        rows = self.epoch(epoch)
        return float(self.costs.tokens[rows.samples].sum() / (len(rows) * self.seq_len))

    def end_row(self, epochs: float) -> int:
        """The number of rows in so many epochs; a part of one is a part of its rows, rounded up."""
        whole = int(epochs)
        while len(self._first_row) <= whole:  # without making room for epochs that are far away
            self.plan_ahead(self._first_row[-1] + 1)
        part = int(np.ceil((epochs - whole) * len(self.epoch(whole)))) if epochs > whole else 0
        return self._start(whole) + part

    def plan_ahead(self, end_row: int) -> None:
        """Makes and keeps every epoch with rows before `end_row`, so that other processes find them."""
        self._ahead = True
        while self._first_row[-1] < end_row:
            self._start(len(self._first_row))
        self._ahead = False

    def _start(self, epoch: int) -> int:
        with self._lock:
            while len(self._first_row) <= epoch:
                done = len(self._first_row) - 1
                rows = self._epochs[done] if done in self._epochs else self.epoch(done)
                self._first_row.append(self._first_row[done] + len(rows))
                if self.files is not None:
                    self.files.keep_first_rows(self._first_row)
            return self._first_row[epoch]

    def _epoch_of(self, row: int) -> int:
        while self._first_row[-1] <= row:
            self._start(len(self._first_row))
        return int(np.searchsorted(self._first_row, row, side="right")) - 1


@dataclass(frozen=True)
class MicroRow:
    """One row of one rank. samples: numbers into the index. vision_calls: of every rank in this
    micro-step.
    """

    samples: np.ndarray
    vision_calls: int


def deal_rows(cost: np.ndarray, dp_size: int) -> np.ndarray:
    """int64 [micro-steps, dp_size]: which row of a step each rank takes in each micro-step. cost: of its
    rows.

    Rows of similar cost share a micro-step, because ZeRO-3 makes every rank wait for the slowest in each;
    within one, the rank that has done least so far gets the costliest.
    """
    micros = np.argsort(-cost, kind="stable").reshape(-1, dp_size)
    dealt = np.empty_like(micros)
    done = np.zeros(dp_size)
    for micro, rows in enumerate(micros):
        dealt[micro, np.argsort(done, kind="stable")] = rows
        done += cost[dealt[micro]]
    return dealt


def rank_rows(
    step: StepRows, costs: SampleCosts, dp_rank: int, dp_size: int, vision_chunk: int
) -> list[MicroRow]:
    """The rows that a data-parallel rank accumulates in a step; global_batch / dp_size of them."""
    cost = np.array([row_cost(costs, row) for row in step.rows])
    views = [int(costs.tiles[row].sum()) for row in step.rows]
    pictures = [int(costs.pictures[row].sum()) for row in step.rows]
    return [
        MicroRow(
            step.rows[together[dp_rank]],
            max(vision_calls_needed(views[row], pictures[row], vision_chunk) for row in together),
        )
        for together in deal_rows(cost, dp_size).tolist()
    ]


@dataclass(frozen=True)
class RankRows:
    """The rows of one rank over `steps` optimizer steps from row `first_row` on, worked out while they are
    iterated over.

    end_row: rows of the run; there are none after it.
    """

    plan: Plan
    dp_rank: int
    dp_size: int
    vision_chunk: int
    first_row: int
    steps: int
    end_row: int | None = None

    def __len__(self) -> int:
        return self.steps * self.plan.global_batch // self.dp_size

    def __iter__(self) -> Iterator[MicroRow]:
        row = self.first_row
        for _ in range(self.steps):
            step = self.plan.step(row, self.end_row)
            row += step.taken
            yield from rank_rows(step, self.plan.costs, self.dp_rank, self.dp_size, self.vision_chunk)


def sample_work(costs: SampleCosts, samples: np.ndarray | None = None) -> np.ndarray:
    """float64 [samples]: work of each sample in the work of one token's linear layers, by the FLOPs of the
    published sizes.

    A token costs 7.25 GFLOP, attention 0.197 MFLOP x L x L in a document of L tokens (half masked), a view
    0.37 TFLOP in the tower.
    """
    chosen = slice(None) if samples is None else samples
    tokens = costs.tokens[chosen].astype(np.float64)
    return tokens + tokens * tokens / 37_000 + 51.0 * (costs.tiles[chosen] + costs.pictures[chosen])


def row_cost(costs: SampleCosts, samples: np.ndarray) -> float:
    """Work of a row: that of its samples, which never attend to each other."""
    return float(sample_work(costs, samples).sum())

"""Which samples form which packed row, and which rank takes which row. No torch.

The rows of a run are one endless sequence: the rows of epoch 0, then those of epoch 1, and so on. An epoch
packs every sample exactly once (for a mixture of datasets see `epoch.Layout`). An optimizer step takes the
next `global_batch` rows, also across the border of two epochs, so no row is dropped or repeated. If a run
ends with an epoch, its last step may get fewer rows than `global_batch`; their documents are then dealt out
again to `global_batch` rows. The sequence does not depend on the number of ranks, so resuming needs a single
number: the rows consumed.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass, field

import numpy as np

from phi3v_dist.data.epoch import EpochRows, Layout, PackingSettings, epoch_rows
from phi3v_dist.data.pack import spread
from phi3v_dist.data.plan_files import PlanFiles
from phi3v_dist.data.tokens import SampleCosts
from phi3v_dist.processor.geometry import vision_calls_needed
from shards.common.errors import BadInputError

_KEPT_EPOCHS = 2  # in memory


@dataclass(frozen=True)
class StepRows:
    """The rows of one optimizer step.

    rows: for each of the global_batch rows its sample numbers, int64 [samples]. epoch: of the first row.
    targets: target tokens of all rows, the denominator of the loss. taken: rows of the sequence that the step
    consumes; fewer than global_batch at the end of a run.
    """

    rows: tuple[np.ndarray, ...]
    epoch: int
    targets: int
    taken: int


@dataclass
class Plan:
    """The rows of a run.

    costs: of the samples of the train split. seq_len: largest number of tokens of a row. over_long: "fail"
    refuses longer samples, any other value drops them. layout: shards and datasets of the samples. files:
    where epochs are kept for other processes and later starts.
    Raises BadInputError if a sample is too long and over_long is "fail", or if no sample fits.
    """

    costs: SampleCosts
    seq_len: int
    seed: int
    _: KW_ONLY
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
    # The train loop and the thread that feeds the data workers both use the plan.
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
        """The rows of an epoch; the latest few stay in memory."""
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
            usable=self._usable,
            settings=PackingSettings(
                self.seq_len, self.global_batch, self.seed, shuffle=self.shuffle, packing=self.packing
            ),
            epoch=number,
            phase=phase,
        )

    def steps_between(self, first_row: int, end_row: int) -> int:
        """Optimizer steps that take the rows from first_row to before end_row."""
        return max(0, -(-(end_row - first_row) // self.global_batch))

    def steps_of(self, epochs: float) -> int:
        """Optimizer steps that take the rows of this many epochs."""
        return self.steps_between(0, self.end_row(epochs))

    def step(self, first_row: int, end_row: int | None = None) -> StepRows:
        """The rows of the optimizer step that begins with row `first_row`; rows from `end_row` on are left
        out.
        """
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
            self.costs.tokens[samples],
            sample_work(self.costs, samples),
            self.global_batch,
            seq_len=self.seq_len,
        )
        return None if parts is None else [samples[part] for part in parts]

    def fill(self, epoch: int) -> float:
        """Tokens of an epoch as a fraction of its rows times seq_len."""
        rows = self.epoch(epoch)
        return float(self.costs.tokens[rows.samples].sum() / (len(rows) * self.seq_len))

    def end_row(self, epochs: float) -> int:
        """The number of rows in this many epochs; a fraction of an epoch is rounded up to whole rows."""
        whole = int(epochs)
        while len(self._first_row) <= whole:  # keeps the files of the early epochs, which are needed first
            self.plan_ahead(self._first_row[-1] + 1)
        part = int(np.ceil((epochs - whole) * len(self.epoch(whole)))) if epochs > whole else 0
        return self._start(whole) + part

    def plan_ahead(self, end_row: int) -> None:
        """Plans every epoch with rows before `end_row` and keeps it in a file for the other processes."""
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
    """One row of one rank. samples: int64 [samples], numbers into the index. vision_calls: calls of the
    vision tower that every rank makes in this micro-step.
    """

    samples: np.ndarray
    vision_calls: int


def deal_rows(cost: np.ndarray, dp_size: int) -> np.ndarray:
    """int64 [micro-steps, dp_size]: the row of a step that each rank takes in each micro-step.

    cost: float64 [rows of the step]. Rows of similar cost share a micro-step, because under ZeRO-3 all ranks
    wait for the slowest in each; within a micro-step, the rank with the least work so far gets the costliest
    row.
    """
    micros = np.argsort(-cost, kind="stable").reshape(-1, dp_size)
    dealt = np.empty_like(micros)
    done = np.zeros(dp_size)
    for micro, rows in enumerate(micros):
        dealt[micro, np.argsort(done, kind="stable")] = rows
        done += cost[dealt[micro]]
    return dealt


def rank_rows(
    step: StepRows, costs: SampleCosts, *, dp_rank: int, dp_size: int, vision_chunk: int
) -> list[MicroRow]:
    """The global_batch / dp_size rows that a data-parallel rank accumulates in a step. vision_chunk:
    largest number of views in a call of the vision tower.
    """
    cost = np.array([row_cost(costs, row) for row in step.rows])
    views = [int(costs.tiles[row].sum()) for row in step.rows]
    images = [int(costs.images[row].sum()) for row in step.rows]
    return [
        MicroRow(
            step.rows[together[dp_rank]],
            max(vision_calls_needed(views[row], images[row], vision_chunk) for row in together),
        )
        for together in deal_rows(cost, dp_size).tolist()
    ]


@dataclass(frozen=True)
class RankRows:
    """The rows of one rank in `steps` optimizer steps from row `first_row` on, computed during iteration.

    end_row: number of rows of the run; None: endless.
    """

    plan: Plan
    _: KW_ONLY
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
            yield from rank_rows(
                step,
                self.plan.costs,
                dp_rank=self.dp_rank,
                dp_size=self.dp_size,
                vision_chunk=self.vision_chunk,
            )


def sample_work(costs: SampleCosts, samples: np.ndarray | None = None) -> np.ndarray:
    """float64 [samples]: the work of each sample, in units of the work of one token in the linear layers.

    By the FLOPs of the published model: a token costs 7.25 GFLOP, attention 0.197 MFLOP x L x L in a document
    of L tokens (half is masked), a view 0.37 TFLOP in the vision tower.
    """
    chosen = slice(None) if samples is None else samples
    tokens = costs.tokens[chosen].astype(np.float64)
    return tokens + tokens * tokens / 37_000 + 51.0 * (costs.tiles[chosen] + costs.images[chosen])


def row_cost(costs: SampleCosts, samples: np.ndarray) -> float:
    """The work of a row: the sum over its samples, which never attend to each other."""
    return float(sample_work(costs, samples).sum())

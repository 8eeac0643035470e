"""What guards a run against bad numbers and bad data.

`NumberGuard` looks at the loss and the gradient norm of every step: steps that are skipped, losses that jump.
`DataGuard` counts the samples that cannot be used. What they decide is the same on all ranks, so the ranks
agree without a message.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from phi3v_dist.data.loader import LoadedRow
from phi3v_dist.exits import DivergedError
from phi3v_dist.parallel.mesh import Mesh
from shards.common.files import write_atomically

SPIKE_SIGMAS = 6.0
SPIKE_RATIO = 1.2
BAD_SAMPLES = "bad-samples.txt"
_MEMORY = 50  # steps over which the usual loss is averaged
_LEARNING = 20  # steps before anything counts as unusual
_ENOUGH = 1000  # samples that a fraction is taken of, at least, unless an epoch has fewer
_SHOWN = 10  # bad samples in the message that ends a run
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RowLoss:
    """A row of this rank and what it cost. nll: sum of its loss over this rank's part of the row, a scalar on
    the device. keys: gives the keys of its samples.
    """

    loaded: LoadedRow
    nll: torch.Tensor
    keys: Callable[[], list[str]]


@dataclass(frozen=True)
class StepNumbers:
    """step: number of the step, from 0. loss: mean over its target tokens. grad_norm: global. bad_streak:
    skipped steps in a row by now, 0 if this one was not skipped.
    """

    step: int
    loss: float
    grad_norm: float
    bad_streak: int


class NumberGuard:
    """Watches the loss and the gradient norm; `check` after every step, on all ranks.

    Out: `logs/rows-rank-N.jsonl` (N: the data-parallel rank), one line for every row that may be the cause of
    a skipped step or a jump of the loss, with the keys of its samples. spikes: jumps so far.
    """

    def __init__(self, logs: Path, mesh: Mesh, max_bad_steps: int) -> None:
        self._file = logs / f"rows-rank-{mesh.dp_rank}.jsonl"
        self._mesh, self._max_bad_steps = mesh, max_bad_steps
        self._mean = self._variance = 0.0
        self._seen = 0
        self.spikes = 0

    def check(self, numbers: StepNumbers, rows: Sequence[RowLoss]) -> None:
        """Raises DivergedError after max_bad_steps skipped steps in a row."""
        step, loss, norm = numbers.step, numbers.loss, numbers.grad_norm
        if not numbers.bad_streak:
            if self._is_spike(loss):
                _log.warning("step %d: the loss jumped to %.4g (gradient norm %.4g)", step, loss, norm)
                self._write_rows("the loss jumped", numbers, rows)
            return
        why = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient norm is {norm}"
        self._write_rows(why, numbers, rows)
        _log.warning("step %d: %s; skipped on all ranks (%d in a row)", step, why, numbers.bad_streak)
        if numbers.bad_streak >= self._max_bad_steps:
            raise DivergedError(
                f"step {step}: {why}, and {numbers.bad_streak} steps in a row were skipped; weights and "
                f"optimizer are as they were before these; their rows are in "
                f"{self._file.parent}/rows-rank-*.jsonl; lower train.lr, or take the rows out if they are "
                "always the same ones"
            )

    def _is_spike(self, loss: float) -> bool:
        """Whether a finite loss is far above the usual one; updates what is usual."""
        usual, spread = self._mean, math.sqrt(self._variance)
        unusual = self._seen >= _LEARNING and loss > max(usual + SPIKE_SIGMAS * spread, SPIKE_RATIO * usual)
        weight = 1 / min(self._seen + 1, _MEMORY)
        # A jump enters the average only up to the limit, so that it does not hide the next one.
        kept = min(loss, usual + SPIKE_SIGMAS * spread) if unusual else loss
        self._mean += weight * (kept - usual)
        self._variance = (1 - weight) * (self._variance + weight * (kept - usual) ** 2)
        self._seen += 1
        self.spikes += unusual
        return unusual

    def _write_rows(self, why: str, numbers: StepNumbers, rows: Sequence[RowLoss]) -> None:
        """Notes this rank's rows: those with a non-finite loss if there are any on any rank, else all."""
        sums = self._mesh.sum_of_row([float(each.nll) for each in rows])
        if self._mesh.sp_rank > 0:  # the first of the ranks that share the row writes
            return
        means = [nll / max(1, each.loaded.row.num_targets) for nll, each in zip(sums, rows, strict=True)]
        entries: list[dict[str, Any]] = [
            {
                "step": numbers.step, "rank": self._mesh.dp_rank, "micro": micro, "why": why,
                "row_loss": _json_number(mean), "loss": _json_number(numbers.loss),
                "grad_norm": _json_number(numbers.grad_norm), "keys": each.keys(),
            }
            for micro, (each, mean) in enumerate(zip(rows, means, strict=True))
            if math.isfinite(numbers.loss) or not math.isfinite(mean)
        ]  # fmt: skip
        if not entries:
            return
        try:
            with self._file.open("a") as stream:
                stream.writelines(json.dumps(entry) + "\n" for entry in entries)
        except OSError as error:
            _log.warning("%s: cannot be written: %s", self._file, error)
        for entry in entries:
            _log.warning(
                "step %d, rank %d, micro %d: row loss %s: samples %s",
                numbers.step, entry["rank"], entry["micro"], entry["row_loss"], ", ".join(entry["keys"]),
            )  # fmt: skip


class DataGuard:
    """The samples of this rank that could not be used since the start of the process.

    max_fraction: data.max_bad_fraction. epoch_samples: samples of an epoch. Out: RUN/bad-samples.txt when the
    run ends because of them.
    """

    def __init__(self, max_fraction: float, epoch_samples: int, run_dir: Path) -> None:
        self._max_fraction, self._epoch_samples, self._run_dir = max_fraction, epoch_samples, run_dir
        self._reasons: dict[str, None] = {}

    def note(self, step: int, reasons: Sequence[str]) -> None:
        """reasons: "shard key: reason" of the bad samples of a step."""
        for reason in reasons:
            _log.warning("step %d: sample left out: %s", step, reason)
            self._reasons[reason] = None

    def check(self, bad: int, seen: int, mesh: Mesh) -> None:
        """bad, seen: samples of all ranks so far; the same on every rank.

        Raises DivergedError with the list if there are too many bad ones.
        """
        if bad <= allowed_bad_samples(self._max_fraction, seen, self._epoch_samples):
            return
        listed = sorted({reason for reasons in mesh.gather(list(self._reasons)) for reason in reasons})
        file = self._run_dir / BAD_SAMPLES
        if mesh.is_main:
            write_atomically(file, "".join(f"{reason}\n" for reason in listed).encode())
        more = f"\n  ... and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
        shown = "".join(f"\n  {reason}" for reason in listed[:_SHOWN])
        raise DivergedError(
            f"{bad} unreadable samples among {seen} seen, more than data.max_bad_fraction="
            f"{self._max_fraction:g} allows; all of them are in {file}; run `phi3v shards verify` on the "
            f"dataset{shown}{more}"
        )


def allowed_bad_samples(max_fraction: float, seen: int, epoch_samples: int) -> int:
    """How many bad samples do not end a run that has seen `seen` samples. Pure."""
    if not max_fraction:
        return 0
    return max(1, math.ceil(max_fraction * max(seen, min(_ENOUGH, epoch_samples))))


def _json_number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)

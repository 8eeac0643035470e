"""Keeps an eye on the numbers of training: steps that are skipped, losses that jump.

In: each step's loss, gradient norm and rows. Out: `logs/rows-rank-N.jsonl` (N: the data-parallel rank), one
line for every row that a skipped step or a jump of the loss is to be blamed on, with the keys of its samples;
counts for the metrics. What decides is the same on all ranks, so they agree without asking. Called by the
train loop.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from phi3v_dist.data.loader import LoadedRow
from phi3v_dist.exits import DivergedError
from phi3v_dist.parallel.mesh import Mesh

SPIKE_SIGMAS = 6.0
SPIKE_RATIO = 1.2
_MEMORY = 50  # steps over which the usual loss is averaged
_LEARNING = 20  # steps before anything counts as unusual
_log = logging.getLogger(__name__)

RowLoss = tuple[LoadedRow, torch.Tensor, Callable[[], list[str]]]
"""A row, the sum of its loss over this rank's part of it (a scalar on the device), and what gives the keys of
its samples.
"""


class Stability:
    """The loss and gradient norm so far; `look_at` after every step, on all ranks."""

    def __init__(self, logs: Path, mesh: Mesh, max_bad_steps: int) -> None:
        self._file = logs / f"rows-rank-{mesh.dp_rank}.jsonl"
        self._mesh, self._max_bad_steps = mesh, max_bad_steps
        self._mean = self._variance = 0.0
        self._seen = 0
        self.spikes = 0

    def is_spike(self, loss: float) -> bool:
        """Whether a finite loss is far above the usual one; then adds it to what is usual."""
        usual, spread = self._mean, math.sqrt(self._variance)
        unusual = self._seen >= _LEARNING and loss > max(usual + SPIKE_SIGMAS * spread, SPIKE_RATIO * usual)
        weight = 1 / min(self._seen + 1, _MEMORY)
        # one jump must not hide the next
        kept = min(loss, usual + SPIKE_SIGMAS * spread) if unusual else loss
        self._mean += weight * (kept - usual)
        self._variance = (1 - weight) * (self._variance + weight * (kept - usual) ** 2)
        self._seen += 1
        self.spikes += unusual
        return unusual

    def look_at(self, step: int, loss: float, norm: float, streak: int, rows: Sequence[RowLoss]) -> None:
        """After step number `step` (from 0). loss: mean over its targets. streak: skipped steps in a row by
        now.

        Raises DivergedError after max_bad_steps skipped steps in a row.
        """
        if not streak:
            if self.is_spike(loss):
                _log.warning("step %d: the loss jumped to %.4g (gradient norm %.4g)", step, loss, norm)
                self._write_rows(step, "the loss jumped", loss, norm, rows)
            return
        why = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient norm is {norm}"
        self._write_rows(step, why, loss, norm, rows)
        _log.warning("step %d: %s; skipped on all ranks (%d in a row)", step, why, streak)
        if streak >= self._max_bad_steps:
            raise DivergedError(
                f"step {step}: {why}, and {streak} steps in a row were skipped; weights and optimizer "
                f"are as they were before these; their rows are in {self._file.parent}/rows-rank-*.jsonl; "
                "lower train.lr, or take the rows out if they are always the same ones"
            )

    def _write_rows(self, step: int, why: str, loss: float, norm: float, rows: Sequence[RowLoss]) -> None:
        """Notes this rank's rows: those without a finite loss if there are any on any rank, else all."""
        sums = self._mesh.sum_of_row([float(summed) for _, summed, _ in rows])
        if self._mesh.sp_rank > 0:  # the first of the ranks that share the row writes
            return
        rank = self._mesh.dp_rank
        means = [nll / max(1, loaded.row.num_targets) for nll, (loaded, _, _) in zip(sums, rows, strict=True)]
        entries: list[dict[str, Any]] = [
            {
                "step": step, "rank": rank, "micro": micro, "why": why, "row_loss": _number(mean),
                "loss": _number(loss), "grad_norm": _number(norm), "keys": keys(),
            }
            for micro, ((_, _, keys), mean) in enumerate(zip(rows, means, strict=True))
            if math.isfinite(loss) or not math.isfinite(mean)
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
                step, rank, entry["micro"], entry["row_loss"], ", ".join(entry["keys"]),
            )  # fmt: skip


def _number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)

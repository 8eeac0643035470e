"""One optimizer step: rows -> loss -> gradients -> update, on all ranks together.

The loss of a step is the sum over the target tokens of its rows divided by their number, over all ranks and
accumulation steps: the same curve at any number of ranks. A step with a non-finite loss or gradient norm
updates only the progress; a step whose data did not come updates nothing.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, fields, replace
from functools import partial

import torch

from phi3v_dist.budget.flops import Flops
from phi3v_dist.checkpoint.meta import Progress
from phi3v_dist.data.loader import LoadedRow, RowCounts
from phi3v_dist.data.plan import StepRows
from phi3v_dist.engine import step as engine_step
from phi3v_dist.parallel.mesh import Mesh
from phi3v_dist.train.feed import FedRow
from phi3v_dist.train.guards import RowLoss, StepNumbers
from phi3v_dist.train.job import Job
from phi3v_dist.train.optim import learning_rate, set_learning_rate

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, the same on all ranks but for the times.

    is_complete: False if data did not come on some rank; then nothing was updated, and the next start takes
    the step again. is_finite: False if the loss or the gradient norm is NaN or Inf; then the weights were not
    updated. stop: whether a rank was asked to stop. nll: sum of the loss over `targets` target tokens.
    counts, flops: of all rows. rows: of the plan that the step consumed. grad_norm: global, before clipping.
    waited_s, busy_s: seconds waiting for data, and of the whole step, on this rank.
    """

    is_complete: bool
    is_finite: bool
    stop: bool
    epoch: int
    rows: int
    learning_rate: float
    nll: float
    targets: int
    grad_norm: float
    counts: RowCounts
    flops: Flops
    waited_s: float
    busy_s: float

    def advance(self, progress: Progress) -> Progress:
        """The progress after this step."""
        if not self.is_complete:
            return progress
        return replace(
            progress,
            step=progress.step + 1,
            rows=progress.rows + self.rows,
            samples=progress.samples + self.counts.samples,
            tokens=progress.tokens + self.counts.tokens,
            images=progress.images + self.counts.images,
            bad_samples=progress.bad_samples + self.counts.bad,
            skipped_steps=progress.skipped_steps + (not self.is_finite),
            bad_streak=0 if self.is_finite else progress.bad_streak + 1,
        )


@dataclass(frozen=True)
class _Micro:
    """One row of this rank: nll, a detached scalar on the device, is the loss summed over its targets."""

    fed: FedRow
    nll: torch.Tensor
    waited_s: float


@dataclass(frozen=True)
class StepSums:
    """What the ranks add up in the one all-reduce of a step.

    nll: of this rank's part of its rows. stop, incomplete: ranks that were asked to stop, whose data did not
    come. save_failures: of the main rank, in a row. The rest counts each row once, although the ranks of a
    sequence group share it.
    """

    nll: float
    stop: float
    incomplete: float
    save_failures: float
    model_flops: float
    hardware_flops: float
    tokens: float
    positions: float
    images: float
    samples: float
    masked: float
    bad: float

    @classmethod
    def of(cls, job: Job, micros: Sequence[_Micro]) -> StepSums:
        """Those of this rank."""
        rows = _rows_of_this_rank(job, micros)
        flops = sum(map(job.flops_of, rows), Flops(0.0, 0.0))
        counts = sum(map(RowCounts.of, rows), RowCounts())
        return cls(
            nll=float(torch.stack([each.nll for each in micros]).double().sum()),
            stop=float(job.run.stop.requested),
            incomplete=float(not all(each.fed.is_real for each in micros)),
            save_failures=float(job.saver.failures),
            model_flops=flops.model,
            hardware_flops=flops.hardware,
            **asdict(counts),
        )

    def over_ranks(self, mesh: Mesh) -> StepSums:
        """Field by field, the sum over all ranks."""
        return StepSums(*mesh.sum(list(astuple(self))))

    @property
    def counts(self) -> RowCounts:
        """What the rows hold."""
        return RowCounts(**{field.name: int(getattr(self, field.name)) for field in fields(RowCounts)})


def train_step(job: Job, step_rows: StepRows, progress: Progress) -> StepResult:
    """Takes optimizer step number `progress.step` over the rows `step_rows` of the plan.

    Raises DivergedError after too many non-finite steps or bad samples, BadInputError after too many failed
    checkpoints; on all ranks.
    """
    began = time.perf_counter()
    rate = learning_rate(progress.step, job.schedule.total, job.config.train)
    torch.manual_seed(job.config.seed + 1_000_003 * progress.step + job.mesh.rank)  # dropout, if any
    # The engine divides gradients by ranks and micro-steps: scaled, they are those of the mean over all
    # targets of the step. With sequence parallelism a rank's loss is that of its slice of the row.
    scale = torch.tensor(job.mesh.size * job.accumulation / max(1, step_rows.targets), device=job.mesh.device)
    micros = [
        _forward_backward(job, step_rows, progress.step, micro=micro, scale=scale)
        for micro in range(job.accumulation)
    ]
    job.run.heartbeat.at(progress.step, "end of the step")
    loaded = _rows_of_this_rank(job, micros)
    job.data_guard.note(progress.step, [reason for each in loaded for reason in each.bad])
    sums = StepSums.of(job, micros).over_ranks(job.mesh)
    counts = sums.counts
    job.data_guard.check(progress.bad_samples + counts.bad, progress.samples + counts.samples, job.mesh)
    set_learning_rate(engine_step.param_groups(job.engine), rate)
    engine_step.apply(job.engine)
    norm = engine_step.gradient_norm(job.engine)
    job.saver.agree(int(sums.save_failures))

    result = StepResult(
        is_complete=sums.incomplete == 0,
        is_finite=math.isfinite(sums.nll) and math.isfinite(norm),
        stop=sums.stop > 0 or sums.incomplete > 0,
        epoch=step_rows.epoch,
        rows=step_rows.taken,
        learning_rate=rate,
        nll=sums.nll,
        targets=step_rows.targets - counts.masked,
        grad_norm=norm,
        counts=counts,
        flops=Flops(sums.model_flops, sums.hardware_flops),
        waited_s=sum(each.waited_s for each in micros),
        busy_s=time.perf_counter() - began,
    )
    _check(job, step_rows, progress, result=result, micros=micros)
    return result


def _rows_of_this_rank(job: Job, micros: Sequence[_Micro]) -> list[LoadedRow]:
    """Without stand-ins; only on the first of the ranks that share a row, so that each row counts once."""
    return [each.fed.loaded for each in micros if each.fed.is_real and job.mesh.sp_rank == 0]


def _forward_backward(job: Job, step_rows: StepRows, step: int, *, micro: int, scale: torch.Tensor) -> _Micro:
    """The row of accumulation step `micro` through the model and back. scale: factor on its loss."""
    asked = time.perf_counter()
    job.run.heartbeat.at(step, "waiting for data")
    fed = job.feed.next(step_rows, micro)
    waited = time.perf_counter() - asked
    job.run.heartbeat.at(step, "forward and backward")
    loss = job.engine(row=fed.loaded.row.to(job.mesh.device, non_blocking=True))
    nll = loss.detach()
    # A NaN on one rank makes the gradients of all ranks NaN, and the engine then does not update.
    is_good = torch.isfinite(nll) & fed.is_real
    engine_step.backward(job.engine, loss * torch.where(is_good, scale, math.nan))
    if micro < job.accumulation - 1:
        engine_step.accumulate(job.engine)
    return _Micro(fed, nll, waited)


def _check(
    job: Job, step_rows: StepRows, progress: Progress, *, result: StepResult, micros: Sequence[_Micro]
) -> None:
    """Looks at the numbers of a step. Raises DivergedError, and RuntimeError if the engine disagrees."""
    step = progress.step
    if not result.is_complete:
        _log.warning("step %d: not completed, data did not come; the next start takes it again", step)
        return
    if engine_step.was_applied(job.engine) != result.is_finite:
        raise RuntimeError(f"step {step}: loss {result.nll}, norm {result.grad_norm}; the engine disagrees")
    numbers = StepNumbers(
        step, result.nll / max(1, result.targets), result.grad_norm, result.advance(progress).bad_streak
    )
    job.number_guard.check(
        numbers,
        [
            RowLoss(each.fed.loaded, each.nll, partial(job.feed.keys, step_rows, micro))
            for micro, each in enumerate(micros)
        ],
    )

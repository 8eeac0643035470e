"""The train loop: claim the run directory, prepare, build, then for every step: rows -> loss -> update ->
log, evaluate, save.

In: the run's configuration and this process's place among the ranks. Out: the run directory (checkpoints,
metrics.jsonl, W&B files, logs). `phi3v train` calls it inside torchrun, the same on every rank.
"""

from __future__ import annotations

import logging
import time

from phi3v_dist.checkpoint import read as checkpoint
from phi3v_dist.checkpoint.meta import Progress
from phi3v_dist.config import RunConfig
from phi3v_dist.engine.step import param_groups
from phi3v_dist.exits import PreemptedError
from phi3v_dist.parallel.mesh import Mesh
from phi3v_dist.run.claim import claim
from phi3v_dist.run.layout import CHECKPOINTS
from phi3v_dist.train.due import Due
from phi3v_dist.train.job import Job, build
from phi3v_dist.train.optim import group_rates
from phi3v_dist.train.prepare import prepare
from phi3v_dist.train.step import train_step
from phi3v_dist.train.window import Metrics, Window
from shards.common.errors import BadInputError

_log = logging.getLogger(__name__)


def train(config: RunConfig, mesh: Mesh) -> Progress:
    """Trains until the run is done; resumes from the newest complete checkpoint if there is one.

    Raises BadInputError for what the user can fix, PreemptedError after a request to stop (with a checkpoint
    written), DivergedError for a loss that stays non-finite or unusable data, LostRankError when a rank is
    gone.
    """
    with claim(config, mesh) as run:
        ready = prepare(config, mesh, run)
        if ready.nothing_left:
            return ready.progress
        with build(config, mesh, run, ready=ready) as job:
            return loop(job)


def loop(job: Job) -> Progress:
    """Takes the steps that are left; what is due after each is done in the order that a restart relies on.

    The line of a step is written before its checkpoint: a run that resumes from the checkpoint finds all
    lines up to it. If an evaluation is interrupted, the line is kept with it as pending: the next start makes
    the evaluation, and then writes line and checkpoint.
    """
    progress = job.progress
    window = Window(job.mesh, seq_len=job.config.data.seq_len, peak_tflops=job.peak_tflops)
    while progress.step < job.schedule.total or job.pending.metrics is not None:
        owed = job.pending.metrics
        if owed is None:
            step = train_step(job, job.plan.step(progress.rows, job.end_row), progress)
            progress = step.advance(progress)
            window.add(step)
            due = Due.at(progress.step, job.schedule, stepped=step.is_complete, stop=step.stop)
        else:
            due = Due.at(progress.step, job.schedule, stepped=False, owed=True)
        metrics = dict(owed or {})
        if due.log:
            metrics = _flush(job, window, progress)
        if due.evaluate:
            due, metrics = _evaluate(job, progress.step, due, metrics=metrics)
        is_best = job.best.improves(metrics, job.saver.is_under_way)
        if job.tracker is not None and metrics and not due.interrupted:
            job.tracker.log(progress.step, metrics)
        fault = _save(job, progress, due, metrics=metrics, is_best=is_best, window=window)
        if owed is not None and not due.interrupted:
            job.pending.clear()
        if due.stop:
            raise _stopped(job, progress, fault)
        if due.last and fault is not None:
            raise BadInputError(
                f"{job.run.directory}: all steps are done, but the last checkpoint could not be written "
                f"({fault}); make room, then the same command resumes from the one before"
            )
    job.run.stop.remove_file()
    return progress


def _flush(job: Job, window: Window, progress: Progress) -> Metrics:
    rates = group_rates(param_groups(job.engine))
    metrics = window.flush(progress, rates=rates, spikes=job.number_guard.spikes)
    job.line.show(progress.step, metrics)
    return metrics


def _evaluate(job: Job, step: int, due: Due, *, metrics: Metrics) -> tuple[Due, Metrics]:
    """The metrics with those of the evaluation; or, interrupted, what is due then."""
    job.run.heartbeat.at(step, "evaluation")
    scores = job.evaluation.run(step, job.engine)
    if scores is None:
        _log.warning("step %d: evaluation interrupted by a request to stop; the next start makes it", step)
        job.pending.record(step, metrics)
        return due.after_interruption(), metrics
    shown = [f"{name} {value:.4g}" for name, value in scores.items() if value is not None]
    _log.info("step %d  %s", step, "  ".join(shown))
    return due, {**metrics, **scores}


def _save(
    job: Job, progress: Progress, due: Due, *, metrics: Metrics, is_best: bool, window: Window
) -> str | None:
    """Saves if it is due or the evaluation is the best so far; why the last checkpoint of the process could
    not be written, else None.
    """
    as_best = job.best.record_when_saved(progress.step, metrics) if is_best else None
    if due.last:
        job.run.heartbeat.at(progress.step, "last save")
        return job.saver.save_surely(progress, as_best)
    if due.save or is_best:
        job.run.heartbeat.at(progress.step, "save")
        began = time.perf_counter()
        job.saver.save(progress, as_best)
        window.add_save(time.perf_counter() - began)
    return None


def _stopped(job: Job, progress: Progress, fault: str | None) -> PreemptedError:
    """The error that ends a run that was asked to stop. fault: why there is no checkpoint of `progress`."""
    if job.tracker is not None:
        job.tracker.preempting()
    job.run.stop.remove_file()
    if progress.step == 0:
        how = "nothing is learnt yet; the same command starts again"
    elif fault is None:
        how = "checkpoint written; the same command resumes from there"
    else:
        last = checkpoint.pointed(job.run.directory / CHECKPOINTS, checkpoint.LATEST)
        how = (
            f"its checkpoint could NOT be written ({fault}); the same command resumes from "
            f"{last or 'the beginning'}"
        )
    return PreemptedError(f"stopped by a signal after step {progress.step} of {job.schedule.total}, {how}")

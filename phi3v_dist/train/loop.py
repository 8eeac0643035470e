"""The train loop, to be read from top to bottom: prepare, resume, then for every step: rows -> loss -> step
-> log, evaluate, save.

In: the run's configuration and this process's place among the ranks. Out: the run directory (checkpoints,
metrics.jsonl, W&B files, logs). Called by `phi3v train` inside torchrun, the same on every rank.

The loss of a step is the sum over the target tokens of its rows divided by their number, over all ranks and
accumulation steps: the same curve at any number of ranks.
"""

from __future__ import annotations

import gc
import logging
import math
import sys
import time
from collections.abc import Callable
from dataclasses import astuple, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from phi3v_dist.budget.flops import Flops, peak_tflops, row_flops, shape_of, utilisation
from phi3v_dist.checkpoint import read as checkpoint
from phi3v_dist.checkpoint.meta import Progress
from phi3v_dist.checkpoint.save import ModelCard, Saver
from phi3v_dist.config import RunConfig
from phi3v_dist.data.loader import LoadedRow, RowCounts, load_rows
from phi3v_dist.data.plan import RankRows, StepRows
from phi3v_dist.data.prepare import PreparedData, data_fingerprint, prepare_data
from phi3v_dist.engine.nvme import prepare_swapping, remove_swapped
from phi3v_dist.engine.zero import (
    make_engine,
    partitioned_fraction,
    partitioned_parameters,
    prepare_deepspeed,
    zero_config,
)
from phi3v_dist.evaluation.in_training import BestSoFar, PendingEvaluation, Validation
from phi3v_dist.exits import PreemptedError
from phi3v_dist.model.dtypes import torch_dtype
from phi3v_dist.model.groups import choose_learning
from phi3v_dist.model.hub import build_model, load_weights
from phi3v_dist.model.memory import save_memory
from phi3v_dist.parallel.heartbeat import Heartbeat
from phi3v_dist.parallel.mesh import Mesh
from phi3v_dist.pretrained import Pretrained, model_config_of, prepare_pretrained
from phi3v_dist.run.claim import RunLock, open_run_dir
from phi3v_dist.run.layout import CHECKPOINTS, DATA, RUN_ID
from phi3v_dist.run.limits import check_limits, check_offload_path
from phi3v_dist.run.preflight import check_room, check_same_everywhere
from phi3v_dist.run.provenance import provenance
from phi3v_dist.run.stop import STOP, Stop
from phi3v_dist.tracking.progress import ProgressLine
from phi3v_dist.tracking.tracker import Tracker, host_memory, watch_node
from phi3v_dist.train.feed import FedRow, Feed
from phi3v_dist.train.optim import group_rates, learning_rate, parameter_groups, set_learning_rate
from phi3v_dist.train.quarantine import Quarantine
from phi3v_dist.train.stability import Stability
from shards.common.errors import BadInputError

LOCK_WAIT_S = 180.0
"""Seconds that a start waits for the ranks of a killed launcher, which still save."""
_log = logging.getLogger(__name__)


def train(config: RunConfig, mesh: Mesh) -> Progress:
    """Trains until the run is done; goes on from the newest whole checkpoint if there is one.

    Raises BadInputError for what the user can mend, PreemptedError after a signal (with a checkpoint
    written), DivergedError for numbers that are not finite again and again or unusable data, LostRankError
    when a peer is gone.
    """
    stop = Stop(config.run_dir / STOP if mesh.local_rank == 0 else None)
    lock = RunLock(config.run_dir)
    with Heartbeat(mesh, config.run_dir / "logs") as heartbeat:
        mesh.on_main(lambda: lock.take(min(LOCK_WAIT_S, mesh.timeout_s / 2)))
        try:
            return _train(config, mesh, stop, heartbeat)
        finally:
            if config.parallel.offload_optimizer == "nvme":
                remove_swapped(config, mesh)
            lock.release()


def _train(config: RunConfig, mesh: Mesh, stop: Stop, heartbeat: Heartbeat) -> Progress:
    run_dir = config.run_dir
    fingerprint = mesh.everywhere(lambda: data_fingerprint(config))
    check_same_everywhere(config, fingerprint, mesh)
    resume = checkpoint.find_resume(run_dir / CHECKPOINTS, mesh)
    stored = None if resume is None else checkpoint.read_meta(resume)
    before, wandb_id = (None, None) if stored is None else (stored.run, stored.wandb_id)
    mesh.on_main(lambda: open_run_dir(config, fingerprint, before, wandb_id=wandb_id))

    gpu_bytes = torch.cuda.mem_get_info()[1] if mesh.device.type == "cuda" else None
    mesh.everywhere(lambda: check_offload_path(config))
    mesh.everywhere(lambda: check_limits(config, model_config_of(config), mesh.size, gpu_bytes))
    if config.parallel.offload_optimizer == "nvme":
        prepare_swapping(config, mesh)
    pretrained = prepare_pretrained(config, run_dir, mesh)
    accumulation = config.train.rows_each(mesh.dp_size)
    data = _prepare_data(config, pretrained, run_dir, mesh)
    plan = data.plan
    end_row = plan.end_row(config.train.epochs) if config.train.epochs else None
    progress = Progress() if stored is None else stored.progress
    steps = config.train.steps or progress.step + plan.steps_between(progress.rows, end_row or 0)
    pending = PendingEvaluation(run_dir, progress.step, mesh)
    if resume is not None and progress.step >= steps and pending.metrics is None:
        _log.info("%s: already finished at step %d; nothing to do", run_dir, progress.step)
        return progress
    mesh.on_main(lambda: check_room(config, pretrained.model_config, run_dir, resume is not None))
    validation = mesh.everywhere(lambda: Validation(config, pretrained, mesh, lambda: stop.asked))
    _leave_if_asked(stop, mesh)

    prepare_deepspeed(mesh)
    engine = _make_engine(config, pretrained, accumulation, mesh)
    if resume is not None:
        progress = checkpoint.load(engine, resume, mesh)
        _log.info("going on from %s", resume)
    card = ModelCard(
        pretrained.model_config.to_dict(),
        config.data.num_crops,
        pretrained.model_dir,
        pretrained.tokenizer_dir,
    )
    about = _about(config, fingerprint, mesh, engine)
    tracker = Tracker(config, run_dir, progress.step, about, progress.rows) if mesh.is_main else None
    saved = progress.step if pending.metrics is None else 0  # again, for it may turn out to be the best
    saver = Saver(
        engine, run_dir / CHECKPOINTS, mesh,
        card=card, run=about, wandb_id=run_dir / RUN_ID, config=config.checkpoint, saved_step=saved,
    )  # fmt: skip
    stability = Stability(run_dir / "logs", mesh, config.train.max_bad_steps)
    best = BestSoFar(config, mesh)

    _log.info(
        "%s: %d steps of %d rows on %d ranks x %d accumulation steps, %d samples, %.1f%% fill; ZeRO-3 keeps "
        "%.1f%% of the weights on each rank",
        config.name, steps, config.train.global_batch, mesh.dp_size, accumulation, len(plan.costs),
        100 * plan.fill(0), 100 * partitioned_fraction(engine, mesh),
    )  # fmt: skip
    rows = load_rows(
        data.maker,
        RankRows(
            plan,
            mesh.dp_rank,
            mesh.dp_size,
            config.views_per_call,
            progress.rows,
            steps - progress.step,
            end_row,
        ),
        config.data.workers,
        config.data.prefetch,
        config.parallel.timeout_s,
        pin=mesh.device.type == "cuda",
        seed=config.seed,
    )
    quarantine = Quarantine(config.data.max_bad_fraction, plan.epoch_samples, run_dir)
    peak = config.parallel.peak_tflops or peak_tflops(mesh.device)
    window = Window(peak_tflops=peak)

    def work(loaded: LoadedRow) -> Flops:
        return row_flops(config, pretrained.model_config, shape_of(loaded.row, loaded.tokens))

    feed = Feed(rows, data.maker, plan, config.views_per_call, mesh, stop)
    node = watch_node(config, run_dir, mesh)
    line = ProgressLine(steps, mesh.is_main and sys.stdout.isatty())
    exit_code = 1
    try:
        _leave_if_asked(stop, mesh)
        while progress.step < steps or pending.metrics is not None:
            began_at, stopping, broken_off = progress.step, False, False
            if pending.metrics is None:
                step_rows = plan.step(progress.rows, end_row)
                rate = learning_rate(progress.step, steps, config.train)
                torch.manual_seed(config.seed + 1_000_003 * progress.step + mesh.rank)  # dropout, if any
                progress, stopping = _step(
                    engine, feed, accumulation, step_rows, rate, progress, window, quarantine, saver,
                    stability, heartbeat, stop, mesh, work,
                )  # fmt: skip
            stepped, done = progress.step > began_at, progress.step == steps

            validating = done or (config.eval.every_steps and progress.step % config.eval.every_steps == 0)
            saving = done or stopping or progress.step % config.checkpoint.every_steps == 0
            metrics = pending.metrics or {}
            # Windows end where a run may be interrupted, so that one that was has the same lines.
            if stepped and (saving or validating or progress.step % config.track.log_every == 0):
                metrics = window.metrics(engine, rate, step_rows.epoch, progress, config.data.seq_len, mesh)
                metrics["train/loss_spikes"] = stability.spikes
                line.show(progress.step, metrics)
                window = Window(peak_tflops=peak)
            if (stepped and validating) or pending.metrics is not None:
                heartbeat.at(progress.step, "evaluation")
                scores = validation.run(progress.step, engine)
                if scores is None:
                    stopping, broken_off = True, True
                    _log.warning(
                        "step %d: evaluation broken off, the run is to stop; the next start makes it",
                        progress.step,
                    )
                    pending.note(progress.step, metrics)
                else:
                    shown = [f"{k} {v:.4g}" for k, v in scores.items() if v is not None]
                    _log.info("step %d  %s", progress.step, "  ".join(shown))
                    metrics = {**metrics, **scores}
            is_best = best.improves(metrics, saver.is_under_way)
            # The line comes before the checkpoint: whoever goes on from it finds all lines up to it.
            if tracker is not None and metrics and not broken_off:
                tracker.log(progress.step, metrics)
            if done or stopping:
                heartbeat.at(progress.step, "last save")
                fault = saver.save_surely(progress, best.note(progress.step, metrics) if is_best else None)
            elif saving or is_best:
                heartbeat.at(progress.step, "save")
                began = time.perf_counter()
                saver.save(progress, best.note(progress.step, metrics) if is_best else None)
                window.saved_in = time.perf_counter() - began
            if pending.metrics is not None and not broken_off:
                pending.settle()
            if stopping and (not done or broken_off):
                if tracker is not None:
                    tracker.preempting()
                stop.forget_file()
                last = checkpoint.pointed(run_dir / CHECKPOINTS, checkpoint.LATEST)
                raise PreemptedError(_stopped_line(progress, steps, fault, last))
            if done and fault is not None:
                raise BadInputError(
                    f"{run_dir}: all steps are done, but the last checkpoint could not be written "
                    f"({fault}); make room, then the same command goes on from the one before"
                )
        stop.forget_file()
        exit_code = 0
        return progress
    except Exception as error:
        if (lost := heartbeat.lost(error)) is not None:
            raise lost from error
        raise
    finally:
        rows.close()
        line.close()
        if node is not None:
            node.close()
        if tracker is not None:
            tracker.close(exit_code)
        engine.destroy()  # without it 3 of 48 CPU runs aborted at exit (DeepSpeed 0.19.8)
        del engine, saver
        gc.collect()


def _step(
    engine: Any,
    feed: Feed,
    accumulation: int,
    step_rows: StepRows,
    rate: float,
    progress: Progress,
    window: Window,
    quarantine: Quarantine,
    saver: Saver,
    stability: Stability,
    heartbeat: Heartbeat,
    stop: Stop,
    mesh: Mesh,
    work: Callable[[LoadedRow], Flops],
) -> tuple[Progress, bool]:
    """One optimizer step. Returns the progress after it, and whether any rank has been told to stop.

    A step whose loss or gradient norm is not finite changes nothing but the progress; one that was broken off
    because data did not come any more not even that.
    """
    began = time.perf_counter()
    # DeepSpeed divides gradients by ranks and micro-steps; so they become those of the mean over all targets.
    # With sequence parallelism a rank's loss is that of its slice of the row.
    scale = torch.tensor(mesh.size * accumulation / max(1, step_rows.targets), device=mesh.device)
    losses: list[torch.Tensor] = []
    fed: list[FedRow] = []
    waited = 0.0
    for micro in range(accumulation):
        asked = time.perf_counter()
        heartbeat.at(progress.step, "waiting for data")
        fed.append(feed.next(step_rows, micro))
        waited += time.perf_counter() - asked
        heartbeat.at(progress.step, "forward and backward")
        loss = engine(row=fed[-1].loaded.row.to(mesh.device, non_blocking=True))
        losses.append(loss.detach())
        # Gradients that are not numbers on one rank are so on all of them, and DeepSpeed then takes no step.
        is_good = torch.isfinite(losses[-1]) & fed[-1].is_real
        engine.backward(loss * torch.where(is_good, scale, math.nan))
        if micro < accumulation - 1:
            engine.step()
    heartbeat.at(progress.step, "end of the step")
    loaded = [each.loaded for each in fed if each.is_real]
    mine = loaded if mesh.sp_rank == 0 else []  # once for each row
    counts, flops = sum(map(RowCounts.of, mine), RowCounts()), sum(map(work, mine), Flops(0.0, 0.0))
    quarantine.note(progress.step, [reason for each in mine for reason in each.bad])

    # One small all-reduce a step: the loss, the counts, and whether anybody has been told to stop.
    nll = float(torch.stack(losses).double().sum())
    broken_off = len(loaded) < accumulation
    total_nll, stopping, broken, failures, model_flops, hardware_flops, *summed = mesh.sum(
        [nll, float(stop.asked), float(broken_off), saver.failures, flops.model, flops.hardware,
         *astuple(counts)]
    )  # fmt: skip
    counts = RowCounts(*map(int, summed))
    quarantine.check(progress.bad_samples + counts.bad, progress.samples + counts.samples, mesh)
    set_learning_rate(engine.optimizer.param_groups, rate)
    engine.step()
    norm = float(engine.get_global_grad_norm() or 0.0)
    saver.agree(int(failures))
    if broken:
        _log.warning("step %d: broken off, data did not come; the next start takes it again", progress.step)
        return progress, True
    is_good_step = math.isfinite(total_nll) and math.isfinite(norm)
    if engine.was_step_applied() != is_good_step:
        raise RuntimeError(f"step {progress.step}: loss {total_nll}, norm {norm}, and DeepSpeed disagrees")
    targets = step_rows.targets - counts.masked
    streak = 0 if is_good_step else progress.bad_streak + 1
    stability.look_at(
        progress.step, total_nll / max(1, targets), norm, streak,
        [(each.loaded, loss, partial(feed.keys, step_rows, micro))
         for micro, (each, loss) in enumerate(zip(fed, losses, strict=True))],
    )  # fmt: skip
    progress = replace(
        progress,
        step=progress.step + 1,
        rows=progress.rows + step_rows.taken,
        samples=progress.samples + counts.samples,
        tokens=progress.tokens + counts.tokens,
        images=progress.images + counts.pictures,
        bad_samples=progress.bad_samples + counts.bad,
        skipped_steps=progress.skipped_steps + (streak > 0),
        bad_streak=streak,
    )
    if is_good_step:
        window.add(total_nll, targets, counts, step_rows.taken, norm, waited, time.perf_counter() - began)
        window.flops += Flops(model_flops, hardware_flops)
    return progress, stopping > 0


def _leave_if_asked(stop: Stop, mesh: Mesh) -> None:
    """Raises PreemptedError on all ranks if one has been told to stop before the first step."""
    if mesh.sum([float(stop.asked)])[0]:
        stop.forget_file()
        raise PreemptedError("stopped before the first step; the same command goes on where the run was")


def _stopped_line(progress: Progress, steps: int, fault: str | None, last: Path | None) -> str:
    if progress.step == 0:
        how = "nothing is learnt yet; the same command starts again"
    elif fault is None:
        how = "checkpoint written; the same command goes on from there"
    else:
        how = (
            f"its checkpoint could NOT be written ({fault}); the same command goes on from "
            f"{last or 'the beginning'}"
        )
    return f"stopped by a signal after step {progress.step} of {steps}, {how}"


@dataclass
class Window:
    """Sums over the steps since the last line of metrics, without those that were skipped, evaluations and
    checkpoints. Times in seconds.
    """

    nll: float = 0.0
    targets: int = 0
    counts: RowCounts = RowCounts()
    rows: int = 0
    steps: int = 0
    grad_norm: float = 0.0
    grad_norm_max: float = 0.0
    waited: float = 0.0
    busy: float = 0.0
    saved_in: float | None = None  # seconds that the last checkpoint held the run up
    flops: Flops = Flops(0.0, 0.0)
    peak_tflops: float | None = None

    def add(
        self,
        nll: float,
        targets: int,
        counts: RowCounts,
        rows: int,
        grad_norm: float,
        waited: float,
        busy: float,
    ) -> None:
        self.nll, self.targets = self.nll + nll, self.targets + targets
        self.counts, self.rows = self.counts + counts, self.rows + rows
        self.steps, self.grad_norm = self.steps + 1, grad_norm
        self.grad_norm_max = max(self.grad_norm_max, grad_norm)
        self.waited, self.busy = self.waited + waited, self.busy + busy

    def metrics(
        self, engine: Any, rate: float, epoch: int, progress: Progress, seq_len: int, mesh: Mesh
    ) -> dict[str, float | int | None]:
        """The metrics of these steps; grad_norm of the last one."""
        speed = self.counts.tokens / max(1e-9, self.busy)
        metrics: dict[str, float | int | None] = {
            "train/loss": self.nll / max(1, self.targets) if self.steps else None,
            "train/learning_rate": rate,
            **{f"train/learning_rate/{name}": each for name, each in group_rates(engine).items()},
            "train/grad_norm": self.grad_norm if self.steps else None,
            "train/grad_norm_max": self.grad_norm_max if self.steps else None,
            "train/skipped_steps": progress.skipped_steps,
            "train/epoch": epoch,
            "train/tokens_seen": progress.tokens,
            "train/images_seen": progress.images,
            "perf/tokens_per_second": speed,
            "perf/tokens_per_second_per_gpu": speed / mesh.size,
            **utilisation(self.flops, max(1e-9, self.busy), mesh.size, self.peak_tflops),
            "time/step": self.busy / max(1, self.steps),
            "time/data_wait": self.waited / max(1, self.steps),
            "time/checkpoint": self.saved_in,
            **self.counts.metrics(self.rows, seq_len),
            "data/bad_samples": progress.bad_samples,
            **host_memory(),
        }
        if mesh.device.type == "cuda":
            metrics["mem/peak_allocated_gb"] = torch.cuda.max_memory_allocated(mesh.device) / 1e9
        return metrics


def _prepare_data(config: RunConfig, pretrained: Pretrained, run_dir: Path, mesh: Mesh) -> PreparedData:
    """Made by the main rank, for as many epochs as the run has; the others find its files."""

    def prepare(writer: bool) -> PreparedData:
        return prepare_data(
            config, pretrained.tokenizer, pretrained.model_config.tile, run_dir / DATA, writer
        )

    def make() -> None:
        data = prepare(writer=True)
        rows = (config.train.steps or 0) * config.train.global_batch
        data.plan.plan_ahead(data.plan.end_row(config.train.epochs) if config.train.epochs else rows)
        if data.truncated or data.plan.dropped:
            _log.warning(
                "of %d samples, %d lose pictures to fit into data.seq_len=%d and %d are left out",
                len(data.plan.costs), data.truncated, config.data.seq_len, data.plan.dropped,
            )  # fmt: skip

    mesh.on_main(make)
    return mesh.everywhere(lambda: prepare(writer=mesh.is_main))


def _make_engine(config: RunConfig, pretrained: Pretrained, accumulation: int, mesh: Mesh) -> Any:
    dtype = torch_dtype(config.model.dtype)
    with partitioned_parameters(zero_config(config, accumulation), dtype):
        model = build_model(pretrained.model_config, dtype)
    mesh.everywhere(lambda: load_weights(model, pretrained.model_dir))
    model.vision_chunk = config.model.vision_chunk
    model.sequence = mesh.sequence
    save_memory(model, config)
    choose_learning(model, config.model, config.seed)
    return make_engine(model, parameter_groups(model, config.train), config, accumulation=accumulation)


def _about(config: RunConfig, fingerprint: str, mesh: Mesh, engine: Any) -> dict[str, Any]:
    """What made this run, for checkpoints and W&B."""
    return {
        **provenance(config, fingerprint),
        "world_size": mesh.size,
        "zero_stage": int(engine.zero_optimization_stage()),
    }

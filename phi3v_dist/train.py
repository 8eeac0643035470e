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
import signal
import time
from collections.abc import Callable
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from phi3v_dist import checkpoint
from phi3v_dist.checkpoint import ModelCard, Progress
from phi3v_dist.config import RunConfig
from phi3v_dist.data.loader import LoadedRow, RowCounts, load_rows
from phi3v_dist.data.plan import RankRows, StepRows
from phi3v_dist.data.prepare import PreparedData, data_fingerprint, prepare_data
from phi3v_dist.data.quarantine import Quarantine
from phi3v_dist.exits import DivergedError, PreemptedError
from phi3v_dist.flops import Flops, peak_tflops, row_flops, shape_of, utilisation
from phi3v_dist.limits import check_limits, check_offload_path
from phi3v_dist.model.hub import build_model, load_weights
from phi3v_dist.model.memory import offload_checkpoints, tile_mlp
from phi3v_dist.optim import freeze, group_rates, learning_rate, parameter_groups, set_learning_rate
from phi3v_dist.origin import Origin, model_config_of, prepare_origin
from phi3v_dist.parallel.mesh import Mesh
from phi3v_dist.parallel.zero import make_engine, partitioned_fraction, prepare_deepspeed, zero_config
from phi3v_dist.provenance import provenance
from phi3v_dist.rundir import CHECKPOINTS, DATA, open_run_dir
from phi3v_dist.track import Tracker, host_memory
from phi3v_dist.validation import BestSoFar, Validation
from shards.format import BadInputError

_log = logging.getLogger(__name__)


def train(config: RunConfig, mesh: Mesh) -> Progress:
    """Trains until the run is done; goes on from the newest complete checkpoint if there is one.

    Raises BadInputError for what the user can mend, PreemptedError after a signal (with a checkpoint
    written), DivergedError for a loss that is not finite or unusable data.
    """
    stop = StopSignal()
    run_dir = config.run_dir
    fingerprint = mesh.on_main(lambda: data_fingerprint(config))
    resume = mesh.on_main(lambda: open_run_dir(config, fingerprint))

    gpu_bytes = torch.cuda.mem_get_info()[1] if mesh.device.type == "cuda" else None
    check_offload_path(config)
    check_limits(config, model_config_of(config), mesh.size, gpu_bytes)
    origin = prepare_origin(config, run_dir, mesh)
    accumulation = _accumulation(config, mesh)
    data = _prepare_data(config, origin, run_dir, mesh)
    plan = data.plan
    end_row = plan.end_row(config.train.epochs) if config.train.epochs else None
    progress = Progress() if resume is None else Progress(**checkpoint.read_meta(resume)["progress"])
    steps = config.train.steps or progress.step + plan.steps_between(progress.rows, end_row or 0)
    if resume is not None and progress.step >= steps:
        _log.info("%s: already finished at step %d; nothing to do", run_dir, progress.step)
        return progress

    prepare_deepspeed(mesh)
    engine = _make_engine(config, origin, accumulation, mesh)
    if resume is not None:
        progress = checkpoint.load(engine, resume, mesh)
        _log.info("going on from %s", resume)
    validation = Validation(config, origin, engine, mesh)
    card = ModelCard(origin.model_config.to_dict(), config.data.num_crops, origin.tokenizer_dir)
    about = _about(config, fingerprint, mesh, engine)
    tracker = Tracker(config, run_dir, progress.step, about) if mesh.is_main else None
    best = BestSoFar(config)

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
        return row_flops(config, origin.model_config, shape_of(loaded.row, loaded.tokens))

    exit_code = 1
    try:
        while progress.step < steps:
            step_rows = plan.step(progress.rows, end_row)
            rate = learning_rate(progress.step, steps, config.train)
            torch.manual_seed(config.seed + 1_000_003 * progress.step + mesh.rank)  # dropout, if there is any
            progress, stopping = _step(
                engine, rows, accumulation, step_rows, rate, progress, stop, window, quarantine, mesh, work
            )
            done = progress.step == steps

            validating = done or (config.eval.every_steps and progress.step % config.eval.every_steps == 0)
            saving = done or stopping or progress.step % config.checkpoint.every_steps == 0
            metrics: dict[str, float | int | None] = {}
            # Windows end where checkpoints are, so that a run that was interrupted has the same lines.
            if done or saving or progress.step % config.track.log_every == 0:
                metrics = window.metrics(engine, rate, step_rows.epoch, progress, config.data.seq_len, mesh)
                _log.info(_line(progress.step, steps, metrics))
                window = Window(peak_tflops=peak)
            if validating:
                began = time.perf_counter()
                scores = validation.run(progress.step)
                window.exclude(time.perf_counter() - began)
                _log.info(
                    "step %d  %s",
                    progress.step,
                    "  ".join(f"{k} {v:.4g}" for k, v in scores.items() if v is not None),
                )
                metrics |= scores
            is_best = best.improves(metrics)
            # The line comes before the checkpoint: whoever goes on from it finds all lines up to it.
            if tracker is not None and metrics:
                tracker.log(progress.step, metrics)
            if saving or is_best:
                began = time.perf_counter()
                saved = checkpoint.save(
                    engine,
                    run_dir / CHECKPOINTS,
                    progress,
                    card,
                    about,
                    mesh,
                    config.checkpoint.keep_last,
                    is_best,
                )
                if is_best:
                    best.record(progress.step, metrics, mesh)
                window.saved_in = time.perf_counter() - began
                window.exclude(window.saved_in)
                _log.info("step %d  saved %s in %.1f s", progress.step, saved, window.saved_in)
            if stopping and not done:
                if tracker is not None:
                    tracker.preempting()
                raise PreemptedError(
                    f"stopped by a signal after step {progress.step} of {steps}, checkpoint written; "
                    "the same command goes on from there"
                )
        exit_code = 0
        return progress
    finally:
        rows.close()
        if tracker is not None:
            tracker.close(exit_code)
        del validation
        engine.destroy()  # without it 3 of 48 CPU runs aborted at exit (DeepSpeed 0.19.8)
        del engine
        gc.collect()


def _step(
    engine: Any,
    rows: Any,
    accumulation: int,
    step_rows: StepRows,
    rate: float,
    progress: Progress,
    stop: StopSignal,
    window: Window,
    quarantine: Quarantine,
    mesh: Mesh,
    work: Callable[[LoadedRow], Flops],
) -> tuple[Progress, bool]:
    """One optimizer step. Returns the progress after it, and whether any rank has been told to stop."""
    began = time.perf_counter()
    # DeepSpeed divides gradients by ranks and micro-steps; so they become those of the mean over all targets.
    # With sequence parallelism a rank's loss is that of its slice of the row.
    scale = mesh.size * accumulation / max(1, step_rows.targets)
    nll = torch.zeros((), dtype=torch.float64, device=mesh.device)
    counts, flops = RowCounts(), Flops(0.0, 0.0)
    bad: list[str] = []
    waited = 0.0
    for micro in range(accumulation):
        asked = time.perf_counter()
        loaded: LoadedRow = next(rows)
        waited += time.perf_counter() - asked
        if mesh.sp_rank == 0:  # once for each row
            counts, flops = counts + RowCounts.of(loaded), flops + work(loaded)
            bad += loaded.bad
        loss = engine(row=loaded.row.to(mesh.device, non_blocking=True))
        nll += loss.detach()
        engine.backward(loss * scale)
        if micro < accumulation - 1:
            engine.step()
    quarantine.note(progress.step, bad)

    # One small all-reduce a step: the loss, the counts, and whether anybody has been told to stop.
    total_nll, stopping, model_flops, hardware_flops, *summed = mesh.sum(
        [float(nll), float(stop.asked), flops.model, flops.hardware, *astuple(counts)]
    )
    counts = RowCounts(*map(int, summed))
    quarantine.check(progress.bad_samples + counts.bad, progress.samples + counts.samples, mesh)
    if not math.isfinite(total_nll):
        raise DivergedError(
            f"step {progress.step}: the loss is {total_nll}; the last checkpoint is good; lower train.lr or "
            "look at the rows of this step"
        )
    set_learning_rate(engine.optimizer.param_groups, rate)
    engine.step()
    norm = float(engine.get_global_grad_norm() or 0.0)
    if not math.isfinite(norm):
        raise DivergedError(
            f"step {progress.step}: the gradient norm is {norm}; the last checkpoint is good; lower train.lr"
        )
    progress = replace(
        progress,
        step=progress.step + 1,
        rows=progress.rows + step_rows.taken,
        samples=progress.samples + counts.samples,
        tokens=progress.tokens + counts.tokens,
        images=progress.images + counts.pictures,
        bad_samples=progress.bad_samples + counts.bad,
    )
    targets = step_rows.targets - counts.masked
    window.add(total_nll, targets, counts, step_rows.taken, norm, waited, time.perf_counter() - began)
    window.flops += Flops(model_flops, hardware_flops)
    return progress, stopping > 0


class StopSignal:
    """Remembers SIGUSR1, SIGTERM or SIGINT; the loop asks at the end of each step. A second one changes
    nothing.
    """

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.asked = True


@dataclass
class Window:
    """Sums over the steps since the last line of metrics. Times in seconds."""

    nll: float = 0.0
    targets: int = 0
    counts: RowCounts = RowCounts()
    rows: int = 0
    steps: int = 0
    grad_norm: float = 0.0
    waited: float = 0.0
    busy: float = 0.0
    excluded: float = 0.0
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
        self.waited, self.busy = self.waited + waited, self.busy + busy

    def exclude(self, seconds: float) -> None:
        """Time spent on evaluation and checkpoints, which is no part of a step."""
        self.excluded += seconds

    def metrics(
        self, engine: Any, rate: float, epoch: int, progress: Progress, seq_len: int, mesh: Mesh
    ) -> dict[str, float | int | None]:
        """The metrics of these steps; grad_norm of the last one."""
        speed = self.counts.tokens / self.busy
        metrics: dict[str, float | int | None] = {
            "train/loss": self.nll / max(1, self.targets),
            "train/learning_rate": rate,
            **{f"train/learning_rate/{name}": each for name, each in group_rates(engine).items()},
            "train/grad_norm": self.grad_norm,
            "train/epoch": epoch,
            "train/tokens_seen": progress.tokens,
            "train/images_seen": progress.images,
            "perf/tokens_per_second": speed,
            "perf/tokens_per_second_per_gpu": speed / mesh.size,
            **utilisation(self.flops, self.busy, mesh.size, self.peak_tflops),
            "time/step": self.busy / self.steps,
            "time/data_wait": self.waited / self.steps,
            "time/checkpoint": self.saved_in,
            **self.counts.metrics(self.rows, seq_len),
            "data/bad_samples": progress.bad_samples,
            **host_memory(),
        }
        if mesh.device.type == "cuda":
            metrics["mem/peak_allocated_gb"] = torch.cuda.max_memory_allocated(mesh.device) / 1e9
        return metrics


def _line(step: int, steps: int, metrics: dict[str, float | int | None]) -> str:
    left = (steps - step) * float(metrics["time/step"] or 0)
    return (
        f"step {step}/{steps}  loss {metrics['train/loss']:.4f}  lr {metrics['train/learning_rate']:.2e}  "
        f"grad {metrics['train/grad_norm']:.2f}  {metrics['perf/tokens_per_second']:.0f} tokens/s  "
        f"{metrics['time/step']:.2f} s/step  {int(left // 60)}:{int(left % 60):02d} left"
    )


def _prepare_data(config: RunConfig, origin: Origin, run_dir: Path, mesh: Mesh) -> PreparedData:
    """Made by the main rank, for as many epochs as the run has; the others find its files."""

    def prepare(writer: bool) -> PreparedData:
        return prepare_data(config, origin.tokenizer, origin.model_config.tile, run_dir / DATA, writer)

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
    return prepare(writer=mesh.is_main)


def _accumulation(config: RunConfig, mesh: Mesh) -> int:
    rows = config.train.global_batch
    if rows % mesh.dp_size:
        raise BadInputError(
            f"train.global_batch={rows} rows cannot be shared by {mesh.dp_size} ranks; make it a multiple"
        )
    return rows // mesh.dp_size


def _make_engine(config: RunConfig, origin: Origin, accumulation: int, mesh: Mesh) -> Any:
    dtype = torch.bfloat16 if config.model.dtype == "bfloat16" else torch.float32
    model = build_model(origin.model_config, dtype, zero_config(config, accumulation))
    load_weights(model, origin.model_dir)
    model.vision_chunk = config.model.vision_chunk
    model.sequence = mesh.sequence
    if config.model.gradient_checkpointing:
        model.gradient_checkpointing_enable()
        if config.parallel.offload_checkpoints:
            offload_checkpoints(model)
    tile_mlp(model, config.parallel.tile_mlp)
    freeze(model, config.model.freeze)
    return make_engine(model, parameter_groups(model, config.train), config, accumulation)


def _about(config: RunConfig, fingerprint: str, mesh: Mesh, engine: Any) -> dict[str, Any]:
    """What made this run, for checkpoints and W&B."""
    return {
        **provenance(config, fingerprint),
        "world_size": mesh.size,
        "zero_stage": int(engine.zero_optimization_stage()),
    }

"""What the loop works with: the engine with its weights, the rows, the saver, the tracker, the guards.

`build` makes it from what `prepare` found, and closes it in order, however the loop ends.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from phi3v_dist.budget.flops import Flops, peak_tflops, row_flops, shape_of
from phi3v_dist.checkpoint import read as checkpoint
from phi3v_dist.checkpoint.meta import Progress
from phi3v_dist.checkpoint.save import ModelCard, Saver
from phi3v_dist.config import RunConfig
from phi3v_dist.data.loader import LoadedRow, load_rows
from phi3v_dist.data.plan import Plan, RankRows
from phi3v_dist.engine import step as engine_step
from phi3v_dist.engine.nvme import remove_swapped
from phi3v_dist.engine.zero import (
    make_engine,
    partitioned_fraction,
    partitioned_parameters,
    prepare_deepspeed,
    zero_config,
)
from phi3v_dist.evaluation.in_training import BestSoFar, InTrainingEvaluation, PendingEvaluation
from phi3v_dist.model.dtypes import torch_dtype
from phi3v_dist.model.groups import choose_learning
from phi3v_dist.model.hub import build_model, load_weights
from phi3v_dist.model.memory import save_memory
from phi3v_dist.parallel.mesh import Mesh
from phi3v_dist.pretrained import Pretrained
from phi3v_dist.run.claim import Run
from phi3v_dist.run.layout import CHECKPOINTS, LOGS, RUN_ID
from phi3v_dist.run.provenance import provenance
from phi3v_dist.tracking.progress import ProgressLine
from phi3v_dist.tracking.tracker import Tracker, watch_node
from phi3v_dist.train.due import Schedule
from phi3v_dist.train.feed import Feed
from phi3v_dist.train.guards import DataGuard, NumberGuard
from phi3v_dist.train.optim import parameter_groups
from phi3v_dist.train.prepare import Ready, leave_if_asked

_log = logging.getLogger(__name__)


@dataclass
class Job:
    """A run that is ready to step; the same on all ranks but for `tracker`, which the main rank alone has.

    accumulation: rows of this rank in a step. progress: where the loop begins. end_row: row of the plan at
    which the run ends, None where its steps decide. peak_tflops: dense bf16 peak of one GPU, None where it is
    not known.
    """

    config: RunConfig
    mesh: Mesh
    run: Run
    pretrained: Pretrained
    engine: Any
    plan: Plan
    feed: Feed
    schedule: Schedule
    end_row: int | None
    accumulation: int
    progress: Progress
    saver: Saver
    tracker: Tracker | None
    line: ProgressLine
    evaluation: InTrainingEvaluation
    pending: PendingEvaluation
    best: BestSoFar
    number_guard: NumberGuard
    data_guard: DataGuard
    peak_tflops: float | None

    def flops_of(self, loaded: LoadedRow) -> Flops:
        """The arithmetic of a row, forward and backward."""
        shape = shape_of(loaded.row, loaded.tokens)
        return row_flops(self.config, self.pretrained.model_config, shape)


@contextlib.contextmanager
def build(config: RunConfig, mesh: Mesh, run: Run, *, ready: Ready) -> Iterator[Job]:
    """Loads the weights, resumes, and starts what works beside the loop; closes all of it at the end.

    Raises BadInputError on every rank for a checkpoint or weights that cannot be used, LostRankError in place
    of the failure of a collective.
    """
    with contextlib.ExitStack() as stack:  # closed from the last entry to the first
        if config.parallel.offload_optimizer == "nvme":
            stack.callback(remove_swapped, config, mesh)
        stack.callback(gc.collect)  # the engine is part of reference cycles
        engine = _make_engine(config, ready.pretrained, mesh=mesh)
        stack.callback(engine_step.destroy, engine)
        progress = ready.progress
        if ready.resume is not None:
            progress = checkpoint.load(engine, ready.resume, mesh)
            _log.info("resuming from %s", ready.resume)
        job = _assemble(config, mesh, run, ready=ready, engine=engine, progress=progress, stack=stack)
        _log_start(job)
        try:
            leave_if_asked(run, mesh)
            yield job
        except Exception as error:
            # Before anything is closed, which takes time: the other ranks wait for this one's note.
            if (lost := run.heartbeat.lost(error)) is not None:
                raise lost from error
            raise
        finally:
            job.engine = job.saver = None  # type: ignore[assignment]  # so that its memory can be freed
            del engine


def _assemble(
    config: RunConfig,
    mesh: Mesh,
    run: Run,
    *,
    ready: Ready,
    engine: Any,
    progress: Progress,
    stack: contextlib.ExitStack,
) -> Job:
    """All parts around the engine; what must be closed is put on `stack`."""
    assert ready.evaluation is not None
    about = {
        **provenance(config, ready.fingerprint),
        "world_size": mesh.size,
        "zero_stage": engine_step.zero_stage(engine),
    }
    tracker = stack.enter_context(_tracker(config, mesh, run, about=about, progress=progress))
    line = stack.enter_context(
        contextlib.closing(ProgressLine(ready.steps, mesh.is_main and sys.stdout.isatty()))
    )
    return Job(
        config=config,
        mesh=mesh,
        run=run,
        pretrained=ready.pretrained,
        engine=engine,
        plan=ready.plan,
        feed=stack.enter_context(_feed(config, mesh, run, ready=ready, progress=progress)),
        schedule=Schedule(
            ready.steps, config.track.log_every, config.eval.every_steps, config.checkpoint.every_steps
        ),
        end_row=ready.end_row,
        accumulation=config.train.rows_each(mesh.dp_size),
        progress=progress,
        saver=_saver(config, mesh, ready, engine=engine, about=about, progress=progress),
        tracker=tracker,
        line=line,
        evaluation=ready.evaluation,
        pending=ready.pending,
        best=BestSoFar(config, mesh),
        number_guard=NumberGuard(run.directory / LOGS, mesh, config.train.max_bad_steps),
        data_guard=DataGuard(config.data.max_bad_fraction, ready.plan.epoch_samples, run.directory),
        peak_tflops=config.parallel.peak_tflops or peak_tflops(mesh.device),
    )


@contextlib.contextmanager
def _tracker(
    config: RunConfig, mesh: Mesh, run: Run, *, about: dict[str, Any], progress: Progress
) -> Iterator[Tracker | None]:
    """The metrics of the run, on the main rank; on the other nodes their system metrics, if asked for."""
    exit_code = 1
    tracker = None
    if mesh.is_main:
        tracker = Tracker(config, run.directory, progress.step, about=about, from_row=progress.rows)
    node = watch_node(config, run.directory, mesh)
    try:
        yield tracker
        exit_code = 0
    finally:
        if node is not None:
            node.close()
        if tracker is not None:
            tracker.close(exit_code)


@contextlib.contextmanager
def _feed(config: RunConfig, mesh: Mesh, run: Run, *, ready: Ready, progress: Progress) -> Iterator[Feed]:
    """The rows of this rank from `progress` to the end of the run."""
    rows = load_rows(
        ready.data.maker,
        RankRows(
            ready.plan,
            dp_rank=mesh.dp_rank,
            dp_size=mesh.dp_size,
            vision_chunk=config.views_per_call,
            first_row=progress.rows,
            steps=ready.steps - progress.step,
            end_row=ready.end_row,
        ),
        config.data.workers,
        prefetch=config.data.prefetch,
        timeout_s=config.parallel.timeout_s,
        pin=mesh.device.type == "cuda",
        seed=config.seed,
    )
    feed = Feed(
        rows, ready.data.maker, ready.plan, views_per_call=config.views_per_call, mesh=mesh, stop=run.stop
    )
    with contextlib.closing(rows):
        yield feed


def _make_engine(config: RunConfig, pretrained: Pretrained, *, mesh: Mesh) -> Any:
    """The ZeRO-3 engine with the first weights of the run."""
    prepare_deepspeed(mesh)
    accumulation = config.train.rows_each(mesh.dp_size)
    dtype = torch_dtype(config.model.dtype)
    with partitioned_parameters(zero_config(config, accumulation), dtype):
        model = build_model(pretrained.model_config, dtype)
    mesh.everywhere(lambda: load_weights(model, pretrained.model_dir))
    model.vision_chunk = config.model.vision_chunk
    model.sequence = mesh.sequence
    save_memory(model, config)
    choose_learning(model, config.model, config.seed)
    groups = parameter_groups(model, config.train)
    return make_engine(model, groups, config, accumulation=accumulation)


def _saver(
    config: RunConfig, mesh: Mesh, ready: Ready, *, engine: Any, about: dict[str, Any], progress: Progress
) -> Saver:
    pretrained, folder = ready.pretrained, config.run_dir
    card = ModelCard(
        pretrained.model_config.to_dict(),
        config.data.num_crops,
        pretrained.model_dir,
        pretrained.tokenizer_dir,
    )
    # After an evaluation that is still owed the checkpoint is saved again: it may turn out to be the best.
    saved_step = progress.step if ready.pending.metrics is None else 0
    return Saver(
        engine,
        folder / CHECKPOINTS,
        mesh,
        card=card,
        run=about,
        wandb_id=folder / RUN_ID,
        config=config.checkpoint,
        saved_step=saved_step,
    )


def _log_start(job: Job) -> None:
    _log.info(
        "%s: %d steps of %d rows on %d ranks x %d accumulation steps, %d samples, %.1f%% fill; ZeRO-3 keeps "
        "%.1f%% of the weights on each rank",
        job.config.name, job.schedule.total, job.config.train.global_batch, job.mesh.dp_size,
        job.accumulation,
        len(job.plan.costs), 100 * job.plan.fill(0), 100 * partitioned_fraction(job.engine, job.mesh),
    )  # fmt: skip

"""Everything that may refuse a run, before weights are loaded: data, plan, checkpoint, limits, room.

In: the configuration, the ranks, the claimed directory. Out: `Ready`: where the run resumes, and what it
trains on.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from phi3v_dist.checkpoint import read as checkpoint
from phi3v_dist.checkpoint.meta import Progress
from phi3v_dist.config import RunConfig
from phi3v_dist.data.plan import Plan
from phi3v_dist.data.prepare import PreparedData, data_fingerprint, prepare_data
from phi3v_dist.engine.nvme import prepare_swapping
from phi3v_dist.evaluation.in_training import InTrainingEvaluation, PendingEvaluation
from phi3v_dist.exits import PreemptedError
from phi3v_dist.parallel.mesh import Mesh
from phi3v_dist.pretrained import Pretrained, model_config_of, prepare_pretrained
from phi3v_dist.run.claim import Run, open_run_dir
from phi3v_dist.run.layout import CHECKPOINTS, DATA
from phi3v_dist.run.limits import check_limits, check_offload_path
from phi3v_dist.run.preflight import check_room, check_same_everywhere

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ready:
    """What a run is built from; the same on all ranks.

    fingerprint: of the data. resume: the checkpoint to resume from, None for a new run. progress: at that
    checkpoint. steps: optimizer steps at the end of the run. end_row: row of the plan at which it ends, None
    where train.steps decides. pending: an evaluation that the last start owes. evaluation: None if
    `nothing_left`.
    """

    fingerprint: str
    resume: Path | None
    progress: Progress
    steps: int
    end_row: int | None
    pretrained: Pretrained
    data: PreparedData
    pending: PendingEvaluation
    evaluation: InTrainingEvaluation | None

    @property
    def plan(self) -> Plan:
        return self.data.plan

    @property
    def nothing_left(self) -> bool:
        """Whether the run is finished: all steps are done and no evaluation is owed."""
        return self.resume is not None and self.progress.step >= self.steps and self.pending.metrics is None


def prepare(config: RunConfig, mesh: Mesh, run: Run) -> Ready:
    """Checks and prepares all that needs no weights; all ranks call it together.

    Raises BadInputError on every rank for what the user can fix, PreemptedError if a rank was asked to stop.
    """
    fingerprint, resume, progress = _open(config, mesh, run)
    pretrained, data = _inputs(config, mesh, run)
    end_row = data.plan.end_row(config.train.epochs) if config.train.epochs else None
    steps = config.train.steps or progress.step + data.plan.steps_between(progress.rows, end_row or 0)
    ready = Ready(
        fingerprint=fingerprint, resume=resume, progress=progress, steps=steps, end_row=end_row,
        pretrained=pretrained, data=data, pending=PendingEvaluation(run.directory, progress.step, mesh),
        evaluation=None,
    )  # fmt: skip
    if ready.nothing_left:
        _log.info("%s: already finished at step %d; nothing to do", run.directory, progress.step)
        return ready
    model = pretrained.model_config
    mesh.on_main(lambda: check_room(config, model, run.directory, resuming=resume is not None))
    evaluation = mesh.everywhere(
        lambda: InTrainingEvaluation(config, pretrained, mesh, stop=lambda: run.stop.requested)
    )
    leave_if_asked(run, mesh)
    return replace(ready, evaluation=evaluation)


def _open(config: RunConfig, mesh: Mesh, run: Run) -> tuple[str, Path | None, Progress]:
    """Makes the run directory this run's. Out: the fingerprint of its data, the checkpoint that it resumes
    from and the progress at that.
    """
    fingerprint = mesh.everywhere(lambda: data_fingerprint(config))
    check_same_everywhere(config, fingerprint, mesh)
    resume = checkpoint.find_resume(run.directory / CHECKPOINTS, mesh)
    meta = None if resume is None else mesh.everywhere(lambda: checkpoint.read_meta(resume))
    before, wandb_id = (None, None) if meta is None else (meta.run, meta.wandb_id)
    mesh.on_main(lambda: open_run_dir(config, fingerprint, before, wandb_id=wandb_id))
    return fingerprint, resume, Progress() if meta is None else meta.progress


def _inputs(config: RunConfig, mesh: Mesh, run: Run) -> tuple[Pretrained, PreparedData]:
    """The first weights, the tokenizer and the plan; what does not fit into the machine is refused first."""
    gpu_bytes = torch.cuda.mem_get_info()[1] if mesh.device.type == "cuda" else None
    mesh.everywhere(lambda: check_offload_path(config))
    mesh.everywhere(lambda: check_limits(config, model_config_of(config), mesh.size, gpu_bytes=gpu_bytes))
    if config.parallel.offload_optimizer == "nvme":
        prepare_swapping(config, mesh)
    pretrained = prepare_pretrained(config, run.directory, mesh)
    config.train.rows_each(mesh.dp_size)  # refuses a batch that the ranks cannot share
    return pretrained, _plan(config, pretrained, run.directory / DATA, mesh=mesh)


def _plan(config: RunConfig, pretrained: Pretrained, directory: Path, *, mesh: Mesh) -> PreparedData:
    """Made by the main rank, for as many epochs as the run has; the others read its files."""

    def make(writer: bool) -> PreparedData:
        return prepare_data(
            config, pretrained.tokenizer, pretrained.model_config.tile, directory=directory, writer=writer
        )

    def make_first() -> None:
        data = make(writer=True)
        rows = (config.train.steps or 0) * config.train.global_batch
        data.plan.plan_ahead(data.plan.end_row(config.train.epochs) if config.train.epochs else rows)
        if data.truncated or data.plan.dropped:
            _log.warning(
                "of %d samples, %d lose images to fit into data.seq_len=%d and %d are left out",
                len(data.plan.costs), data.truncated, config.data.seq_len, data.plan.dropped,
            )  # fmt: skip

    mesh.on_main(make_first)
    return mesh.everywhere(lambda: make(writer=mesh.is_main))


def leave_if_asked(run: Run, mesh: Mesh) -> None:
    """Raises PreemptedError on all ranks if one was asked to stop before the first step."""
    if mesh.sum([float(run.stop.requested)])[0]:
        run.stop.remove_file()
        raise PreemptedError("stopped before the first step; the same command resumes where the run was")

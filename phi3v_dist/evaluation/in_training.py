"""Evaluation during training: loss and answers on the val split, by all ranks together.

In: the configuration of a run and its ZeRO-3 engine. Out: metrics eval/*, and RUN/eval/step-N with the
answers; the samples are the same each time. The loss is computed by the engine over packed rows. For the
answers the weights are gathered once if there is enough memory. An evaluation that fails (an image, a user's
metric, a full disk) is reported in the log, and training continues.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from phi3v_dist.checkpoint.restore import Restored
from phi3v_dist.config import RunConfig
from phi3v_dist.data.loader import RowMaker
from phi3v_dist.data.tokens import Counter, sample_costs
from phi3v_dist.evaluation.evaluate import EvalSettings, Evaluation, score_answers, write_evaluation
from phi3v_dist.evaluation.loss import split_loss
from phi3v_dist.evaluation.metrics import find_metrics
from phi3v_dist.evaluation.prompts import Prompts, read_split, spread
from phi3v_dist.evaluation.whole import gather_weights, keep_whole
from phi3v_dist.model.dtypes import torch_dtype
from phi3v_dist.model.row import PackedRow
from phi3v_dist.parallel.mesh import Mesh
from phi3v_dist.pretrained import Pretrained
from phi3v_dist.processor.processing import Phi3VProcessor
from phi3v_dist.run.layout import BEST_FILE, EVALUATIONS, evaluation_dir
from shards.common.errors import BadInputError
from shards.common.files import write_atomically

Metrics = dict[str, float | int | None]
_log = logging.getLogger(__name__)


class InTrainingEvaluation:
    """Evaluates a run on its val split; `run` may be called at any step, by all ranks together.

    stop: whether this rank has been told to stop. Raises BadInputError for metrics or a split that cannot be
    used.
    """

    def __init__(
        self, config: RunConfig, pretrained: Pretrained, mesh: Mesh, *, stop: Callable[[], bool]
    ) -> None:
        self._config, self._pretrained, self._mesh, self._stop = config, pretrained, mesh, stop
        find_metrics(config.eval.metrics)
        data, ours = config.data, config.eval
        most = max(ours.loss_samples, ours.generate_samples)
        chosen = read_split(data.paths, data.val_split, most, may_lack=True)
        samples = chosen.take(spread(len(chosen), ours.loss_samples))
        tile = pretrained.model_config.tile
        self._costs = sample_costs(samples, Counter(pretrained.tokenizer, data.num_crops, tile))
        too_long = int((self._costs.tokens > data.seq_len).sum())
        if too_long:
            _log.warning(
                "%d val samples are longer than data.seq_len; they do not count in eval/loss", too_long
            )
        self._maker = RowMaker(samples, pretrained.tokenizer, data.num_crops, tile=tile)
        self._processor = Phi3VProcessor(tokenizer=pretrained.tokenizer, num_crops=data.num_crops, tile=tile)
        answered = chosen.take(spread(len(chosen), ours.generate_samples))
        self._prompts = Prompts(answered, before_read=self._refuse_after_stop)
        self._settings = EvalSettings(
            split=data.val_split,
            samples=ours.generate_samples,
            swap=False,
            batch_size=ours.batch_size,
            max_new_tokens=ours.max_new_tokens,
            metrics=tuple(ours.metrics),
            slice_by=ours.slice_by,
            seed=config.seed,
            weights=ours.weights,
        )

    def run(self, step: int, engine: Any) -> Metrics | None:
        """The metrics eval/* of `step`, the same on every rank; RUN/eval/step-N is written if there are
        answers.

        None if any rank was told to stop meanwhile, because an evaluation may take longer than the time that
        is left. If the answers cannot be scored, an error is logged and only eval/loss is returned.
        """
        engine.eval()
        metrics: Metrics = {}
        try:
            if (self._costs.tokens <= self._config.data.seq_len).any():
                metrics["eval/loss"] = self._loss(engine)
            if not len(self._prompts):
                return metrics
            restored = self._model_for_answers(engine)
            evaluation = score_answers(
                restored, self._prompts, self._settings, mesh=self._mesh, loss=metrics.get("eval/loss")
            )
            del restored
        except _StoppedError:
            return None
        except BadInputError as error:
            if self._any_rank_stops():
                return None
            _log.error("step %d: NO SCORES of the answers: %s; training continues", step, error)
            return metrics
        finally:
            engine.train()
        if self._mesh.device.type == "cuda":
            torch.cuda.empty_cache()  # the next step needs the memory of the whole copy
        self._mesh.on_main(lambda: self._write(evaluation, step))
        return metrics | {f"eval/{name}": value for name, value in evaluation.scores.values.items()}

    def _write(self, evaluation: Evaluation, step: int) -> None:
        out = evaluation_dir(self._config.run_dir, step)
        try:
            write_evaluation(evaluation, out)
        except OSError as error:
            _log.error("%s: the answers cannot be written (%s); training continues", out, error.strerror)

    def _any_rank_stops(self) -> bool:
        return self._mesh.sum([float(self._stop())])[0] > 0

    def _refuse_after_stop(self) -> None:
        """Ends the answering on all ranks: `generate_all` raises the error of one rank on every rank."""
        if self._stop():
            raise BadInputError("the run was told to stop")

    def _loss(self, engine: Any) -> float:
        def forward(row: PackedRow) -> torch.Tensor:
            if self._any_rank_stops():
                raise _StoppedError
            loss: torch.Tensor = engine(row=row)
            return loss

        loss, unreadable = split_loss(
            forward,
            self._maker,
            self._costs,
            row_tokens=self._config.data.seq_len,
            views_per_call=self._config.views_per_call,
            mesh=self._mesh,
        )
        for reason in unreadable:
            _log.warning("val sample left out of the loss: %s", reason)
        return loss

    def _model_for_answers(self, engine: Any) -> Restored:
        """The current model: a whole copy if it fits, else the engine's partitioned one."""
        config, dtype = self._pretrained.model_config, torch_dtype(self._config.model.dtype)
        shapes = self._prompts.shapes(
            self._pretrained.tokenizer, self._config.data.num_crops, self._processor.tile
        )
        settings, device = self._settings, self._mesh.device
        positions = max(shape.tokens for shape in shapes) + settings.max_new_tokens
        if keep_whole(
            settings.weights, config, dtype,
            batch_size=settings.batch_size, positions=positions, mesh=self._mesh,
        ):  # fmt: skip
            copy = gather_weights(engine, config, dtype, device=device)
            return Restored(copy, config, self._processor, device, dtype)
        return Restored(engine.module, config, self._processor, device, dtype, partitioned=True)


class _StoppedError(Exception):
    """Raised on all ranks: one of them was told to stop."""


class PendingEvaluation:
    """An interrupted evaluation, kept in RUN/eval/owed.json over restarts: the next start makes it.

    metrics: of the line of `step`, which is not written before the evaluation is made; None if nothing is
    pending. step: that of the checkpoint from which the run resumes; a record of another step is deleted. The
    state is the same on all ranks, which call the methods together.
    """

    def __init__(self, run_dir: Path, step: int, mesh: Mesh) -> None:
        self._file, self._mesh = run_dir / EVALUATIONS / "owed.json", mesh
        self.metrics: Metrics | None = mesh.on_main(lambda: self._read(step))

    def _read(self, step: int) -> Metrics | None:
        try:
            record = json.loads(self._file.read_text())
            if record["step"] == step:
                return dict(record["metrics"])
        except (OSError, ValueError, KeyError, TypeError):
            pass
        self._remove()
        return None

    def record(self, step: int, metrics: Metrics) -> None:
        """Records that the evaluation of `step` was interrupted. metrics: the rest of that step's line.

        If the record cannot be written, a warning is logged and the evaluation is lost.
        """

        def write() -> None:
            try:
                self._file.parent.mkdir(exist_ok=True)
                write_atomically(self._file, (json.dumps({"step": step, "metrics": metrics}) + "\n").encode())
            except OSError as error:
                _log.warning("%s: %s; the evaluation of step %d is lost", self._file, error.strerror, step)

        self._mesh.on_main(write)

    def clear(self) -> None:
        """The evaluation has been made, and its line and checkpoint are written."""
        self.metrics = None
        self._mesh.on_main(self._remove)

    def _remove(self) -> None:
        with contextlib.suppress(OSError):
            self._file.unlink()


class BestSoFar:
    """The best evaluation of a run by eval.best_metric, kept in RUN/eval/best.json over restarts.

    Only the main rank knows the best value: its checkpoint may still be being written, or fail.
    """

    def __init__(self, config: RunConfig, mesh: Mesh) -> None:
        self._metric, self._mode = config.eval.best_metric, config.eval.best_mode
        self._mesh = mesh
        self._file = config.run_dir / EVALUATIONS / BEST_FILE
        self._kept = self._read() if mesh.is_main else None
        self._pending: float | None = None  # value of the checkpoint that is being written

    def improves(self, metrics: Metrics, saving: Callable[[], bool]) -> bool:
        """Whether these metrics (equal on all ranks) are the best so far; the same on all ranks. saving: on
        the main rank, whether a save is in progress.
        """
        value = metrics.get(self._metric) if self._metric else None
        return value is not None and self._mesh.on_main(lambda: self._beats(value, saving()))

    def record_when_saved(self, step: int, metrics: Metrics) -> Callable[[], None]:
        """The checkpoint of `step` is about to be saved as the best one. Out: a function that records it in
        best.json; the main rank calls it once that checkpoint is complete.
        """
        value = metrics[self._metric or ""]
        assert value is not None
        fields = {"step": step, "metric": self._metric, "mode": self._mode, "value": float(value)}
        self._pending = float(value)

        def write() -> None:
            self._file.parent.mkdir(exist_ok=True)
            write_atomically(self._file, (json.dumps(fields) + "\n").encode())
            self._kept = float(value)

        return write

    def _beats(self, value: float, saving: bool) -> bool:
        if not saving:  # the pending checkpoint has been recorded by now, or its save has failed
            self._pending = None
        before = self._kept if self._pending is None else self._pending
        beats = before is None or (value > before if self._mode == "max" else value < before)
        return math.isfinite(value) and beats

    def _read(self) -> float | None:
        try:
            record = json.loads(self._file.read_text())
            same = (record["metric"], record["mode"]) == (self._metric, self._mode)
            return float(record["value"]) if same else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

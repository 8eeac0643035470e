"""Evaluation during training: loss and answers on the val split, by all ranks together.

In: the run's configuration and the ZeRO-3 engine. Out: metrics eval/*, and RUN/eval/step-N with the answers,
to the same samples each time. The loss goes through the engine over packed rows; for the answers the weights
are gathered once where there is room (`whole`). An evaluation that fails (a picture, a user's metric, a full
disk) says so and costs the run nothing else. Called by the train loop.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from phi3v_dist.checkpoint.restore import Restored
from phi3v_dist.config import RunConfig
from phi3v_dist.data.loader import RowMaker
from phi3v_dist.data.samples import Samples
from phi3v_dist.data.tokens import Counter, sample_costs
from phi3v_dist.evaluation.evaluate import Evaluation, How, score_answers, split_loss, write_evaluation
from phi3v_dist.evaluation.metrics import find_metrics
from phi3v_dist.evaluation.prompts import Question, Questions, read_split, spread
from phi3v_dist.evaluation.whole import gather_weights, keep_whole
from phi3v_dist.model.dtypes import torch_dtype
from phi3v_dist.model.row import PackedRow
from phi3v_dist.parallel.mesh import Mesh
from phi3v_dist.pretrained import Pretrained
from phi3v_dist.processor.processing import Phi3VProcessor
from phi3v_dist.run.layout import BEST_FILE, EVALUATIONS, evaluation_dir
from shards.common.errors import BadInputError
from shards.common.files import write_atomically

_log = logging.getLogger(__name__)


class Validation:
    """The val split of a run; `run` at any step, on all ranks. stop: whether this rank has been told to
    stop.

    Raises BadInputError for metrics and a split that cannot be used.
    """

    def __init__(
        self, config: RunConfig, pretrained: Pretrained, mesh: Mesh, stop: Callable[[], bool]
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
            _log.warning("%d val samples are longer than data.seq_len: no loss of them", too_long)
        self._maker = RowMaker(
            samples, pretrained.tokenizer, data.num_crops, tile, pretrained.tokenizer.pad_token_id
        )
        self._processor = Phi3VProcessor(tokenizer=pretrained.tokenizer, num_crops=data.num_crops, tile=tile)
        self._questions = _Interruptible(chosen.take(spread(len(chosen), ours.generate_samples)), stop)
        self._how = How(
            split=data.val_split, samples=ours.generate_samples, swap=False, batch_size=ours.batch_size,
            max_new_tokens=ours.max_new_tokens, metrics=tuple(ours.metrics), slice_by=ours.slice_by,
            seed=config.seed, weights=ours.weights,
        )  # fmt: skip

    def run(self, step: int, engine: Any) -> dict[str, float | int | None] | None:
        """Metrics with keys eval/*, the same on every rank; writes RUN/eval/step-N if there are answers. None
        if any rank was told to stop meanwhile: an evaluation may take longer than the time that is left.
        Without the scores of the answers, aloud, if these cannot be made.
        """
        engine.eval()
        metrics: dict[str, float | int | None] = {}
        try:
            if (self._costs.tokens <= self._config.data.seq_len).any():
                metrics["eval/loss"] = self._loss(engine)
            if not len(self._questions):
                return metrics
            restored = self._answering(engine)
            evaluation = score_answers(
                restored, self._questions, self._how, self._mesh, metrics.get("eval/loss")
            )
            del restored
        except _StoppedError:
            return None
        except BadInputError as error:
            if self._asked_anywhere():
                return None
            _log.error("step %d: NO SCORES of the answers: %s; training goes on", step, error)
            return metrics
        finally:
            engine.train()
        if self._mesh.device.type == "cuda":
            torch.cuda.empty_cache()  # the whole copy is gone; its memory is the next step's
        self._mesh.on_main(lambda: self._write(evaluation, step))
        return metrics | {f"eval/{name}": value for name, value in evaluation.scores.values.items()}

    def _write(self, evaluation: Evaluation, step: int) -> None:
        out = evaluation_dir(self._config.run_dir, step)
        try:
            write_evaluation(evaluation, out)
        except OSError as error:
            _log.error("%s: the answers cannot be written (%s); training goes on", out, error.strerror)

    def _asked_anywhere(self) -> bool:
        return self._mesh.sum([float(self._stop())])[0] > 0

    def _loss(self, engine: Any) -> float:
        tokens = self._config.data.seq_len

        def forward(row: PackedRow) -> torch.Tensor:
            if self._asked_anywhere():
                raise _StoppedError
            loss: torch.Tensor = engine(row=row)
            return loss

        views = self._config.views_per_call
        loss, bad = split_loss(forward, self._maker, self._costs, tokens, views, self._mesh)
        for reason in bad:
            _log.warning("val sample left out of the loss: %s", reason)
        return loss

    def _answering(self, engine: Any) -> Restored:
        """The model of today: a whole copy, else the engine's own in parts."""
        config, dtype = self._pretrained.model_config, torch_dtype(self._config.model.dtype)
        shapes = self._questions.shapes(
            self._pretrained.tokenizer, self._config.data.num_crops, self._processor.tile
        )
        positions = max(shape.tokens for shape in shapes) + self._how.max_new_tokens
        whole = keep_whole(
            self._how.weights, config, dtype,
            batch_size=self._how.batch_size, positions=positions, mesh=self._mesh,
        )  # fmt: skip
        device = self._mesh.device
        if whole:
            copy = gather_weights(engine, config, dtype, device=device)
            return Restored(copy, config, self._processor, device, dtype)
        return Restored(engine.module, config, self._processor, device, dtype, partitioned=True)


class _StoppedError(Exception):
    """All ranks leave the evaluation: one of them was told to stop."""


class _Interruptible(Questions):
    """Questions that cannot be read any more once the run is to stop, which ends the answering everywhere."""

    def __init__(self, samples: Samples, stop: Callable[[], bool]) -> None:
        super().__init__(samples)
        self._stop = stop

    def read(self, places: Sequence[int]) -> list[Question]:
        if self._stop():
            raise BadInputError("the run is to stop")
        return super().read(places)


class PendingEvaluation:
    """An evaluation that was broken off, kept in RUN/eval/owed.json over restarts: the next start makes it.

    step, metrics: of that step, whose line is not written before the evaluation is there; None if nothing is
    pending. The same on all ranks, which call its methods together.
    """

    def __init__(self, run_dir: Path, step: int, mesh: Mesh) -> None:
        self._file, self._mesh = run_dir / EVALUATIONS / "owed.json", mesh
        self.metrics: dict[str, float | int | None] | None = mesh.on_main(lambda: self._read(step))

    def _read(self, step: int) -> dict[str, float | int | None] | None:
        try:
            record = json.loads(self._file.read_text())
            if record["step"] == step:
                return dict(record["metrics"])
        except (OSError, ValueError, KeyError, TypeError):
            pass
        self._remove()  # of a step that the run has not got any more
        return None

    def note(self, step: int, metrics: dict[str, float | int | None]) -> None:
        """The evaluation of `step` was broken off; metrics: the rest of that step's line."""

        def write() -> None:
            try:
                self._file.parent.mkdir(exist_ok=True)
                write_atomically(self._file, (json.dumps({"step": step, "metrics": metrics}) + "\n").encode())
            except OSError as error:
                _log.warning("%s: %s; the evaluation of step %d is lost", self._file, error.strerror, step)

        self._mesh.on_main(write)

    def settle(self) -> None:
        """It has been made, and its line and checkpoint written."""
        self.metrics = None
        self._mesh.on_main(self._remove)

    def _remove(self) -> None:
        with contextlib.suppress(OSError):
            self._file.unlink()


class BestSoFar:
    """The best evaluation of a run, kept in RUN/eval/best.json over restarts. What it is only the main rank
    knows: its checkpoint may still be under way, or fail.
    """

    def __init__(self, config: RunConfig, mesh: Mesh) -> None:
        self._metric, self._mode = config.eval.best_metric, config.eval.best_mode
        self._mesh = mesh
        self._file = config.run_dir / EVALUATIONS / BEST_FILE
        self._kept = self._read() if mesh.is_main else None
        self._pending: float | None = None  # of the checkpoint that is under way

    def improves(self, metrics: dict[str, float | int | None], saving: Callable[[], bool]) -> bool:
        """Whether these metrics, which all ranks have alike, are the best so far. saving: says on the main
        rank whether a save is under way.
        """
        value = metrics.get(self._metric) if self._metric else None
        return value is not None and self._mesh.on_main(lambda: self._beats(value, saving()))

    def note(self, step: int, metrics: dict[str, float | int | None]) -> Callable[[], None]:
        """The checkpoint of `step` is about to be saved as the best; what writes it down, for the main rank
        to call when that checkpoint is there.
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
        if not saving:  # what was is kept by now, or it has failed
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

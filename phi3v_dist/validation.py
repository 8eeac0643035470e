"""Evaluation during training: loss and answers on the val split, by all ranks together.

In: the run's configuration and the ZeRO-3 engine. Out: metrics eval/*, and RUN/eval/step-N with the answers,
to the same samples each time. The loss goes through the engine over packed rows; for the answers the weights
are gathered once where there is room (`whole`). Called by the train loop.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from phi3v_dist.config import RunConfig
from phi3v_dist.data.loader import RowMaker
from phi3v_dist.data.samples import Samples
from phi3v_dist.data.tokens import Counter, sample_costs
from phi3v_dist.evaluate import How, score_answers, split_loss, write_evaluation
from phi3v_dist.metrics import find_metrics
from phi3v_dist.model.dtypes import torch_dtype
from phi3v_dist.model.row import PackedRow
from phi3v_dist.origin import Origin
from phi3v_dist.parallel.mesh import Mesh
from phi3v_dist.processor.processing import Phi3VProcessor
from phi3v_dist.questions import Question, Questions, read_split, spread
from phi3v_dist.restore import Restored
from phi3v_dist.whole import gather_whole, keep_whole
from shards.atomic import write_atomically
from shards.format import BadInputError

EVALUATIONS = "eval"
_BEST = "best.json"
_log = logging.getLogger(__name__)


class Validation:
    """The val split of a run; `run` at any step, on all ranks. stop: whether this rank has been told to
    stop.
    """

    def __init__(
        self, config: RunConfig, origin: Origin, engine: Any, mesh: Mesh, stop: Callable[[], bool]
    ) -> None:
        self._config, self._origin, self._engine, self._mesh = config, origin, engine, mesh
        self._stop = stop
        find_metrics(config.eval.metrics)
        data, ours = config.data, config.eval
        samples = read_split(data.paths, data.val_split, ours.loss_samples, may_lack=True)
        tile = origin.model_config.tile
        self._costs = sample_costs(samples, Counter(origin.tokenizer, data.num_crops, tile))
        too_long = int((self._costs.tokens > data.seq_len).sum())
        if too_long:
            _log.warning("%d val samples are longer than data.seq_len: no loss of them", too_long)
        self._maker = RowMaker(samples, origin.tokenizer, data.num_crops, tile, origin.tokenizer.pad_token_id)
        self._processor = Phi3VProcessor(tokenizer=origin.tokenizer, num_crops=data.num_crops, tile=tile)
        self._questions = _Interruptible(samples.take(spread(len(samples), ours.generate_samples)), stop)
        self._how = How(
            split=data.val_split, samples=ours.generate_samples, swap=False, batch_size=ours.batch_size,
            max_new_tokens=ours.max_new_tokens, metrics=tuple(ours.metrics), slice_by=ours.slice_by,
            seed=config.seed, weights=ours.weights,
        )  # fmt: skip

    def run(self, step: int) -> dict[str, float | int | None] | None:
        """Metrics with keys eval/*, the same on every rank; writes RUN/eval/step-N if there are answers. None
        if any rank was told to stop meanwhile: an evaluation may take longer than the time that is left.
        """
        self._engine.eval()
        try:
            loss = self._loss() if (self._costs.tokens <= self._config.data.seq_len).any() else None
            metrics: dict[str, float | int | None] = {} if loss is None else {"eval/loss": loss}
            if not len(self._questions):
                return metrics
            evaluation = score_answers(self._answering(), self._questions, self._how, self._mesh, loss)
        except _StoppedError:
            return None
        except BadInputError:
            if self._asked_anywhere():
                return None
            raise
        finally:
            self._engine.train()
        if self._mesh.device.type == "cuda":
            torch.cuda.empty_cache()  # the whole copy is gone; its memory is the next step's
        out = evaluation_dir(self._config.run_dir, step)
        self._mesh.on_main(lambda: write_evaluation(evaluation, out))
        return metrics | {f"eval/{name}": value for name, value in evaluation.scores.values.items()}

    def _asked_anywhere(self) -> bool:
        return self._mesh.sum([float(self._stop())])[0] > 0

    def _loss(self) -> float:
        tokens = self._config.data.seq_len

        def forward(row: PackedRow) -> torch.Tensor:
            if self._asked_anywhere():
                raise _StoppedError
            loss: torch.Tensor = self._engine(row=row)
            return loss

        loss, bad = split_loss(forward, self._maker, self._costs, tokens, self._mesh)
        for reason in bad:
            _log.warning("val sample left out of the loss: %s", reason)
        return loss

    def _answering(self) -> Restored:
        """The model of today: a whole copy, else the engine's own in parts."""
        config, dtype = self._origin.model_config, torch_dtype(self._config.model.dtype)
        shapes = self._questions.shapes(
            self._origin.tokenizer, self._config.data.num_crops, self._processor.tile
        )
        positions = max(shape.tokens for shape in shapes) + self._how.max_new_tokens
        whole = keep_whole(self._how.weights, config, dtype, self._how.batch_size, positions, self._mesh)
        device = self._mesh.device
        if whole:
            copy = gather_whole(self._engine, config, dtype, device)
            return Restored(copy, config, self._processor, device, dtype)
        return Restored(self._engine.module, config, self._processor, device, dtype, partitioned=True)


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


class Owed:
    """An evaluation that was broken off, kept in RUN/eval/owed.json over restarts: the next start makes it.

    step, metrics: of that step, whose line is not written before the evaluation is there; None if nothing is
    owed. The same on all ranks, which call its methods together.
    """

    def __init__(self, run_dir: Path, step: int, mesh: Mesh) -> None:
        self._file, self._mesh = run_dir / EVALUATIONS / "owed.json", mesh
        self.metrics: dict[str, float | int | None] | None = mesh.on_main(lambda: self._read(step))

    def _read(self, step: int) -> dict[str, float | int | None] | None:
        try:
            record = json.loads(self._file.read_text())
            return dict(record["metrics"]) if record["step"] == step else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def note(self, step: int, metrics: dict[str, float | int | None]) -> None:
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

        def remove() -> None:
            with contextlib.suppress(OSError):
                self._file.unlink()

        self._mesh.on_main(remove)


def evaluation_dir(run_dir: Path, step: int) -> Path:
    """RUN/eval/step-N."""
    return run_dir / EVALUATIONS / f"step-{step:06d}"


class BestSoFar:
    """The best evaluation of a run, kept in RUN/eval/best.json over restarts. The same on all ranks."""

    def __init__(self, config: RunConfig) -> None:
        self._metric, self._sign = config.eval.best_metric, 1 if config.eval.best_mode == "max" else -1
        self._file = config.run_dir / EVALUATIONS / _BEST
        self.value: float | None = None
        self.step: int | None = None
        try:
            record = json.loads(self._file.read_text())
            if (record["metric"], record["mode"]) == (self._metric, config.eval.best_mode):
                self.value, self.step = float(record["value"]), int(record["step"])
        except (OSError, ValueError, KeyError, TypeError):
            pass
        self._mode = config.eval.best_mode

    def improves(self, metrics: dict[str, float | int | None]) -> bool:
        """Whether these metrics are the best so far."""
        value = metrics.get(self._metric) if self._metric else None
        return value is not None and (self.value is None or self._sign * (value - self.value) > 0)

    def note(self, step: int, metrics: dict[str, float | int | None]) -> Callable[[], None]:
        """Remembers, on all ranks, that the checkpoint of `step` will be the best; what writes it down, for
        the main rank to call when that checkpoint is there.
        """
        value = metrics[self._metric or ""]
        assert value is not None
        self.value, self.step = float(value), step
        fields = {"step": step, "metric": self._metric, "mode": self._mode, "value": self.value}

        def write() -> None:
            self._file.parent.mkdir(exist_ok=True)
            write_atomically(self._file, (json.dumps(fields) + "\n").encode())

        return write

"""The metrics of the steps since the last line.

In: the result of every step. Out: one dict of metrics a line of metrics.jsonl.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from phi3v_dist.budget.flops import Flops, utilisation
from phi3v_dist.checkpoint.meta import Progress
from phi3v_dist.data.loader import RowCounts
from phi3v_dist.parallel.mesh import Mesh
from phi3v_dist.tracking.tracker import host_memory
from phi3v_dist.train.step import StepResult

Metrics = dict[str, float | int | None]


@dataclass
class _Sums:
    """Over the steps of a window that updated the weights; evaluations and checkpoints are not in it.

    waited, busy: seconds waiting for data, and of the whole steps. grad_norm: of the last step.
    """

    nll: float = 0.0
    targets: int = 0
    counts: RowCounts = RowCounts()
    flops: Flops = Flops(0.0, 0.0)
    rows: int = 0
    steps: int = 0
    grad_norm: float = 0.0
    grad_norm_max: float = 0.0
    waited: float = 0.0
    busy: float = 0.0


class Window:
    """`add` after every step, `flush` when a line is due.

    seq_len: positions of a full row. peak_tflops: dense bf16 peak of one GPU, None where it is not known.
    """

    def __init__(self, mesh: Mesh, *, seq_len: int, peak_tflops: float | None) -> None:
        self._mesh, self._seq_len, self._peak_tflops = mesh, seq_len, peak_tflops
        self._sums = _Sums()
        self._last: StepResult | None = None
        self._saved_in: float | None = None

    def add(self, step: StepResult) -> None:
        """Adds a step that was taken; one that was skipped (non-finite) counts only in the learning rate and
        the epoch of the next line, one that was not completed in nothing.
        """
        if not step.is_complete:
            return
        self._last = step
        if not step.is_finite:
            return
        sums = self._sums
        sums.nll, sums.targets = sums.nll + step.nll, sums.targets + step.targets
        sums.counts, sums.flops = sums.counts + step.counts, sums.flops + step.flops
        sums.rows, sums.steps = sums.rows + step.rows, sums.steps + 1
        sums.grad_norm, sums.grad_norm_max = step.grad_norm, max(sums.grad_norm_max, step.grad_norm)
        sums.waited, sums.busy = sums.waited + step.waited_s, sums.busy + step.busy_s

    def add_save(self, seconds: float) -> None:
        """Seconds that a checkpoint held up the run; they come with the next line."""
        self._saved_in = seconds

    def flush(self, progress: Progress, *, rates: dict[str, float], spikes: int) -> Metrics:
        """The metrics of the steps since the last call, then starts anew. Times are in seconds, memory in GB
        (10^9 bytes).

        rates: learning rate by group. spikes: jumps of the loss since the start of the process.
        """
        sums, last, mesh = self._sums, self._last, self._mesh
        assert last is not None  # a line is due only after a step
        speed = sums.counts.tokens / max(1e-9, sums.busy)
        metrics: Metrics = {
            "train/loss": sums.nll / max(1, sums.targets) if sums.steps else None,
            "train/learning_rate": last.learning_rate,
            **{f"train/learning_rate/{name}": rate for name, rate in rates.items()},
            "train/grad_norm": sums.grad_norm if sums.steps else None,
            "train/grad_norm_max": sums.grad_norm_max if sums.steps else None,
            "train/skipped_steps": progress.skipped_steps,
            "train/epoch": last.epoch,
            "train/tokens_seen": progress.tokens,
            "train/images_seen": progress.images,
            "perf/tokens_per_second": speed,
            "perf/tokens_per_second_per_gpu": speed / mesh.size,
            **utilisation(sums.flops, max(1e-9, sums.busy), mesh.size, peak=self._peak_tflops),
            "time/step": sums.busy / max(1, sums.steps),
            "time/data_wait": sums.waited / max(1, sums.steps),
            "time/checkpoint": self._saved_in,
            **sums.counts.metrics(sums.rows, self._seq_len),
            "data/bad_samples": progress.bad_samples,
            **host_memory(),
        }
        if mesh.device.type == "cuda":
            metrics["mem/peak_allocated_gb"] = torch.cuda.max_memory_allocated(mesh.device) / 1e9
        metrics["train/loss_spikes"] = spikes
        self._sums, self._saved_in = _Sums(), None
        return metrics

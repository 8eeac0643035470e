"""The files of a run directory as one value.

In: the directory of a run that has ended or still runs. Out: `Run`. A missing file leaves its part empty.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phi3v_dist.exits import EXIT_FILE
from phi3v_dist.run.layout import BEST_FILE, CONFIG, EVALUATIONS, METRICS, SCORES, STEP
from phi3v_dist.tracking.predictions import StoredAnswer, read_predictions
from phi3v_dist.tracking.starts import Start, read_starts
from phi3v_dist.tracking.tracker import read_metrics
from shards.common.errors import BadInputError


@dataclass(frozen=True)
class StoredEvaluation:
    """One evaluation. name: of its directory. step: of the run, None for an evaluation made afterwards.
    samples: how many were answered. scores: value by metric, for "scores", "swapped", "baseline" (as far as
    they were made) and "only PART" for each part of the data. intervals: (low, high) by metric. answers: the
    first ones.
    """

    name: str
    step: int | None
    samples: int | None
    scores: dict[str, dict[str, float | None]]
    intervals: dict[str, tuple[float, float]]
    answers: list[StoredAnswer]


@dataclass(frozen=True)
class Best:
    """The best evaluation in training: the value of `metric` at `step`."""

    metric: str
    step: int
    value: float


@dataclass(frozen=True)
class Run:
    """lines: of metrics.jsonl, metric -> value. config: as resolved. exit_code: how the run ended, None while
    it runs or after it was killed.
    """

    name: str
    lines: list[dict[str, Any]]
    starts: list[Start]
    evaluations: list[StoredEvaluation]
    config: dict[str, Any]
    exit_code: int | None
    best: Best | None

    def series(self, key: str) -> list[tuple[float, float]]:
        """(step, value) of every line that has the metric `key`."""
        return [(line[STEP], line[key]) for line in self.lines if key in line]

    @property
    def last(self) -> dict[str, Any]:
        """The last value of every metric."""
        found: dict[str, Any] = {}
        for line in self.lines:
            found |= line
        return found

    @property
    def restarts(self) -> list[int]:
        """Steps from which the run resumed after an interruption."""
        return [start.step for start in self.starts[1:]]

    @property
    def in_training(self) -> list[StoredEvaluation]:
        """The evaluations in training, by step."""
        return sorted((e for e in self.evaluations if e.step is not None), key=lambda e: e.step or 0)

    @property
    def afterwards(self) -> list[StoredEvaluation]:
        """The evaluations made by `phi3v evaluate`."""
        return [e for e in self.evaluations if e.step is None]


def read_run(run_dir: Path, most_answers: int) -> Run:
    """Reads a run directory, and at most `most_answers` answers of each evaluation.

    Raises BadInputError if there is no metrics.jsonl in it.
    """
    if not (run_dir / METRICS).exists():
        raise BadInputError(f"{run_dir}: has no {METRICS}, so it is not a run directory; give one that has")
    files = sorted((run_dir / EVALUATIONS).glob(f"*/{SCORES}"))
    best = _json(run_dir / EVALUATIONS / BEST_FILE)
    return Run(
        name=run_dir.resolve().name,
        lines=read_metrics(run_dir / METRICS),
        starts=read_starts(run_dir),
        evaluations=[_evaluation(file, most_answers) for file in files],
        config=_json(run_dir / CONFIG),  # config.yaml holds JSON
        exit_code=_json(run_dir / EXIT_FILE).get("code"),
        best=Best(best["metric"], best["step"], best["value"]) if best else None,
    )


def _evaluation(file: Path, most_answers: int) -> StoredEvaluation:
    """The evaluation whose scores.json is `file`."""
    found = json.loads(file.read_text())
    number = file.parent.name.removeprefix("step-")
    in_training = number.isdigit() and number != file.parent.name
    scores = {name: found[name] for name in ("scores", "swapped", "baseline") if found.get(name)}
    scores |= {f"only {part}": values for part, values in (found.get("slices") or {}).items()}
    intervals = found.get("intervals") or {}
    return StoredEvaluation(
        name=file.parent.name,
        step=int(number) if in_training else None,
        samples=found.get("scores", {}).get("samples"),
        scores=scores,
        intervals={name: (pair[0], pair[1]) for name, pair in intervals.items() if pair is not None},
        answers=read_predictions(file.parent, most_answers),
    )


def _json(file: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(file.read_text())
        return found
    except (OSError, ValueError):
        return {}

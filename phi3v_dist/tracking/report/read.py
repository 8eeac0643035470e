"""What the files of a run directory say, as one value. Called by the page.

In: a run directory, alive or finished. Out: `Run`. A file that is missing leaves its part empty.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from phi3v_dist.evaluation.evaluate import PREDICTIONS, SCORES, TABLE
from phi3v_dist.exits import EXIT_FILE
from phi3v_dist.run.layout import BEST_FILE, CONFIG, EVALUATIONS, METRICS, STARTS, STEP
from phi3v_dist.tracking.tracker import read_metrics
from shards.common.errors import BadInputError


@dataclass(frozen=True)
class Evaluated:
    """One evaluation: the name of its directory, its step (None: not in training), scores.json, its rows."""

    name: str
    step: int | None
    scores: dict[str, Any]
    rows: list[dict[str, Any]]


@dataclass(frozen=True)
class Run:
    """lines: of metrics.jsonl; starts: of starts.jsonl; config: as resolved; exit: how it ended; best: the
    best evaluation in training.
    """

    name: str
    lines: list[dict[str, Any]]
    starts: list[dict[str, Any]]
    evaluations: list[Evaluated]
    config: dict[str, Any]
    exit: dict[str, Any]
    best: dict[str, Any]

    def series(self, key: str) -> list[tuple[float, float]]:
        """(step, value) wherever `key` was logged."""
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
        """Steps from which the run went on after an interruption."""
        return [int(start["step"]) for start in self.starts[1:]]


def read_run(run_dir: Path, rows: int) -> Run:
    """rows: of each evaluation at most. Raises BadInputError if `run_dir` holds no metrics."""
    if not (run_dir / METRICS).exists():
        raise BadInputError(f"{run_dir}: no {METRICS}, so no run has been here; give a run directory")
    evaluations = []
    for file in sorted((run_dir / EVALUATIONS).glob(f"*/{SCORES}")):
        name = file.parent.name
        number = name.removeprefix("step-")
        step = int(number) if name.startswith("step-") and number.isdigit() else None
        evaluations.append(Evaluated(name, step, json.loads(file.read_text()), _rows(file.parent, rows)))
    starts = []
    if (run_dir / STARTS).exists():
        text = (run_dir / STARTS).read_text(encoding="utf-8")
        starts = [json.loads(line) for line in text.splitlines() if line.endswith("}")]
    return Run(
        run_dir.resolve().name,
        read_metrics(run_dir / METRICS),
        starts,
        evaluations,
        _json(run_dir / CONFIG),
        _json(run_dir / EXIT_FILE),
        _json(run_dir / EVALUATIONS / BEST_FILE),
    )


def _rows(folder: Path, number: int) -> list[dict[str, Any]]:
    if (folder / TABLE).exists():
        rows: list[dict[str, Any]] = pq.read_table(folder / TABLE).slice(0, number).to_pylist()
        return rows
    if (folder / PREDICTIONS).exists():
        lines = (folder / PREDICTIONS).read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines[:number]]
    return []


def _json(file: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(file.read_text())  # config.yaml is JSON as well
        return found
    except (OSError, ValueError):
        return {}

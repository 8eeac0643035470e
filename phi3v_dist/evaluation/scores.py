"""Numbers over a set of answers: means, medians, how sure they are, and the same for each part of the data.
Pure.

In: truths, answers, metric functions of `metrics`. Out: `Scores`. A name with "median" in it is summed up by
the median, every other by the mean. Called by evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from phi3v_dist.evaluation.metrics import Metric
from shards.common.errors import BadInputError

CONFIDENCE = 0.95
_RESAMPLES = 1000
_MANY = 10_000  # samples from which 200 resamples are enough
_BLOCK = 4_000_000  # numbers drawn at a time


@dataclass(frozen=True)
class Scores:
    """values: by name, None if no sample counts. intervals: (low, high) of a 95 % bootstrap interval.
    counted: samples that the value is made of.
    """

    samples: int
    values: dict[str, float | None]
    intervals: dict[str, tuple[float, float] | None]
    counted: dict[str, int]

    def as_dict(self) -> dict[str, Any]:
        """{"samples", name: value ...}: what scores.json holds of them."""
        return {"samples": self.samples, **self.values}


def sample_values(
    metrics: Sequence[Metric], truths: Sequence[str], answers: Sequence[str]
) -> list[dict[str, float | None]]:
    """What every metric says about each answer. Raises BadInputError if a user's metric fails, naming it."""
    rows = []
    for truth, answer in zip(truths, answers, strict=True):
        row: dict[str, float | None] = {}
        for metric in metrics:
            try:
                found = {str(k): None if v is None else float(v) for k, v in metric(truth, answer).items()}
            except Exception as error:
                name = getattr(metric, "__name__", repr(metric))
                raise BadInputError(
                    f"metric {name} failed on the answer {answer[:80]!r}: {type(error).__name__}: {error}"
                ) from error
            row |= found
        rows.append(row)
    return rows


def summarise(rows: Sequence[dict[str, float | None]], seed: int = 0) -> Scores:
    """Scores over `rows` of `sample_values`; the same seed gives the same intervals.

    Raises ValueError if there are none.
    """
    if not rows:
        raise ValueError("no answers to score")
    names = list(dict.fromkeys(name for row in rows for name in row))
    values: dict[str, float | None] = {}
    intervals: dict[str, tuple[float, float] | None] = {}
    counted = {}
    for name in names:
        found = [row.get(name) for row in rows]
        numbers = np.array([v for v in found if v is not None and math.isfinite(v)], dtype=np.float64)
        median = "median" in name
        counted[name] = len(numbers)
        values[name] = _sum_up(numbers, median) if len(numbers) else None
        intervals[name] = _interval(numbers, median, seed) if len(numbers) else None
    return Scores(len(rows), values, intervals, counted)


def slices(
    rows: Sequence[dict[str, float | None]], parts: Sequence[str | None], seed: int = 0
) -> dict[str, Scores]:
    """Scores of each part of the data, the largest first. parts: of each row, None for a row without one."""
    by_part: dict[str, list[dict[str, float | None]]] = {}
    for row, part in zip(rows, parts, strict=True):
        if part is not None:
            by_part.setdefault(part, []).append(row)
    ordered = sorted(by_part.items(), key=lambda item: (-len(item[1]), item[0]))
    return {part: summarise(of_part, seed) for part, of_part in ordered}


def _sum_up(numbers: np.ndarray, median: bool) -> float:
    # fsum: exact, so that the order of the samples does not matter
    return float(np.median(numbers)) if median else math.fsum(numbers) / len(numbers)


def _interval(numbers: np.ndarray, median: bool, seed: int) -> tuple[float, float]:
    """The percentile bootstrap interval of the mean or median."""
    rng = np.random.default_rng([seed, len(numbers)])
    resamples = _RESAMPLES if len(numbers) <= _MANY else 200
    block = max(1, _BLOCK // len(numbers))
    found: list[float] = []
    numbers = np.sort(numbers)
    for start in range(0, resamples, block):
        drawn = numbers[rng.integers(0, len(numbers), (min(block, resamples - start), len(numbers)))]
        found += (np.median(drawn, axis=1) if median else drawn.mean(axis=1)).tolist()
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(found, [tail, 1 - tail])
    return float(low), float(high)

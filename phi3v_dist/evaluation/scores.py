"""Scores over a set of answers: means, medians, confidence intervals, and the same for each part of the data.
Pure.

In: truths, answers, functions of `metrics`. Out: `Scores`. A metric with "median" in its name is summarised
by the median, every other by the mean. The bootstrap is our own on numpy, because scipy is not a dependency.
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
_MANY = 10_000  # samples above which 200 resamples are enough
_BLOCK = 4_000_000  # random numbers drawn at a time, which bounds the memory


@dataclass(frozen=True)
class Scores:
    """samples: number of answers. By name of the metric: values, None if it applies to no sample; intervals,
    (low, high) of the 95 % bootstrap interval; counted, number of samples to which it applies.
    """

    samples: int
    values: dict[str, float | None]
    intervals: dict[str, tuple[float, float] | None]
    counted: dict[str, int]

    def as_dict(self) -> dict[str, Any]:
        """{"samples": number, name: value ...}, as in scores.json."""
        return {"samples": self.samples, **self.values}


def sample_values(
    metrics: Sequence[Metric], truths: Sequence[str], answers: Sequence[str]
) -> list[dict[str, float | None]]:
    """name -> value of every metric, for each answer.

    Raises BadInputError naming the metric if a user's metric fails.
    """
    values = []
    for truth, answer in zip(truths, answers, strict=True):
        of_answer: dict[str, float | None] = {}
        for metric in metrics:
            try:
                found = {str(k): None if v is None else float(v) for k, v in metric(truth, answer).items()}
            except Exception as error:
                name = getattr(metric, "__name__", repr(metric))
                raise BadInputError(
                    f"metric {name} failed on the answer {answer[:80]!r}: {type(error).__name__}: {error}"
                ) from error
            of_answer |= found
        values.append(of_answer)
    return values


def summarise(sample_values: Sequence[dict[str, float | None]], seed: int = 0) -> Scores:
    """Scores over the values of `sample_values`. seed: of the bootstrap.

    Raises ValueError if there are no answers.
    """
    if not sample_values:
        raise ValueError("no answers to score")
    names = list(dict.fromkeys(name for values in sample_values for name in values))
    summary: dict[str, float | None] = {}
    intervals: dict[str, tuple[float, float] | None] = {}
    counted = {}
    for name in names:
        found = [values.get(name) for values in sample_values]
        numbers = np.array([v for v in found if v is not None and math.isfinite(v)], dtype=np.float64)
        median = "median" in name
        counted[name] = len(numbers)
        summary[name] = _average(numbers, median) if len(numbers) else None
        intervals[name] = _interval(numbers, median, seed) if len(numbers) else None
    return Scores(len(sample_values), summary, intervals, counted)


def slices(
    sample_values: Sequence[dict[str, float | None]], parts: Sequence[str | None], seed: int = 0
) -> dict[str, Scores]:
    """Scores of each part of the data, the largest part first. parts: of each sample, None for a sample
    without one.
    """
    by_part: dict[str, list[dict[str, float | None]]] = {}
    for values, part in zip(sample_values, parts, strict=True):
        if part is not None:
            by_part.setdefault(part, []).append(values)
    ordered = sorted(by_part.items(), key=lambda item: (-len(item[1]), item[0]))
    return {part: summarise(of_part, seed) for part, of_part in ordered}


def _average(numbers: np.ndarray, median: bool) -> float:
    # fsum is exact, so the order of the samples does not matter
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

"""What a configuration makes of its data, before any GPU is reserved: rows, fill, steps, balance.

In: the configuration, a number of ranks, the tokenizer and the tile side. Out: lines of text.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from phi3v_dist.config import RunConfig
from phi3v_dist.data.plan import Plan, deal_rows, row_cost
from phi3v_dist.data.prepare import prepare_data
from phi3v_dist.data.tokens import SampleCosts

LONGEST = 131_072  # positions that the published model was trained for
_STEPS_SHOWN = 2000  # steps whose balance is computed, evenly spread
_BAR = 40  # characters of the longest bar of the histogram


def describe_plan(config: RunConfig, dp_size: int, tokenizer: Any, *, tile: int) -> list[str]:
    """The plan of the first epoch on `dp_size` data-parallel ranks. tile: px.

    Raises BadInputError for data or settings that training would refuse too.
    """
    data, batch = config.data, config.train.global_batch
    each = config.train.rows_each(dp_size)
    with tempfile.TemporaryDirectory() as scratch:
        made = prepare_data(config, tokenizer, tile, directory=Path(scratch), writer=True)
        plan, costs = made.plan, made.plan.costs
        epoch = plan.epoch(0)
        rows, samples = len(epoch), epoch.samples
        tokens = costs.tokens[samples]
        steps = plan.steps_of(1)
        imbalance = step_imbalance(plan, dp_size, _STEPS_SHOWN)
        quantiles = np.quantile(costs.tokens, [0, 0.5, 0.9, 0.99, 1]).astype(int)
        total = config.train.steps or plan.steps_of(config.train.epochs or 1)
        positions = int((-(-np.add.reduceat(tokens, epoch.offsets[:-1]) // 64) * 64).sum())
        over = int((costs.tokens > LONGEST).sum())
        lines = [
            f"samples      {len(costs):,} with {costs.images.sum():,} images; of those longer than "
            f"{data.seq_len:,} tokens {made.truncated:,} lose images, {plan.dropped:,} are dropped; "
            f"{over:,} are longer than {LONGEST:,}",
            "tokens       a sample: least {:,}, median {:,}, 90% {:,}, 99% {:,}, most {:,}".format(
                *quantiles
            ),
            *_histogram(costs),
            f"targets      {costs.targets.sum() / costs.tokens.sum():.1%} of {costs.tokens.sum():,} tokens",
            f"rows         {rows:,} of {data.seq_len:,} tokens an epoch, {plan.fill(0):.2%} filled, "
            f"{len(samples) / rows:.1f} samples and {costs.images[samples].sum() / rows:.1f} images "
            f"each; rows are padded to a multiple of 64, {1 - tokens.sum() / positions:.2%} of positions",
            f"steps        {steps:,} an epoch of {batch} rows ({each} on each of {dp_size} "
            f"ranks); {total:,} in this run",
            f"imbalance    the slowest rank does {imbalance.mean():.3f} x the mean work of its step, "
            f"{np.quantile(imbalance, 0.99):.3f} x in the worst 1%",
        ]
        if len(data.paths) > 1:
            source = np.searchsorted(made.maker.samples.bounds(), samples, side="right") - 1
            lines += [
                f"source       {(source == number).sum():,} samples an epoch, "
                f"{tokens[source == number].sum() / tokens.sum():.1%} of its tokens: {path}"
                for number, path in enumerate(data.paths)
            ]
        return lines


def step_imbalance(plan: Plan, dp_size: int, most: int) -> np.ndarray:
    """float64 [steps]: the work of the busiest rank, as a multiple of the mean of its step. Of the steps of
    the first epoch, at most `most`, evenly spread; the last one is that of a run that ends with this epoch.
    """
    end = plan.end_row(1)
    steps = plan.steps_between(0, end)
    found = []
    for number in np.unique(np.linspace(0, steps - 1, min(steps, most)).astype(int)).tolist():
        step = plan.step(number * plan.global_batch, end)
        cost = np.array([row_cost(plan.costs, row) for row in step.rows])
        work = cost[deal_rows(cost, dp_size)].sum(axis=0)
        found.append(work.max() / work.mean())
    return np.array(found)


def _histogram(costs: SampleCosts) -> list[str]:
    """One line per power of two of tokens, from the first that holds samples."""
    powers = np.ceil(np.log2(np.maximum(costs.tokens, 1))).astype(int)
    counts = np.bincount(powers)
    first = int(np.flatnonzero(counts)[0])
    return [
        f"  <= {1 << power:<9,}{counts[power]:>12,}  {'#' * round(_BAR * counts[power] / counts.max())}"
        for power in range(first, len(counts))
    ]

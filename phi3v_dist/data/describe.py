"""What a configuration makes of its data, before any GPU is asked for: rows, fill, steps, balance.

In: the configuration and a number of ranks. Out: lines of text. Called by `phi3v plan`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from phi3v_dist.config import RunConfig
from phi3v_dist.data.plan import Plan, rank_rows, row_cost
from phi3v_dist.data.tokens import sample_costs
from phi3v_dist.origin import model_config_of, tokenizer_dir
from phi3v_dist.processor.tokenizer import load_tokenizer
from shards.format import BadInputError, read_index


def describe_plan(config: RunConfig, dp_size: int) -> list[str]:
    """The plan of the first epoch on `dp_size` data-parallel ranks.

    Raises BadInputError for data or settings that training would refuse as well.
    """
    if config.train.global_batch % dp_size:
        raise BadInputError(
            f"train.global_batch={config.train.global_batch} rows cannot be shared by {dp_size} ranks; "
            "make it a multiple"
        )
    with tempfile.TemporaryDirectory() as scratch:  # a tokenizer that training would train is trained there
        tokenizer = load_tokenizer(tokenizer_dir(config, Path(scratch)))
    tile = model_config_of(config).tile
    index = read_index(config.data.path, config.data.train_split, ["key", "images", "messages"])
    costs = sample_costs(index, tokenizer, config.data.num_crops, tile)
    data = config.data
    plan = Plan(
        costs,
        data.seq_len,
        config.seed,
        config.train.global_batch,
        data.shuffle,
        data.packing,
        data.over_long,
    )
    epoch = plan.epoch(0)
    steps = plan.steps_of(1)
    imbalance = []
    for number in range(steps):
        step = plan.step(number)
        ranks = [rank_rows(step, costs, rank, dp_size, config.model.vision_chunk) for rank in range(dp_size)]
        work = [sum(row_cost(costs, micro.samples) for micro in rank) for rank in ranks]
        imbalance.append(max(work) / (sum(work) / dp_size))
    quantiles = np.quantile(costs.tokens, [0, 0.5, 0.9, 0.99, 1]).astype(int)
    total = config.train.steps or plan.steps_of(config.train.epochs or 1)
    return [
        f"samples      {len(costs):,} with {costs.pictures.sum():,} pictures; {plan.dropped:,} longer than "
        f"{data.seq_len:,} tokens are left out",
        "tokens       a sample: least {:,}, median {:,}, 90% {:,}, 99% {:,}, most {:,}".format(*quantiles),
        f"targets      {costs.targets.sum() / costs.tokens.sum():.1%} of {costs.tokens.sum():,} tokens",
        f"rows         {len(epoch):,} of {data.seq_len:,} tokens an epoch, {plan.fill(0):.2%} filled, "
        f"{len(epoch.samples) / len(epoch):.1f} samples each",
        f"steps        {steps:,} an epoch of {config.train.global_batch} rows "
        f"({config.train.global_batch // dp_size} on each of {dp_size} ranks); {total:,} in this run",
        f"imbalance    the slowest rank does {np.mean(imbalance):.3f} x the mean work of its step, "
        f"{np.quantile(imbalance, 0.99):.3f} x in the worst 1%",
    ]

"""From the configuration to the plan of a run and the maker of its rows; slow results are kept in files.

In: the configuration, the tokenizer, the tile side, a directory for files. Out: `PreparedData`. The name of a
file is a digest of everything that shapes its content: the index, the tokenizer, num_crops, the settings of
the plan.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phi3v_dist.config import RunConfig
from phi3v_dist.data.epoch import Layout
from phi3v_dist.data.loader import RowMaker
from phi3v_dist.data.node_cache import CacheOptions
from phi3v_dist.data.plan import Plan
from phi3v_dist.data.plan_files import PlanFiles
from phi3v_dist.data.samples import Samples, keep_samples, open_samples, read_samples, samples_fingerprint
from phi3v_dist.data.tokens import Counter, keep_costs, load_costs, sample_costs, truncated_costs
from shards.format.dataset import read_dataset_info

_PLAN_VERSION = 2  # raise it when the same settings give other rows
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreparedData:
    """truncated: number of samples that lose images to fit into a row."""

    plan: Plan
    maker: RowMaker
    truncated: int


def prepare_data(
    config: RunConfig, tokenizer: Any, tile: int, *, directory: Path, writer: bool
) -> PreparedData:
    """The plan of `config` and the maker of its rows.

    tile: px. directory: for the files; made here, shared by all ranks. writer: whether this process writes
    the files (the others come later and find them).
    Raises BadInputError for a missing dataset or split, and for a sample that cannot be used or is too long.
    """
    data = config.data
    directory.mkdir(parents=True, exist_ok=True)
    counter = Counter(tokenizer, data.num_crops, tile)
    of_index = samples_fingerprint(data.paths, data.train_split)
    of_costs = _digest(of_index, counter.key())
    samples = _samples(config, directory / f"samples-{of_index[:20]}.arrow", writer)
    costs_file = directory / f"costs-{of_costs[:20]}.npy"
    if costs_file.exists():
        costs, shards = load_costs(costs_file)
    else:
        costs, shards = sample_costs(samples, counter), samples.shard_numbers()
        if writer:
            keep_costs(costs, shards, costs_file)
            costs, shards = load_costs(costs_file)
    truncated = 0
    if data.over_long == "truncate":
        costs, truncated = truncated_costs(costs, samples, counter, limit=data.seq_len)
    layout = Layout(shards, samples.bounds(), data.weights)
    files = PlanFiles(directory, _plan_key(config, of_costs), writer)
    plan = Plan(
        costs,
        data.seq_len,
        config.seed,
        global_batch=config.train.global_batch,
        shuffle=data.shuffle,
        packing=data.packing,
        over_long=data.over_long,
        layout=layout,
        files=files,
    )
    cache = None if data.cache_dir is None else CacheOptions(data.cache_dir, int(data.cache_gb * 1e9))
    limit = data.seq_len if data.over_long == "truncate" else None
    maker = RowMaker(samples, tokenizer, data.num_crops, tile=tile, max_tokens=limit, cache=cache)
    return PreparedData(plan, maker, truncated)


def _plan_key(config: RunConfig, costs_key: str) -> str:
    """A digest of everything that shapes the plan. costs_key: stands for the costs."""
    data = config.data
    parts = (
        *(_PLAN_VERSION, costs_key, data.seq_len, config.seed, config.train.global_batch),
        *(data.shuffle, data.packing, data.over_long, data.weights),
    )
    return _digest(*parts)[:20]


def data_fingerprint(config: RunConfig) -> str:
    """Identifies the data of a run in its checkpoints: a digest of the fingerprints of its datasets."""
    fingerprints = [read_dataset_info(path).fingerprint for path in config.data.paths]
    return fingerprints[0] if len(fingerprints) == 1 else _digest(*fingerprints)


def _samples(config: RunConfig, file: Path, writer: bool) -> Samples:
    if file.exists():
        return open_samples(config.data.paths, file)
    samples = read_samples(config.data.paths, config.data.train_split)
    if not writer:
        return samples
    keep_samples(samples, file)
    return open_samples(config.data.paths, file)


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

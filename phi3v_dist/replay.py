"""One row of a run again: what a rank saw in a step, and what a model makes of it.

In: a run's configuration and a place (step, rank, accumulation step), as `logs/rows-rank-N.jsonl` names it.
Out: the row's samples with keys, text and shapes, and its loss under a checkpoint. No process group, no GPU
needed. Called by `phi3v debug row`.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from phi3v_dist.checkpoint.restore import find_source, restore
from phi3v_dist.config import RunConfig
from phi3v_dist.data.loader import LoadedRow, RowMaker
from phi3v_dist.data.plan import rank_rows
from phi3v_dist.data.prepare import prepare_data
from phi3v_dist.pretrained import model_config_of, tokenizer_dir
from phi3v_dist.processor.tokenizer import load_tokenizer
from phi3v_dist.run.layout import DATA
from phi3v_dist.tracking.starts import first_row_of_step
from shards.common.errors import BadInputError

_SHOWN = 400  # characters of a text
_ARRAYS = ("input_ids", "labels", "position_ids", "cu_seqlens", "tiles", "grids", "image_positions")


@dataclass(frozen=True)
class Place:
    """step: optimizer steps done before it. rank: of `ranks` data-parallel ones. micro: accumulation step."""

    step: int
    rank: int
    micro: int
    ranks: int


@dataclass(frozen=True)
class Replayed:
    """keys: of the samples, in the order of the row."""

    place: Place
    keys: tuple[str, ...]
    loaded: LoadedRow
    maker: RowMaker


def replay(config: RunConfig, place: Place) -> Replayed:
    """The row of `place`, read and decoded as in training.

    Raises BadInputError for a place that the run does not have.
    """
    each = config.train.rows_each(place.ranks)
    if not (0 <= place.rank < place.ranks and 0 <= place.micro < each and place.step >= 0):
        raise BadInputError(
            f"{place.ranks} ranks with {each} rows each a step have no rank {place.rank}, row "
            f"{place.micro} of step {place.step}"
        )
    with tempfile.TemporaryDirectory() as scratch:  # one that training has made of other data stays as it is
        tokens = load_tokenizer(tokenizer_dir(config, Path(scratch)))
    data = prepare_data(
        config, tokens, model_config_of(config).tile, directory=config.run_dir / DATA, writer=False
    )
    end_row = data.plan.end_row(config.train.epochs) if config.train.epochs else None
    first_row = first_row_of_step(config.run_dir, place.step, config.train.global_batch)
    if place.step >= (config.train.steps or sys.maxsize) or first_row >= (end_row or sys.maxsize):
        raise BadInputError(f"{config.run_dir}: the run ends before step {place.step} (steps count from 0)")
    step = data.plan.step(first_row, end_row)
    micro = rank_rows(
        step, data.plan.costs, dp_rank=place.rank, dp_size=place.ranks, vision_chunk=config.views_per_call
    )[place.micro]
    reader = data.maker.reader()
    try:
        loaded = data.maker.load(micro, reader)
    finally:
        reader.close()
    return Replayed(place, tuple(data.maker.keys(micro)), loaded, data.maker)


def describe(replayed: Replayed) -> Iterator[str]:
    """Lines: the row as a whole, then each sample with its key, size and text."""
    row, place = replayed.loaded.row, replayed.place
    yield (
        f"step {place.step}, rank {place.rank} of {place.ranks}, row {place.micro}: "
        f"{len(replayed.keys)} samples, {replayed.loaded.tokens} tokens in {len(row.input_ids)} positions, "
        f"{row.num_targets} targets"
    )
    for name in _ARRAYS:
        value = getattr(row, name)
        yield f"  {name:16} {str(value.dtype).removeprefix('torch.'):8} {list(value.shape)}"
    for reason in replayed.loaded.bad:
        yield f"  unreadable: {reason}"
    bounds = row.cu_seqlens.tolist()
    for key, start, end in zip(replayed.keys, bounds, bounds[1:], strict=False):
        ids, labels = row.input_ids[start:end], row.labels[start:end]
        pictures = int((ids < 0).sum())
        text = replayed.maker.tokenizer.decode(ids[ids >= 0].tolist())
        answer = replayed.maker.tokenizer.decode(labels[labels >= 0].tolist())
        yield f"{key}: {end - start} tokens, {pictures} of pictures, {int((labels >= 0).sum())} targets"
        yield f"  text    {_short(text)}"
        yield f"  targets {_short(answer)}"


def row_loss(replayed: Replayed, model: str | Path) -> float:
    """The mean loss of the row's targets under a run's newest checkpoint, a checkpoint, or a model
    directory.
    """
    restored = restore(find_source(model), "cpu", torch.float32)
    with torch.no_grad():
        loss = restored.model(row=replayed.loaded.row)
    return float(loss) / max(1, replayed.loaded.row.num_targets)


def write(replayed: Replayed, out: Path) -> Path:
    """OUT/row-STEP-RANK-MICRO.npz: the row's arrays and the keys; returns it."""
    place, row = replayed.place, replayed.loaded.row
    out.mkdir(parents=True, exist_ok=True)
    target = out / f"row-{place.step}-{place.rank}-{place.micro}.npz"
    np.savez_compressed(target, keys=np.array(replayed.keys), **{n: getattr(row, n).numpy() for n in _ARRAYS})
    return target


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN else f"{line[:_SHOWN]} ... ({len(line)} characters)"

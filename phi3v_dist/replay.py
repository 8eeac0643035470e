"""Replays one packed row of a run: what a rank saw in a step, and the loss of a model on it.

In: a run's configuration and a place (step, rank, accumulation step), as in `logs/rows-rank-N.jsonl`. Out:
the row's samples with keys, texts and shapes, and its loss under a checkpoint. It needs neither a process
group nor a GPU.
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

_SHOWN = 400  # characters of each text
_ARRAYS = ("input_ids", "labels", "position_ids", "cu_seqlens", "tiles", "grids", "image_positions")


@dataclass(frozen=True)
class Place:
    """Which packed row. step: optimizer steps done before it. rank: data-parallel rank, of `ranks`. micro:
    accumulation step.
    """

    step: int
    rank: int
    micro: int
    ranks: int


@dataclass(frozen=True)
class Replayed:
    """keys: of the samples, in the order of the row. loaded: the row. maker: what loaded it."""

    place: Place
    keys: tuple[str, ...]
    loaded: LoadedRow
    maker: RowMaker


def replay(config: RunConfig, place: Place) -> Replayed:
    """The packed row of `place`, read and decoded as in training.

    Raises BadInputError for a step, rank or accumulation step that the run does not have.
    """
    each = config.train.rows_each(place.ranks)
    if not (0 <= place.rank < place.ranks and 0 <= place.micro < each and place.step >= 0):
        raise BadInputError(
            f"a step of {place.ranks} ranks with {each} rows each has no row {place.micro} of rank "
            f"{place.rank} in step {place.step}"
        )
    with (
        tempfile.TemporaryDirectory() as scratch
    ):  # a tokenizer that training has made from other data is not replaced
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
    """Lines of text: the row with its arrays, then each sample with its key, size, text and targets."""
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
        image_tokens = int((ids < 0).sum())
        text = replayed.maker.tokenizer.decode(ids[ids >= 0].tolist())
        answer = replayed.maker.tokenizer.decode(labels[labels >= 0].tolist())
        yield f"{key}: {end - start} tokens, {image_tokens} of images, {int((labels >= 0).sum())} targets"
        yield f"  text    {_short(text)}"
        yield f"  targets {_short(answer)}"


def row_loss(replayed: Replayed, model: str | Path) -> float:
    """The loss (nats per target token) of the row under a model, in float32 on the CPU.

    model: a run (its newest checkpoint), a checkpoint, or a model directory. Raises BadInputError if it is
    none of these.
    """
    restored = restore(find_source(model), "cpu", torch.float32)
    with torch.no_grad():
        loss = restored.model(row=replayed.loaded.row)
    return float(loss) / max(1, replayed.loaded.row.num_targets)


def write(replayed: Replayed, out: Path) -> Path:
    """Writes the row's arrays and the keys to OUT/row-STEP-RANK-MICRO.npz. Out: that path."""
    place, row = replayed.place, replayed.loaded.row
    out.mkdir(parents=True, exist_ok=True)
    target = out / f"row-{place.step}-{place.rank}-{place.micro}.npz"
    np.savez_compressed(target, keys=np.array(replayed.keys), **{n: getattr(row, n).numpy() for n in _ARRAYS})
    return target


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN else f"{line[:_SHOWN]} ... ({len(line)} characters)"

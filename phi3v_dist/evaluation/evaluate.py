"""How good a model's answers are: loss and generation on a split, scores, how sure they are, and what to hold
them against.

`evaluate` scores a model on a split, beside a constant predictor and the same model with the pictures swapped
between samples; `write_evaluation` puts it into a directory. All ranks call it together; what comes out is
the same at any number of them. Called by `phi3v evaluate`; the train loop's validation uses the same parts.
"""

from __future__ import annotations

import io
import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from phi3v_dist.checkpoint.restore import (
    Restored,
    Source,
    answer_dtype,
    model_config,
    processor,
    restore,
    restore_partitioned,
)
from phi3v_dist.data.loader import RowMaker
from phi3v_dist.data.plan import MicroRow
from phi3v_dist.data.samples import Samples
from phi3v_dist.data.tokens import Counter, SampleCosts, sample_costs
from phi3v_dist.engine.zero import prepare_deepspeed
from phi3v_dist.evaluation.generate import answer_all
from phi3v_dist.evaluation.metrics import constant_answer, find_metrics
from phi3v_dist.evaluation.prompts import Questions, read_split
from phi3v_dist.evaluation.scores import Scores, sample_values, slices, summarise
from phi3v_dist.evaluation.whole import keep_whole
from phi3v_dist.model.row import PackedRow
from phi3v_dist.parallel.mesh import Mesh
from phi3v_dist.processor.geometry import vision_calls_needed
from shards.common.errors import BadInputError
from shards.common.files import write_atomically
from shards.format.index import read_index

SCORES, PREDICTIONS, TABLE = "scores.json", "predictions.jsonl", "predictions.parquet"
THUMBNAILS = 200  # samples whose picture goes into the predictions file
_ROW_TOKENS = 4096
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class How:
    """How to evaluate. samples: so many of the split, None for all. slice_by: field of the samples' meta.
    weights: "whole" on every rank, "partitioned" by ZeRO-3, or "auto". loss: also the loss of the replies.
    """

    split: str = "val"
    samples: int | None = None
    swap: bool = True
    batch_size: int = 16
    max_new_tokens: int = 64
    metrics: tuple[str, ...] = ("price", "category", "title", "exact_match")
    slice_by: str = "category"
    seed: int = 0
    loss: bool = True
    weights: str = "auto"


@dataclass(frozen=True)
class Evaluation:
    """scores: of the model; swapped: with pictures swapped between samples; baseline: of a constant answer
    made from the train split; by_slice: of each part of the data. rows: key, slice, prompt, truth, prediction
    and what each metric says, one per sample. pictures: small JPEGs by row. loss: mean over target tokens.
    """

    scores: Scores
    swapped: Scores | None
    baseline: Scores | None
    by_slice: dict[str, Scores]
    rows: tuple[dict[str, Any], ...]
    pictures: dict[int, bytes]
    loss: float | None
    seconds: float
    how: dict[str, Any]


def evaluate(source: Source, dataset: str, how: How, mesh: Mesh) -> Evaluation:
    """Answers the samples of a split with the model of `source`, all ranks together.

    Raises BadInputError on every rank for a dataset, picture, metric or size that cannot be used.
    """
    find_metrics(how.metrics)
    if mesh.device.type == "cpu":
        torch.set_num_threads(1)  # sums depend on the number of threads; ranks are what makes it faster
    samples = read_split([dataset], how.split, how.samples)
    if not len(samples):
        raise BadInputError(f"{dataset}: the split {how.split!r} is empty; nothing to evaluate")
    questions = Questions(samples)
    config, dtype = model_config(source), answer_dtype(mesh.device)
    reader = processor(source)
    shapes = questions.shapes(reader.tokenizer, reader.num_crops, reader.tile)
    positions = max(shape.tokens for shape in shapes) + how.max_new_tokens
    if keep_whole(how.weights, config, dtype, batch_size=how.batch_size, positions=positions, mesh=mesh):
        restored = restore(source, mesh.device, dtype)
    else:
        prepare_deepspeed(mesh)
        restored = restore_partitioned(source, mesh.device, dtype)
    loss = _loss_of(restored, samples, mesh) if how.loss else None
    baseline = _train_replies(dataset)
    return score_answers(restored, questions, how, mesh, loss, baseline)


def score_answers(
    restored: Restored,
    questions: Questions,
    how: How,
    mesh: Mesh,
    loss: float | None = None,
    train_replies: Sequence[str] = (),
) -> Evaluation:
    """Answers `questions` and scores the answers; the same on every rank."""
    began = time.perf_counter()
    metrics = find_metrics(how.metrics)
    truths, parts = questions.truths, questions.parts(how.slice_by)

    def values_of(asked: Questions, thumbnails: int) -> tuple[list[dict[str, float | None]], list[str], Any]:
        said, small = answer_all(restored, asked, mesh, how.batch_size, how.max_new_tokens, thumbnails)
        return sample_values(metrics, truths, said), said, small

    values, answers, pictures = values_of(questions, THUMBNAILS)
    swapped = summarise(values_of(questions.swapped(how.seed), 0)[0], how.seed) if how.swap else None
    constant = [constant_answer(train_replies)] * len(truths)
    baseline = summarise(sample_values(metrics, truths, constant), how.seed) if train_replies else None
    rows = tuple(
        {"key": key, "slice": part, "prompt": prompt, "truth": truth, "prediction": said, **value}
        for key, part, prompt, truth, said, value in zip(
            questions.keys, parts, questions.prompts, truths, answers, values, strict=True
        )
    )
    return Evaluation(
        summarise(values, how.seed), swapped, baseline, slices(values, parts, how.seed), rows, pictures, loss,
        time.perf_counter() - began, {k: v for k, v in asdict(how).items() if k != "weights"},
    )  # fmt: skip


def split_loss(
    forward: Callable[[PackedRow], torch.Tensor],
    maker: RowMaker,
    costs: SampleCosts,
    row_tokens: int,
    views_per_call: int,
    mesh: Mesh,
) -> tuple[float, list[str]]:
    """The mean negative log likelihood of all target tokens of the samples of `maker` that have at most
    `row_tokens` tokens, and why which of them were left out. costs: of them. forward: of a packed row on the
    device; all ranks call it as often, as ZeRO-3 needs it. views_per_call: views of a row that pass the tower
    at once.

    The rows do not depend on the ranks and are added up in their order: the same at any number of them.
    """
    rows = _loss_rows(costs.tokens, row_tokens)
    views = [int(costs.tiles[row].sum() + costs.pictures[row].sum()) for row in rows]
    calls = vision_calls_needed(max(views, default=0), 0, views_per_call)
    reader = maker.reader()
    found: list[tuple[int, int, float]] = []
    targets: dict[int, int] = {}
    bad: list[str] = []
    try:
        with torch.no_grad():
            for first in range(0, len(rows), mesh.dp_size):
                number = first + mesh.dp_rank
                here = rows[number] if number < len(rows) else np.empty(0, np.int64)
                loaded = maker.load(MicroRow(here, calls), reader)
                nll = float(forward(loaded.row.to(mesh.device)))
                bad += loaded.bad
                if len(here):
                    found.append((number, mesh.rank, nll))
                    targets[number] = loaded.row.num_targets
    finally:
        reader.close()
    shares = mesh.gather((found, targets, bad))
    total = math.fsum(nll for _, _, nll in sorted(entry for share, _, _ in shares for entry in share))
    counted = {number: count for _, share, _ in shares for number, count in share.items()}
    return total / max(1, sum(counted.values())), sorted({each for _, _, share in shares for each in share})


def _loss_rows(tokens: np.ndarray, row_tokens: int) -> list[np.ndarray]:
    """Samples that share a row, in their order; those that fit into none are left out."""
    rows: list[list[int]] = []
    room = 0
    for sample in np.flatnonzero(tokens <= row_tokens).tolist():
        if not rows or tokens[sample] > room:
            rows.append([])
            room = row_tokens
        rows[-1].append(sample)
        room -= int(tokens[sample])
    return [np.array(row, dtype=np.int64) for row in rows]


def _loss_of(restored: Restored, samples: Samples, mesh: Mesh) -> float:
    ours = restored.processor
    tokenizer, tile = ours.tokenizer, ours.tile
    costs = sample_costs(samples, Counter(tokenizer, ours.num_crops, tile))
    maker = RowMaker(samples, tokenizer, ours.num_crops, tile, tokenizer.pad_token_id)
    row_tokens = max(_ROW_TOKENS, int(costs.tokens.max()))
    views = restored.model.vision_chunk
    loss, bad = split_loss(lambda row: restored.model(row=row), maker, costs, row_tokens, views, mesh)
    if bad:
        raise BadInputError(f"{len(bad)} samples cannot be read, the first is {bad[0]}")
    return loss


def write_evaluation(evaluation: Evaluation, out: Path) -> None:
    """OUT/predictions.jsonl and .parquet (with small pictures), then OUT/scores.json."""
    out.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in evaluation.rows)
    write_atomically(out / PREDICTIONS, text.encode())
    table = pa.Table.from_pylist(
        [{**row, "picture": evaluation.pictures.get(place)} for place, row in enumerate(evaluation.rows)]
    )
    packed = io.BytesIO()
    pq.write_table(table, packed)
    write_atomically(out / TABLE, packed.getvalue())
    write_atomically(out / SCORES, (json.dumps(scores_json(evaluation), indent=1) + "\n").encode())


def scores_json(evaluation: Evaluation) -> dict[str, Any]:
    """What scores.json holds: scores, swapped, baseline, slices (values by name), intervals of the scores."""
    found: dict[str, Any] = {
        name: scores.as_dict()
        for name in ("scores", "swapped", "baseline")
        if (scores := getattr(evaluation, name)) is not None
    }
    if evaluation.loss is not None:
        found["scores"]["loss"] = evaluation.loss
    return {
        **found,
        "intervals": evaluation.scores.intervals,
        "counted": evaluation.scores.counted,
        "slices": {name: scores.as_dict() for name, scores in evaluation.by_slice.items()},
        "how": evaluation.how,
    }


def _train_replies(dataset: str) -> list[str]:
    try:
        messages = read_index(dataset, "train", ["messages"])["messages"].to_pylist()
    except BadInputError:  # a dataset of one split: then there is no constant to learn
        return []
    return [each[-1]["content"] for each in messages]

"""How good a model's answers are: loss and generated answers on a split, scores with confidence intervals,
and two references to compare them with.

`evaluate` scores a model on a split. The references are a constant answer, and the same model with the images
swapped between samples. `write_evaluation` writes the result to a directory. All ranks call `evaluate`
together; the result does not depend on their number. Evaluation during training uses the same parts.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

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
from phi3v_dist.config import DataConfig, EvalConfig, RunConfig
from phi3v_dist.data.loader import RowMaker
from phi3v_dist.data.samples import Samples
from phi3v_dist.data.tokens import Counter, sample_costs
from phi3v_dist.engine.zero import prepare_deepspeed
from phi3v_dist.evaluation.generate import generate_all
from phi3v_dist.evaluation.loss import split_loss
from phi3v_dist.evaluation.metrics import constant_answer, find_metrics
from phi3v_dist.evaluation.prompts import Prompts, read_split
from phi3v_dist.evaluation.scores import Scores, sample_values, slices, summarise
from phi3v_dist.evaluation.whole import keep_whole
from phi3v_dist.parallel.mesh import Mesh
from phi3v_dist.run.layout import PREDICTIONS, PREDICTIONS_TABLE, SCORES
from shards.common.errors import BadInputError
from shards.common.files import write_atomically
from shards.format.index import read_index

_THUMBNAILS = 200  # samples whose image goes into the table of predictions
_ROW_TOKENS = 4096
_DEFAULTS = EvalConfig()


@dataclass(frozen=True)
class EvalSettings:
    """How to evaluate.

    samples: number of samples of the split, evenly spread; None for all. swap: answer once more with the
    images swapped between samples. batch_size: prompts answered together. max_new_tokens: tokens of the
    longest answer. metrics: as in eval.metrics. slice_by: field of the samples' meta. seed: of the swap and
    of the confidence intervals. loss: also compute the loss of the reference replies. weights: "whole" on
    every rank, "partitioned" by ZeRO-3, or "auto". Where the config has the key, the default is the config's.
    """

    split: str = DataConfig.model_fields["val_split"].default
    samples: int | None = None
    swap: bool = True
    batch_size: int = _DEFAULTS.batch_size
    max_new_tokens: int = _DEFAULTS.max_new_tokens
    metrics: tuple[str, ...] = tuple(_DEFAULTS.metrics)
    slice_by: str = _DEFAULTS.slice_by
    seed: int = RunConfig.model_fields["seed"].default
    loss: bool = True
    weights: str = _DEFAULTS.weights


@dataclass(frozen=True)
class AnswerRecord:
    """One answered sample. slice: its part of the data, None without one. prompt: as rendered for the model.
    truth: the reference reply. prediction: the model's answer. values: of every metric, None where a metric
    does not apply to this sample.
    """

    key: str
    slice: str | None
    prompt: str
    truth: str
    prediction: str
    values: dict[str, float | None]

    def as_dict(self) -> dict[str, Any]:
        """{"key", "slice", "prompt", "truth", "prediction", metric: value ...}: a record of the predictions
        files.
        """
        fields = {name: getattr(self, name) for name in ("key", "slice", "prompt", "truth", "prediction")}
        return {**fields, **self.values}


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation.

    scores: of the model. swapped: of the model with images swapped between samples, None if not asked for.
    baseline: of a constant answer made from the train split, None without one. by_slice: scores of each part
    of the data, the largest first. answers: one record per sample, in the order of the split. images: small
    JPEGs (bytes) by position in `answers`, for the first samples. loss: nats per target token, None if not
    asked for. seconds: that answering and scoring took. settings: the fields of EvalSettings but `weights`,
    which do not change the result.
    """

    scores: Scores
    swapped: Scores | None
    baseline: Scores | None
    by_slice: dict[str, Scores]
    answers: tuple[AnswerRecord, ...]
    images: dict[int, bytes]
    loss: float | None
    seconds: float
    settings: dict[str, Any]


def evaluate(source: Source, dataset: str, settings: EvalSettings, *, mesh: Mesh) -> Evaluation:
    """Answers and scores the samples of a split of `dataset` with the model of `source`.

    Collective: all ranks call it and get the same result. Raises BadInputError on every rank for a dataset,
    image or metric that cannot be used, and for an empty split.
    """
    find_metrics(settings.metrics)
    if mesh.device.type == "cpu":
        torch.set_num_threads(1)  # sums depend on the number of threads; more ranks make it faster instead
    samples = read_split([dataset], settings.split, settings.samples)
    if not len(samples):
        raise BadInputError(f"{dataset}: the split {settings.split!r} is empty; nothing to evaluate")
    prompts = Prompts(samples)
    config, dtype = model_config(source), answer_dtype(mesh.device)
    reader = processor(source)
    shapes = prompts.shapes(reader.tokenizer, reader.num_crops, reader.tile)
    positions = max(shape.tokens for shape in shapes) + settings.max_new_tokens
    if keep_whole(
        settings.weights, config, dtype, batch_size=settings.batch_size, positions=positions, mesh=mesh
    ):
        restored = restore(source, mesh.device, dtype)
    else:
        prepare_deepspeed(mesh)
        restored = restore_partitioned(source, mesh.device, dtype)
    loss = _loss_of(restored, samples, mesh) if settings.loss else None
    train_replies = _train_replies(dataset)
    return score_answers(restored, prompts, settings, mesh=mesh, loss=loss, train_replies=train_replies)


def score_answers(
    restored: Restored,
    prompts: Prompts,
    settings: EvalSettings,
    *,
    mesh: Mesh,
    loss: float | None = None,
    train_replies: Sequence[str] = (),
) -> Evaluation:
    """Answers `prompts` and scores the answers.

    loss: is passed on to the result. train_replies: replies from which the constant answer is made; without
    them there is no baseline. Collective, with the same result on every rank. Raises BadInputError on every
    rank for an image that cannot be read or a metric that fails.
    """
    began = time.perf_counter()
    metrics = find_metrics(settings.metrics)
    truths, parts, seed = prompts.truths, prompts.parts(settings.slice_by), settings.seed

    def generate(asked: Prompts, thumbnails: int) -> tuple[list[str], dict[int, bytes]]:
        return generate_all(
            restored,
            asked,
            mesh,
            batch_size=settings.batch_size,
            max_new_tokens=settings.max_new_tokens,
            thumbnails=thumbnails,
        )

    predictions, images = generate(prompts, _THUMBNAILS)
    values = sample_values(metrics, truths, predictions)
    swapped = baseline = None
    if settings.swap:
        swapped_predictions, _ = generate(prompts.swapped(seed), 0)
        swapped = summarise(sample_values(metrics, truths, swapped_predictions), seed)
    if train_replies:
        constant = [constant_answer(train_replies)] * len(truths)
        baseline = summarise(sample_values(metrics, truths, constant), seed)
    columns = zip(prompts.keys, parts, prompts.texts, truths, predictions, values, strict=True)
    return Evaluation(
        scores=summarise(values, seed),
        swapped=swapped,
        baseline=baseline,
        by_slice=slices(values, parts, seed),
        answers=tuple(AnswerRecord(*fields) for fields in columns),
        images=images,
        loss=loss,
        seconds=time.perf_counter() - began,
        settings={name: value for name, value in asdict(settings).items() if name != "weights"},
    )


def write_evaluation(evaluation: Evaluation, out: Path) -> None:
    """Writes OUT/predictions.jsonl, OUT/predictions.parquet (with small images), and then OUT/scores.json.

    Raises OSError if the files cannot be written.
    """
    out.mkdir(parents=True, exist_ok=True)
    records = [answer.as_dict() for answer in evaluation.answers]
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    write_atomically(out / PREDICTIONS, text.encode())
    with_images = [
        {**record, "picture": evaluation.images.get(place)} for place, record in enumerate(records)
    ]
    parquet = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(with_images), parquet)
    write_atomically(out / PREDICTIONS_TABLE, parquet.getvalue())
    write_atomically(out / SCORES, (json.dumps(scores_json(evaluation), indent=1) + "\n").encode())


def scores_json(evaluation: Evaluation) -> dict[str, Any]:
    """The content of scores.json: scores, swapped, baseline and slices (values by name), the confidence
    intervals of the scores, the number of samples in each, and the settings.
    """
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
        "how": evaluation.settings,
    }


def _loss_of(restored: Restored, samples: Samples, mesh: Mesh) -> float:
    """The loss of `samples`, whose rows are as long as the longest sample. Raises BadInputError if a sample
    cannot be read.
    """
    ours = restored.processor
    tokenizer, tile = ours.tokenizer, ours.tile
    costs = sample_costs(samples, Counter(tokenizer, ours.num_crops, tile))
    maker = RowMaker(samples, tokenizer, ours.num_crops, tile=tile)
    loss, unreadable = split_loss(
        lambda row: restored.model(row=row),
        maker,
        costs,
        row_tokens=max(_ROW_TOKENS, int(costs.tokens.max())),
        views_per_call=restored.model.vision_chunk,
        mesh=mesh,
    )
    if unreadable:
        raise BadInputError(f"{len(unreadable)} samples cannot be read, the first is {unreadable[0]}")
    return loss


def _train_replies(dataset: str) -> list[str]:
    """The reference replies of the train split; none if the dataset has no train split."""
    try:
        messages = read_index(dataset, "train", ["messages"])["messages"].to_pylist()
    except BadInputError:
        return []
    return [each[-1]["content"] for each in messages]

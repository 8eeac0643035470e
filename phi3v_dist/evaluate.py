"""What a model answers: generation on a split (never teacher-forced), its scores, and what to hold them
against.

`answer` writes the replies of a model to samples. `evaluate` scores a model on a split, beside a constant
predictor and the same model with the pictures swapped between samples. `Validation` does both loss and
answers in the train loop, on all ranks. Called by the train loop and `phi3v evaluate`.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from PIL import Image

from phi3v_dist.config import RunConfig
from phi3v_dist.data.loader import RowMaker
from phi3v_dist.data.plan import Plan, RankRows
from phi3v_dist.data.reader import SampleReader
from phi3v_dist.data.samples import read_samples
from phi3v_dist.data.tokens import Counter, sample_costs
from phi3v_dist.metrics import Scores, constant_answer, parse_product, score
from phi3v_dist.model.hub import build_model
from phi3v_dist.origin import Origin
from phi3v_dist.parallel.mesh import Mesh
from phi3v_dist.processor.image import decode_image
from phi3v_dist.processor.processing import Phi3VProcessor
from phi3v_dist.processor.prompt import render
from phi3v_dist.restore import Restored
from shards.atomic import write_atomically
from shards.format import BadInputError, image_tags, read_index

_COLUMNS = ["key", "shard", "images", "messages"]


@dataclass(frozen=True)
class Question:
    """One sample as a question. prompt: rendered, up to the open reply. truth: the reference reply."""

    key: str
    prompt: str
    truth: str
    pictures: tuple[Image.Image, ...]


def read_questions(roots: str | Sequence[str], records: Sequence[dict[str, Any]]) -> list[Question]:
    """The samples of `records` (rows of the index of the dataset in `roots`, or of several) with their
    pictures.

    Raises BadInputError naming a sample whose picture cannot be read: leaving it out would flatter the
    scores.
    """
    reader = SampleReader(roots)
    questions = []
    try:
        for record in records:
            try:
                pictures = tuple(decode_image(data) for data in reader.images(record))
            except BadInputError as error:
                raise BadInputError(f"{record['shard']}: sample {record['key']!r}: {error}") from error
            *before, reply = record["messages"]
            prompt = render(before, add_generation_prompt=True)
            questions.append(Question(record["key"], prompt, reply["content"], pictures))
    finally:
        reader.close()
    return questions


def answer(
    model: Any, processor: Phi3VProcessor, questions: Sequence[Question], batch_size: int, max_new_tokens: int
) -> list[str]:
    """The model's greedy replies, in order; a batch is padded on the left.

    Questions of similar length share a batch, which changes the time, not the replies.
    """
    inputs = [processor(q.prompt, list(q.pictures) or None, return_tensors="pt") for q in questions]
    order = sorted(range(len(questions)), key=lambda i: (inputs[i]["input_ids"].shape[1], i))
    replies = [""] * len(questions)
    for start in range(0, len(order), batch_size):
        together = order[start : start + batch_size]
        batch = _pad_left(
            [inputs[i] for i in together], processor.tokenizer.pad_token_id, model.device, model.dtype
        )
        with torch.inference_mode():
            ids = model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False)
        for i, reply in zip(together, ids[:, batch["input_ids"].shape[1] :], strict=True):
            replies[i] = processor.tokenizer.decode(reply, skip_special_tokens=True).strip()
    return replies


def ask(restored: Restored, picture: bytes, prompt: str, max_new_tokens: int) -> str:
    """The reply to one question about one picture (the bytes of an image file).

    Raises BadInputError for a picture that cannot be decoded.
    """
    if not image_tags([{"role": "user", "content": prompt}]):
        prompt = f"<|image_1|>\n{prompt}"
    rendered = render([{"role": "user", "content": prompt}], add_generation_prompt=True)
    question = Question("", rendered, "", (decode_image(picture),))
    return answer(restored.model, restored.processor, [question], 1, max_new_tokens)[0]


def _pad_left(
    inputs: Sequence[Any], pad_id: int, device: torch.device, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    width = max(each["input_ids"].shape[1] for each in inputs)
    ids = torch.full((len(inputs), width), pad_id, dtype=torch.int64)
    mask = torch.zeros((len(inputs), width), dtype=torch.int64)
    for place, each in enumerate(inputs):
        length = each["input_ids"].shape[1]
        ids[place, width - length :] = each["input_ids"][0]
        mask[place, width - length :] = 1
    batch = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
    pictures = [each for each in inputs if "pixel_values" in each]
    if pictures:
        batch["pixel_values"] = torch.cat([each["pixel_values"] for each in pictures]).to(device, dtype)
        batch["image_sizes"] = torch.cat([each["image_sizes"] for each in pictures]).to(device)
    return batch


def swap_pictures(questions: Sequence[Question], seed: int) -> list[Question]:
    """The same questions, each with the pictures of another one that has as many; one without a partner keeps
    its own.
    """
    swapped = list(questions)
    by_count: dict[int, list[int]] = {}
    for place, question in enumerate(questions):
        by_count.setdefault(len(question.pictures), []).append(place)
    for places in by_count.values():
        random.Random(f"swap {seed}").shuffle(places)
        for here, there in zip(places, places[1:] + places[:1], strict=True):
            swapped[here] = replace(questions[here], pictures=questions[there].pictures)
    return swapped


@dataclass(frozen=True)
class Evaluation:
    """scores: of the model; swapped: with pictures swapped between samples; baseline: of a constant answer
    made from the train split.
    """

    scores: Scores
    swapped: Scores | None
    baseline: Scores | None
    answers: tuple[str, ...]
    questions: tuple[Question, ...]


def evaluate(
    restored: Restored,
    dataset: str,
    split: str,
    samples: int | None,
    swap: bool,
    batch_size: int,
    max_new_tokens: int,
) -> Evaluation:
    """Answers `samples` (None: all) of a split. Raises BadInputError for a dataset that cannot be read."""
    index = read_index(dataset, split, _COLUMNS)
    questions = read_questions(dataset, index.take(pa.array(_spread(index.num_rows, samples))).to_pylist())
    if not questions:
        raise BadInputError(f"{dataset}: the split {split!r} is empty; nothing to evaluate")
    truths = [question.truth for question in questions]

    def scored(asked: Sequence[Question]) -> tuple[Scores, list[str]]:
        answers = answer(restored.model, restored.processor, asked, batch_size, max_new_tokens)
        return score(truths, answers), answers

    scores, answers = scored(questions)
    swapped = scored(swap_pictures(questions, 0))[0] if swap else None
    train = _train_replies(dataset)
    baseline = score(truths, [constant_answer(train)] * len(truths)) if train else None
    return Evaluation(scores, swapped, baseline, tuple(answers), tuple(questions))


def write_evaluation(evaluation: Evaluation, out: Path) -> None:
    """OUT/predictions.jsonl, then OUT/scores.json."""
    out.mkdir(parents=True, exist_ok=True)
    lines = [
        {"key": q.key, "prompt": q.prompt, "truth": q.truth, "prediction": a}
        for q, a in zip(evaluation.questions, evaluation.answers, strict=True)
    ]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_atomically(out / "predictions.jsonl", text.encode())
    scores = {
        name: asdict(value)
        for name in ("scores", "swapped", "baseline")
        if (value := getattr(evaluation, name)) is not None
    }
    write_atomically(out / "scores.json", (json.dumps(scores, indent=1) + "\n").encode())


def _train_replies(dataset: str) -> list[str]:
    try:
        messages = read_index(dataset, "train", ["messages"])["messages"].to_pylist()
    except BadInputError:  # a dataset of one split: then there is no constant to learn
        return []
    return [each[-1]["content"] for each in messages]


def _spread(total: int, wanted: int | None) -> list[int]:
    """`wanted` of the numbers 0 .. total - 1, evenly spread; the same ones every time."""
    if wanted is None or wanted >= total:
        return list(range(total))
    return [i * total // wanted for i in range(wanted)]


class Validation:
    """Loss and answers on the val split during training, on all ranks together; `run` at any step.

    The loss goes through the ZeRO-3 engine over packed rows. For the answers the weights are gathered once
    into a plain copy of the model on every rank, and each rank answers its share: ZeRO-3 would gather every
    layer for every token. The copy is made at the first call and kept.
    """

    def __init__(self, config: RunConfig, origin: Origin, engine: Any, mesh: Mesh) -> None:
        self._config, self._origin, self._engine, self._mesh = config, origin, engine, mesh
        self._copy: Any = None
        data = config.data
        samples = read_samples(data.paths, data.val_split, may_lack=True)
        self._samples = samples.take(_spread(len(samples), config.eval.loss_samples))
        tile = origin.model_config.tile
        costs = sample_costs(self._samples, Counter(origin.tokenizer, data.num_crops, tile))
        self._plan = (
            Plan(costs, data.seq_len, 0, mesh.dp_size, shuffle=False, over_long="drop")
            if len(costs)
            else None
        )
        self._maker = RowMaker(
            self._samples, origin.tokenizer, data.num_crops, tile, origin.tokenizer.pad_token_id
        )
        self._processor = Phi3VProcessor(tokenizer=origin.tokenizer, num_crops=data.num_crops, tile=tile)

    def run(self) -> tuple[dict[str, float | int | None], list[dict[str, Any]]]:
        """Metrics with keys eval/*, and rows for the table of predictions (the same on every rank)."""
        if self._plan is None:
            return {}, []
        metrics: dict[str, float | int | None] = {"eval/loss": self._loss(self._plan)}
        rows = self._answers() if self._config.eval.generate_samples else []
        if rows:
            scores = score([row["truth"] for row in rows], [row["prediction"] for row in rows])
            metrics |= {f"eval/{name}": value for name, value in asdict(scores).items() if name != "samples"}
        return metrics, rows

    def _loss(self, plan: Plan) -> float:
        end_row = plan.end_row(1)
        mine = RankRows(
            plan,
            self._mesh.dp_rank,
            self._mesh.dp_size,
            self._config.model.vision_chunk,
            0,
            plan.steps_of(1),
            end_row,
        )
        reader = self._maker.reader()
        nll = targets = 0.0
        self._engine.eval()
        try:
            with torch.no_grad():
                for micro in mine:
                    row = self._maker.load(micro, reader).row
                    nll += float(self._engine(row=row.to(self._mesh.device)))
                    targets += row.num_targets
        finally:
            self._engine.train()
            reader.close()
        nll, targets = self._mesh.sum([nll, targets])
        return nll / max(1.0, targets)

    def _answers(self) -> list[dict[str, Any]]:
        first = range(min(len(self._samples), self._config.eval.generate_samples))
        questions = read_questions(self._config.data.paths, list(self._samples.records(first)))
        mine = questions[self._mesh.dp_rank :: self._mesh.dp_size]
        model = self._gather()
        evaluation = self._config.eval
        replies = (
            answer(model, self._processor, mine, evaluation.batch_size, evaluation.max_new_tokens)
            if mine
            else []
        )
        shares = self._mesh.gather(replies)
        rows = []
        for place, question in enumerate(questions):
            reply = shares[place % self._mesh.dp_size][place // self._mesh.dp_size]
            truth, said = parse_product(question.truth), parse_product(reply)
            error = None if truth.price is None or said.price is None else abs(truth.price - said.price)
            rows.append(
                {
                    "picture": question.pictures[0] if question.pictures else Image.new("RGB", (1, 1)),
                    "prompt": question.prompt,
                    "truth": question.truth,
                    "prediction": reply,
                    "price_error": error,
                }
            )
        return rows

    def _gather(self) -> Any:
        """A plain copy of the model with today's weights."""
        import deepspeed

        if self._copy is None:
            dtype = torch.bfloat16 if self._config.model.dtype == "bfloat16" else torch.float32
            self._copy = build_model(self._origin.model_config, dtype).to(self._mesh.device).eval()
        with torch.no_grad():
            pairs = zip(self._copy.parameters(), self._engine.module.parameters(), strict=True)
            for plain, partitioned in pairs:
                with deepspeed.zero.GatheredParameters(partitioned):
                    plain.copy_(partitioned)
        return self._copy

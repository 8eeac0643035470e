"""Answers by generation (never teacher-forced), spread over the ranks, every question exactly once.

In: a model that is whole on every rank, or partitioned by ZeRO-3, and `Questions`. Out: the replies, in
order, on every rank. With whole weights each rank answers its batches as if it were alone. With partitioned
ones every layer is gathered for every token, so the ranks go in step: as many batches, of the same kind, and
as many tokens in each. Called by evaluation, in training and afterwards, by `phi3v ask` and export.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from phi3v_dist.checkpoint.restore import Restored
from phi3v_dist.evaluation.prompts import Batch, Question, Questions, make_batches
from phi3v_dist.parallel.mesh import Mesh
from phi3v_dist.processor.image import decode_image
from phi3v_dist.processor.prompt import render
from shards.common.errors import BadInputError
from shards.format.messages import image_tags

_THUMBNAIL = 160  # px of the longer side


def answer_all(
    restored: Restored,
    questions: Questions,
    mesh: Mesh,
    batch_size: int,
    max_new_tokens: int,
    thumbnails: int = 0,
) -> tuple[list[str], dict[int, bytes]]:
    """The greedy replies to all questions, and small JPEGs of the first picture of the first `thumbnails`.

    Raises BadInputError on every rank if a picture cannot be read on one.
    """
    processor = restored.processor
    shapes = questions.shapes(processor.tokenizer, processor.num_crops, processor.tile)
    switch = restored.config.original_max_position_embeddings
    batches = make_batches(shapes, batch_size, max_new_tokens, switch)
    replies: dict[int, str] = {}
    small: dict[int, bytes] = {}
    fault: str | None = None
    for batch, counts in _share(batches, mesh, in_step=restored.partitioned):
        asked: list[Question] = []
        try:
            if fault is None:
                asked = questions.read(batch.places)
        except BadInputError as error:
            fault = str(error)
        if restored.partitioned:
            fault = _any_fault(mesh, fault)  # before the others wait in a collective
        if fault is not None:
            break
        said = answer(restored, asked, max_new_tokens, cache=not (restored.partitioned and batch.switches))
        if counts:
            replies |= dict(zip(batch.places, said, strict=True))
            for place, question in zip(batch.places, asked, strict=True):
                if place < thumbnails and question.pictures:
                    small[place] = thumbnail(question.pictures[0])
    shares = mesh.gather((replies, small, fault))
    for _, _, found in shares:
        if found is not None:
            raise BadInputError(found)
    whole = {place: reply for share, _, _ in shares for place, reply in share.items()}
    if sum(len(share) for share, _, _ in shares) != len(questions) or len(whole) != len(questions):
        raise RuntimeError(f"{len(whole)} of {len(questions)} questions were answered once; a bug")
    pictures = {place: data for _, share, _ in shares for place, data in share.items()}
    return [whole[place] for place in range(len(questions))], pictures


def answer(
    restored: Restored, questions: Sequence[Question], max_new_tokens: int, cache: bool = True
) -> list[str]:
    """The greedy replies to `questions` in one batch, padded on the left. cache: keep keys and values."""
    model, processor = restored.model, restored.processor
    inputs = [processor(q.prompt, list(q.pictures) or None, return_tensors="pt") for q in questions]
    batch = _pad_left(inputs, processor.tokenizer.pad_token_id, restored.device, restored.dtype)
    chunk = model.vision_chunk
    if restored.partitioned:  # one call of the tower on every rank, whatever its pictures
        model.vision_chunk = 1 << 30
    try:
        with torch.no_grad():
            ids = model.generate(
                **batch,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                use_cache=cache,
                synced_gpus=restored.partitioned,
            )
    finally:
        model.vision_chunk = chunk
    new = ids[:, batch["input_ids"].shape[1] :]
    return [processor.tokenizer.decode(reply, skip_special_tokens=True).strip() for reply in new]


def ask(restored: Restored, picture: bytes, prompt: str, max_new_tokens: int) -> str:
    """The reply to one question about one picture (the bytes of an image file).

    Raises BadInputError for a picture that cannot be decoded.
    """
    if not image_tags([{"role": "user", "content": prompt}]):
        prompt = f"<|image_1|>\n{prompt}"
    rendered = render([{"role": "user", "content": prompt}], add_generation_prompt=True)
    return answer(restored, [Question("", rendered, "", (decode_image(picture),))], max_new_tokens)[0]


def thumbnail(picture: Image.Image) -> bytes:
    """A small JPEG of a picture."""
    small = picture.convert("RGB")
    small.thumbnail((_THUMBNAIL, _THUMBNAIL))
    data = io.BytesIO()
    small.save(data, "JPEG", quality=80)
    return data.getvalue()


def _share(batches: Sequence[Batch], mesh: Mesh, in_step: bool) -> list[tuple[Batch, bool]]:
    """This rank's batches, and whether their replies count.

    in_step: every rank gets as many, and in each round all have the same kind; a rank without one of its own
    repeats another's, which does not count.
    """
    if not in_step:
        return [(batch, True) for batch in batches[mesh.rank :: mesh.size]]
    kinds: dict[tuple[bool, bool], list[Batch]] = {}
    for batch in batches:
        kinds.setdefault((batch.pictures, batch.switches), []).append(batch)
    mine = []
    for of_kind in kinds.values():
        for first in range(0, len(of_kind), mesh.size):
            round_ = of_kind[first : first + mesh.size]
            counts = mesh.rank < len(round_)
            mine.append((round_[mesh.rank] if counts else round_[0], counts))
    return mine


def _any_fault(mesh: Mesh, fault: str | None) -> str | None:
    return next((each for each in mesh.gather(fault) if each is not None), None)


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

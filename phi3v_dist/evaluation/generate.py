"""Answers by generation (never teacher-forced), divided between the ranks; every prompt is answered once.

In: a model that is whole on every rank, or partitioned by ZeRO-3, and `Prompts`. Out: the answers, in order,
on every rank. With whole weights each rank works through its batches independently. With partitioned weights
every layer is gathered for every token, so all ranks must make the same calls: equally many batches, of the
same kind, with equally many tokens generated in each.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from phi3v_dist.checkpoint.restore import Restored
from phi3v_dist.evaluation.prompts import Batch, Prompt, Prompts, make_batches
from phi3v_dist.parallel.mesh import Mesh
from phi3v_dist.processor.image import decode_image
from phi3v_dist.processor.prompt import render
from shards.common.errors import BadInputError
from shards.format.messages import image_tags

_THUMBNAIL = 160  # px of the longer side


def generate_all(
    restored: Restored,
    prompts: Prompts,
    mesh: Mesh,
    *,
    batch_size: int,
    max_new_tokens: int,
    thumbnails: int = 0,
) -> tuple[list[str], dict[int, bytes]]:
    """The greedy answers to all prompts, in order, and small JPEGs (bytes by position) of the first image of
    the first `thumbnails` prompts.

    batch_size: most prompts in a batch. Collective: all ranks call it and get the same result. Raises
    BadInputError on every rank if one rank cannot read an image.
    """
    processor = restored.processor
    shapes = prompts.shapes(processor.tokenizer, processor.num_crops, processor.tile)
    rope_switch = restored.config.original_max_position_embeddings
    batches = make_batches(shapes, batch_size, max_new_tokens, rope_switch=rope_switch)
    answers: dict[int, str] = {}
    small: dict[int, bytes] = {}
    fault: str | None = None
    for batch, counts in _batches_of_rank(batches, mesh, in_step=restored.partitioned):
        asked: list[Prompt] = []
        try:
            if fault is None:
                asked = prompts.read(batch.places)
        except BadInputError as error:
            fault = str(error)
        if restored.partitioned:
            fault = _first_fault(mesh, fault)  # before the other ranks wait in a collective
        if fault is not None:
            break
        cache = not (restored.partitioned and batch.crosses_rope_switch)
        texts = generate(restored, asked, max_new_tokens, cache=cache)
        if counts:
            answers |= dict(zip(batch.places, texts, strict=True))
            for place, prompt in zip(batch.places, asked, strict=True):
                if place < thumbnails and prompt.images:
                    small[place] = thumbnail(prompt.images[0])
    shares = mesh.gather((answers, small, fault))
    for _, _, rank_fault in shares:
        if rank_fault is not None:
            raise BadInputError(rank_fault)
    by_place = {place: answer for share, _, _ in shares for place, answer in share.items()}
    if sum(len(share) for share, _, _ in shares) != len(prompts) or len(by_place) != len(prompts):
        raise RuntimeError(f"{len(by_place)} of {len(prompts)} prompts were answered once; a bug")
    images = {place: data for _, share, _ in shares for place, data in share.items()}
    return [by_place[place] for place in range(len(prompts))], images


def generate(
    restored: Restored, prompts: Sequence[Prompt], max_new_tokens: int, *, cache: bool = True
) -> list[str]:
    """The greedy answers to `prompts` in one batch, padded on the left.

    cache: keep keys and values of earlier tokens; without it every token computes the whole sequence again.
    """
    model, processor = restored.model, restored.processor
    inputs = [processor(p.text, list(p.images) or None, return_tensors="pt") for p in prompts]
    batch = _pad_left(inputs, processor.tokenizer.pad_token_id, device=restored.device, dtype=restored.dtype)
    chunk = model.vision_chunk
    if restored.partitioned:  # ranks have different numbers of views, but must call the tower equally often
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


def ask(restored: Restored, image: bytes, prompt: str, *, max_new_tokens: int) -> str:
    """The answer to one question about one image (the bytes of an image file).

    prompt: the text of the question; a prompt without an image tag gets one in front. Raises BadInputError
    for an image that cannot be decoded.
    """
    if not image_tags([{"role": "user", "content": prompt}]):
        prompt = f"<|image_1|>\n{prompt}"
    rendered = render([{"role": "user", "content": prompt}], add_generation_prompt=True)
    asked = Prompt(key="", text=rendered, truth="", images=(decode_image(image),))
    return generate(restored, [asked], max_new_tokens)[0]


def thumbnail(image: Image.Image) -> bytes:
    """A small JPEG (160 px on the longer side) of an image, as bytes."""
    small = image.convert("RGB")
    small.thumbnail((_THUMBNAIL, _THUMBNAIL))
    data = io.BytesIO()
    small.save(data, "JPEG", quality=80)
    return data.getvalue()


def _batches_of_rank(batches: Sequence[Batch], mesh: Mesh, *, in_step: bool) -> list[tuple[Batch, bool]]:
    """This rank's batches, each with whether its answers count.

    in_step: every rank gets equally many batches, and in each round all ranks get the same kind. A rank that
    has no batch left repeats another rank's; its answers do not count.
    """
    if not in_step:
        return [(batch, True) for batch in batches[mesh.rank :: mesh.size]]
    kinds: dict[tuple[bool, bool], list[Batch]] = {}
    for batch in batches:
        kinds.setdefault((batch.has_images, batch.crosses_rope_switch), []).append(batch)
    mine = []
    for of_kind in kinds.values():
        for first in range(0, len(of_kind), mesh.size):
            round_ = of_kind[first : first + mesh.size]
            counts = mesh.rank < len(round_)
            mine.append((round_[mesh.rank] if counts else round_[0], counts))
    return mine


def _first_fault(mesh: Mesh, fault: str | None) -> str | None:
    """The fault of the first rank that has one; the same on all ranks."""
    return next((each for each in mesh.gather(fault) if each is not None), None)


def _pad_left(
    inputs: Sequence[Any], pad_id: int, *, device: torch.device, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """The processor's outputs for single prompts as one batch: input_ids and attention_mask int64
    [prompts, longest], and pixel_values (in `dtype`) and image_sizes if there are images.
    """
    width = max(each["input_ids"].shape[1] for each in inputs)
    ids = torch.full((len(inputs), width), pad_id, dtype=torch.int64)
    mask = torch.zeros((len(inputs), width), dtype=torch.int64)
    for place, each in enumerate(inputs):
        length = each["input_ids"].shape[1]
        ids[place, width - length :] = each["input_ids"][0]
        mask[place, width - length :] = 1
    batch = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
    with_images = [each for each in inputs if "pixel_values" in each]
    if with_images:
        batch["pixel_values"] = torch.cat([each["pixel_values"] for each in with_images]).to(device, dtype)
        batch["image_sizes"] = torch.cat([each["image_sizes"] for each in with_images]).to(device)
    return batch

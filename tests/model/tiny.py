"""A tiny Phi-3-V (tile 112 px, short factors up to 64 positions) and documents to feed it both ways."""

from dataclasses import dataclass

import numpy as np
import torch

from phi3v_dist.model import PackedRow, Phi3VConfig, Phi3VForCausalLM
from phi3v_dist.processor.geometry import image_token_count, vision_calls_needed
from phi3v_dist.processor.pixels import global_views, normalise

SIDE = 112
VOCAB = 160


def tiny_config(**changes: object) -> Phi3VConfig:
    fields: dict = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "pad_token_id": 150,
        "max_position_embeddings": 2048,
        "original_max_position_embeddings": 64,
        "rope_scaling": {
            "type": "su",
            "short_factor": [1.05, 1.1, 1.25, 1.45, 1.9, 2.0, 2.2, 3.05],
            "long_factor": [1.03, 1.08, 1.3, 1.9, 5.49, 15.7, 39.95, 64.8],
        },
        "clip_vision_config": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": SIDE,
        },
    }
    return Phi3VConfig(**{**fields, **changes})


def tiny_model(seed: int = 0, spread: float = 0.05, **changes: object) -> Phi3VForCausalLM:
    """Random weights, separators included, so that every parameter matters; `spread`: how wild they are."""
    torch.manual_seed(seed)
    model = Phi3VForCausalLM(tiny_config(**changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=spread)
    return model.eval()


@dataclass(frozen=True)
class Document:
    """input_ids, labels [L]; tiles uint8 per picture [rows * cols, 3, S, S] and its grid."""

    input_ids: list[int]
    labels: list[int]
    pictures: tuple[tuple[torch.Tensor, tuple[int, int]], ...]


def make_document(seed: int, text: int, grids: tuple[tuple[int, int], ...] = ()) -> Document:
    """`text` random tokens with the pictures after the second one; labels on the last half of the text."""
    random = np.random.RandomState(seed)
    ids = random.randint(4, 140, size=text).tolist()
    pictures = []
    middle: list[int] = []
    for place, (rows, cols) in enumerate(grids):
        tiles = torch.from_numpy(random.randint(0, 256, size=(rows * cols, 3, SIDE, SIDE), dtype=np.uint8))
        pictures.append((tiles, (rows, cols)))
        middle += [-place - 1] * image_token_count(rows, cols, 4) + [1]
    split = text // 2
    input_ids = ids[:2] + middle + ids[2:]
    labels = [-100] * (len(input_ids) - split) + ids[text - split :]
    return Document(input_ids, labels, tuple(pictures))


def pack(documents: list[Document], pad: int = 0, chunk: int = 64) -> PackedRow:
    """The documents in one row, with `pad` positions of padding as a document of their own at the end."""
    ids = [t for d in documents for t in d.input_ids] + [150] * pad
    labels = [t for d in documents for t in d.labels] + [-100] * pad
    lengths = [len(d.input_ids) for d in documents] + ([pad] if pad else [])
    pictures = [p for d in documents for p in d.pictures]
    input_ids = torch.tensor(ids)
    tiles = (
        torch.cat([t for t, _ in pictures]) if pictures else torch.zeros(0, 3, SIDE, SIDE, dtype=torch.uint8)
    )
    return PackedRow(
        input_ids=input_ids,
        labels=torch.tensor(labels),
        position_ids=torch.cat([torch.arange(n) for n in lengths]),
        cu_seqlens=torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32),
        tiles=tiles,
        grids=torch.tensor([g for _, g in pictures], dtype=torch.int64).view(-1, 2),
        image_positions=(input_ids < 0).nonzero()[:, 0],
        vision_calls=vision_calls_needed(len(tiles), len(pictures), chunk),
    )


def published(document: Document) -> dict[str, torch.Tensor]:
    """The document in the published convention, alone."""
    inputs = {
        "input_ids": torch.tensor([document.input_ids]),
        "attention_mask": torch.ones(1, len(document.input_ids), dtype=torch.int64),
        "labels": torch.tensor([document.labels]),
    }
    if document.pictures:
        most = max(len(tiles) for tiles, _ in document.pictures)
        pixels = torch.zeros(len(document.pictures), most + 1, 3, SIDE, SIDE)
        for views, (tiles, grid) in zip(pixels, document.pictures, strict=True):
            views[0] = global_views(tiles, torch.tensor([grid]))[0]
            views[1 : len(tiles) + 1] = normalise(tiles)
        inputs["pixel_values"] = pixels
        inputs["image_sizes"] = torch.tensor([grid for _, grid in document.pictures]) * SIDE
    return inputs

"""Phi3VProcessor: text and images -> model inputs, exactly as the published processor returns them.

It follows the published convention in full (float pixel values, padded to num_crops + 1 views); training uses
the uint8 tiles of `image` and the ids of `prompt` instead. `phi3v_dist.model` registers it with AutoProcessor
for model_type `phi3_v`.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature

from phi3v_dist.processor.geometry import TILE, SampleShape, hd_grid, tile_side_tokens
from phi3v_dist.processor.image import hd_tiles
from phi3v_dist.processor.pixels import global_views, normalise
from phi3v_dist.processor.preprocessor_config import read_num_crops, write_preprocessor_config
from phi3v_dist.processor.prompt import encode_text, image_tags
from phi3v_dist.processor.tokenizer import copy_tokenizer, load_tokenizer
from shards.common.errors import BadInputError


def image_inputs(images: Sequence[Image.Image], num_crops: int, tile: int = TILE) -> dict[str, torch.Tensor]:
    """The image inputs of the published model.

    Out: pixel_values, float32 [images, num_crops + 1, 3, tile, tile]: the global view, then the tiles, then
    zeros; image_sizes, int64 [images, 2]: height and width of the padded canvas in px.
    Raises BadInputError, naming the image by its number from 1, for one that is not a PIL image, cannot be
    decoded, or has no `hd_grid`.
    """
    pixel_values = torch.zeros(len(images), num_crops + 1, 3, tile, tile)
    sizes = []
    for number, (views, image) in enumerate(zip(pixel_values, images, strict=True), 1):
        tiles = torch.from_numpy(_tiles(image, num_crops, tile, number=number))
        grid = hd_grid(*image.size, num_crops, tile=tile)
        views[0] = global_views(tiles, torch.tensor([[grid.rows, grid.cols]]))[0]
        views[1 : len(tiles) + 1] = normalise(tiles)
        sizes.append([grid.rows * tile, grid.cols * tile])
    return {"pixel_values": pixel_values, "image_sizes": torch.tensor(sizes, dtype=torch.int64)}


def _tiles(image: Image.Image, num_crops: int, tile: int, *, number: int) -> np.ndarray:
    """`hd_tiles`. number: of the image, from 1, for error messages."""
    if not isinstance(image, Image.Image):
        raise BadInputError(
            f"image {number} is of type {type(image).__name__}, not a PIL image; use PIL.Image.open"
        )
    try:
        return hd_tiles(image, num_crops, tile)
    except BadInputError as error:
        raise BadInputError(f"image {number}: {error}") from error
    except (OSError, SyntaxError) as error:  # Pillow decodes lazily, at the first use
        raise BadInputError(f"image {number} cannot be decoded ({error}); replace the file") from error


class Phi3VProcessor:
    """Text with tags <|image_1|>.. and PIL images -> input_ids, attention_mask, pixel_values, image_sizes.

    tokenizer: what `load_tokenizer` returns. num_crops: the largest number of tiles of an image. tile: side
    of a tile in px. Raises BadInputError if num_crops is below 1.
    """

    def __init__(self, tokenizer: Any, num_crops: int = 16, tile: int = TILE) -> None:
        if num_crops < 1:
            raise BadInputError(
                f"num_crops is {num_crops}; an image needs at least 1 tile (4 or 16 are usual)"
            )
        self.tokenizer = tokenizer
        self.num_crops = num_crops
        self.tile = tile

    def __call__(
        self,
        text: str | list[str],
        images: Image.Image | Sequence[Image.Image] | None = None,
        padding: bool | str = False,
        *,
        truncation: bool = False,
        max_length: int | None = None,
        return_tensors: str | None = "pt",
    ) -> BatchFeature:
        """One prompt with its images (input_ids int64 [1, L], shapes of images as in `image_inputs`), or text
        alone, which goes to the tokenizer unchanged.

        Raises BadInputError if tags and images do not match, or an image cannot be cut into tiles.
        """
        if images is None or (not isinstance(images, Image.Image) and not len(images)):
            for one in [text] if isinstance(text, str) else text:
                if image_tags(one):
                    raise BadInputError(
                        "the text names <|image_1|> but there are no images; pass them, or drop the tag"
                    )
            encoded = self.tokenizer(
                text,
                padding=padding,
                truncation=truncation,
                max_length=max_length,
                return_tensors=return_tensors,
            )
            return BatchFeature(dict(encoded))
        if not isinstance(text, str):
            raise BadInputError("with images, text must be one string; call the processor once per prompt")
        if isinstance(images, Image.Image):
            images = [images]
        if padding or truncation or max_length is not None:
            warnings.warn(
                "padding, truncation and max_length do nothing with images, as published", stacklevel=2
            )
        tags = image_tags(text)
        if tags != sorted(tags):
            warnings.warn(
                f"the text names images in the order {tags} but the model takes them in the order of "
                "`images`; pass them in the order of their tags",
                stacklevel=2,
            )
        of_images = image_inputs(images, self.num_crops, self.tile)
        ids = encode_text(self.tokenizer, text, self.image_tokens(images))
        input_ids = torch.tensor([ids], dtype=torch.int64)
        data = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), **of_images}
        return BatchFeature(data, tensor_type=return_tensors)

    def image_tokens(self, images: Sequence[Image.Image]) -> list[int]:
        """The number of tokens of each image."""
        sizes = [image.size for image in images]
        return list(SampleShape.of(sizes, self.num_crops, self.tile).image_tokens)

    def apply_chat_template(self, messages: Any, **options: Any) -> Any:
        """`apply_chat_template` of the tokenizer."""
        return self.tokenizer.apply_chat_template(messages, **options)

    def batch_decode(self, *args: Any, **options: Any) -> list[str]:
        """`batch_decode` of the tokenizer."""
        return self.tokenizer.batch_decode(*args, **options)

    def decode(self, *args: Any, **options: Any) -> str:
        """`decode` of the tokenizer."""
        return self.tokenizer.decode(*args, **options)

    @classmethod
    def from_pretrained(cls, directory: str | Path, num_crops: int | None = None, **_: Any) -> Phi3VProcessor:
        """Reads tokenizer.json, preprocessor_config.json and, for the tile side, config.json of a checkpoint.

        Raises BadInputError if the tokenizer or num_crops is missing.
        """
        directory = Path(directory)
        if num_crops is None:
            num_crops = read_num_crops(directory)
        tile = TILE
        if (directory / "config.json").exists():
            clip = json.loads((directory / "config.json").read_text()).get("clip_vision_config") or {}
            tile = clip.get("image_size", TILE)
        return cls(load_tokenizer(directory), num_crops, tile)

    def save_pretrained(self, directory: str | Path, **_: Any) -> None:
        """Writes preprocessor_config.json and the tokenizer's files. The tile side is in config.json, which
        the model writes.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        write_preprocessor_config(directory, self.num_crops, tile_side_tokens(self.tile) ** 2)
        copy_tokenizer(self.tokenizer, directory)

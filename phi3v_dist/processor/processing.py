"""Phi3VProcessor: text and pictures -> model inputs, exactly as the published processor returns them.

The published convention in full (float pixel values padded to num_crops + 1 views); training uses the uint8
tiles of `image` and the ids of `prompt` instead. Registered with AutoProcessor for model_type `phi3_v`.
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
from transformers import AutoProcessor, BatchFeature

from phi3v_dist.model.configuration import CODE_REPOSITORY, Phi3VConfig
from phi3v_dist.model.vision import global_views, normalise
from phi3v_dist.processor.geometry import TILE, hd_grid, image_token_count, tile_side_tokens
from phi3v_dist.processor.image import IMAGE_MEAN, IMAGE_STD, hd_tiles
from phi3v_dist.processor.prompt import encode, encode_text, image_tags
from phi3v_dist.processor.tokenizer import copy_tokenizer, load_tokenizer
from shards.common.errors import BadInputError

PREPROCESSOR = "preprocessor_config.json"


def image_inputs(images: Sequence[Image.Image], num_crops: int, tile: int = TILE) -> dict[str, torch.Tensor]:
    """pixel_values float32 [pictures, num_crops + 1, 3, tile, tile] and image_sizes int64 [pictures, 2]
    (height, width).

    View 0 is the global view, then the tiles, then zeros. Raises BadInputError as `hd_grid`.
    """
    pixel_values = torch.zeros(len(images), num_crops + 1, 3, tile, tile)
    sizes = []
    for number, (views, image) in enumerate(zip(pixel_values, images, strict=True), 1):
        tiles = torch.from_numpy(_tiles(number, image, num_crops, tile))
        grid = hd_grid(*image.size, num_crops, tile=tile)
        views[0] = global_views(tiles, torch.tensor([[grid.rows, grid.cols]]))[0]
        views[1 : len(tiles) + 1] = normalise(tiles)
        sizes.append([grid.rows * tile, grid.cols * tile])
    return {"pixel_values": pixel_values, "image_sizes": torch.tensor(sizes, dtype=torch.int64)}


def _tiles(number: int, image: Image.Image, num_crops: int, tile: int) -> np.ndarray:
    """`hd_tiles` of picture `number`, from 1, which an error names."""
    if not isinstance(image, Image.Image):
        raise BadInputError(
            f"image {number} is of type {type(image).__name__}, not a PIL image; use PIL.Image.open"
        )
    try:
        return hd_tiles(image, num_crops, tile)
    except BadInputError as error:
        raise BadInputError(f"image {number}: {error}") from error
    except (OSError, SyntaxError) as error:  # Pillow decodes at the first use
        raise BadInputError(f"image {number} cannot be decoded ({error}); replace the file") from error


class Phi3VProcessor:
    """Text with tags <|image_1|>.. and PIL images -> input_ids, attention_mask, pixel_values, image_sizes.

    tokenizer: what `load_tokenizer` returns. num_crops: most tiles of a picture. tile: px.
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
        truncation: bool = False,
        max_length: int | None = None,
        return_tensors: str | None = "pt",
    ) -> BatchFeature:
        """One prompt with its pictures (ids [1, L]), or text alone, which goes to the tokenizer as it is.

        Raises BadInputError if tags and pictures do not match, or a picture cannot be cut into tiles.
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
                f"the text names pictures in the order {tags} but the model takes them in the order of "
                "`images`; pass them in the order of their tags",
                stacklevel=2,
            )
        pictures = image_inputs(images, self.num_crops, self.tile)
        ids = encode_text(self.tokenizer, text, self.image_tokens(images))
        input_ids = torch.tensor([ids], dtype=torch.int64)
        data = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), **pictures}
        return BatchFeature(data, tensor_type=return_tensors)

    def image_tokens(self, images: Sequence[Image.Image]) -> list[int]:
        """Tokens of each picture."""
        side = tile_side_tokens(self.tile)
        grids = [hd_grid(*image.size, self.num_crops, tile=self.tile) for image in images]
        return [image_token_count(grid.rows, grid.cols, side) for grid in grids]

    def training_inputs(
        self, messages: Sequence[dict[str, str]], images: Sequence[Image.Image] = (), template: str = "chat"
    ) -> dict[str, Any]:
        """The packed-friendly form of a conversation: ids and labels, and uint8 tiles instead of float views.

        input_ids, labels: int64 [L]; tiles: uint8 [tiles, 3, tile, tile]; grids: int64 [pictures, 2]. The
        tiles of a picture take 3 * tile^2 bytes each, an eighth to a quarter of what __call__ hands over.
        Raises BadInputError as `encode`.
        """
        tiles = [
            torch.from_numpy(_tiles(number, image, self.num_crops, self.tile))
            for number, image in enumerate(images, 1)
        ]
        encoded = encode(self.tokenizer, messages, self.image_tokens(images), template=template)
        grids = [hd_grid(*image.size, self.num_crops, tile=self.tile) for image in images]
        blank = torch.zeros(0, 3, self.tile, self.tile, dtype=torch.uint8)
        return {
            "input_ids": torch.tensor(encoded.input_ids),
            "labels": torch.tensor(encoded.labels),
            "tiles": torch.cat(tiles) if tiles else blank,
            "grids": torch.tensor([[g.rows, g.cols] for g in grids], dtype=torch.int64).view(-1, 2),
        }

    def apply_chat_template(self, messages: Any, **options: Any) -> Any:
        """The tokenizer's."""
        return self.tokenizer.apply_chat_template(messages, **options)

    def batch_decode(self, *args: Any, **options: Any) -> list[str]:
        """The tokenizer's."""
        return self.tokenizer.batch_decode(*args, **options)

    def decode(self, *args: Any, **options: Any) -> str:
        """The tokenizer's."""
        return self.tokenizer.decode(*args, **options)

    @classmethod
    def from_pretrained(cls, directory: str | Path, num_crops: int | None = None, **_: Any) -> Phi3VProcessor:
        """Reads tokenizer.json, preprocessor_config.json and, for the tile side, config.json of a checkpoint.

        Raises BadInputError if the tokenizer or num_crops is not there.
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
        """Writes preprocessor_config.json and the tokenizer's files; config.json (the tile side) is the
        model's.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        write_preprocessor_config(directory, self.num_crops, tile_side_tokens(self.tile) ** 2)
        copy_tokenizer(self.tokenizer, directory)


def read_num_crops(directory: str | Path) -> int:
    """num_crops of a checkpoint's preprocessor_config.json. Raises BadInputError if it is not there."""
    file = Path(directory) / PREPROCESSOR
    if not file.exists():
        raise BadInputError(f"{directory}: no {PREPROCESSOR}; download it with the model, or pass num_crops")
    num_crops = json.loads(file.read_text()).get("num_crops")
    if not isinstance(num_crops, int) or num_crops < 1:
        raise BadInputError(f"{file}: num_crops is {num_crops!r}, expected a whole number from 1, such as 16")
    return num_crops


def write_preprocessor_config(directory: Path, num_crops: int, image_tokens: int = 144) -> None:
    """preprocessor_config.json in the published layout; image_tokens: of one view, without separators."""
    config = {
        "auto_map": {
            "AutoProcessor": f"{CODE_REPOSITORY}--processing_phi3_v.Phi3VProcessor",
            "AutoImageProcessor": f"{CODE_REPOSITORY}--image_processing_phi3_v.Phi3VImageProcessor",
        },
        "num_crops": num_crops,
        "image_mean": list(IMAGE_MEAN),
        "image_processor_type": "Phi3VImageProcessor",
        "image_std": list(IMAGE_STD),
        "processor_class": "Phi3VProcessor",
        "num_img_tokens": image_tokens,
    }
    (directory / PREPROCESSOR).write_text(json.dumps(config, indent=2) + "\n")


AutoProcessor.register(Phi3VConfig, Phi3VProcessor, exist_ok=True)

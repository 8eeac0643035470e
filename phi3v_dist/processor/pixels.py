"""uint8 tiles -> normalised float views, on any device: the float arithmetic of the published processor.

In: tiles of `image.hd_tiles` as torch tensors. Out: normalised tiles, and the global view of each image.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from phi3v_dist.processor.preprocessor_config import IMAGE_MEAN, IMAGE_STD


def normalise(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 [..., 3, H, W] -> float32 of the same shape, (x / 255 - mean) / std as published."""
    mean = torch.tensor(IMAGE_MEAN, dtype=torch.float32, device=pixels.device)[:, None, None]
    std = torch.tensor(IMAGE_STD, dtype=torch.float32, device=pixels.device)[:, None, None]
    return pixels.to(torch.float32).div_(255).sub_(mean).div_(std)


def global_views(tiles: torch.Tensor, grids: torch.Tensor) -> torch.Tensor:
    """The global view of each image: its normalised, padded canvas, resized to one tile (bicubic).

    tiles: uint8 [tiles, 3, S, S], image after image, row-major within one. grids: int64 [images, 2], rows and
    columns of tiles. Out: float32 [images, 3, S, S].
    """
    side = tiles.shape[-1]
    views = []
    start = 0
    for rows, cols in grids.tolist():
        image = normalise(tiles[start : start + rows * cols])
        start += rows * cols
        canvas = (
            image.view(rows, cols, 3, side, side)
            .permute(2, 0, 3, 1, 4)
            .reshape(1, 3, rows * side, cols * side)
        )
        views.append(F.interpolate(canvas, size=(side, side), mode="bicubic"))
    return torch.cat(views)

"""Sizes -> tiles -> tokens: the arithmetic of the HD transform, without a pixel and without torch.

In: width and height of a picture as shown, `num_crops`, the tile side. Out: an `HDGrid` that says how the
picture is resized, padded and cut, and how many tokens it costs. Called by the image code, by the plan (token
counts come from the index, not from pictures) and by `estimate`. Source: the image processor published with
Phi-3-vision; tests/golden/image_processor pins it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from shards.common.errors import BadInputError

TILE = 336  # px, side of a tile of the published model
PATCH = 14  # px


@dataclass(frozen=True)
class HDGrid:
    """How one picture becomes rows x cols tiles.

    If `transposed`, the picture is resized and padded with x and y swapped, and swapped back at the end.
    resized_width, resized_height, pad_top, pad_bottom: px, in the swapped frame. rows, cols: tiles of the
    final canvas (height rows * tile, width cols * tile).
    """

    rows: int
    cols: int
    resized_width: int
    resized_height: int
    pad_top: int
    pad_bottom: int
    transposed: bool


def hd_grid(width: int, height: int, num_crops: int, tile: int = TILE) -> HDGrid:
    """The grid of a picture of width x height px cut into at most `num_crops` tiles of `tile` px.

    Raises BadInputError for a picture so long and thin that its short side would shrink to nothing (the
    published processor raises there too), and for sizes or num_crops below 1.
    """
    if num_crops < 1:
        raise BadInputError(f"num_crops is {num_crops}; a picture needs at least 1 tile (4 or 16 are usual)")
    if width < 1 or height < 1:
        raise BadInputError(f"a picture of {width}x{height} px has no pixels; drop it")
    transposed = width < height
    if transposed:
        width, height = height, width
    # Float arithmetic as published: exact fractions give a resized_height one pixel larger for some sizes.
    ratio = width / height
    scale = 1
    while (scale + 1) * math.ceil((scale + 1) / ratio) <= num_crops:
        scale += 1
    resized_width = scale * tile
    resized_height = int(resized_width / ratio)
    if resized_height < 1:
        raise BadInputError(
            f"a picture of {width}x{height} px is too long and thin for num_crops={num_crops} "
            f"(its short side would shrink to nothing); drop it"
        )
    padded = math.ceil(resized_height / tile) * tile
    top = int((padded - resized_height) / 2)
    rows, cols = padded // tile, scale
    if transposed:
        rows, cols = cols, rows
    return HDGrid(rows, cols, resized_width, resized_height, top, padded - resized_height - top, transposed)


def tile_side_tokens(tile: int = TILE, patch: int = PATCH) -> int:
    """Tokens along one side of a tile: patches are merged 2 x 2 (12 for 336 px, 4 for 112 px)."""
    if tile % (2 * patch):
        raise BadInputError(f"tile side {tile} px is not a multiple of two patches of {patch} px")
    return tile // patch // 2


def image_token_count(rows: int, cols: int, side: int = 12) -> int:
    """Tokens of a picture of rows x cols tiles: tiles and global view, a separator per row of features and
    one between the two.
    """
    return (rows * cols + 1) * side * side + 1 + (rows + 1) * side


def vision_calls_needed(num_tiles: int, num_images: int, chunk: int) -> int:
    """Calls of the vision tower for a row: its tiles and one global view per picture, `chunk` views a call.

    At least 1: a row without pictures runs the tower on a blank view, so that ZeRO-3 ranks never differ.
    """
    return max(1, math.ceil((num_tiles + num_images) / chunk))

"""Image sizes -> tiles -> tokens: the arithmetic of the HD transform, without pixels and without torch.

In: width and height of images in px, as shown (EXIF orientation applied), `num_crops` and the tile side. Out:
an `HDGrid` per image, which says how the image is resized, padded and cut into tiles; a `SampleShape` per
sample, which says how many tiles, views and tokens its images take. Source: the image processor published
with Phi-3-vision; tests/golden/image_processor pins it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from shards.common.errors import BadInputError

TILE = 336  # px, side of a tile of the published model
PATCH = 14  # px, side of a CLIP patch of the published model


@dataclass(frozen=True, slots=True)
class HDGrid:
    """How one image becomes rows x cols tiles.

    If `transposed` (a portrait), the image is resized and padded with x and y swapped, and swapped back at
    the end. resized_width, resized_height, pad_top, pad_bottom: px, in the swapped frame. rows, cols: tiles
    of the final canvas (height rows * tile, width cols * tile).
    """

    rows: int
    cols: int
    resized_width: int
    resized_height: int
    pad_top: int
    pad_bottom: int
    transposed: bool

    @property
    def tiles(self) -> int:
        """Number of tiles; the global view is not counted."""
        return self.rows * self.cols


def hd_grid(width: int, height: int, num_crops: int, *, tile: int = TILE) -> HDGrid:
    """The grid of an image of width x height px, cut into at most `num_crops` tiles of `tile` px.

    Raises BadInputError for sizes or num_crops below 1, and for an image so long and thin that its short side
    would shrink to nothing (the published processor raises there too).
    """
    if num_crops < 1:
        raise BadInputError(f"num_crops is {num_crops}; an image needs at least 1 tile (4 or 16 are usual)")
    if width < 1 or height < 1:
        raise BadInputError(f"an image of {width}x{height} px has no pixels; drop it")
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
            f"an image of {width}x{height} px is too long and thin for num_crops={num_crops} "
            f"(its short side would shrink to nothing); drop it"
        )
    padded = math.ceil(resized_height / tile) * tile
    top = int((padded - resized_height) / 2)
    rows, cols = padded // tile, scale
    if transposed:
        rows, cols = cols, rows
    return HDGrid(
        rows=rows,
        cols=cols,
        resized_width=resized_width,
        resized_height=resized_height,
        pad_top=top,
        pad_bottom=padded - resized_height - top,
        transposed=transposed,
    )


def tile_side_tokens(tile: int = TILE) -> int:
    """Tokens along one side of a tile: patches are merged 2 x 2 (12 for 336 px, 4 for 112 px).

    Raises BadInputError if `tile` is not a multiple of two patches.
    """
    if tile % (2 * PATCH):
        raise BadInputError(f"tile side {tile} px is not a multiple of two patches of {PATCH} px")
    return tile // PATCH // 2


def image_token_count(rows: int, cols: int, side: int = 12) -> int:
    """Tokens of an image of rows x cols tiles, `side` tokens along a tile: the tiles, the global view, a
    separator after each row of features, and one separator between the two.
    """
    return (rows * cols + 1) * side * side + 1 + (rows + 1) * side


@dataclass(frozen=True, slots=True)
class SampleShape:
    """What the images of one sample take, known from their sizes alone.

    grids: one per image, in order. image_tokens: number of tokens of each image.
    """

    grids: tuple[HDGrid, ...]
    image_tokens: tuple[int, ...]

    @classmethod
    def of(cls, sizes: Iterable[tuple[int, int]], num_crops: int, tile: int = TILE) -> SampleShape:
        """The shape of a sample with images of these sizes (width, height) in px, as shown.

        Raises BadInputError as `hd_grid` and `tile_side_tokens`.
        """
        images = [_image_shape(size, num_crops, tile) for size in sizes]
        return cls(tuple([grid for grid, _ in images]), tuple([tokens for _, tokens in images]))

    @property
    def tiles(self) -> int:
        """Number of tiles of all images; global views are not counted."""
        return sum([grid.rows * grid.cols for grid in self.grids])

    @property
    def views(self) -> int:
        """Number of views that pass the vision tower: the tiles and one global view per image."""
        return self.tiles + len(self.grids)

    def first(self, count: int) -> SampleShape:
        """The shape of the first `count` images alone."""
        return SampleShape(self.grids[:count], self.image_tokens[:count])


# Counting tokens asks for the same few sizes again and again. Measured with five sizes: without the cache,
# `SampleShape.of` takes three to four times as long.
@lru_cache(maxsize=16_384)
def _image_shape(size: tuple[int, int], num_crops: int, tile: int) -> tuple[HDGrid, int]:
    """The grid of an image of this (width, height), and its number of tokens."""
    grid = hd_grid(*size, num_crops, tile=tile)
    return grid, image_token_count(grid.rows, grid.cols, tile_side_tokens(tile))


def vision_calls_needed(num_tiles: int, num_images: int, chunk: int) -> int:
    """Calls of the vision tower for a row: its tiles and one global view per image, at most `chunk` views a
    call.

    At least 1: a row without images runs the tower on a blank view, so that all ZeRO-3 ranks run the same
    collectives.
    """
    return max(1, math.ceil((num_tiles + num_images) / chunk))

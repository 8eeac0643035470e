"""Sizes -> grids -> tokens, against 1,600 published rows; refusals."""

import json
import math
from pathlib import Path

import pytest

from phi3v_dist.processor.geometry import (
    SampleShape,
    hd_grid,
    image_token_count,
    tile_side_tokens,
    vision_calls_needed,
)
from shards.common.errors import BadInputError

TABLE = json.loads((Path(__file__).parents[1] / "golden/image_processor/size_table.json").read_text())


def test_published_size_table() -> None:
    refused = 0
    for width, height, num_crops, padded_width, padded_height, long, short, tokens in TABLE["rows"]:
        if short == 0:
            with pytest.raises(BadInputError, match="too long and thin"):
                hd_grid(width, height, num_crops)
            refused += 1
            continue
        grid = hd_grid(width, height, num_crops)
        assert (grid.cols * 336, grid.rows * 336) == (padded_width, padded_height)
        assert (grid.resized_width, grid.resized_height) == (long, short)
        assert image_token_count(grid.rows, grid.cols) == tokens
        assert grid.rows * grid.cols <= num_crops
    assert len(TABLE["rows"]) == 1600 and 0 < refused < 200


def test_tokens_of_small_tiles() -> None:
    assert tile_side_tokens() == 12 and tile_side_tokens(112) == 4
    assert image_token_count(1, 1, 4) == 2 * 16 + 1 + 2 * 4
    with pytest.raises(BadInputError, match="not a multiple"):
        tile_side_tokens(100)


@pytest.mark.parametrize(("width", "height", "num_crops"), [(0, 5, 4), (5, 0, 4), (-1, 5, 4), (5, 5, 0)])
def test_impossible_sizes_are_refused(width: int, height: int, num_crops: int) -> None:
    with pytest.raises(BadInputError):
        hd_grid(width, height, num_crops)


def test_vision_calls_cover_all_views_and_are_never_zero() -> None:
    assert vision_calls_needed(0, 0, 64) == 1
    for tiles, images in [(1, 1), (60, 4), (60, 5), (884, 52)]:
        calls = vision_calls_needed(tiles, images, 64)
        assert math.ceil((tiles + images) / calls) <= 64


def test_the_shape_of_a_sample_is_that_of_its_images() -> None:
    sizes = [(1200, 900), (90, 1000), (1200, 900)]
    shape = SampleShape.of(sizes, 4, 112)
    grids = [hd_grid(width, height, 4, tile=112) for width, height in sizes]
    assert shape.grids == tuple(grids)
    assert shape.image_tokens == tuple(image_token_count(grid.rows, grid.cols, 4) for grid in grids)
    assert shape.tiles == sum(grid.tiles for grid in grids) and shape.views == shape.tiles + 3
    assert shape.first(1) == SampleShape.of(sizes[:1], 4, 112)
    assert SampleShape.of([], 4).views == 0

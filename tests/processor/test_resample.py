"""The compiled resize equals Pillow's, byte for byte, and Pillow takes its place where it cannot be had."""

import numpy as np
import pytest
from PIL import Image

from phi3v_dist.processor import resample
from phi3v_dist.processor.geometry import hd_grid
from phi3v_dist.processor.image import hd_tiles


def _noise(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.RandomState(seed).randint(0, 256, size=(height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def compiled() -> None:
    if not resample.available():
        pytest.skip("system package: the compiled resize was not built: no C compiler at installation")


@pytest.fixture
def pillow_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resample, "available", lambda: False)


def _both_ways(
    image: Image.Image, num_crops: int, monkeypatch: pytest.MonkeyPatch
) -> tuple[np.ndarray, np.ndarray]:
    ours = hd_tiles(image, num_crops)
    with monkeypatch.context() as patch:
        patch.setattr(resample, "available", lambda: False)
        return ours, hd_tiles(image, num_crops)


SIZES = [
    (1, 1),
    (2, 3),
    (336, 336),
    (1344, 1008),
    (1200, 900),
    (900, 1200),
    (37, 1000),
    (1000, 37),
    (5000, 4000),
]


@pytest.mark.system
@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_tiles_are_those_of_pillow(
    size: tuple[int, int], compiled: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for num_crops in (1, 4, 16):
        ours, wanted = _both_ways(_noise(*size), num_crops, monkeypatch)
        assert np.array_equal(ours, wanted)


@pytest.mark.system
def test_random_sizes(compiled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.RandomState(7)
    for seed in range(60):
        width, height = (int(np.exp(side)) for side in random.uniform(1.5, 7.3, size=2))
        if max(width, height) > 60 * min(width, height):
            continue
        num_crops = int(random.choice([1, 2, 3, 4, 7, 16]))
        ours, wanted = _both_ways(_noise(width, height, seed), num_crops, monkeypatch)
        assert np.array_equal(ours, wanted), (width, height, num_crops)


@pytest.mark.system
def test_extremes_do_not_wrap(compiled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    checks = (np.indices((300, 500)).sum(axis=0) % 2 * 255).astype(np.uint8)
    for pixels in (checks, np.full((300, 500), 255, dtype=np.uint8)):
        ours, wanted = _both_ways(Image.fromarray(pixels).convert("RGB"), 16, monkeypatch)
        assert np.array_equal(ours, wanted)


def test_pillow_does_the_work_where_nothing_is_compiled(pillow_alone: None) -> None:
    tiles, grid = hd_tiles(_noise(400, 300), 4), hd_grid(400, 300, 4)
    resized = _noise(400, 300).resize((grid.resized_width, grid.resized_height), Image.Resampling.BILINEAR)
    canvas = np.full((grid.rows * 336, grid.cols * 336, 3), 255, dtype=np.uint8)
    canvas[grid.pad_top : grid.pad_top + grid.resized_height] = np.asarray(resized)
    wanted = canvas.reshape(grid.rows, 336, grid.cols, 336, 3).transpose(0, 2, 4, 1, 3)
    assert np.array_equal(tiles, wanted.reshape(-1, 3, 336, 336))


@pytest.mark.system
def test_a_pillow_that_differs_is_noticed(
    compiled: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plain = Image.Image.resize

    def bicubic(self: Image.Image, size: tuple[int, int], *_: object) -> Image.Image:
        return plain(self, size, Image.Resampling.BICUBIC)

    resample._library.cache_clear()
    try:
        with monkeypatch.context() as patch, caplog.at_level("WARNING"):
            patch.setattr(Image.Image, "resize", bicubic)
            assert not resample.available()
            assert "the compiled resize differs from this Pillow" in caplog.text
    finally:
        resample._library.cache_clear()

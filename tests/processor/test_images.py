"""Pictures: the published tiles and views, bit for bit; what decode_image mends and what it refuses."""

import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from phi3v_dist.processor.geometry import hd_grid
from phi3v_dist.processor.image import blank_tiles, decode_image, hd_tiles
from phi3v_dist.processor.processing import image_inputs
from shards.common.errors import BadInputError

GOLDEN = Path(__file__).parents[1] / "golden/image_processor"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())


def sha256(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def canvas(tiles: np.ndarray, rows: int, cols: int) -> np.ndarray:
    """[rows * cols, 3, S, S] -> [rows * S, cols * S, 3]."""
    side = tiles.shape[-1]
    whole = tiles.reshape(rows, cols, 3, side, side).transpose(0, 3, 1, 4, 2)
    return whole.reshape(rows * side, cols * side, 3)


@pytest.mark.parametrize("case", EXPECTED["cases"])
def test_golden_case(case: str) -> None:
    expected = EXPECTED["cases"][case]
    image = Image.open(GOLDEN / expected["image"])
    num_crops = expected["num_crops"]
    grid = hd_grid(*image.size, num_crops)
    tiles = hd_tiles(image, num_crops)
    assert (
        tiles.dtype == np.uint8
        and tiles.flags.c_contiguous
        and tiles.shape == (grid.rows * grid.cols, 3, 336, 336)
    )
    assert sha256(canvas(tiles, grid.rows, grid.cols)) == expected["sha256_hd_canvas_u8_hwc"]

    inputs = image_inputs([image], num_crops)
    views = inputs["pixel_values"]
    assert list(views.shape) == expected["pixel_values_shape"] and views.dtype == torch.float32
    assert inputs["image_sizes"].tolist() == [expected["image_size_hw"]]
    assert inputs["image_sizes"].dtype == torch.int64
    real = expected["num_real_crops"]
    assert sha256(views[0, 1 : real + 1].numpy()) == expected["sha256_hd_crops_f32"]
    assert not views[0, real + 1 :].any()
    samples = np.load(GOLDEN / "samples.npz")
    found = views[0, : real + 1].numpy().ravel()[samples[f"{case}|idx"]]
    np.testing.assert_allclose(found, samples[f"{case}|val"], atol=1e-5, rtol=0)


def test_several_pictures_in_one_call() -> None:
    expected = EXPECTED["batch_call_num_crops4"]
    inputs = image_inputs([Image.open(GOLDEN / f"images/{name}.png") for name in expected["images"]], 4)
    assert list(inputs["pixel_values"].shape) == expected["pixel_values_shape"]
    assert inputs["image_sizes"].tolist() == expected["image_sizes"]


def test_the_picture_itself_is_not_modified() -> None:
    image = Image.open(GOLDEN / "images/port480x640.png").convert("RGB")
    before = image.tobytes()
    image_inputs([image], 4)
    assert image.tobytes() == before and image.size == (480, 640)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_exif_is_applied_by_decode_image_and_ignored_by_the_processor() -> None:
    image = Image.new("RGB", (40, 20), "red")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees
    data = encoded(image, "JPEG", exif=exif)
    assert decode_image(data).size == (20, 40)
    raw = Image.open(io.BytesIO(data))
    assert image_inputs([raw], 4)["image_sizes"].tolist() == image_inputs([image], 4)["image_sizes"].tolist()


def test_transparency_is_laid_over_white() -> None:
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    half = Image.new("LA", (4, 4), (0, 128))
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([10, 20, 30] + [0] * 765)
    assert decode_image(encoded(clear, "PNG")).getpixel((0, 0)) == (255, 255, 255)
    assert decode_image(encoded(half, "PNG")).getpixel((0, 0)) == (127, 127, 127)
    assert decode_image(encoded(palette, "PNG", transparency=0)).getpixel((0, 0)) == (255, 255, 255)
    assert decode_image(encoded(palette, "PNG")).getpixel((0, 0)) == (10, 20, 30)


def test_other_colour_modes_become_rgb() -> None:
    cmyk = encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95)
    red, green, blue = decode_image(cmyk).getpixel((4, 4))
    assert red > 240 and green < 15 and blue < 15
    assert decode_image(encoded(Image.new("1", (4, 4), 1), "PNG")).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(("value", "expected"), [(65535, 255), (32896, 128), (200, 1), (0, 0)])
def test_sixteen_bit_grey_is_scaled_not_clipped(value: int, expected: int) -> None:
    grey = Image.fromarray(np.full((4, 4), value, dtype=np.uint16))
    for kind in ("PNG", "TIFF"):
        assert decode_image(encoded(grey, kind)).getpixel((0, 0)) == (expected,) * 3


def test_phone_pictures_with_previews_are_their_first_frame() -> None:
    first = Image.new("RGB", (16, 16), "blue")
    data = encoded(first, "MPO", save_all=True, append_images=[Image.new("RGB", (8, 8), "red")])
    image = decode_image(data)
    assert image.size == (16, 16) and image.getpixel((3, 3))[2] > 240


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "undecodable"),
        (b"GIF89a nonsense", "undecodable"),
        (b"<html>not found", r"undecodable picture: none of JPEG, PNG, .*starts with b'<html>not found'"),
        (encoded(Image.new("RGB", (8, 8)), "EPS"), "none of JPEG"),  # Ghostscript would be run for it
        (encoded(Image.new("RGB", (64, 64), "red"), "JPEG")[:300], "undecodable"),
        (encoded(Image.effect_noise((64, 64), 50), "PNG")[:900], "undecodable"),
        (
            encoded(
                Image.new("L", (8, 8)), "GIF", save_all=True, append_images=[Image.new("L", (8, 8), 255)]
            ),
            "animated",
        ),
    ],
)
def test_unusable_pictures_are_refused_in_one_line(data: bytes, says: str) -> None:
    with pytest.raises(BadInputError, match=says) as refused:
        decode_image(data)
    assert "\n" not in str(refused.value)


def test_the_pixel_cap_holds_before_decoding() -> None:
    data = encoded(Image.new("1", (3000, 2000)), "PNG")
    with pytest.raises(BadInputError, match="3000x2000 px is over the cap of 5000000"):
        decode_image(data, max_pixels=5_000_000)
    assert decode_image(data).size == (3000, 2000)


def test_too_thin_and_wrong_types_are_refused() -> None:
    with pytest.raises(BadInputError, match="too long and thin"):
        hd_tiles(Image.new("RGB", (337, 1)), 1)
    good = Image.new("RGB", (8, 8))
    cut = Image.open(io.BytesIO(encoded(Image.effect_noise((64, 64), 50), "PNG")[:900]))
    for image, says in (
        (np.zeros((4, 4, 3), dtype=np.uint8), "image 2 is of type ndarray, not a PIL image"),
        (cut, "image 2 cannot be decoded"),
        (Image.new("RGB", (337, 1)), "image 2: an image of 337x1 px is too long and thin"),
        (Image.new("RGB", (0, 5)), "image 2: an image of 0x5 px has no pixels"),
    ):
        with pytest.raises(BadInputError, match=says):
            image_inputs([good, image], 1)


@pytest.mark.parametrize("size", [(500, 300), (300, 500), (112, 112), (1000, 90)])
def test_small_tiles_and_blanks_have_the_planned_shape(size: tuple[int, int]) -> None:
    grid = hd_grid(*size, 4, tile=112)
    tiles = hd_tiles(Image.new("RGB", size, "green"), 4, 112)
    assert tiles.shape == blank_tiles(grid, 112).shape == (grid.rows * grid.cols, 3, 112, 112)
    assert not blank_tiles(grid, 112).any()

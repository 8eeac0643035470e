"""Pixels -> uint8 tiles. Pillow, numpy and the compiled resize; what needs float arithmetic happens later, on
the device.

`decode_image` is the data path (bytes from a shard, turned upright, refused when unusable). `hd_tiles` does
to a PIL image what the published processor does up to normalisation, bit for bit. Both avoid copies: on a
loaded machine fresh memory costs more than the arithmetic.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from phi3v_dist.processor import resample
from phi3v_dist.processor.geometry import TILE, HDGrid, hd_grid
from shards.common.errors import BadInputError
from shards.common.grey import eight_bits, is_deep

MAX_PIXELS = 100_000_000
# Not all that Pillow reads: it runs Ghostscript for EPS, and its rare formats are the least tested.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)  # preprocessor_config.json of the published model
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)


def decode_image(data: bytes | memoryview, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The picture in `data` as RGB, upright (EXIF orientation applied), transparency laid over white.

    16-bit grey is scaled to 8 bits, CMYK converted. Raises BadInputError if it is of none of FORMATS, cannot
    be decoded, is animated, or has no or more than `max_pixels` pixels (checked before decoding).
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
            width, height = opened.size
            if width < 1 or height < 1:
                raise BadInputError(f"a picture of {width}x{height} px has no pixels; drop it")
            if width * height > max_pixels:
                raise BadInputError(
                    f"{width}x{height} px is over the cap of {max_pixels} pixels; "
                    "scale it down or raise the cap"
                )
            # Phones write MPO: a JPEG whose further frames are previews of the first.
            if opened.format != "MPO" and getattr(opened, "n_frames", 1) > 1:
                raise BadInputError("animated or many-page picture; extract the frame you mean")
            opened.load()
            ImageOps.exif_transpose(opened, in_place=True)
            return _to_rgb(opened)
    except BadInputError:
        raise
    except UnidentifiedImageError as error:
        start = bytes(data[:16])
        raise BadInputError(
            f"undecodable picture: none of {', '.join(FORMATS)} (it starts with {start!r}); convert it"
        ) from error
    except Exception as error:  # Pillow's decoders raise many types on damaged data
        raise BadInputError(f"undecodable picture ({type(error).__name__}: {error})") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if is_deep(image):
        return eight_bits(image).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def hd_tiles(image: Image.Image, num_crops: int, tile: int = TILE) -> np.ndarray:
    """The tiles of the resized, white-padded picture, row-major: uint8 [rows * cols, 3, tile, tile],
    contiguous.

    Alpha is dropped and EXIF ignored, as published; `decode_image` deals with both beforehand. Raises
    BadInputError as `hd_grid`.
    """
    grid = hd_grid(*image.size, num_crops, tile=tile)
    rgb = image if image.mode == "RGB" else image.convert("RGB")
    top, left = (0, grid.pad_top) if grid.transposed else (grid.pad_top, 0)
    tiles = np.empty((grid.rows, grid.cols, 3, tile, tile), dtype=np.uint8)
    if grid.pad_top or grid.pad_bottom:
        tiles.fill(255)
    if resample.available():
        width, height = grid.resized_width, grid.resized_height
        size = (height, width) if grid.transposed else (width, height)
        resample.resample_into(tiles, rgb, size, (left, top), rows_first=grid.transposed)
    else:
        _resize_with_pillow(tiles, rgb, grid, top, left)
    return tiles.reshape(grid.rows * grid.cols, 3, tile, tile)


def _resize_with_pillow(tiles: np.ndarray, rgb: Image.Image, grid: HDGrid, top: int, left: int) -> None:
    # A portrait is resized with x and y swapped: Pillow rounds between its two passes, so the order shows.
    tile, swap = tiles.shape[-1], Image.Transpose.TRANSPOSE
    if grid.transposed:
        rgb = rgb.transpose(swap)
    rgb = rgb.resize((grid.resized_width, grid.resized_height), Image.Resampling.BILINEAR)
    if grid.transposed:
        rgb = rgb.transpose(swap)
    for channel, band in enumerate(rgb.split()):
        plane = np.asarray(band)
        height, width = plane.shape
        for row in range(grid.rows):
            y0, y1 = max(row * tile, top), min((row + 1) * tile, top + height)
            for col in range(grid.cols):
                x0, x1 = max(col * tile, left), min((col + 1) * tile, left + width)
                target = tiles[row, col, channel]
                source = plane[y0 - top : y1 - top, x0 - left : x1 - left]
                target[y0 - row * tile : y1 - row * tile, x0 - col * tile : x1 - col * tile] = source


def blank_tiles(grid: HDGrid, tile: int) -> np.ndarray:
    """Stands in for a picture that cannot be read: zeros of the planned shape, uint8."""
    return np.zeros((grid.rows * grid.cols, 3, tile, tile), dtype=np.uint8)

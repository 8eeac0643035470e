"""Pixels -> uint8 tiles. Pillow and numpy only; what needs float arithmetic happens later, on the device.

`decode_image` is the data path (bytes from a shard, turned upright, refused when unusable). `hd_canvas` and
`hd_tiles` do to a PIL image what the published processor does up to normalisation, bit for bit.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageOps

from phi3v_dist.processor.geometry import TILE, HDGrid, hd_grid
from shards.format import BadInputError

MAX_PIXELS = 100_000_000
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)  # preprocessor_config.json of the published model
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The picture in `data` as RGB, upright (EXIF orientation applied), transparency laid over white.

    Raises BadInputError if it cannot be decoded, is animated, or has more than `max_pixels` pixels (checked
    before decoding).
    """
    try:
        with Image.open(io.BytesIO(data)) as opened:
            width, height = opened.size
            if width * height > max_pixels:
                raise BadInputError(f"{width}x{height} px is over the cap of {max_pixels} pixels")
            if getattr(opened, "n_frames", 1) > 1:
                raise BadInputError(f"animated picture of {opened.n_frames} frames; extract one")
            opened.load()
            return _to_rgb(ImageOps.exif_transpose(opened))
    except BadInputError:
        raise
    except Exception as error:  # Pillow's decoders raise many types on damaged data
        raise BadInputError(f"undecodable picture ({type(error).__name__}: {error})") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        if image.mode != "F" and (values.max(initial=0) > 255):
            values = values / 257  # 16-bit grey to 8-bit; a plain convert() would clip it to white
        return Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8), "L").convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def hd_canvas(image: Image.Image, num_crops: int, tile: int = TILE) -> np.ndarray:
    """The resized, white-padded picture, uint8 [rows * tile, cols * tile, 3]. Raises BadInputError as `hd_grid`.

    Alpha is dropped and EXIF ignored, as published; `decode_image` deals with both beforehand.
    """
    grid = hd_grid(*image.size, num_crops, tile)
    rgb = image.convert("RGB")
    if grid.transposed:
        rgb = rgb.transpose(Image.Transpose.TRANSPOSE)
    resized = np.asarray(rgb.resize((grid.resized_width, grid.resized_height), Image.Resampling.BILINEAR))
    height = grid.pad_top + grid.resized_height + grid.pad_bottom
    canvas = np.full((height, grid.resized_width, 3), 255, dtype=np.uint8)
    canvas[grid.pad_top : grid.pad_top + grid.resized_height] = resized
    return np.ascontiguousarray(canvas.transpose(1, 0, 2)) if grid.transposed else canvas


def hd_tiles(image: Image.Image, num_crops: int, tile: int = TILE) -> np.ndarray:
    """The tiles of a picture in row-major order, uint8 [rows * cols, 3, tile, tile], C-contiguous."""
    return canvas_tiles(hd_canvas(image, num_crops, tile), tile)


def canvas_tiles(canvas: np.ndarray, tile: int) -> np.ndarray:
    """uint8 [rows * tile, cols * tile, 3] -> uint8 [rows * cols, 3, tile, tile], row-major, C-contiguous."""
    rows, cols = canvas.shape[0] // tile, canvas.shape[1] // tile
    tiles = canvas.reshape(rows, tile, cols, tile, 3).transpose(0, 2, 4, 1, 3)
    return np.ascontiguousarray(tiles).reshape(rows * cols, 3, tile, tile)


def blank_tiles(grid: HDGrid, tile: int) -> np.ndarray:
    """Stands in for a picture that cannot be read: zeros of the planned shape, uint8."""
    return np.zeros((grid.rows * grid.cols, 3, tile, tile), dtype=np.uint8)

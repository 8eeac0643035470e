"""The compiled resize: an image straight into tiles, bit for bit what Pillow's bilinear resize gives.

In: a PIL image in mode RGB and its place on the canvas. Out: the canvas as uint8 tiles. `available()` is
false without a C compiler at installation, or with a Pillow whose resize differs from the compiled one (they
are compared once, at the first use); `image.hd_tiles` then uses Pillow.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import logging

import numpy as np
import pyarrow as pa
from PIL import Image

_PRECISION = 22  # bits of a weight after the binary point, as in Pillow
_log = logging.getLogger(__name__)


class _Axis(ctypes.Structure):
    _fields_ = [
        ("size", ctypes.c_int32),
        ("width", ctypes.c_int32),
        ("first", ctypes.c_void_p),
        ("count", ctypes.c_void_p),
        ("weight", ctypes.c_void_p),
    ]


def available() -> bool:
    """Whether the compiled resize is installed and gives the same result as this Pillow."""
    return _library() is not None


def resample_into(
    tiles: np.ndarray,
    image: Image.Image,
    size: tuple[int, int],
    *,
    corner: tuple[int, int],
    rows_first: bool,
) -> None:
    """Resizes `image` (RGB) to size (width, height) px and writes it at corner (left, top) px of the canvas.

    tiles: uint8 [rows, cols, 3, tile, tile], contiguous, written in place; the caller has made the padding
    white. rows_first: the vertical pass comes first (Pillow does the horizontal one first, and rounds between
    the two). Raises MemoryError, and RuntimeError if the compiled resize is not `available()`.
    """
    library = _library()
    if library is None:
        raise RuntimeError("the compiled resize is not available(); use Pillow")
    _run(library, tiles, image, size=size, corner=corner, rows_first=rows_first)


def _run(
    library: ctypes.CDLL,
    tiles: np.ndarray,
    image: Image.Image,
    *,
    size: tuple[int, int],
    corner: tuple[int, int],
    rows_first: bool,
) -> None:
    pixels = _rgbx(image)
    x, y = _axis(image.width, size[0]), _axis(image.height, size[1])
    _, cols, _, tile, _ = tiles.shape
    if library.phi3v_resample(
        pixels.ctypes.data,
        image.width,
        x[0],
        y[0],
        rows_first,
        tiles.ctypes.data,
        cols,
        tile,
        corner[1],
        corner[0],
    ):
        raise MemoryError("no memory to resize an image")


def _rgbx(image: Image.Image) -> np.ndarray:
    """uint8, four bytes a pixel: Pillow's own memory where it is in one piece; a copy for large images, which
    Pillow keeps in several blocks.
    """
    try:
        return np.frombuffer(pa.array(image).buffers()[-1], dtype=np.uint8)
    except ValueError:
        return np.frombuffer(image.tobytes("raw", "RGBX"), dtype=np.uint8)


@functools.lru_cache(maxsize=512)
def _axis(source: int, target: int) -> tuple[_Axis, tuple[np.ndarray, ...]]:
    """Weights of a triangle filter from `source` to `target` pixels. The arrays are returned with the struct
    because the struct only points into them.
    """
    scale = source / target
    support = max(scale, 1.0)
    centre = (np.arange(target) + 0.5) * scale
    first = np.maximum((centre - support + 0.5).astype(np.int32), 0)
    count = np.minimum((centre + support + 0.5).astype(np.int32), source) - first
    width = int(count.max())
    taps = np.arange(width)
    weight = np.maximum(1.0 - np.abs((taps + first[:, None] - centre[:, None] + 0.5) * (1.0 / support)), 0.0)
    weight[taps >= count[:, None]] = 0.0
    total = np.zeros(target)
    for tap in range(width):  # added in the order of Pillow, which decides the last bit
        total += weight[:, tap]
    weight = weight / total[:, None]
    fixed = (weight * (1 << _PRECISION) + 0.5).astype(np.int32)
    arrays = (first.astype(np.int32), count.astype(np.int32), np.ascontiguousarray(fixed))
    return _Axis(target, width, *(array.ctypes.data for array in arrays)), arrays


@functools.cache
def _library() -> ctypes.CDLL | None:
    found = importlib.util.find_spec("phi3v_dist.processor._resample")
    if found is None or found.origin is None:
        return None
    try:
        library = ctypes.CDLL(found.origin)
        function = library.phi3v_resample
    except (OSError, AttributeError) as error:
        _log.warning("the compiled resize cannot be loaded (%s); Pillow is used, at half the speed", error)
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int32
    function.argtypes = [pointer, number, _Axis, _Axis, number, pointer, number, number, number, number]
    function.restype = ctypes.c_int
    if not _same_as_pillow(library):
        _log.warning("the compiled resize differs from this Pillow's; Pillow is used, at half the speed")
        return None
    return library


def _same_as_pillow(library: ctypes.CDLL) -> bool:
    """Compares the two on a small image, enlarged and shrunk, with both orders of the passes."""
    pixels = np.random.RandomState(0).randint(0, 256, size=(37, 53, 3), dtype=np.uint8)
    image, swap = Image.fromarray(pixels), Image.Transpose.TRANSPOSE
    for width, height in ((71, 64), (17, 11)):
        for rows_first in (False, True):
            side = max(width, height)
            tiles = np.zeros((1, 1, 3, side, side), dtype=np.uint8)
            _run(library, tiles, image, size=(width, height), corner=(0, 0), rows_first=rows_first)
            if rows_first:
                wanted = (
                    image.transpose(swap).resize((height, width), Image.Resampling.BILINEAR).transpose(swap)
                )
            else:
                wanted = image.resize((width, height), Image.Resampling.BILINEAR)
            if not np.array_equal(tiles[0, 0, :, :height, :width].transpose(1, 2, 0), np.asarray(wanted)):
                return False
    return True

"""Checks whether bytes are an image that can be trained on, and encodes images again.

In: the bytes of one file. Out: `ImageFacts` (format and size), or BadInputError with the reason. Only the
content counts: no name, URL or Content-Type is trusted.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageOps

from shards.common.errors import BadInputError
from shards.common.grey import eight_bits, is_deep
from shards.common.text import first_line
from shards.format.phi3 import PHI3_TILE_SIDE

EXTENSIONS = ("jpg", "png", "webp")
_FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}
PILLOW_FORMATS = tuple(_FORMATS.values())
_CODING = {"jpg": "jpeg", "png": "png", "webp": "webp"}
_QUALITY = 92  # of JPEG and WebP, if none is given
_MAX_SIDE = {"jpg": 65_535, "png": 2**31 - 1, "webp": 16_383}  # pixels of a side
# Longer side / shorter side. Beyond it, the shorter side would be scaled to less than one pixel when the
# longer side is fitted into one tile (num_crops=1).
_MAX_ASPECT_RATIO = PHI3_TILE_SIDE
_ORIENTATION = 0x0112  # EXIF tag; values 5 to 8 swap width and height when the image is shown


@dataclass(frozen=True)
class ImageFacts:
    """extension: "jpg", "png" or "webp", by content. width, height: pixels as shown, EXIF orientation
    applied.
    """

    extension: str
    width: int
    height: int


def sniff(data: bytes) -> str | None:
    """The extension of the image format of `data`, by its first bytes; None if it is not in EXTENSIONS."""
    if data.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return None


def check_image(data: bytes, max_pixels: int = 100_000_000, decode: bool = True) -> ImageFacts:
    """Decodes `data` and returns its facts.

    decode=False: only follows the structure of the file to its end. This costs a hundredth and finds
    truncated files, but not damage inside the compressed pixels. Raises BadInputError: empty, another format
    (an HTML error page, for example), damaged or truncated, animated, too long and thin to train on, or of
    more than `max_pixels` pixels (checked before decoding, so that a decompression bomb costs nothing).
    """
    if not data:
        raise BadInputError("empty file")
    extension = sniff(data)
    if extension is None:
        raise BadInputError(f"not a JPEG, PNG or WebP image (starts with {data[:16]!r})")
    if extension == "jpg" and not decode and (size := _plain_jpeg(data)) is not None:
        check_size(*size, max_pixels)
        return ImageFacts(extension, *size)
    try:
        with Image.open(io.BytesIO(data), formats=[_FORMATS[extension]]) as image:
            width, height = image.size
            check_size(width, height, max_pixels)
            # A JPEG with several frames is an MPO file (CIPA DC-007), as phones write it; its first frame is
            # the photograph.
            if extension != "jpg" and getattr(image, "n_frames", 1) > 1:
                raise BadInputError(f"animated image of {getattr(image, 'n_frames', 1)} frames")
            # For the EXIF data of a PNG, Pillow would decode all of it.
            exif = _png_exif(data) if extension == "png" and not decode else image.getexif()
            if exif.get(_ORIENTATION, 1) in (5, 6, 7, 8):
                width, height = height, width
            if not decode:
                _check_structure(data, extension)
            else:
                # draft: reads all of a JPEG stream, so that truncation is found, but decodes only 1/8 of its
                # size.
                image.draft(None, (max(1, image.width // 8), max(1, image.height // 8)))
                image.load()
    except BadInputError:
        raise
    except Image.DecompressionBombError as error:
        raise BadInputError(f"too many pixels ({error})") from error
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, ValueError, ...
        raise BadInputError(f"damaged {extension} image ({first_line(error)})") from error
    return ImageFacts(extension, width, height)


def check_size(width: int, height: int, max_pixels: int) -> None:
    """Raises BadInputError if the image has more than `max_pixels` pixels or is too long and thin."""
    if width * height > max_pixels:
        raise BadInputError(f"{width}x{height} pixels, more than the limit of {max_pixels}")
    if max(width, height) > _MAX_ASPECT_RATIO * min(width, height):
        raise BadInputError(
            f"{width}x{height} pixels: too long and thin to train on (more than {_MAX_ASPECT_RATIO} to 1); "
            "drop it"
        )


def _png_exif(data: bytes) -> Image.Exif:
    """The EXIF data of a PNG, from its eXIf chunk; empty without one."""
    exif = Image.Exif()
    for name, start, end in _chunks(data):
        if name == b"eXIf":
            exif.load(b"Exif\0\0" + data[start:end])
    return exif


def _plain_jpeg(data: bytes) -> tuple[int, int] | None:
    """Width and height of a complete JPEG of the usual kind without EXIF data; None if it needs a closer
    look.

    Usual: baseline or progressive, 8 bits, one or three components, no APP1 segment (which may rotate it).
    Markers and segments: ITU T.81, annex B.
    """
    position, end, size, tables = 2, len(data), None, 0
    while position + 4 <= end and data[position] == 0xFF:
        marker = data[position + 1]
        length = data[position + 2] << 8 | data[position + 3]
        if length < 2 or marker == 0xE1:
            return None
        if marker in (0xC0, 0xC1, 0xC2):
            frame = data[position + 4 : position + 10]
            if size is not None or len(frame) < 6 or frame[0] != 8 or frame[5] not in (1, 3):
                return None
            size = frame[3] << 8 | frame[4], frame[1] << 8 | frame[2]
        elif marker in (0xC4, 0xDB):
            tables |= 1 if marker == 0xDB else 2
        elif marker == 0xDA:
            complete = tables == 3 and data.rfind(b"\xff\xd9", position + 2 + length) > 0
            return size if complete and size is not None and min(size) > 0 else None
        elif not (0xE0 <= marker <= 0xEF or marker in (0xDD, 0xFE)):
            return None
        position += 2 + length
    return None


def _check_structure(data: bytes, extension: str) -> None:
    """Raises ValueError if the file is truncated."""
    if extension == "png":
        _check_chunks(data)
    elif extension == "webp":
        if 8 + int.from_bytes(data[4:8], "little") > len(data):
            raise ValueError("truncated")
    else:
        position = 2
        while data[position : position + 2] != b"\xff\xda":  # start of scan; before it, segments with lengths
            length = int.from_bytes(data[position + 2 : position + 4], "big")
            if data[position : position + 1] != b"\xff" or length < 2:
                raise ValueError("no start of scan")
            position += 2 + length
        if data.rfind(b"\xff\xd9", position) < 0:
            raise ValueError("truncated: no end of image")


def _check_chunks(data: bytes) -> None:
    """Raises ValueError if a chunk of a PNG is damaged or the file is truncated."""
    for name, start, end in _chunks(data):
        if zlib.crc32(memoryview(data)[start - 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            raise ValueError(f"wrong checksum of a chunk {name!r}")


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yields (name, start, end) of the content of every chunk of a PNG. Raises ValueError if truncated."""
    position, name = 8, b""
    while name != b"IEND":
        length, name = int.from_bytes(data[position : position + 4], "big"), data[position + 4 : position + 8]
        end = position + 8 + length
        if len(data) < end + 4:
            raise ValueError("truncated: no end of image")
        yield name, position + 8, end
        position = end + 4


def reencode(
    data: bytes, facts: ImageFacts, max_side: int | None = None, *, coding: str | None = None
) -> tuple[bytes, ImageFacts]:
    """The image encoded again: its new bytes and facts. It is upright and has no metadata.

    max_side: the longer side has at most so many pixels. coding: as `parse_coding` takes it; None: the format
    that the image has. With one version of Pillow, equal inputs give equal bytes.
    Raises BadInputError if the format does not allow a side this long; Pillow's errors if `data` is damaged.
    """
    extension, settings = parse_coding(coding or _CODING[facts.extension])
    with Image.open(io.BytesIO(data), formats=[_FORMATS[facts.extension]]) as opened:
        image = ImageOps.exif_transpose(opened)
        transparent = image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info
        if extension == "jpg" and transparent:  # onto white, as web shops show it
            above = image.convert("RGBA")
            image = Image.new("RGBA", above.size, "white")
            image.alpha_composite(above)
        if transparent and extension != "jpg":
            image = image.convert("RGBA")
        elif is_deep(image):
            image = eight_bits(image)
        elif image.mode not in ("RGB", "L"):
            image = image.convert("RGB")
        if max_side is not None:
            image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
        if max(image.size) > _MAX_SIDE[extension]:
            raise BadInputError(
                f"{image.width}x{image.height} pixels, {extension} allows {_MAX_SIDE[extension]} on a side; "
                "give --max-side, or another --reencode"
            )
        image.info.clear()  # colour profile, orientation and camera data describe the old bytes
        encoded = io.BytesIO()
        image.save(encoded, _FORMATS[extension], **settings)
    return encoded.getvalue(), ImageFacts(extension, image.width, image.height)


def parse_coding(coding: str) -> tuple[str, dict[str, Any]]:
    """The extension and Pillow's settings for "jpeg:90", "webp:80", "png". Raises BadInputError for other
    text.
    """
    name, colon, quality = coding.partition(":")
    extension = "jpg" if name == "jpeg" else name
    good = not colon or (extension != "png" and quality.isdecimal() and 1 <= int(quality) <= 100)
    if extension not in EXTENSIONS or not good:
        raise BadInputError(
            f"reencode is {coding!r}; it must be jpeg, webp or png, or have a quality from 1 to 100: jpeg:90"
        )
    return extension, {} if extension == "png" else {"quality": int(quality or _QUALITY)}

"""Are these bytes a picture we can train on? Nothing here trusts a name, a URL or a Content-Type.

In: the bytes of one file. Out: `ImageFacts` (format by content, size as shown), or BadInputError with the
reason. The bytes are kept as they are by the caller. Called by `build`, `index` and `verify`.
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

EXTENSIONS = ("jpg", "png", "webp")
_FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}
PILLOW_FORMATS = tuple(_FORMATS.values())
_CODING = {"jpg": "jpeg", "png": "png", "webp": "webp"}
_QUALITY = 92
_LONGEST = {"jpg": 65_535, "png": 2**31 - 1, "webp": 16_383}  # pixels of a side
_THINNEST = 336  # longer side / shorter side: with a tile of 336 px and num_crops=1 nothing would be left
_ORIENTATION = 0x0112  # EXIF tag; values 5 to 8 swap width and height when the picture is shown


@dataclass(frozen=True)
class ImageFacts:
    """extension: "jpg", "png" or "webp", from the content. width, height: pixels as shown, EXIF applied."""

    extension: str
    width: int
    height: int


def sniff(data: bytes) -> str | None:
    """The extension of the image format that `data` starts like, None if it is none of ours."""
    if data.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return None


def check_image(data: bytes, max_pixels: int = 100_000_000, decode: bool = True) -> ImageFacts:
    """Decodes `data` and returns its facts. decode=False: only walks through its structure to its end, at a
    hundredth of the cost: finds files cut short, not damage inside the compressed pixels.

    Raises BadInputError: empty, another format (HTML error pages arrive this way), damaged or cut short,
    animated, too long and thin to train on, or of more than `max_pixels` pixels (checked before anything is
    decoded, so a decompression bomb costs nothing).
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
            # A JPEG with several frames is a phone's multi-picture file, whose first frame is the photograph.
            if extension != "jpg" and getattr(image, "n_frames", 1) > 1:
                raise BadInputError(f"animated image of {getattr(image, 'n_frames', 1)} frames")
            # Pillow decodes a PNG to its end for its EXIF data.
            exif = _png_exif(data) if extension == "png" and not decode else image.getexif()
            if exif.get(_ORIENTATION, 1) in (5, 6, 7, 8):
                width, height = height, width
            if not decode:
                _check_structure(data, extension)
            else:
                # Reads the whole JPEG stream, so finds it cut short, at a fraction of the cost of its pixels.
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
    """Raises BadInputError for more than `max_pixels` pixels, and for a picture too long and thin."""
    if width * height > max_pixels:
        raise BadInputError(f"{width}x{height} pixels, more than the limit of {max_pixels}")
    if max(width, height) > _THINNEST * min(width, height):
        raise BadInputError(
            f"{width}x{height} pixels: too long and thin to train on (more than {_THINNEST} to 1); drop it"
        )


def _png_exif(data: bytes) -> Image.Exif:
    """The EXIF data of a PNG from its chunk of that name, empty without one."""
    exif = Image.Exif()
    for name, start, end in _chunks(data):
        if name == b"eXIf":
            exif.load(b"Exif\0\0" + data[start:end])
    return exif


def _plain_jpeg(data: bytes) -> tuple[int, int] | None:
    """Width and height of a whole JPEG of the usual kind without metadata; None: look at it more closely.

    Usual: baseline or progressive, 8 bits, one or three components, no APP1 segment (which could turn it).
    Markers and segments are those of ITU T.81, annex B.
    """
    place, end, size, tables = 2, len(data), None, 0
    while place + 4 <= end and data[place] == 0xFF:
        marker = data[place + 1]
        length = data[place + 2] << 8 | data[place + 3]
        if length < 2 or marker == 0xE1:
            return None
        if marker in (0xC0, 0xC1, 0xC2):
            frame = data[place + 4 : place + 10]
            if size is not None or len(frame) < 6 or frame[0] != 8 or frame[5] not in (1, 3):
                return None
            size = frame[3] << 8 | frame[4], frame[1] << 8 | frame[2]
        elif marker in (0xC4, 0xDB):
            tables |= 1 if marker == 0xDB else 2
        elif marker == 0xDA:
            whole = tables == 3 and data.rfind(b"\xff\xd9", place + 2 + length) > 0
            return size if whole and size is not None and min(size) > 0 else None
        elif not (0xE0 <= marker <= 0xEF or marker in (0xDD, 0xFE)):
            return None
        place += 2 + length
    return None


def _check_structure(data: bytes, extension: str) -> None:
    """Raises ValueError if the file does not reach its own end."""
    if extension == "png":
        _check_chunks(data)
    elif extension == "webp":
        if 8 + int.from_bytes(data[4:8], "little") > len(data):
            raise ValueError("cut short")
    else:
        place = 2
        while data[place : place + 2] != b"\xff\xda":  # the scan; before it, segments with lengths
            length = int.from_bytes(data[place + 2 : place + 4], "big")
            if data[place : place + 1] != b"\xff" or length < 2:
                raise ValueError("no scan")
            place += 2 + length
        if data.rfind(b"\xff\xd9", place) < 0:
            raise ValueError("cut short: no end of image")


def _check_chunks(data: bytes) -> None:
    """Raises ValueError if a chunk of a PNG is damaged or there is no end."""
    for name, start, end in _chunks(data):
        if zlib.crc32(memoryview(data)[start - 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            raise ValueError(f"checksum of a chunk {name!r} is wrong")


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(name, start, end) of the content of each chunk of a PNG. Raises ValueError if there is no end."""
    place, name = 8, b""
    while name != b"IEND":
        length, name = int.from_bytes(data[place : place + 4], "big"), data[place + 4 : place + 8]
        end = place + 8 + length
        if len(data) < end + 4:
            raise ValueError("cut short: no end of image")
        yield name, place + 8, end
        place = end + 4


def reencode(
    data: bytes, facts: ImageFacts, max_side: int | None = None, coding: str | None = None
) -> tuple[bytes, ImageFacts]:
    """`data` made anew, upright, without metadata; one version of Pillow makes equal bytes of equal bytes.

    max_side: the longer side is at most so many pixels. coding: "FORMAT" or "FORMAT:QUALITY" as
    `parse_coding` takes it; None: the format that it has.
    """
    extension, settings = parse_coding(coding or _CODING[facts.extension])
    with Image.open(io.BytesIO(data), formats=[_FORMATS[facts.extension]]) as opened:
        image = ImageOps.exif_transpose(opened)
        transparent = image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info
        if extension == "jpg" and transparent:  # onto white, as a shop shows it
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
        if max(image.size) > _LONGEST[extension]:
            raise BadInputError(
                f"{image.width}x{image.height} pixels, {extension} holds {_LONGEST[extension]} on a side; "
                "give --max-side, or another --reencode"
            )
        image.info.clear()  # what it says of colours, orientation and cameras is about the old bytes
        encoded = io.BytesIO()
        image.save(encoded, _FORMATS[extension], **settings)
    return encoded.getvalue(), ImageFacts(extension, image.width, image.height)


def parse_coding(coding: str) -> tuple[str, dict[str, Any]]:
    """Extension and Pillow's settings for "jpeg:90", "webp:80", "png". Raises BadInputError at other text."""
    name, colon, quality = coding.partition(":")
    extension = "jpg" if name == "jpeg" else name
    good = not colon or (extension != "png" and quality.isdecimal() and 1 <= int(quality) <= 100)
    if extension not in EXTENSIONS or not good:
        raise BadInputError(
            f"reencode is {coding!r}; it must be jpeg, webp or png, or have a quality from 1 to 100: jpeg:90"
        )
    return extension, {} if extension == "png" else {"quality": int(quality or _QUALITY)}

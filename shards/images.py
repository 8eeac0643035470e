"""Are these bytes a picture we can train on? Nothing here trusts a name, a URL or a Content-Type.

In: the bytes of one file. Out: `ImageFacts` (format by content, size as shown), or BadInputError with the
reason. The bytes are kept as they are by the caller. Called by `build`, `index` and `verify`.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageOps

from shards.format import BadInputError

EXTENSIONS = ("jpg", "png", "webp")
_FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}
_ENCODING: dict[str, dict[str, Any]] = {"jpg": {"quality": 92}, "png": {}, "webp": {"quality": 92}}
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
    tenth of the cost: finds files cut short, not damage inside the compressed pixels.

    Raises BadInputError: empty, another format (HTML error pages arrive this way), damaged or cut short,
    animated, or of more than `max_pixels` pixels (checked before anything is decoded, so a decompression
    bomb costs nothing).
    """
    if not data:
        raise BadInputError("empty file")
    extension = sniff(data)
    if extension is None:
        raise BadInputError(f"not a JPEG, PNG or WebP image (starts with {data[:16]!r})")
    try:
        with Image.open(io.BytesIO(data), formats=[_FORMATS[extension]]) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise BadInputError(f"{width}x{height} pixels, more than the limit of {max_pixels}")
            # A JPEG with several frames is a phone's multi-picture file, whose first frame is the photograph.
            if extension != "jpg" and getattr(image, "n_frames", 1) > 1:
                raise BadInputError(f"animated image of {getattr(image, 'n_frames', 1)} frames")
            if image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8):
                width, height = height, width
            if not decode:
                _check_structure(data, extension, image)
            else:
                # Reads the whole JPEG stream, so finds it cut short, at a fraction of the cost of its pixels.
                image.draft(None, (max(1, image.width // 8), max(1, image.height // 8)))
                image.load()
    except BadInputError:
        raise
    except Image.DecompressionBombError as error:
        raise BadInputError(f"too many pixels ({error})") from error
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, ValueError, ...
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BadInputError(f"damaged {extension} image ({reason})") from error
    return ImageFacts(extension, width, height)


def _check_structure(data: bytes, extension: str, image: Image.Image) -> None:
    """Raises ValueError if the file does not reach its own end."""
    if extension == "png":
        image.verify()  # the checksums of all chunks
    elif extension == "webp":
        whole = 8 + int.from_bytes(data[4:8], "little") <= len(data)
        if not whole:
            raise ValueError("cut short")
    else:
        place = 2
        while (
            data[place : place + 2] != b"\xff\xda"
        ):  # the start of the scan; before it, segments with lengths
            length = int.from_bytes(data[place + 2 : place + 4], "big")
            if data[place : place + 1] != b"\xff" or length < 2:
                raise ValueError("no scan")
            place += 2 + length
        if data.rfind(b"\xff\xd9", place) < 0:
            raise ValueError("cut short: no end of image")


def shrink(data: bytes, facts: ImageFacts, max_side: int) -> tuple[bytes, ImageFacts]:
    """`data` made smaller so that its longer side has `max_side` pixels, in the same format, upright."""
    with Image.open(io.BytesIO(data)) as opened:
        image = ImageOps.exif_transpose(opened)
        if image.mode not in ("RGB", "RGBA", "L"):
            image = image.convert("RGB")
        image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
        encoded = io.BytesIO()
        image.save(encoded, _FORMATS[facts.extension], **_ENCODING[facts.extension])
    return encoded.getvalue(), ImageFacts(facts.extension, image.width, image.height)

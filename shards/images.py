"""Are these bytes a picture we can train on? Nothing here trusts a name, a URL or a Content-Type.

In: the bytes of one file. Out: `ImageFacts` (format by content, size as shown), or BadInputError with the
reason. The bytes are kept as they are by the caller. Called by `build`, `index` and `verify`.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

from PIL import Image

from shards.format import BadInputError

EXTENSIONS = ("jpg", "png", "webp")
_FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}
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


def check_image(data: bytes, max_pixels: int = 100_000_000) -> ImageFacts:
    """Decodes `data` and returns its facts.

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
            # Reads the whole JPEG stream, so finds it cut short, at a fraction of the cost of all its pixels.
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

"""Greyscale images of more than 8 bits, reduced to 8 bits. Pillow and numpy.

Builds and training share this rule: an image that a build has encoded again must look to the model exactly as
the original would have.
"""

from __future__ import annotations

import numpy as np
from PIL import Image


def is_deep(image: Image.Image) -> bool:
    """Whether the image has one channel of more than 8 bits."""
    return image.mode.startswith("I") or image.mode == "F"


def eight_bits(image: Image.Image) -> Image.Image:
    """An image for which `is_deep` holds, as mode L: 16-bit values are scaled down, others are clipped.

    Pillow's convert() would clip 16-bit values to white. For some formats, mode I holds 16-bit data too.
    """
    values = np.asarray(image, dtype=np.float64)
    if image.mode.startswith("I;16") or (image.mode == "I" and values.max(initial=0) > 255):
        values = values / 257
    return Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8), "L")

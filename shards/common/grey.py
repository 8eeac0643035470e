"""Grey pictures of more than 8 bits, as training sees them. Pillow and numpy.

Apart from the format this is all that the training side takes from here: a picture that a build makes anew
must show what it would have shown as it was. Called by `images` and by the processor.
"""

from __future__ import annotations

import numpy as np
from PIL import Image


def is_deep(image: Image.Image) -> bool:
    """Whether it has one channel of more than 8 bits."""
    return image.mode.startswith("I") or image.mode == "F"


def eight_bits(image: Image.Image) -> Image.Image:
    """A picture of which `is_deep` holds, as mode L: 16 bits scaled down, anything else clipped.

    A plain convert() would clip 16 bits to white. Mode I holds 16-bit data too, from some formats.
    """
    values = np.asarray(image, dtype=np.float64)
    if image.mode.startswith("I;16") or (image.mode == "I" and values.max(initial=0) > 255):
        values = values / 257
    return Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8), "L")

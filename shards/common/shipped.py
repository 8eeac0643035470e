"""Where the recipes are: configs/ of the checkout, or its copy in an installed wheel.

In: a path as users write it, `configs/tiny.yaml`. Out: the file that it names.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path

SHIPPED = Path(sysconfig.get_path("data")) / "share" / "phi3v-dist"


def shipped(path: Path) -> Path:
    """`path` if it exists or has no copy in the wheel, otherwise that copy."""
    if path.exists() or path.is_absolute():
        return path
    copy = SHIPPED / path
    return copy if copy.is_file() and copy.resolve().is_relative_to(SHIPPED.resolve()) else path

"""One file of a dataset on a local disk: fetched into a partial file, verified, then renamed to its name.

In: a file of any fsspec store. Out: a verified copy, which appears atomically. Imports no torch, because the
launcher stages datasets with it before the ranks start.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from shards.common.errors import BadInputError

_BLOCK = 1 << 22  # bytes


def fetch_file(
    fs: Any, source: str, target: Path, *, partial: Path, size: int | None, sha256: str | None = None
) -> None:
    """Copies `source` of the fsspec file system `fs` to `target`, by way of `partial` in the same directory.

    size: bytes that it must have; None: any. sha256: hex digest of its content; None: not checked, and the
    store may use its fastest way to copy. A partial file that exists is overwritten in place, so that it may
    reserve the room.
    Raises BadInputError for another size or content; then `partial` remains for the caller to delete.
    """
    if sha256 is None:
        fs.get_file(source, str(partial))
        length, found = partial.stat().st_size, None
    else:
        digest = hashlib.sha256()
        with fs.open(source, "rb") as stream, partial.open("r+b" if partial.exists() else "wb") as out:
            while block := stream.read(_BLOCK):
                digest.update(block)
                out.write(block)
            length = out.tell()
        found = digest.hexdigest()
    if size is not None and length != size:
        raise BadInputError(f"{source}: {length} bytes, dataset.json says {size}")
    if found != sha256:
        raise BadInputError(f"{source}: sha256 {found}, dataset.json says {sha256}")
    os.replace(partial, target)
